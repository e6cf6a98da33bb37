import gc
import resource
import threading
import time
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import landscape
from landscape import (
    EmpiricalFisherOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    Objective,
)
from landscape.linalg import hessian
from landscape.linalg.gradient import GradientGraph, twice_differentiable
from tests import oracles
from tests.cases import MODELS, assert_untouched, make_batches, make_model, snapshot

KINDS = {
    "hessian": HessianOperator,
    "gauss-newton": GaussNewtonOperator,
    "fisher": FisherOperator,
    "empirical-fisher": EmpiricalFisherOperator,
}
PART = 9_000  # bytes: the graph of one batch of four and no more


def times_ones(operator):
    return operator @ torch.ones(operator.dim, dtype=operator.dtype)


def matrix_of(operator):
    return operator @ torch.eye(operator.dim, dtype=operator.dtype)


@pytest.mark.parametrize("sizes", [(12,), (8, 4), (5, 4, 3)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matvec_equals_closed_form_however_batched(sizes, weight_decay, generator):
    model = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (12,), generator=generator)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    operator = HessianOperator(model, batches, Objective(weight_decay=weight_decay))
    expected = oracles.softmax_regression_hessian(model.weight.detach(), x, weight_decay)
    for v in torch.eye(operator.dim, dtype=torch.float64):
        torch.testing.assert_close(operator.matvec(v), expected @ v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_operators_equal_dense_autograd(kind, name):
    model, batches = make_model(name), make_batches((7, 3))
    operator = KINDS[kind](model, batches, Objective(weight_decay=0.1))
    expected = oracles.dense(model, batches, kind=kind, weight_decay=0.1)
    torch.testing.assert_close(matrix_of(operator), expected, rtol=1e-8, atol=1e-10)


class Spectral(nn.Module):
    """Multiplies by complex weights, pairs of real ones that lie behind an odd number of others."""

    def __init__(self, complex_of):
        super().__init__()
        self.complex_of = complex_of
        self.mix = nn.Parameter(torch.randn(3, 3))
        self.pairs = nn.Parameter(torch.randn(3, 3, 2))

    def forward(self, x):
        return (x.to(torch.complex128) @ self.complex_of(self.pairs)).abs() @ self.mix


def test_weights_may_be_viewed_as_complex(generator):
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    batches = [(x[:5], torch.arange(5) % 3), (x[5:], torch.arange(3))]
    views = Spectral(torch.view_as_complex).double()
    plain = Spectral(lambda pairs: torch.complex(pairs[..., 0], pairs[..., 1])).double()
    plain.load_state_dict(views.state_dict())
    expected = oracles.dense(plain, batches)
    operator = HessianOperator(views, batches)
    torch.testing.assert_close(matrix_of(operator), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(times_ones(operator), expected.sum(1), rtol=1e-8, atol=1e-10)
    ours, theirs = (landscape.hessian_max_spectrum(m, batches, k=2) for m in (views, plain))
    np.testing.assert_allclose(ours.eigenvalues, theirs.eigenvalues, rtol=1e-8)
    ours, theirs = (landscape.loss_line(m, batches, points=3) for m in (views, plain))
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-12)


class Viewed(nn.Module):
    """Its `view` wants channels first in memory."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1).double()
        self.head = nn.Linear(16, 3).double()

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1).tanh())


@pytest.mark.parametrize("kind", KINDS)
def test_operators_of_a_model_that_views_its_activations(kind):
    model, batches = Viewed(), make_batches((7, 3))
    expected = oracles.dense(model, batches, kind=kind)
    for settings in [{"memory": 0}, {}] if kind == "hessian" else [{}]:
        operator = KINDS[kind](model, batches, **settings)
        torch.testing.assert_close(matrix_of(operator), expected, rtol=1e-8, atol=1e-10)


class Force(nn.Module):
    """Its outputs are a linear map of a slope that `torch.func` takes."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(16, 2), nn.Tanh(), nn.Linear(2, 1)).double()
        self.head = nn.Linear(16, 3).double()

    def forward(self, x):
        slope = torch.func.grad(lambda z: self.energy(z).sum())
        return self.head(torch.func.vmap(slope)(x.flatten(1)))


def test_a_model_that_uses_torch_func():
    model, batches = Force(), make_batches((7, 3))
    operator = HessianOperator(model, batches)
    assert operator.num_kept == 0  # their memory is not known
    expected = oracles.dense(model, batches)
    torch.testing.assert_close(matrix_of(operator), expected, rtol=1e-8, atol=1e-10)


def shift_alone():
    norm = nn.BatchNorm2d(4)
    norm.weight = None
    norm.running_var.fill_(0.5)
    return nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Tanh())


# Second derivatives that PyTorch lacks, crashes in or gets wrong: (layers, chosen parameters).
UNCOMMON = {
    "hard sigmoid": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Hardsigmoid()), "*"),
    "bias of a group norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)),
        "0.1.bias",
    ),
    "batch norm without a scale": (shift_alone, "*"),
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hessian"])
@pytest.mark.parametrize("name", UNCOMMON)
def test_operators_of_the_outputs_of_uncommon_layers(kind, name):
    build, chosen = UNCOMMON[name]
    model = nn.Sequential(build(), nn.Flatten(), nn.Linear(16, 3)).double()
    model = model.to(memory_format=torch.channels_last)
    batches = make_batches((7, 3))
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    operator = KINDS[kind](model, batches, Objective(parameters=chosen))
    names = operator.frozen.space.names
    expected = oracles.dense(model, batches, kind=kind, names=names)
    # PyTorch's hard sigmoid has its factor in float32.
    torch.testing.assert_close(matrix_of(operator), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_operators_of_a_compiled_model(how, kind):
    model, batches = make_model("attention"), make_batches((7, 3))
    expected = oracles.dense(model, batches, kind=kind, weight_decay=0.1)
    if how == "wrapped":
        model = torch.compile(model, backend="aot_eager")
    else:
        model.compile(backend="aot_eager")
    model(batches[0][0])  # compiled by now
    settings = {"memory": PART} if kind == "hessian" else {}
    operator = KINDS[kind](model, batches, Objective(weight_decay=0.1), **settings)
    torch.testing.assert_close(matrix_of(operator), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_operators_in_single_precision(kind):
    model, batches = make_model("attention", torch.float32), make_batches((7, 3), torch.float32)
    operator = KINDS[kind](model, batches)
    expected = oracles.dense(make_model("attention"), make_batches((7, 3)), kind=kind)
    assert operator.dtype == torch.float32
    torch.testing.assert_close(matrix_of(operator).double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("memory", [0, "auto", 0.5, PART, float(PART)], ids=str)
def test_kept_and_rebuilt_graphs_give_the_same_products(memory):
    model, batches = make_model("conv"), make_batches((4, 4, 3, 1))
    operator = HessianOperator(model, batches, memory=memory)
    assert operator.num_kept == (0 if memory == 0 else 1 if memory == PART else 4)
    expected = oracles.dense(model, batches)
    for _ in range(2):  # a graph can be used again
        torch.testing.assert_close(matrix_of(operator), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        operator.gradient(), HessianOperator(model, batches, memory=0).gradient()
    )


@pytest.mark.parametrize("sizes", [(7, 3), (5, 4, 3)], ids=str)
def test_graphs_are_worked_on_by_two_threads(sizes, two_threads, monkeypatch):
    """Neither the products nor the threads that come later are others for that."""
    model, batches = make_model("attention"), make_batches(sizes)
    operator = HessianOperator(model, batches, Objective(weight_decay=0.1))
    expected = oracles.dense(model, batches, weight_decay=0.1)
    seen = defaultdict(list)
    product = GradientGraph.product

    def noted(self, *args):
        seen[threading.current_thread()].append(torch.get_num_threads())
        return product(self, *args)

    monkeypatch.setattr(GradientGraph, "product", noted)
    torch.testing.assert_close(matrix_of(operator), expected, rtol=1e-8, atol=1e-10)
    assert len(seen) == 2  # kept between products
    assert threading.main_thread() not in seen
    assert {count for counts in seen.values() for count in counts} == {1}
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2
    del operator
    gc.collect()
    for thread in seen:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_threads_that_cannot_be_shared_work_together(monkeypatch, request):
    """There is one, or all threads have the number of the last that sets it."""
    operator = HessianOperator(make_model("conv"), make_batches((4, 4)))
    expected = times_ones(operator)
    monkeypatch.setattr(hessian, "side_by_side", None)
    torch.testing.assert_close(times_ones(operator), expected)
    request.getfixturevalue("two_threads")
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    torch.testing.assert_close(times_ones(operator), expected)


def test_what_fails_on_one_thread_is_raised_when_the_other_is_done(two_threads, monkeypatch):
    operator = HessianOperator(make_model("conv"), make_batches((4, 4)))
    began, done = threading.Event(), []
    graphs = operator._graphs
    product = GradientGraph.product

    def failing(self, *args):
        if self is graphs[0]:
            began.wait()
            raise RuntimeError("of a batch")
        began.set()
        time.sleep(0.1)
        done.append(product(self, *args))
        return done[-1]

    monkeypatch.setattr(GradientGraph, "product", failing)
    with pytest.raises(RuntimeError, match="of a batch"):
        times_ones(operator)
    assert done


def test_gradient_is_that_of_the_objective():
    model, batches = make_model("attention"), make_batches((7, 3))
    operator = HessianOperator(model, batches, Objective(weight_decay=0.1))
    step = torch.zeros(operator.dim, dtype=torch.float64)
    step[5] = 1e-5
    frozen, space = operator.frozen, operator.frozen.space
    theta = space.flatten(space.values)
    high, low = (frozen.value(space.unflatten(theta + s * step)) for s in (1, -1))
    assert operator.gradient()[5].item() == pytest.approx((high - low) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("sizes", [(10,), (7, 2, 1), (1, 4, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_class_weights_and_ignored_labels_however_batched(kind, sizes):
    model = make_model("attention")
    x, y = (torch.cat(parts) for parts in zip(*make_batches((7, 3)), strict=True))
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    class_weights = torch.tensor([0.2, 1.0, 5.0]).double()
    for loss, weights in (
        (nn.CrossEntropyLoss(weight=class_weights), class_weights[y]),
        (nn.CrossEntropyLoss(ignore_index=1), (y != 1).double()),
    ):
        operator = KINDS[kind](model, batches, Objective(loss=loss))
        expected = oracles.dense(model, batches, kind=kind, loss=loss, weights=weights)
        torch.testing.assert_close(matrix_of(operator), expected, rtol=1e-8, atol=1e-10)


def test_a_loss_that_vmap_cannot_take():
    model, batches = make_model("conv"), make_batches((7, 3))
    y = torch.cat([y for _, y in batches])
    class_weights = torch.tensor([0.2, 1.0, 5.0]).double()
    loss = nn.CrossEntropyLoss(weight=class_weights, label_smoothing=0.1)
    operator = EmpiricalFisherOperator(model, batches, Objective(loss=loss))
    expected = oracles.dense(
        model, batches, kind="empirical-fisher", loss=loss, weights=class_weights[y]
    )
    torch.testing.assert_close(matrix_of(operator), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton", "empirical-fisher"])
def test_soft_targets_and_a_subset(kind):
    model = make_model("attention")
    batches = make_batches((7, 2, 1))
    subset = ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    soft = [(x, F.one_hot(y, 3).double() * 0.7 + 0.1) for x, y in batches]
    operator = KINDS[kind](model, soft, Objective(parameters=["norm*", "head.*"]))
    expected = oracles.dense(model, soft, kind=kind, names=subset)
    torch.testing.assert_close(matrix_of(operator), expected, rtol=1e-8, atol=1e-10)


class WithLoss(nn.Module):
    """Brings its own loss, as Hugging Face's models do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3, dtype=torch.float64)

    def forward(self, x, labels):
        logits = self.head(x.flatten(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("kind", ["gauss-newton", "fisher", "empirical-fisher"])
def test_a_loss_that_the_model_brings_is_refused_where_its_outputs_are_needed(kind):
    data = [{"x": x, "labels": y} for x, y in make_batches((7,))]
    with pytest.raises(ValueError, match=r"`loss` must be a function of .* got None; pass the"):
        KINDS[kind](WithLoss(), data, Objective(loss=None))


@pytest.mark.parametrize(
    "loss",
    [F.mse_loss, nn.BCEWithLogitsLoss(), F.multilabel_soft_margin_loss, nn.PoissonNLLLoss()],
    ids=["mse", "bce", "labels", "poisson"],
)
def test_a_fisher_matrix_is_that_of_a_softmax(loss):
    data = [(x, torch.rand(len(x), 3).double()) for x, _ in make_batches((7,))]
    with pytest.raises(ValueError, match="must be that of a softmax"):
        FisherOperator(make_model("conv"), data, Objective(loss=loss))


def test_a_fisher_matrix_is_not_that_of_a_regression_whose_loss_is_ones_own():
    def squared(outputs, targets):
        return 0.5 * (outputs - targets).square().sum(1).mean()

    data = [(x, torch.randn(len(x), 3).double()) for x, _ in make_batches((7,))]
    with pytest.raises(ValueError, match="labels, or probabilities that sum to 1, .* `Gauss"):
        FisherOperator(make_model("conv"), data, Objective(loss=squared))
    one = nn.Sequential(nn.Flatten(), nn.LazyLinear(1, dtype=torch.float64))
    one(data[0][0])
    with pytest.raises(ValueError, match=r"two or more classes .* got \(7, 1\)"):
        FisherOperator(one, [(x, y[:, :1]) for x, y in data], Objective(loss=squared))
    soft = [(x, y.softmax(1)) for x, y in data]
    FisherOperator(make_model("conv"), soft, Objective(loss=squared))


class Cube(torch.autograd.Function):
    """Differentiable once, as operations with a kernel of their own are."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@pytest.mark.filterwarnings("ignore:landscape_tests")
def test_functions_without_a_derivative_are_refused(recorded):
    library = torch.library.Library("landscape_tests", "FRAGMENT")
    library.define("rounded(Tensor x) -> Tensor")
    library.impl("rounded", lambda x: x.detach().round(decimals=1), "CPU")

    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(16, 4).double(), nn.Linear(4, 3).double()

        def forward(self, x):
            return self.head(torch.ops.landscape_tests.rounded(self.first(x.flatten(1))))

    model, data = Rounded(), make_batches((6, 6))
    for operator in (HessianOperator, GaussNewtonOperator):
        with pytest.raises(ValueError, match="got a function without a derivative"):
            operator(model, data).matvec(torch.ones(83, dtype=torch.float64))
        operator(model, data, Objective(parameters="head.*")).matvec(torch.ones(15).double())


def test_functions_that_are_differentiable_once_are_refused(recorded):
    class Cubic(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(16, 4).double(), nn.Linear(4, 3).double()

        def forward(self, x):
            return self.head(Cube.apply(self.first(x.flatten(1))))

    model, batches = Cubic(), make_batches((7, 3))
    for memory in ("auto", 0):
        with pytest.raises(ValueError, match="`model` must be twice differentiable"):
            HessianOperator(model, batches, memory=memory)
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for kind in (GaussNewtonOperator, FisherOperator, EmpiricalFisherOperator):
        with pytest.raises(ValueError, match="`model` must be twice differentiable"):
            kind(model, batches).matvec(v)
    with pytest.raises(ValueError, match="`model` must be twice differentiable"):
        landscape.hessian_max_spectrum(model, batches, k=1)
    assert np.isfinite(landscape.loss_line(model, batches, points=3).nll).all()


class Align(torch.autograd.Function):
    """Refuses its second derivative as the operations of torchvision do."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return AlignBackward.apply(grad)


class AlignBackward(Align):
    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("double backwards on roi_align not supported")


class Aligned(nn.Embedding):
    def forward(self, x):
        return Align.apply(super().forward(x).tanh().sum(1))


@pytest.mark.parametrize(
    ("name", "model", "loss"),
    [
        ("roi_align", Aligned(5, 3), F.cross_entropy),
        ("embedding_bag", nn.Sequential(nn.EmbeddingBag(5, 4), nn.Linear(4, 3)), F.cross_entropy),
        ("multi_margin_loss", nn.Sequential(nn.Embedding(5, 3), nn.Flatten()), F.multi_margin_loss),
    ],
    ids=["torchvision", "model", "loss"],
)
def test_functions_without_a_second_derivative_are_named(name, model, loss, recorded):
    batches = [(torch.arange(10).view(-1, 2) % 5, torch.arange(5) % 3)] * 2
    objective = Objective(loss=loss)
    with pytest.raises(ValueError, match=f"must be twice differentiable, got '{name}'"):
        landscape.hessian_max_spectrum(model, batches, objective=objective, k=1)
    for kind in (HessianOperator, GaussNewtonOperator):
        operator = kind(model, batches, objective)
        with pytest.raises(ValueError, match=f"must be twice differentiable, got '{name}'"):
            times_ones(operator)


def test_a_recurrent_network_of_cudnn_is_told_to_do_without():
    said = "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not …"
    with (
        pytest.raises(ValueError, match=r"got 'cudnn_rnn', .* `torch.backends.cudnn.flags"),
        twice_differentiable(),
    ):
        raise NotImplementedError(said)


def test_the_samples_of_a_contrastive_loss_have_no_gradients_of_their_own():
    def contrastive(outputs, targets):
        return F.cross_entropy(outputs @ targets.T, torch.arange(len(outputs)))

    (x, _), objective = make_batches((7,))[0], Objective(loss=contrastive)
    batch = x, torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    assert GaussNewtonOperator(make_model("conv"), [batch], objective).dim
    with pytest.raises(ValueError, match="see `GaussNewtonOperator`"):
        EmpiricalFisherOperator(make_model("conv"), [batch], objective)


@pytest.mark.parametrize("once", [False, True], ids=["each", "once"])
def test_gradients_that_a_hook_changes_are_refused_and_what_only_looks_is_not(once, recorded):
    class Equilibrium(nn.Module):
        """Solves its backward pass in a hook, which some remove when it has been called."""

        def __init__(self, slope):
            super().__init__()
            self.first, self.head = nn.Linear(16, 4).double(), nn.Linear(4, 3).double()
            self.slope = slope

        def forward(self, x):
            z = torch.tanh(self.first(x.flatten(1)))
            if torch.is_grad_enabled():
                handle = z.register_hook(lambda g: self.solved(g, handle))
            return self.head(z)

        def solved(self, gradient, handle):
            if once:
                handle.remove()
            return None if self.slope is None else gradient / (1 - self.slope)

    batches = make_batches((7, 3))
    v = torch.ones(83, dtype=torch.float64)
    model = Equilibrium(0.5)
    for memory in ("auto", 0):
        with pytest.raises(ValueError, match="changes a gradient by a hook"):
            HessianOperator(model, batches, memory=memory)
    for kind in (GaussNewtonOperator, FisherOperator, EmpiricalFisherOperator):
        with pytest.raises(ValueError, match="changes a gradient by a hook"):
            kind(model, batches).matvec(v)
    with pytest.raises(ValueError, match="changes a gradient by a hook"):
        landscape.hessian_max_spectrum(model, batches, k=1)
    assert np.isfinite(landscape.loss_line(model, batches, points=3).nll).all()
    for kind in (HessianOperator, GaussNewtonOperator):
        assert kind(Equilibrium(None), batches).matvec(v).isfinite().all()


def test_many_vectors_share_one_forward_pass():
    model, batches = make_model("conv"), make_batches((7, 3))
    operator = GaussNewtonOperator(model, batches)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    matrix_of(operator)
    handle.remove()
    assert len(calls) == len(batches)


def test_frozen_parameters_take_no_part():
    model, batches = make_model("tied"), make_batches((7, 3))
    model.encode.weight.requires_grad_(False)
    operator = HessianOperator(model, batches)
    expected = oracles.dense(model, batches, names=["unused", "head.weight", "head.bias"])
    torch.testing.assert_close(matrix_of(operator), expected, rtol=1e-8, atol=1e-10)


def test_an_ignored_parameter_is_a_zero_row_not_an_error():
    model, batches = make_model("tied"), make_batches((7,))
    for kind in KINDS.values():
        matrix = matrix_of(kind(model, batches, Objective(weight_decay=0.5)))
        expected = torch.zeros_like(matrix[0])
        expected[0] = 0.5
        torch.testing.assert_close(matrix[0], expected, rtol=0, atol=0)
    for kind in KINDS.values():
        with pytest.warns(UserWarning, match="depends on none of the chosen parameters"):
            only = matrix_of(kind(model, batches, Objective(parameters="unused", weight_decay=0.5)))
        torch.testing.assert_close(only, 0.5 * torch.eye(2, dtype=torch.float64))
    model = make_model("conv")
    model.forward = torch.inference_mode()(model.forward)
    with pytest.warns(UserWarning, match="remove `no_grad`, `inference_mode` and `detach` from"):
        assert not matrix_of(HessianOperator(model, batches)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_modes_of_the_caller_that_spoil_derivatives_are_refused(kind):
    model, batches = make_model("conv"), make_batches((7,))
    expected = times_ones(KINDS[kind](model, batches))
    with torch.inference_mode():
        made = [(x.clone(), y.clone()) for x, y in batches]
        with pytest.raises(RuntimeError, match=r"outside `torch\.inference_mode`"):
            times_ones(KINDS[kind](model, batches))
    torch.testing.assert_close(times_ones(KINDS[kind](model, made)), expected)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match=r"outside `torch\.autocast`"),
    ):
        times_ones(KINDS[kind](model, batches))


class Changing(nn.Module):
    """Changes a tensor in place that a layer before has taken."""

    def __init__(self, change):
        super().__init__()
        self.change, self.frozen = change, nn.Linear(3, 3).requires_grad_(False)
        self.first, self.last = nn.Linear(16, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.change(self, self.first(x.flatten(1)))


def after_square(model, h):
    y = h * h
    h += 1
    return model.last(y)


def after_gelu(model, h):
    h = model.last(h)
    y = F.gelu(h)
    h *= 2
    return model.last(y)


def after_conv(model, h):
    y = F.conv2d(h[:, :, None, None], model.last.weight[:, :, None, None])
    h *= 2
    return F.batch_norm(y, h.new_zeros(3), h.new_ones(3)).flatten(1)


@pytest.mark.parametrize("change", [after_square, after_gelu, after_conv])
def test_what_the_gradient_needs_must_not_be_changed_in_place(change):
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        HessianOperator(Changing(change).double(), make_batches((7,)))


def test_what_the_gradient_does_not_need_may_be_changed_in_place():
    def add(model, h):
        h += model.frozen(h)
        return model.last(h)

    model, batches = Changing(add).double(), make_batches((7, 3))
    found = matrix_of(HessianOperator(model, batches))
    model.change = lambda model, h: model.last(h + model.frozen(h))
    torch.testing.assert_close(found, matrix_of(HessianOperator(model, batches)))


def test_true_and_empirical_fisher_differ_and_fisher_ignores_the_labels():
    model, batches = make_model("attention"), make_batches((12,))
    other = [(x, (y + 1) % 3) for x, y in batches]
    fisher = matrix_of(FisherOperator(model, batches))
    torch.testing.assert_close(fisher, matrix_of(FisherOperator(model, other)))
    # Of cross-entropy with labels the Gauss-Newton matrix is the Fisher matrix (Martens, 2020).
    torch.testing.assert_close(fisher, matrix_of(GaussNewtonOperator(model, batches)))
    empirical = matrix_of(EmpiricalFisherOperator(model, batches))
    assert (empirical - fisher).abs().max() > 0.01 * fisher.abs().max()


def test_products_are_linear_and_repeatable_under_a_random_transform():
    def jitter(x, y, generator):
        return x + torch.randn(x.shape, generator=generator, dtype=x.dtype), y

    model, batches = make_model("conv"), make_batches((7, 3))
    operator = HessianOperator(model, batches, Objective(transform=jitter), memory=0)
    v = torch.linspace(-1, 1, operator.dim, dtype=torch.float64)
    assert torch.equal(operator @ v, operator @ v)
    torch.testing.assert_close(operator @ (3 * v), 3 * (operator @ v))
    again = HessianOperator(model, batches, Objective(transform=jitter))
    torch.testing.assert_close(operator @ v, again @ v)


def test_scipy_sees_the_same_matrix():
    from scipy.sparse.linalg import eigsh

    model, batches = make_model("conv"), make_batches((7, 3))
    operator = HessianOperator(model, batches)
    theirs, matrix = operator.to_scipy(), oracles.dense(model, batches).numpy()
    values = eigsh(theirs, k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(matrix)[-3:], rtol=1e-8)
    assert operator.num_matvecs > 3
    v = np.linspace(-1, 1, 3 * operator.dim).reshape(-1, 3)
    for product in (theirs @ v, theirs.T @ np.asfortranarray(v)):
        np.testing.assert_allclose(product, matrix @ v, rtol=1e-8, atol=1e-10)


def test_model_is_untouched_and_operators_do_not_disturb_each_other():
    model, batches = make_model("conv"), make_batches((7, 3))
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = snapshot(model)
    first = HessianOperator(model, batches)
    matrix = matrix_of(first)
    second = HessianOperator(model, batches)
    torch.testing.assert_close(matrix_of(second), matrix, rtol=0, atol=0)
    torch.testing.assert_close(matrix_of(first), matrix, rtol=0, atol=0)
    for kind in KINDS.values():
        kind(model, batches).matvec(torch.ones(first.dim))
    assert_untouched(model, before)


def test_a_dropped_operator_frees_its_graphs():
    model, batches = make_model("conv"), make_batches((7, 3))
    gc.collect()
    gc.disable()  # what only the collector could free is a reference cycle
    try:
        operator = HessianOperator(model, batches)
        operator @ torch.ones(operator.dim)
        graphs = [weakref.ref(graph.gradient[0]) for graph in operator._graphs]
        assert len(graphs) == 2
        del operator
        assert [graph() for graph in graphs] == [None, None]
    finally:
        gc.enable()


def test_memory_does_not_grow_with_the_number_of_operators():
    """What autograd saved for one batch is freed: its bytes would show within 60 operators."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1024, 256), nn.Tanh(), nn.Linear(256, 3))
    x = torch.randn(512, 1024, generator=generator)
    batches = [(x, torch.randint(3, (512,), generator=generator))]

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    for _ in range(5):
        HessianOperator(model, batches)
    before = resident()
    for _ in range(60):
        num_bytes = HessianOperator(model, batches)._graphs[0].num_bytes
    assert num_bytes > 2e6
    assert resident() - before < 10 * num_bytes


def test_bad_input_is_refused():
    model, batches = make_model("conv"), make_batches((7, 3))
    operator = HessianOperator(model, batches)
    with pytest.raises(ValueError, match=r"`v` must have shape \(\d+,\), got \(3,\)"):
        operator.matvec(torch.ones(3))
    with pytest.raises(ValueError, match="`vectors` must have shape"):
        operator.matmat(torch.ones(3, 3))
    with pytest.raises(ValueError, match="`memory` must be"):
        HessianOperator(model, batches, memory="lots")
    bad = [(x * float("nan"), y) for x, y in batches[:1]] + batches[1:]
    for kind in KINDS.values():
        with pytest.raises(ValueError, match="finite loss on every batch, got nan on batch 0"):
            kind(model, bad)
    again = make_model("conv")
    first, *rest = again[:3], *again[3:]
    again.forward = lambda x: nn.Sequential(*rest)(checkpoint(first, x, use_reentrant=False))
    before = snapshot(again)
    for kind in KINDS.values():
        with pytest.raises(ValueError, match="must not use gradient checkpointing, .* turn it off"):
            kind(again, batches)
    assert_untouched(again, before)
    with pytest.raises(ValueError, match="logits of shape"):
        FisherOperator(_Map(), batches, Objective(loss=_map_loss))


class _Map(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return x * self.scale


def _map_loss(outputs, targets):
    return outputs.square().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_not_changed_and_dropout_is_off(kind):
    batches = make_batches((7, 3))
    body = make_model("conv")
    model = nn.Sequential(nn.Dropout(0.5), body, nn.Dropout(0.5)).train()
    operator = KINDS[kind](model, batches)
    v = torch.linspace(-1, 1, operator.dim, dtype=torch.float64)
    product = operator @ v
    assert torch.equal(v, torch.linspace(-1, 1, operator.dim, dtype=torch.float64))
    assert torch.equal(product, operator @ v)
    torch.testing.assert_close(product, KINDS[kind](body, batches) @ v)
    torch.testing.assert_close(
        operator @ torch.stack([v, 2 * v], 1), product[:, None] * torch.tensor([1, 2])
    )


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_exact_products_beside_rounded_ones(precision, generator, monkeypatch):
    monkeypatch.setattr("landscape.linalg.hessian.check_precision", lambda *_: None)
    model, batches = make_model("conv", torch.float32), make_batches((7, 5), torch.float32)
    frozen = Objective(weight_decay=0.05).freeze(model, batches)
    rough = HessianOperator.of(frozen, precision=precision)
    exact = rough.exact()
    assert exact.exact() is exact
    assert (rough.precision, exact.precision) == (precision, "full")
    # Under autocast the graph itself is rounded.
    assert (exact._graphs is rough._graphs) is (precision == "tf32")
    v = torch.randn(rough.dim, generator=generator)
    torch.testing.assert_close(exact.matvec(v), HessianOperator.of(frozen).matvec(v))
    assert (rough.num_matvecs, exact.num_matvecs) == (0, 1)


def test_exact_products_are_recorded_with_the_rounded_ones(generator, monkeypatch, recorded):
    """Of batches that are not kept: the gradient, and a product in either precision."""
    monkeypatch.setattr("landscape.linalg.hessian.check_precision", lambda *_: None)
    model, batches = make_model("conv", torch.float32), make_batches((4, 4), torch.float32)
    frozen = Objective().freeze(model, batches)
    rough = HessianOperator.of(frozen, precision="tf32", memory=0)
    v = torch.randn(rough.dim, generator=generator)
    product = rough.matvec(v)
    assert recorded.made == 3
    torch.testing.assert_close(rough.exact().matvec(v), product)
    assert recorded.made == 3
