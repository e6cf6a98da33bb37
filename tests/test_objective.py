import copy
import functools
import itertools
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

from landscape import (
    GaussNewtonOperator,
    HessianOperator,
    Objective,
    evaluate,
    hessian_max_spectrum,
    hessian_trace,
    loss_line,
    random_directions,
)
from tests.cases import assert_untouched, make_batches, make_model, snapshot


def jitter(x, y, generator):
    return x + torch.randn(x.shape, generator=generator, dtype=x.dtype), y


class Record(nn.Module):
    """Hugging Face manners: keyword inputs, an output with `logits` and `loss`."""

    def __init__(self, as_mapping=False):
        super().__init__()
        self.body = make_model("conv")
        self.as_mapping = as_mapping

    def forward(self, pixel_values, labels=None):
        logits = self.body(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if self.as_mapping:
            return {"logits": logits, "loss": loss}
        return type("Output", (), {"logits": logits, "loss": loss})()


class Twice(nn.Module):
    """One layer and one batch norm, each registered under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Tanh())
        self.again = self.first
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.again(self.first(x)).flatten(1))


def direct_value(model, batches, weight_decay=0.0, loss=F.cross_entropy):
    model.eval()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    value = loss(model(x), y) + 0.5 * weight_decay * sum(
        p.square().sum() for p in model.parameters()
    )
    model.train()
    return value.item()


@pytest.mark.parametrize("sizes", [(11,), (8, 3), (4, 4, 3), (1,) * 11], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_value_is_the_mean_over_samples_however_batched(sizes, weight_decay):
    model, batches = make_model("conv"), make_batches(sizes)
    expected = direct_value(model, make_batches((11,)), weight_decay)
    value = Objective(weight_decay=weight_decay).freeze(model, batches).value()
    assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 5.0]).double(), ignore_index=-1),
        functools.partial(F.cross_entropy, weight=torch.tensor([0.2, 1.0, 5.0]).double()),
        nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=1),
        nn.CrossEntropyLoss(torch.tensor([0.0, 1.0, 5.0]).double(), label_smoothing=0.1),
    ],
    ids=["module", "partial", "ignored", "smoothed"],
)
def test_class_weights_average_over_all_data_not_over_batches(loss):
    model = make_model("conv")
    value = Objective(loss=loss).freeze(model, make_batches((8, 2, 1))).value()
    assert value == pytest.approx(direct_value(model, make_batches((11,)), loss=loss), rel=1e-12)


WITHOUT_FIRST = {"weight": torch.tensor([0.0, 1.0, 5.0]).double(), "label_smoothing": 0.1}


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(**WITHOUT_FIRST), functools.partial(F.cross_entropy, **WITHOUT_FIRST)],
    ids=["module", "partial"],
)
def test_smoothed_labels_that_weigh_nothing_make_no_batch(loss):
    model, ((x, _),) = make_model("conv"), make_batches((6,))
    y = torch.tensor([0, 0, 1, 2, 0, 1])
    # The first batch has a sum that belongs to the mean, and nothing to divide it by.
    batches, objective = [(x[:2], y[:2]), (x[2:], y[2:])], Objective(loss=loss)
    with pytest.raises(ValueError, match="must have a label of positive class weight"):
        objective.freeze(model, batches)
    with pytest.warns(UserWarning, match="mini-batches without a sample or label that counts"):
        hessian_max_spectrum(model, batches, objective=objective, k=1)


def test_an_ignored_label_may_lie_beyond_the_classes():
    model = nn.Conv2d(4, 3, 1).double()
    x = torch.cat([x for x, _ in make_batches((8, 3))])
    y = (x[:, 0] > 0).long()  # a label a pixel
    y[:2, 0] = 255
    loss = nn.CrossEntropyLoss(ignore_index=255)
    batches = list(zip(x.split((8, 3)), y.split((8, 3)), strict=True))
    value = Objective(loss=loss).freeze(model, batches).value()
    assert value == pytest.approx(loss(model(x), y).item(), rel=1e-12)
    y[3, 1, 1] = 7
    with pytest.raises(ValueError, match="got labels from 0 to 7"):
        Objective(loss=loss).freeze(model, batches)


def borders_left_out(outputs, targets):
    return F.cross_entropy(outputs, targets, ignore_index=255)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (F.cross_entropy, r"got labels from 0 to 255; .*`nn.CrossEntropyLoss\(ignore_index=…\)`"),
        (borders_left_out, r"must be a mean .*`nn.CrossEntropyLoss\(weight=…, ignore_index=…\)`"),
    ],
    ids=["unnamed", "hidden"],
)
def test_the_remedy_of_an_ignored_label_is_named(loss, message):
    (x, y), *others = make_batches((8, 3))
    y = y.clone()
    y[[0, 1, 4]] = 255
    with pytest.raises(ValueError, match=message):
        Objective(loss=loss).freeze(make_model("conv"), [(x, y), *others])


def test_hidden_class_weights_and_sums_are_refused():
    model, batches = make_model("conv"), make_batches((8, 3))
    weight = torch.tensor([0.2, 1.0, 5.0]).double()
    for loss in (
        lambda o, y: F.cross_entropy(o, y, weight=weight),
        lambda o, y: F.cross_entropy(o, y, reduction="sum"),
    ):
        with pytest.raises(ValueError, match="`loss` must be a mean over samples"):
            Objective(loss=loss).freeze(model, batches)
    with pytest.raises(ValueError, match="must reduce by 'mean'"):
        Objective(loss=nn.CrossEntropyLoss(reduction="sum"))


@pytest.mark.parametrize("keep_bytes", [None, 0, 600], ids=["kept", "redrawn", "part"])
def test_transform_is_drawn_once(keep_bytes):
    model, batches = make_model("conv"), make_batches((8, 3))
    frozen = Objective(transform=jitter, seed=3).freeze(model, batches, keep_bytes=keep_bytes)
    first = [b.inputs.clone() for b in frozen.batches]
    again = [b.inputs.clone() for b in frozen.batches]
    for a, b, (x, _) in zip(first, again, batches, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, x)
    assert frozen.value() == frozen.value()
    kept = Objective(transform=jitter, seed=3).freeze(model, batches)
    assert frozen.value() == kept.value()
    other = Objective(transform=jitter, seed=4).freeze(model, batches)
    assert frozen.value() != other.value()


def test_batches_are_kept_as_far_as_all_of_them_fit():
    batches = make_batches((4, 4, 4))
    size = sum(t.nbytes for t in batches[0])
    for keep_bytes, kept in ((3 * size, True), (2 * size, False)):
        frozen = Objective().freeze(make_model("conv"), batches, keep_bytes=keep_bytes)
        assert frozen.batches.are_kept is kept


def test_redrawn_data_may_hold_nan_and_empty_batches():
    model, (first, second) = make_model("conv"), make_batches((8, 3))
    empty = (first[0][:0], first[1][:0])
    frozen = Objective().freeze(model, [first, empty, second], keep_bytes=0)
    assert frozen.value() == Objective().freeze(model, [first, second]).value()
    spoilt = (second[0].clone(), second[1])
    spoilt[0][0] = float("nan")
    assert np.isnan(Objective().freeze(model, [first, spoilt], keep_bytes=0).value())


def test_reductions_that_are_means_are_taken():
    Objective(loss=nn.KLDivLoss(reduction="batchmean"))
    for function in (F.mse_loss, F.binary_cross_entropy_with_logits):
        with pytest.raises(ValueError, match="must reduce by 'mean'"):
            Objective(loss=functools.partial(function, reduction="sum"))


class Focal(nn.Module):
    """A module of the user's that takes the mean itself, or does not."""

    def __init__(self, mean):
        super().__init__()
        self.reduction, self.mean = "none", mean

    def forward(self, outputs, targets):
        nll = F.cross_entropy(outputs, targets, reduction="none")
        loss = (1 - (-nll).exp()) ** 2 * nll
        return loss.mean() if self.mean else loss.sum()


def test_a_module_of_the_users_is_judged_by_the_value_it_returns():
    model, batches = make_model("conv"), make_batches((8, 3))
    assert np.isfinite(Objective(loss=Focal(mean=True)).freeze(model, batches).value())
    with pytest.raises(ValueError, match="`loss` must be a mean over samples"):
        Objective(loss=Focal(mean=False)).freeze(model, batches)


def test_binary_targets_must_be_floating():
    model, data = nn.Linear(4, 3), [(torch.randn(6, 4), torch.randint(2, (6, 3)))]
    with pytest.raises(ValueError, match=r"floating targets .* got torch.int64; convert them with"):
        Objective(loss=nn.BCEWithLogitsLoss()).freeze(model, data)


def test_threads_that_probe_one_model_wait_for_each_other():
    model, batches = make_model("conv"), make_batches((9, 4))
    expected = hessian_trace(model, batches).value, loss_line(model, batches, points=5).nll
    before = snapshot(model)
    with ThreadPoolExecutor(4) as pool:
        traces = [pool.submit(hessian_trace, model, batches) for _ in range(6)]
        lines = [pool.submit(loss_line, model, batches, points=5) for _ in range(6)]
        for trace, line in zip(traces, lines, strict=True):
            assert trace.result().value == pytest.approx(expected[0])
            np.testing.assert_allclose(line.result().nll, expected[1])
    assert_untouched(model, before)


@pytest.mark.parametrize("keep_bytes", [None, 0], ids=["kept", "redrawn"])
def test_equal_batches_have_draws_of_their_own(keep_bytes):
    batches = make_batches((8,)) * 2
    objective = Objective(transform=jitter)
    frozen = objective.freeze(make_model("conv"), batches, keep_bytes=keep_bytes).batches
    first, again = ([b.inputs.clone() for b in frozen] for _ in range(2))
    assert not torch.equal(*first)
    assert all(map(torch.equal, first, again))


def test_data_that_change_are_frozen_when_kept_and_refused_when_redrawn():
    class Changing:
        rng = np.random.default_rng(0)

        def __iter__(self):
            for x, y in make_batches((4, 4, 4)):
                yield x + self.rng.normal(), y

    model, data = make_model("conv"), Changing()
    frozen = Objective().freeze(model, data)
    assert len({frozen.value() for _ in range(5)}) == 1
    with pytest.raises(ValueError, match="same batches at every pass"):
        Objective().freeze(model, data, keep_bytes=0).value()


def test_mapping_batches_and_outputs_with_logits():
    batches = make_batches((8, 3))
    mappings = [{"pixel_values": x, "labels": y} for x, y in batches]
    for as_mapping in (False, True):
        model = Record(as_mapping)
        expected = direct_value(model.body, make_batches((11,)))
        for objective in (Objective(), Objective(loss=None)):
            value = objective.freeze(model, mappings).value()
            assert value == pytest.approx(expected, rel=1e-12)


def test_soft_targets_and_another_precision():
    model = make_model("conv", torch.float32)
    batches = [(x, F.one_hot(y, 3).double()) for x, y in make_batches((8, 3))]
    frozen = Objective().freeze(model, batches)
    assert next(iter(frozen.batches)).inputs.dtype == torch.float32
    expected = direct_value(make_model("conv"), make_batches((11,)))
    assert frozen.value() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "loss", [F.cross_entropy, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])), F.mse_loss]
)
def test_the_loss_of_outputs_in_half_precision_is_taken_in_single(loss):
    model = make_model("conv", torch.bfloat16)
    x, y = make_batches((11,), torch.bfloat16)[0]
    y = F.one_hot(y, 3).bfloat16() if loss is F.mse_loss else y
    expected = loss(model.eval()(x).detach().float(), y)
    objective = Objective(loss=loss)
    assert objective.freeze(model, [(x, y)]).value() == pytest.approx(float(expected), rel=1e-6)
    line = loss_line(model, [(x, y)], points=[0.0], objective=objective, metrics="loss")
    assert line.nll[0] == pytest.approx(float(expected), rel=1e-6)
    assert np.isfinite(line.nll_stderr[0])


def test_inputs_have_the_precision_of_the_first_layer_whatever_is_chosen():
    model = make_model("conv", torch.float32)
    model[-1].double().register_forward_pre_hook(lambda module, args: args[0].double())
    for choice in (None, "5.*"):
        frozen = Objective(parameters=choice).freeze(model, make_batches((8, 3)))
        assert next(iter(frozen.batches)).inputs.dtype == torch.float32
        assert frozen.space.dtype == torch.float64


def test_parameters_are_chosen_by_glob_predicate_and_alias():
    model = make_model("tied")
    batches = make_batches((8,))

    def names(choice):
        return Objective(parameters=choice).freeze(model, batches).space.names

    assert names("head.*") == ("head.weight", "head.bias")
    assert names("decode*") == ("encode.weight",)  # the tied name
    assert names(lambda n, p: p.dim() > 1) == ("encode.weight", "head.weight")
    model.head.bias.requires_grad_(False)
    assert names(["head.*", "unused"]) == ("unused", "head.weight")


def test_a_compiled_model_goes_by_the_names_of_its_parameters_before():
    model = make_model("conv")
    batches = make_batches((8,))
    generator = torch.Generator().manual_seed(0)
    directions = random_directions(model, num=1, generator=generator)
    expected = loss_line(model, batches, directions=directions, points=[0.0, 1.0]).nll
    compiled = torch.compile(model, backend="eager")
    assert Objective(parameters="5.*").freeze(compiled, batches).space.names == (
        "_orig_mod.5.weight",
        "_orig_mod.5.bias",
    )
    found = loss_line(compiled, batches, directions=directions, points=[0.0, 1.0]).nll
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_flat_vector_round_trip():
    space = Objective().freeze(make_model("tied"), make_batches((8,))).space
    vector = space.flatten(space.values)
    assert vector.shape == (space.dim,) == (2 + 80 + 15 + 3,)
    for name, tensor in space.unflatten(vector).items():
        assert torch.equal(tensor, space.values[name])


def test_a_module_registered_twice_keeps_its_tensors():
    model = Twice().double()
    batches = make_batches((20, 3))
    optimizer = torch.optim.SGD(model.parameters())
    before = snapshot(model)
    buffers = [id(b) for b in model.buffers()]
    value = Objective().freeze(model, batches).value()
    line = loss_line(model, batches, points=[0.0, 1.0], batch_norm="recalibrate", metrics="loss")
    assert_untouched(model, before)
    assert buffers == [id(b) for b in model.buffers()]
    held = optimizer.param_groups[0]["params"]
    assert all(p is q for p, q in zip(model.parameters(), held, strict=True))
    assert value == pytest.approx(direct_value(model, batches), rel=1e-12)
    assert np.isfinite(line.nll).all()


def test_a_weight_that_is_computed_before_each_call_is_put_back():
    model = make_model("conv")
    prune.l1_unstructured(model[5], "weight", amount=0.5)
    weight, values = model[5].weight, model[5].weight.detach().clone()
    batches = make_batches((20, 3))
    line = loss_line(model, batches, points=[0.0, 1.0], metrics="loss")
    assert model[5].weight is weight
    assert torch.equal(weight, values)
    assert line.nll[0] == pytest.approx(direct_value(model, batches), rel=1e-12)


class Cached(nn.Module):
    """Looks up a bias of its attention once in evaluation mode, as LeViT does, and a scale."""

    def __init__(self, caches=True):
        super().__init__()
        self.body = make_model("conv")
        self.bias = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))
        self.caches, self.kept, self.scale = caches, {}, None
        self.table = {"constant": torch.tensor([1.0, 2.0, 3.0])}

    def forward(self, x):
        if not self.caches:
            bias, scale = self.bias[[0, 1, 1]], self.bias.exp()[0]
        else:
            if "bias" not in self.kept:
                self.kept["bias"] = self.bias[[0, 1, 1]]
            if self.scale is None:
                self.scale = self.bias.exp()[0]
            bias, scale = self.kept["bias"], self.scale
        out = self.body(x)
        return out + (bias * self.table["constant"]).sum() * scale * out.square()


@pytest.mark.parametrize("used", [False, True])
def test_what_a_model_keeps_of_its_parameters_is_computed_again(used):
    model, plain = Cached(), Cached(caches=False)
    plain.load_state_dict(model.state_dict())
    batches = make_batches((8, 3))
    if used:
        with torch.no_grad():
            model.eval()(batches[0][0])
    kept, content, scale = model.kept, dict(model.kept), model.scale
    ours, expected = HessianOperator(model, batches), HessianOperator(plain, batches)
    v = torch.ones(ours.dim, dtype=ours.dtype)
    torch.testing.assert_close(ours @ v, expected @ v)
    line = [loss_line(m, batches, points=[0.0, 1.0], metrics="loss").nll for m in (model, plain)]
    np.testing.assert_allclose(*line, rtol=1e-12)
    if not used:
        assert model.scale is None
        assert not model.kept
        with torch.no_grad():  # an operator outlives what the caller does with the model
            model.bias.mul_(2)
            model.eval()(batches[0][0])
        torch.testing.assert_close(ours @ v, expected @ v)
        return
    assert model.kept is kept
    assert model.scale is scale
    assert list(kept) == list(content)
    assert all(kept[k] is content[k] for k in kept)


KEPT = {
    "dict": (dict, lambda w, b: {"w": w, "b": b, "count": 2}),
    "dict from None": (lambda: None, lambda w, b: {"w": w, "b": b}),
    "nested": (lambda: None, lambda w, b: {"w": [w], "b": (b,)}),
    "tuple": (lambda: None, lambda w, b: (w, b)),
    "list": (list, lambda w, b: [w, b]),
    "places": (lambda: [None, None], lambda w, b: [w, b]),
    "named places": (lambda: {"w": None, "b": None, "n": 2}, lambda w, b: {"w": w, "b": b, "n": 2}),
}


class Fused(nn.Module):
    """Makes a layer and its scale one at the first call."""

    def __init__(self, kind):
        super().__init__()
        self.head, self.scale = nn.Linear(16, 3), nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))
        self.empty, self.make = KEPT[kind] if kind else (lambda: None, lambda w, b: (w, b))
        self.fused, self.caches = self.empty(), kind is not None

    def forward(self, x):
        if not self.caches or self.fused == self.empty():
            made = self.head.weight * self.scale[:, None], self.head.bias * self.scale
            if self.caches:
                self.fused = self.make(*made)
        if self.caches:
            made = [t for t in tree_leaves(self.fused) if isinstance(t, torch.Tensor)]
        return F.linear(x.flatten(1), *made)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", KEPT)
def test_weights_that_a_model_keeps_in_any_container_are_made_again(kind, used):
    model, plain = Fused(kind).double().eval(), Fused(None).double().eval()
    plain.load_state_dict(model.state_dict())
    batches = make_batches((8, 3))
    if used:
        with torch.no_grad():
            model(batches[0][0])
    before = model.fused
    ours, expected = HessianOperator(model, batches), HessianOperator(plain, batches)
    v = torch.ones(ours.dim, dtype=ours.dtype)
    torch.testing.assert_close(ours @ v, expected @ v)
    line = [loss_line(m, batches, points=[0.0, 1.0], metrics="loss").nll for m in (model, plain)]
    np.testing.assert_allclose(*line, rtol=1e-12)
    assert model.fused is before
    if not used:
        assert model.fused == model.empty()


class Table(nn.Module):
    """Weights in one dictionary that two layers share, which also holds itself."""

    def __init__(self, kept=None):
        super().__init__()
        self.weight, self.kept, self.name = nn.Parameter(torch.randn(16, 16)), kept, f"{id(self)}"

    def forward(self, x):
        if self.kept is None:
            return x @ self.weight.square()
        if self.name not in self.kept:
            self.kept[self.name] = self.weight.square()
            self.kept["self"] = self.kept
        return x @ self.kept[self.name]


def test_a_dictionary_that_two_layers_share_is_emptied_once():
    shared = {}
    layers = [Table(shared), Table(shared)]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(16, 3)).double().eval()
    plain = nn.Sequential(nn.Flatten(), Table(), Table(), nn.Linear(16, 3)).double().eval()
    plain.load_state_dict(model.state_dict())
    batches = make_batches((8, 3))
    ours, expected = HessianOperator(model, batches), HessianOperator(plain, batches)
    v = torch.ones(ours.dim, dtype=ours.dtype)
    torch.testing.assert_close(ours @ v, expected @ v)
    assert not shared
    assert layers[0].kept is layers[1].kept is shared


class Anchored(nn.Module):
    """Keeps a table by the size of its input, and that size beside it; fills a buffer."""

    def __init__(self):
        super().__init__()
        self.head, self.size, self.table = nn.Linear(16, 3), None, torch.zeros(())
        self.register_buffer("scale", None)

    def forward(self, x):
        if self.size != x.shape[1:]:
            self.table, self.size = torch.linspace(0, 1, x[0].numel()).to(x), x.shape[1:]
        if self.scale is None:
            self.scale = self.head.weight.detach().abs().max()
        return self.head(x.flatten(1) + self.table) * self.scale


def test_what_is_kept_beside_a_tensor_goes_with_it():
    model, batches = Anchored().double().eval(), make_batches((8, 3))
    expected = copy.deepcopy(model)(batches[0][0])
    for _ in range(2):
        evaluate(model, batches)
        HessianOperator(model, batches)
        assert model.size is None
        assert model.scale is None
        assert model.table.dim() == 0
    torch.testing.assert_close(model(batches[0][0]), expected)


class Hidden(nn.Module):
    """Keeps what it makes of its weights where nothing finds it."""

    def __init__(self, keep):
        super().__init__()
        self.head, self.keep = nn.Linear(16, 3), keep(self)

    def forward(self, x):
        return F.linear(x.flatten(1), self.keep(), self.head.bias)


def in_a_closure(model):
    kept = []

    def weights():
        if not kept:
            kept.append(model.head.weight.square())
        return kept[0]

    return weights


HIDDEN = {
    "closure": in_a_closure,
    "lru_cache": lambda model: functools.lru_cache(lambda: model.head.weight.square()),
    "object": lambda model: SimpleNamespace(call=in_a_closure(model)).call,
}


@pytest.mark.parametrize("keep", HIDDEN.values(), ids=HIDDEN)
def test_weights_that_are_kept_where_nothing_finds_them_are_refused(keep):
    model = Hidden(keep).double().eval()
    for probe in (HessianOperator, functools.partial(loss_line, points=3)):
        with pytest.raises(ValueError, match="keeps something made of 'head.weight'"):
            probe(model, make_batches((8, 3)))
        model.keep = keep(model)
    HessianOperator(model, make_batches((8, 3)), Objective(parameters="head.bias"))


def test_model_is_untouched_even_by_an_exception():
    model = make_model("conv")
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = snapshot(model)
    Objective(transform=jitter).freeze(model, make_batches((8, 3))).value()
    assert_untouched(model, before)

    def interrupted(outputs, targets):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Objective(loss=interrupted).freeze(model, make_batches((8, 3)))
    assert_untouched(model, before)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = make_model("conv")

    def forward(self, x):
        return F.dropout(self.body(x), 0.5, training=True)


class Squeezed(nn.Module):
    """One number a sample, and no dimension left for a single sample."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return self.head(x.flatten(1)).squeeze()


X, Y = make_batches((6,))[0]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "at least one sample"),
        (iter([(X, Y)]), TypeError, "re-iterable"),
        ((b for b in [(X, Y)]), TypeError, "one-shot generator"),
        (X, TypeError, "pass `\\[\\(x, y\\)\\]`"),
        (3, TypeError, "iterable of batches"),
        ([X], TypeError, "\\(x, y\\) or a mapping"),
        ([(X, Y, Y)], TypeError, "tuple of 3 items"),
        ([(X, Y[:2])], ValueError, "one length"),
        ([(X, Y + 3)], ValueError, "labels in 0 … 2"),
        ([(X, Y - 1)], ValueError, "labels in 0 … 2"),
        ([(X, "cat")], TypeError, "must yield tensors"),
        (
            [(X.numpy(), Y)],
            TypeError,
            "ndarray in batch 0; convert it with `torch.as_tensor`",
        ),
        ([(X, Y, Y)], TypeError, "got a tuple of 3 items as batch 0; use a `collate_fn`"),
        ([((X, X), Y)], TypeError, "tuple in batch 0; pass several inputs as a mapping"),
        ([(X[:0], Y[:0])], ValueError, "at least one sample"),
        ([(X, Y[:, None])], ValueError, r"targets of shape \(6,\) .*, got torch.int64 \(6, 1\)"),
    ],
)
def test_bad_data_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        Objective().freeze(make_model("conv"), data)


def test_no_worker_is_started_but_for_a_pass():
    class Loader:
        started = 0

        def __iter__(self):
            self.started += 1
            return iter(make_batches((4, 2)))

    loader = Loader()
    Objective().freeze(make_model("conv"), loader)
    assert loader.started == 1


def test_targets_that_a_loss_would_broadcast_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(1))
    model(X.float())
    with pytest.raises(ValueError, match=r"targets of shape \(6, 1\) .*, got torch.float32 \(6,\)"):
        Objective(loss=nn.MSELoss()).freeze(model, [(X, Y.float())])


def test_classes_in_the_last_dimension_are_named():
    model, ids = nn.Embedding(7, 5), torch.randint(5, (6, 4))
    with pytest.raises(ValueError, match=r"\(6, 4\); .* `outputs.movedim\(-1, 1\)`"):
        Objective().freeze(model, [(ids, ids)])


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_class_labels_that_are_floats_are_refused(loss):
    model = make_model("conv")
    with pytest.raises(ValueError, match=r"integer type, got torch.float64 \(6,\) .*`\.long\(\)`"):
        Objective(loss=loss).freeze(model, [(X, Y.double())])
    with pytest.raises(
        ValueError, match=r"targets of shape \(6, 3\) .*, got torch.float64 \(6, 2\)"
    ):
        Objective(loss=loss).freeze(model, [(X, torch.ones(6, 2, dtype=torch.float64) / 2)])
    soft = F.one_hot(Y, 3).double()
    plain = Objective(loss=loss).freeze(model, [(X, Y)]).value()
    torch.testing.assert_close(Objective(loss=loss).freeze(model, [(X, soft)]).value(), plain)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_class_labels_may_have_any_integer_type(dtype):
    model = make_model("conv")
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    expected = Objective(loss=loss).freeze(model, [(X, Y)]).value()
    assert Objective(loss=loss).freeze(model, [(X, Y.to(dtype))]).value() == expected


def test_an_error_of_the_model_says_what_it_was_called_with():
    with pytest.raises(RuntimeError) as caught:
        Objective().freeze(make_model("conv"), [((X * 9).to(torch.uint8), Y)])
    assert caught.value.__notes__ == [
        f"It came from `model` on the first batch of `data`: torch.uint8 {tuple(X.shape)}."
    ]


class Slope(nn.Module):
    """Gives the slope of a curve, as networks informed by physics do, where gradients are on."""

    def __init__(self, inside=nullcontext):
        super().__init__()
        self.curve = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
        self.inside = inside

    def forward(self, x, f=None):
        with self.inside():
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.curve(x).sum(), x, create_graph=True)
        return slope if f is None else {"loss": F.mse_loss(slope, f)}


@pytest.mark.parametrize("own", [False, True])
def test_a_gradient_in_a_forward_pass_is_told_to_enable_gradients(own):
    x, f = torch.rand(5, 1), torch.rand(5, 1)
    data = [{"x": x, "f": f}] if own else [(x, f)]
    objective = Objective(loss=None if own else F.mse_loss)
    with pytest.raises(RuntimeError) as caught:
        objective.freeze(Slope(), data)
    assert "within `torch.enable_grad()`" in caught.value.__notes__[-1]
    model = Slope(torch.enable_grad)
    value = objective.freeze(model, data).value()
    torch.testing.assert_close(value, F.mse_loss(model(x), f).item(), rtol=1e-6, atol=0)


class Counting(nn.Module):
    """Counts its samples; may want all of them at once."""

    def __init__(self, body, size=None):
        super().__init__()
        self.body, self.size, self.calls = body, size, []

    def forward(self, x):
        self.calls.append(len(x))
        return self.body(x if self.size is None else x.view(self.size, *x.shape[1:]))


@pytest.mark.parametrize(
    ("samples", "size", "calls"),
    [(40, None, [2, 40, 16, 16]), (40, 40, [2, 40, 40, 16, 40]), (32, None, [2, 32, 32])],
)
def test_some_samples_show_whether_a_model_repeats_itself(samples, size, calls):
    batches = [(X[:1].repeat(samples, 1, 1, 1), Y[:1].repeat(samples))]
    model = Counting(make_model("conv"), size)
    Objective().freeze(model, batches)
    assert model.calls == calls
    with pytest.raises(ValueError, match="deterministic"):
        Objective().freeze(Counting(Noisy(), size), batches)


@pytest.mark.parametrize("samples", [6, 40])
def test_a_head_of_zeros_hides_nothing(samples):
    """As a head is before training, or the last layer of a branch."""
    model = nn.Sequential(Noisy(), nn.Linear(3, 3, dtype=torch.float64))
    nn.init.zeros_(model[1].weight)
    before = snapshot(model)
    with pytest.raises(ValueError, match="deterministic"):
        Objective().freeze(model, make_batches((samples,)))
    assert_untouched(model, before)


CLASSES = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)


class Passed(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        return super().forward(1.5 * outputs, targets)


class Summed(nn.CrossEntropyLoss):
    """A mean over samples, of a class whose own is none."""

    def forward(self, outputs, targets):
        own = F.cross_entropy(outputs, targets, reduction="none")
        return (own * self.weight[targets]).mean()


def weighted(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=CLASSES)


def root(outputs, targets):
    return F.mse_loss(outputs, F.one_hot(targets, 3).double()).sqrt()


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_a_mean_over_tokens_is_refused_before_training_too(scale, generator):
    model = nn.Conv1d(4, 3, 1, bias=False).double()
    model.weight.data *= scale
    x = torch.randn(12, 4, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (12, 6), generator=generator)
    y[torch.arange(6) > torch.arange(12)[:, None] % 6] = -100

    def over_tokens(outputs, targets):
        return F.cross_entropy(outputs.mT.flatten(0, 1), targets.flatten())

    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    with pytest.raises(ValueError, match="`loss` must be a mean over samples"):
        Objective(loss=over_tokens).freeze(model, batches)
    value = Objective().freeze(model, batches).value()
    assert value == pytest.approx(over_tokens(model(x), y).item(), rel=1e-12)


@pytest.mark.parametrize("loss", [weighted, root])
@pytest.mark.parametrize("sizes", [(20, 20, 20), (10,) * 6])
def test_a_loss_that_is_no_mean_is_refused_though_a_batch_holds_one_class(loss, sizes, generator):
    x = torch.randn(60, 4, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.arange(3).repeat_interleave(20)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    model = make_model("conv")
    Objective(loss=loss).freeze(model, [(x, y)])
    with pytest.raises(ValueError, match="`loss` must be a mean over samples"):
        Objective(loss=loss).freeze(model, batches)
    with pytest.raises(ValueError, match="`loss` must be a mean over samples"):
        Objective(loss=Summed(weight=CLASSES)).freeze(model, batches)
    own = Objective(loss=Passed(weight=CLASSES))
    assert own.freeze(model, batches).value() == pytest.approx(own.freeze(model, [(x, y)]).value())


def test_a_loss_that_needs_its_batch_whole_is_told_what_to_pass():
    def paired(outputs, targets):  # as of images and texts: each target is a place in the batch
        return F.cross_entropy(outputs @ outputs.T, targets)

    model, batches = make_model("conv"), [(x, torch.arange(4)) for x, _ in make_batches((4, 4))]
    Objective(loss=paired).freeze(model, batches[:1])
    with pytest.raises((ValueError, RuntimeError, IndexError)) as error:
        Objective(loss=paired).freeze(model, batches)
    assert "or all samples as one batch" in error.value.__notes__[0]


def test_a_loss_that_draws_or_remembers_is_refused():
    class Dropped(nn.Module):
        def forward(self, outputs, targets):
            return F.cross_entropy(F.dropout(outputs, 0.5), targets)

    class Centred(nn.Module):
        def __init__(self, assigned):
            super().__init__()
            self.assigned = assigned
            self.register_buffer("centre", torch.zeros(3, dtype=torch.float64))

        def forward(self, outputs, targets):
            loss = F.cross_entropy(outputs - self.centre, targets)
            moved = 0.9 * self.centre + 1e-9 * outputs.detach().mean(0)
            if self.assigned:
                self.centre = moved
            else:
                self.centre.copy_(moved)
            return loss

    with pytest.raises(ValueError, match="`loss` must be deterministic"):
        Objective(loss=Dropped()).freeze(make_model("conv"), make_batches((6,)))
    for assigned in (False, True):
        loss = Centred(assigned)
        with pytest.raises(ValueError, match="`loss` must not have a state of its own"):
            Objective(loss=loss).freeze(make_model("conv"), make_batches((6,)))
        assert not loss.centre.any()


def test_a_transform_may_write_in_place_and_draw_from_the_global_streams():
    def noisy(x, y, generator):
        x += 0.1 * torch.randn_like(x) * random.random()
        return x, y

    batches = make_batches((6, 6))
    before = [x.clone() for x, _ in batches]
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        state = torch.get_rng_state()
        values.append(Objective(transform=noisy).freeze(make_model("conv"), batches).value())
        assert torch.equal(torch.get_rng_state(), state)
    assert values[0] == values[1]
    assert all(map(torch.equal, before, [x for x, _ in batches]))
    other = Objective(transform=noisy, seed=1).freeze(make_model("conv"), batches).value()
    assert other != values[0]
    same = [batches[0]] * 2
    drawn = [b.inputs for b in Objective(transform=noisy).freeze(make_model("conv"), same).batches]
    assert not torch.equal(*drawn)


def test_inputs_are_not_narrowed_for_a_factor_in_half_precision():
    class Factor(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
            self.layer = nn.Linear(5, 1)

        def forward(self, x):
            return self.scale.float() * self.layer(x)

    model, x = Factor(), 100 + torch.rand(8, 5)
    y = model(x).detach() + 0.01
    value = Objective(loss=F.mse_loss).freeze(model, [(x, y)]).value()
    assert value == pytest.approx(1e-4, rel=1e-2)
    # But a norm that comes first is a layer, too.
    normed = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3).double())
    normed[0].register_forward_hook(lambda module, args, out: out.double())
    Objective().freeze(normed, [(x.double(), torch.arange(8) % 3)])


@pytest.mark.parametrize("order", [[1, 0, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
def test_data_that_come_in_another_order_are_refused_when_drawn_again(order):
    (x, y) = make_batches((6,))[0]
    y = torch.zeros_like(y)  # the images alone tell

    class Shuffled:
        passes = 0

        def __iter__(self):
            self.passes += 1
            rows = order if self.passes > 1 else range(6)
            yield x[list(rows)], y

        def __len__(self):
            return 1

    frozen = Objective().freeze(make_model("conv"), [(x, y)], keep_bytes=0)
    frozen.batches._data = Shuffled()
    assert frozen.value() > 0
    with pytest.raises(ValueError, match="same batches at every pass"):
        frozen.value()


def test_fewer_batches_than_before_are_refused_when_drawn_again():
    batches = make_batches((4, 4, 4))
    frozen = Objective().freeze(make_model("conv"), batches, keep_bytes=0)
    del batches[-1]
    with pytest.raises(ValueError, match="same batches at every pass, but batch 2 differs"):
        frozen.value()


def test_batches_beyond_what_is_kept_are_drawn_again():
    model, batches = make_model("conv"), make_batches((4, 4, 4))
    size = batches[0][0].numel() * 8 + 4 * 8
    expected = Objective().freeze(model, batches).value()
    for keep_bytes in (size + 1, 2 * size + 1):
        frozen = Objective().freeze(model, batches, keep_bytes=keep_bytes)
        assert frozen.value() == pytest.approx(expected, rel=1e-12)


def test_pixels_of_batches_of_unequal_size_weigh_alike(generator):
    model = nn.Conv2d(4, 3, 1, dtype=torch.float64)
    batches = []
    for side, factor in ((4, 1.0), (2, 20.0)):
        x = factor * torch.randn(2, 4, side, side, generator=generator, dtype=torch.float64)
        batches.append((x, torch.randint(3, (2, side, side), generator=generator)))
    losses = [F.cross_entropy(model(x), y, reduction="none").flatten() for x, y in batches]
    expected = torch.cat(losses).mean().item()
    assert Objective().freeze(model, batches).value() == pytest.approx(expected, rel=1e-12)


def test_mappings_may_hold_lists_of_tensors(generator):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, xs):
            return self.layer(xs[0]) + self.layer(xs[1])

    one, two = torch.randn(2, 6, 4, generator=generator)
    labels = torch.arange(6) % 3
    model = Two()
    expected = F.cross_entropy(model([one.double(), two.double()]), labels).item()
    for xs in ([one, two], (one, two)):
        value = Objective().freeze(model, [{"xs": xs, "labels": labels}]).value()
        assert value == pytest.approx(expected, rel=1e-12)


def test_what_changes_nothing_is_no_change():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.share = nn.Parameter(torch.tensor([0.5]))

        def forward(self, x):
            with torch.no_grad():
                self.share.clamp_(0, 1)
            return self.share * self.layer(x)

    class Placed(nn.Module):
        """Moves its constants to where the outputs are, and makes others when it is called."""

        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.tensor([1.0, float("nan"), 3.0]))
            self.register_buffer("made", None)

        def forward(self, outputs, targets):
            self.weight = self.weight.to(outputs)
            self.made = torch.ones(3).to(outputs)
            return F.cross_entropy(outputs * self.made, targets)

    data = [(torch.rand(6, 4), torch.arange(6) % 3)]
    model = Clamped()
    value = Objective(loss=Placed()).freeze(model, data).value()
    assert value == pytest.approx(evaluate(model, data).nll, rel=1e-6)
    assert value == pytest.approx(Objective(loss=Placed()).freeze(model.double(), data).value())


class Shortened(nn.Module):
    """Changes a weight when it is called."""

    def __init__(self, own):
        super().__init__()
        self.words = nn.Embedding(9, 4, max_norm=None if own else 0.5)
        self.head, self.own = nn.Linear(4, 3), own

    def forward(self, x):
        if self.own:
            with torch.no_grad():
                self.words.weight.div_(2)
        return self.head(self.words(x).mean(1))


@pytest.mark.parametrize("own", [False, True])
def test_a_model_that_changes_its_weights_is_refused(own):
    model, data = Shortened(own), [(torch.arange(24).view(6, 4) % 9, torch.arange(6) % 3)]
    before = model.words.weight.detach().clone()
    with pytest.raises(ValueError, match="`model` must leave its weights as they are"):
        Objective().freeze(model, data)
    assert torch.equal(model.words.weight, before)
    if own:
        with pytest.raises(ValueError, match="`model` must leave its weights as they are"):
            evaluate(model, data)
    else:
        evaluate(model, data)
        assert torch.equal(model.words.weight, before)


class OfParts(nn.Module):
    """Takes a list of tensors, and writes into the first one if asked to."""

    def __init__(self, writes=False):
        super().__init__()
        self.head, self.writes = nn.Linear(4, 3), writes

    def forward(self, parts):
        first = parts[0].mul_(2) if self.writes else parts[0]
        return self.head(first + parts[1])


def test_tensors_in_lists_are_watched_as_others_are(generator):
    draw = functools.partial(torch.randn, 6, 4, generator=generator)
    parts, labels = [[draw(), draw()] for _ in range(3)], torch.arange(6) % 3
    buffers = [torch.empty(6, 4), torch.empty(6, 4)]

    class Refilled:
        def __iter__(self):
            for each in parts:
                for buffer, part in zip(buffers, each, strict=True):
                    buffer.copy_(part)
                yield {"parts": buffers, "labels": labels}

    class Random:
        def __iter__(self):
            yield {"parts": [draw(), draw()], "labels": labels}

    data = [{"parts": each, "labels": labels} for each in parts]
    model = OfParts()
    assert Objective().freeze(model, Refilled()).value() == Objective().freeze(model, data).value()
    with pytest.raises(ValueError, match="must yield the same batches"):
        Objective().freeze(model, Random(), keep_bytes=0).value()
    before = copy.deepcopy(data)
    for probe in (Objective().freeze, evaluate):
        with pytest.raises(ValueError, match="not modify its input in place"):
            probe(OfParts(writes=True), data)
    for now, then in zip(data, before, strict=True):
        assert all(map(torch.equal, now["parts"], then["parts"]))


def test_sharded_models_are_refused(alone):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model, batches = make_model("conv"), make_batches((6,))
    fully_shard(model, mesh=mesh)
    for _ in range(2):  # once it has been called, its parameters look like any others
        with pytest.raises(TypeError, match="one that FSDP shards"):
            Objective().freeze(model, batches)
        with torch.no_grad():
            model(batches[0][0])


def test_bad_models_and_settings_are_refused():
    batches = make_batches((6,))
    frozen = make_model("conv").requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad"):
        Objective().freeze(frozen, batches)
    with pytest.raises(ValueError, match=r"nearest are .*'5.weight'"):
        Objective(parameters="6.weight").freeze(make_model("conv"), batches)
    with pytest.raises(ValueError, match="chooses none"):
        Objective(parameters=lambda n, p: False).freeze(make_model("conv"), batches)
    with pytest.raises(ValueError, match="deterministic"):
        Objective().freeze(Noisy(), batches)
    before = batches[0][0].clone()
    with pytest.raises(ValueError, match="not modify its input in place"):
        Objective().freeze(nn.Sequential(nn.ReLU(inplace=True), make_model("conv")), batches)
    assert torch.equal(batches[0][0], before)
    mappings = [{"pixel_values": x, "labels": y} for x, y in batches]
    noisy = Record(as_mapping=True)
    noisy.body = Noisy()
    with pytest.raises(ValueError, match="deterministic"):
        Objective(loss=None).freeze(noisy, mappings)
    with pytest.raises(ValueError, match="lazy parameter"):
        Objective().freeze(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), batches)
    with pytest.raises(ValueError, match="meta device"):
        Objective().freeze(nn.Linear(2, 3, device="meta"), batches)
    with pytest.raises(TypeError, match=r"called with other .* DataParallel; pass `model.module`"):
        Objective().freeze(nn.DataParallel(make_model("conv")), batches)
    imaginary = nn.Linear(16, 3, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"complex64 in 'weight'; choose others"):
        Objective().freeze(imaginary, batches)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        Objective().freeze(lambda x: x, batches)
    with pytest.raises(ValueError, match="one output a sample"):
        Objective().freeze(nn.Sequential(nn.Flatten(0), nn.Linear(96, 3).double()), batches)
    with pytest.raises(ValueError, match=r"one output a sample, got shape \(\) for 1 samples"):
        Objective(loss=F.mse_loss).freeze(Squeezed(), [(X[:1], torch.zeros(1))])
    with pytest.raises(ValueError, match="scalar"):
        Objective(loss=lambda o, y: o.sum(1)).freeze(make_model("conv"), batches)
    with pytest.raises(ValueError, match="`weight_decay` must be at least 0"):
        Objective(weight_decay=-1.0)
    with pytest.raises(ValueError, match="keep the number of samples"):
        Objective(transform=lambda x, y, g: (x[:2], y[:2])).freeze(make_model("conv"), batches)
    with pytest.raises(ValueError, match="only ignored labels"):
        Objective().freeze(make_model("conv"), [(X, torch.full_like(Y, -100))])


class Pairs(nn.Module):
    """Takes any number of arguments and returns them all, as torchvision's `v2.MixUp` does."""

    def forward(self, *arguments):
        return arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"transform": "x"}, TypeError, r"`transform` must be a function of \(x, y, gen.* got str"),
        (
            {"transform": lambda x, y: (x, y)},
            TypeError,
            r"`transform` must .* got <lambda>\(x, y\)",
        ),
        ({"seed": "x"}, ValueError, "`seed` must be a whole number, got 'x'"),
        ({"seed": 1.5}, ValueError, "`seed` must be a whole number, got 1.5"),
        ({"parameters": 3}, TypeError, "`parameters` must be patterns of names, .* got int"),
        ({"weight_decay": float("inf")}, ValueError, "`weight_decay` must be finite, got inf"),
        ({"weight_decay": "x"}, ValueError, "`weight_decay` must be a number, got 'x'"),
    ],
)
def test_an_objective_is_refused_when_it_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        Objective(**arguments)


@pytest.mark.parametrize(
    ("transform", "got"),
    [
        (lambda x, y, generator: x, "Tensor"),
        (lambda x, y, generator: None, "NoneType"),
        (Pairs(), "tuple of 3"),
    ],
    ids=["x", "nothing", "all"],
)
def test_a_transform_returns_inputs_and_targets(transform, got):
    message = rf"`transform` must return \(x, y\) when called as `transform\(.*`, got a {got}\."
    with pytest.raises(TypeError, match=message):
        Objective(transform=transform).freeze(make_model("conv"), [(X, Y)])


# --- one function at every pass ------------------------------------------------------------------


def test_batches_may_be_written_where_the_last_one_was():
    x, y = torch.randn(9, 4, 4, 4, dtype=torch.float64), torch.arange(9) % 3

    class Recycling:
        def __iter__(self):
            inputs, labels = torch.empty_like(x[:3]), torch.empty_like(y[:3])
            for start in (0, 3, 6):
                inputs.copy_(x[start : start + 3])
                labels.copy_(y[start : start + 3])
                yield inputs, labels

    model, whole = make_model("conv"), [(x, y)]
    expected = Objective().freeze(model, whole).value()
    for keep_bytes in (None, 0):
        frozen = Objective().freeze(model, Recycling(), keep_bytes=keep_bytes)
        assert frozen.value() == pytest.approx(expected, rel=1e-12)
    parts = [(x[:3], y[:3]), (x[3:], y[3:])]  # of one storage: nothing to copy
    first = next(iter(Objective().freeze(model, parts).batches))
    assert first.inputs.data_ptr() == x.data_ptr()


class Elsewhere(nn.Module):
    """Holds one of its parameters in another place too, and uses that."""

    def __init__(self, place):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.call = {
            "list": lambda own=[self.a.weight]: own[0],  # noqa: B006
            "partial": functools.partial(lambda own: own, own=self.a.weight),
            "view": lambda own=self.a.weight.view(5, 4): own,
            "attribute": lambda: self.a.weight,
        }[place]

    def forward(self, x):
        return self.b(torch.tanh(F.linear(x, self.call(), self.a.bias)))


@pytest.mark.parametrize("place", ["list", "partial", "view"])
def test_a_parameter_that_nothing_can_stand_in_for_is_refused(place):
    data = [(torch.randn(6, 4), torch.arange(6) % 3)]
    with pytest.raises(ValueError, match="`model` must read its parameters from .* but 'a.weight'"):
        Objective().freeze(Elsewhere(place), data)
    Objective(parameters=["b.*", "a.bias"]).freeze(Elsewhere(place), data)  # it stays as it is
    Objective().freeze(Elsewhere("attribute"), data)

    class Forces(nn.Module):  # a graph of its own, without the parameters of the model
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x.detach().requires_grad_())

    Objective().freeze(Forces(), data)


def test_padding_of_an_encoder_is_one_function_with_gradients_and_without():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.words, self.encoder = nn.Embedding(7, 4), nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.encoder(self.words(x), src_key_padding_mask=x == 0).mean(1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Padded().double(), torch.randint(1, 7, (20, 6))
    x[:, 4:] = 0
    operator = HessianOperator(model, [(x, torch.arange(20) % 3)])
    space, step = operator.frozen.space, 1e-3
    origin = space.flatten(space.values)
    v = torch.ones_like(origin) / len(origin) ** 0.5
    low, middle, high = (
        operator.frozen.value(space.unflatten(origin + t * v)) for t in (-step, 0, step)
    )
    assert float(operator.gradient() @ v) == pytest.approx((high - low) / (2 * step), rel=1e-4)
    curvature = (high - 2 * middle + low) / step**2
    assert float(v @ (operator @ v)) == pytest.approx(curvature, rel=1e-3)
    assert torch.backends.mha.get_fastpath_enabled()


def test_small_random_outputs_are_random_too():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(20, 32), nn.Linear(32, 3)
            self.b.weight.data.mul_(2e-4)

        def forward(self, x):
            return self.b(F.dropout(self.a(x).relu(), 0.5))

    data = [(torch.randn(40, 20), torch.arange(40) % 3)]
    with pytest.raises(ValueError, match="deterministic"):
        Objective().freeze(Small(), data)


def test_a_hidden_ignored_label_shows_as_nan():
    def masked(outputs, targets):
        return F.cross_entropy(outputs, targets, ignore_index=0)

    x, y = torch.randn(40, 4), torch.arange(40) % 2 + 1
    y[22:] = 0
    with pytest.raises(ValueError, match="`loss` must be a mean over samples"):
        Objective(loss=masked).freeze(nn.Linear(4, 3), [(x[:20], y[:20]), (x[20:], y[20:])])


def test_targets_are_not_rounded_for_a_part_in_half_precision():
    model = nn.Sequential(nn.Linear(4, 4).bfloat16().requires_grad_(False), nn.Linear(4, 1))

    class Widened(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model[1](self.model[0](x).float())

    x, y = torch.randn(40, 4).bfloat16(), 100 + torch.randn(40, 1)
    frozen = Objective(loss=F.mse_loss).freeze(Widened(), [(x, y)])
    assert frozen.value() == pytest.approx(F.mse_loss(Widened()(x), y).item(), rel=1e-6)


def test_data_that_move_within_a_sample_are_refused_when_drawn_again():
    class Flipping(torch.utils.data.Dataset):
        def __init__(self):
            self.x, self.passes = torch.randn(8, 1, 4, 4), 0

        def __len__(self):
            return 8

        def __getitem__(self, index):
            self.passes += index == 0
            return self.x[index].flip(-1) if self.passes > 2 else self.x[index], index % 3

    loader = torch.utils.data.DataLoader(Flipping(), batch_size=4)
    frozen = Objective().freeze(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), loader, keep_bytes=0)
    with pytest.raises(ValueError, match="must yield the same batches at every pass"):
        list(itertools.chain(frozen.batches, frozen.batches))


# --- losses of the model -------------------------------------------------------------------------


class OwnLoss(nn.Module):
    def __init__(self, checkpoints=False):
        super().__init__()
        self.a, self.b, self.checkpoints = nn.Linear(5, 4), nn.Linear(4, 3), checkpoints

    def forward(self, x, targets):
        body = self.a
        if self.checkpoints:
            x = torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False)
        else:
            x = body(x)
        return {"loss": F.cross_entropy(self.b(x.tanh()), targets)}


def test_labels_go_to_a_model_by_the_name_that_it_has_for_them():
    model, x, y = OwnLoss(), torch.randn(6, 5), torch.arange(6) % 3
    frozen = Objective(loss=None).freeze(model, [{"x": x, "targets": y}])
    assert frozen.value() == pytest.approx(model(x, y)["loss"].item(), rel=1e-6)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        hessian_trace(OwnLoss(True), [{"x": x, "targets": y}], objective=Objective(loss=None))


def test_a_forward_that_tells_no_names_takes_labels():
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 3)

        def forward(self, **given):
            return {"loss": F.cross_entropy(self.a(given["x"]), given["labels"])}

    model, x, y = Given(), torch.randn(6, 5), torch.arange(6) % 3
    frozen = Objective(loss=None).freeze(model, [{"x": x, "target": y}])
    assert frozen.value() == pytest.approx(F.cross_entropy(model.a(x), y).item(), rel=1e-6)


def test_samples_of_a_mapping_are_those_of_its_largest_input():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 5)

        def forward(self, mask, x):
            return {"loss": F.mse_loss(self.a(x) * mask, x * mask)}

    model, mask, x = Masked(), torch.rand(5), torch.randn(12, 5)
    batches = [{"mask": mask, "x": x[:9]}, {"mask": mask, "x": x[9:]}]
    frozen = Objective(loss=None).freeze(model, batches)
    assert frozen.num_samples == 12
    assert frozen.value() == pytest.approx(model(mask, x)["loss"].item(), rel=1e-6)


def test_mistakes_are_named():
    model, data = nn.Linear(4, 3), [(torch.randn(6, 4), torch.arange(6) % 3)]
    with pytest.raises(ValueError, match="`loss` must be a function of .* make a module of a cl"):
        Objective(loss=nn.CrossEntropyLoss)
    with pytest.raises(ValueError, match="`weight_decay` must be a number, got None"):
        Objective(weight_decay=None)
    for probe in (hessian_trace, loss_line):
        with pytest.raises(TypeError, match="`objective` must be an Objective, got function"):
            probe(model, data, objective=F.cross_entropy)
    with pytest.raises(TypeError, match="`parameters` must be patterns of names, .* a Parameter"):
        Objective(parameters=[model.weight]).freeze(model, data)
    operator = HessianOperator(model, data)
    with pytest.raises(TypeError, match="`v` must be a tensor, got ndarray"):
        operator @ np.ones(operator.dim)
    assert (operator @ torch.ones(operator.dim, 0)).shape == (operator.dim, 0)


def test_streamed_batches_may_be_written_where_the_last_one_was():
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    model = nn.Linear(4, 3).double()

    class Recycling:
        def __iter__(self):
            inputs = np.empty((3, 4))
            for start in (0, 3, 6):
                inputs[:] = x[start : start + 3]
                yield torch.from_numpy(inputs), y[start : start + 3]

    frozen = Objective().freeze(model, Recycling(), keep_bytes=0)
    v = torch.ones(15, dtype=torch.float64)
    expected = HessianOperator(model, [(x, y)]) @ v
    torch.testing.assert_close(HessianOperator.of(frozen) @ v, expected)


def test_a_loss_of_ones_own_gets_targets_in_the_precision_of_the_outputs():
    def product(outputs, targets):
        return torch.einsum("nc,nc->n", outputs, targets).mean()

    model = nn.Linear(4, 3).bfloat16()
    data = [(torch.randn(6, 4), torch.rand(6, 3))]
    Objective(loss=product).freeze(model, data)


def test_the_fast_path_is_put_back_by_the_last_of_several_threads():
    models = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(4)]
    data = [(torch.randn(6, 4), torch.arange(6) % 3)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            list(pool.map(lambda model: loss_line(model, data, points=5), models))
            assert torch.backends.mha.get_fastpath_enabled()


def test_a_loss_that_remembers_is_put_back_though_it_fails():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, outputs, targets):
            loss = F.cross_entropy(outputs, targets)
            self.mean.mul_(0.9).add_(0.1 * loss.detach())
            return loss / self.mean.clone()

    loss = Average()
    with pytest.raises(ValueError, match="`loss` must not have a state of its own"):
        Objective(loss=loss).freeze(nn.Linear(4, 3), [(torch.randn(6, 4), torch.arange(6) % 3)])
    assert loss.mean == 0
    with pytest.raises(ValueError, match="`loss` must return a tensor, got a float"):
        Objective(loss=lambda o, t: 1.0).freeze(
            nn.Linear(4, 3), [(torch.randn(6, 4), torch.arange(6) % 3)]
        )


def test_a_model_that_wants_its_batch_whole_may_have_caches():
    class Viewing(nn.Module):
        def __init__(self, keeps):
            super().__init__()
            self.a, self.kept, self.keeps = nn.Linear(6, 3), None, keeps

        def forward(self, x):
            if self.kept is None or not self.keeps:
                self.kept = 2 * self.a.weight
            return F.linear(x.view(8, 6), self.kept, self.a.bias)

    model, plain = Viewing(True), Viewing(False)
    plain.load_state_dict(model.state_dict())
    data = [(torch.randn(8, 6), torch.arange(8) % 3)]
    with torch.no_grad():
        model(data[0][0])
    v = torch.ones(21)
    torch.testing.assert_close(HessianOperator(model, data) @ v, HessianOperator(plain, data) @ v)


class Growing(nn.Module):
    """Its outputs grow with the number of its calls, which it keeps in a buffer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.calls * self.head(x)


def test_every_call_begins_with_the_buffers_of_the_model(generator):
    model = Growing()
    x, y = torch.randn(6, 4, generator=generator), torch.arange(6) % 3
    frozen = Objective().freeze(model, [(x, y)])
    expected = F.cross_entropy(model.head(x), y).item()
    assert [frozen.value() for _ in range(3)] == pytest.approx([expected] * 3)
    assert model.calls == 0


class Summing(nn.Module):
    """Brings its own loss: a sum, a mean over samples, or one over the tokens that count."""

    def __init__(self, reduction):
        super().__init__()
        self.head, self.reduction = nn.Linear(4, 3).double(), reduction

    def forward(self, x, labels):
        logits = self.head(x)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=self.reduction)
        return {"loss": loss, "logits": logits}


def test_a_loss_that_the_model_brings_is_a_mean_over_samples(generator):
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (9,), generator=generator)
    batches = [{"x": x[:5], "labels": y[:5]}, {"x": x[5:], "labels": y[5:]}]
    Objective(loss=None).freeze(Summing("mean"), batches)
    with pytest.raises(ValueError, match="`model` must return a `.loss` that is a mean over"):
        Objective(loss=None).freeze(Summing("sum"), batches)
    Objective(loss=None).freeze(Summing("sum"), batches[:1])
    Objective(loss=None).freeze(Summing("sum"), batches, check_mean=False)
    tokens = torch.randn(8, 6, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (8, 6), generator=generator)
    padded = labels.where(torch.arange(8)[:, None] < 4, -100).index_fill(1, torch.tensor(0), 1)
    model, told = Summing("mean"), pytest.raises(ValueError, match="by the labels that count")
    for targets, context in ((labels, nullcontext()), (padded, told)):
        batches = [{"x": tokens[i::2], "labels": targets[i::2]} for i in range(2)]
        with context:
            Objective(loss=None).freeze(model, batches)
    untrained = Summing("mean")  # all tokens have a loss of about log 3
    untrained.head.weight.data *= 1e-3
    untrained.head.bias.data.zero_()
    with told:
        Objective(loss=None).freeze(untrained, batches)

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, labels=None):
            return self.model.head(x).transpose(1, 2)

    batches = [{"x": tokens[i::2], "labels": padded[i::2]} for i in range(2)]
    remedy = Objective(loss=nn.CrossEntropyLoss()).freeze(Turned(), batches)
    whole = Objective(loss=None).freeze(model, [{"x": tokens, "labels": padded}])
    assert remedy.value() == pytest.approx(whole.value(), rel=1e-12)


@pytest.mark.parametrize("outputs", ["nothing", "tensor", "tuple", "mapping"])
def test_a_model_without_a_loss_of_its_own_is_told_what_to_pass(outputs):
    class Bare(nn.Linear):
        def forward(self, x, labels=None):
            logits = super().forward(x)
            return {
                "nothing": SimpleNamespace(loss=None, logits=logits),
                "tensor": logits,
                "tuple": (logits, logits.sum()),
                "mapping": {"logits": logits},
            }[outputs]

    data = [{"x": torch.randn(4, 4), "labels": torch.arange(4) % 3}]
    with pytest.raises(ValueError, match=r"needs a `model` that returns its own `.loss`, got a"):
        Objective(loss=None).freeze(Bare(4, 3), data)


def test_weights_that_parametrize_caches_are_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    data = [(torch.randn(4, 4), torch.arange(4) % 3)]
    with nn.utils.parametrize.cached(), pytest.raises(RuntimeError, match="frozen outside"):
        Objective().freeze(model, data)
    Objective().freeze(model, data)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_both_forms_of_checkpointing_are_seen(use_reentrant):
    first, head = nn.Linear(4, 5), nn.Linear(5, 3)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = first, head

        def forward(self, x):
            return self.head(
                torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=use_reentrant).tanh()
            )

    data = [(torch.randn(4, 4), torch.arange(4) % 3)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
        assert Objective().freeze(Model(), data).recomputes
    assert not Objective().freeze(nn.Sequential(first, head), data).recomputes


def test_gradients_that_are_sparse_are_those_that_are_dense():
    tokens, labels = torch.randint(7, (6, 5)), torch.arange(6) % 3
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Linear(20, 3)).double()
        for sparse in (False, True)
    ]
    models[1].load_state_dict(models[0].state_dict())
    for kind in (HessianOperator, GaussNewtonOperator):
        dense, sparse = (kind(model, [(tokens, labels)]) for model in models)
        v = torch.randn(dense.dim, dtype=torch.float64)
        torch.testing.assert_close(sparse.matvec(v), dense.matvec(v))


def test_norms_that_see_the_batch_are_told_of_where_there_are_several():
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.warns(UserWarning, match="results depend on how `data` is batched"):
        Objective().freeze(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    Objective().freeze(model, [(x, y)])


class Mixed(nn.CrossEntropyLoss):
    """A loss of one's own: a setting, a part, and a weight that is trained."""

    def __init__(self, gamma, base=None, scale=1.0, **settings):
        super().__init__(**settings)
        self.gamma, self.base, self.part = gamma, base, nn.HuberLoss(delta=0.5)
        self.scale = nn.Parameter(torch.tensor(scale))


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (F.cross_entropy, "cross_entropy"),
        (functools.partial(F.cross_entropy, label_smoothing=0.1), "cross_entropy(label_smoothing="),
        (functools.partial(abs, 3, [4]), "abs(3, [4])"),
        (nn.CrossEntropyLoss(), "CrossEntropyLoss()"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "CrossEntropyLoss(label_smoothing=0.1)"),
        (nn.CrossEntropyLoss(torch.tensor([1.0, 9.5])), "CrossEntropyLoss(weight=[1, 9.5])"),
        (nn.NLLLoss(ignore_index=255), "NLLLoss(ignore_index=255)"),
        (nn.HuberLoss(delta=0.3), "HuberLoss(delta=0.3)"),
        (nn.KLDivLoss(reduction="batchmean"), "KLDivLoss(reduction='batchmean')"),
        (
            Mixed(2, nn.MSELoss(), scale=0.3, label_smoothing=0.1),
            "Mixed(gamma=2, base=MSELoss(), label_smoothing=0.1, part=HuberLoss(delta=0.5))",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_a_loss_is_named_with_its_settings(loss, told):
    assert Objective(loss=loss).describe().startswith(f"loss={told}")


def test_the_name_of_a_module_does_not_say_where_its_parts_lie():
    def describe():
        return Objective(loss=Mixed(gamma=object(), base=[print, object()])).describe()

    assert "gamma=<object object>" in describe()
    assert describe() == describe()


@pytest.mark.parametrize(
    "make",
    [nn.CrossEntropyLoss, lambda weight: functools.partial(F.cross_entropy, weight=weight)],
    ids=["module", "partial"],
)
def test_long_class_weights_are_told_by_a_digest(make):
    weights = (torch.arange(2000.0).index_fill(0, torch.tensor(1000), x) for x in (0, 0, 1))
    same, again, other = (Objective(loss=make(weight)).describe() for weight in weights)
    assert "weight=(2000,) " in same
    assert len(same) < 100
    assert same == again != other


class Detector(nn.Module):
    """Finds boxes in images of several sizes, and takes its own loss, as detectors do."""

    def __init__(self, mean):
        super().__init__()
        self.mean, self.head = mean, nn.Linear(3, 4, dtype=torch.float64)

    def forward(self, images, labels):
        assert len(images) == len(labels)
        pairs = zip(images, labels, strict=True)
        losses = [
            (self.head(image.mean((1, 2))) - label["boxes"]).exp().mean(1) for image, label in pairs
        ]
        if self.mean == "images":
            losses = [loss.mean(0, keepdim=True) for loss in losses]
        return {"loss": torch.cat(losses).mean()}


def test_lists_of_images_and_annotations(generator):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def batch(*sizes):
        images = [draw(3, 4 + n, 5) for n in sizes]
        return {"images": images, "labels": [{"boxes": draw(n, 4)} for n in sizes]}

    batches, objective = [batch(1, 3), batch(2, 2, 5)], Objective(loss=None)
    model = Detector("images")
    operator = HessianOperator(model, batches, objective)
    assert operator.frozen.num_samples == 5
    one = {name: batches[0][name] + batches[1][name] for name in batches[0]}

    def loss(weight):
        entries = {"head.weight": weight, "head.bias": model.head.bias.detach()}
        return functional_call(model, entries, (), one)["loss"]

    expected = torch.func.hessian(loss)(model.head.weight.detach()).reshape(12, 12)
    matrix = operator @ torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(matrix[:12, :12], expected)
    with pytest.raises(ValueError, match="return a `.loss` that is a mean over samples"):
        HessianOperator(Detector("boxes"), batches, objective)
    HessianOperator(Detector("boxes"), [one], objective)
    with pytest.raises(TypeError, match=r"got a list in batch 0; convert it with `torch"):
        HessianOperator(model, [{"images": one["images"], "labels": [1, 2, 0, 1, 2]}], objective)
