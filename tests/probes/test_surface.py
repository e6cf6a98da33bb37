import copy
import dataclasses
import functools
import itertools
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from landscape.objective import Objective
from landscape.probes.batch_norm import recalibrated_buffers
from landscape.probes.directions import Directions, random_directions
from landscape.probes.surface import LossLine, LossSurface, loss_line, loss_surface
from landscape.probes.trajectory import project_trajectory
from tests.cases import MODELS, assert_untouched, make_batches, make_model, snapshot

ARRAYS = ("nll", "nll_stderr", "l2", "loss", "accuracy", "ece")
ALL = ("loss", "accuracy", "ece")


def assert_same(a, b, exactly=True, **tolerance):
    for name in ARRAYS:
        ours, theirs = getattr(a, name), getattr(b, name)
        assert (ours is None) == (theirs is None), name
        if ours is None:
            continue
        if exactly:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        else:
            np.testing.assert_allclose(ours, theirs, err_msg=name, **tolerance)


def fixed_directions(*weights, **ignored):
    vectors = tuple({"weight": np.array(w, dtype=np.float64).reshape(1, -1)} for w in weights)
    return Directions(vectors=vectors, kind="random", **ignored)


class Quadratic:
    """Linear regression: its loss is a quadratic form of the weights."""

    def __init__(self, n=20, weight_decay=0.3):
        g = torch.Generator().manual_seed(7)
        self.model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        self.x = torch.randn(n, 3, generator=g, dtype=torch.float64)
        self.y = torch.randn(n, 1, generator=g, dtype=torch.float64)
        self.d = torch.randn(2, 3, generator=g, dtype=torch.float64)
        self.theta = self.model.weight.detach().clone()[0]
        self.objective = Objective(loss=F.mse_loss, weight_decay=weight_decay)
        self.directions = fixed_directions(*self.d.tolist())

    def batches(self, sizes):
        return list(zip(self.x.split(sizes), self.y.split(sizes), strict=True))

    def weights(self, a, b):
        return self.theta + a * self.d[0] + b * self.d[1]

    def squares(self, a, b):
        return (self.x @ self.weights(a, b) - self.y[:, 0]) ** 2

    def surface(self, sizes=(20,), **arguments):
        arguments = {"objective": self.objective, "metrics": "loss", **arguments}
        return loss_surface(
            self.model, self.batches(sizes), directions=self.directions, **arguments
        )


@pytest.mark.parametrize("sizes", [(20,), (10, 10), (9, 8, 3), (1,) * 20], ids=str)
def test_quadratic_loss_has_its_closed_form_however_batched(sizes):
    case = Quadratic()
    surface = case.surface(sizes, span=(-2, 0.5, 0, 3), points=(4, 7))
    np.testing.assert_allclose(surface.x, [-2, -7 / 6, -1 / 3, 0.5])
    np.testing.assert_allclose(surface.y, [0, 0.5, 1, 1.5, 2, 2.5, 3])
    assert surface.nll.shape == surface.l2.shape == surface.nll_stderr.shape == (4, 7)
    for i, a in enumerate(surface.x):
        for j, b in enumerate(surface.y):
            squares = case.squares(a, b).numpy()
            np.testing.assert_allclose(surface.nll[i, j], squares.mean(), rtol=1e-12)
            stderr = squares.std(ddof=1) / np.sqrt(20)
            np.testing.assert_allclose(surface.nll_stderr[i, j], stderr, rtol=1e-9)
            l2 = 0.15 * (case.weights(a, b) ** 2).sum()
            np.testing.assert_allclose(surface.l2[i, j], l2, rtol=1e-12)
    np.testing.assert_array_equal(surface.loss, surface.nll + surface.l2)
    assert surface.accuracy is None
    assert surface.ece is None
    assert surface.num_nonfinite == 0
    assert surface.provenance.num_forwards == 28


def test_sums_of_norms_are_the_other_definition_of_l2():
    model = make_model("conv")
    directions = random_directions(model, num=1)
    arguments = {"directions": directions, "points": [0.0, 0.7], "metrics": "loss"}
    line = loss_line(
        model, make_batches((6,)), objective=Objective(weight_decay=0.05), l2="norms", **arguments
    )
    expected = 0.0
    for name, p in model.named_parameters():
        step = torch.from_numpy(directions.vectors[0].get(name, np.zeros(p.shape)))
        expected += 0.05 * torch.linalg.vector_norm(p.detach() + 0.7 * step).item()
    assert line.l2[1] == pytest.approx(expected, rel=1e-12)
    assert line.l2[0] != line.l2[1]
    assert line.provenance.settings["l2"] == "norms"


def naive_ece(logits, labels):
    """Expected calibration error, sample by sample."""
    total, probabilities = 0.0, logits.softmax(1)
    for b in range(15):
        hits, confidences = [], []
        for p, label in zip(probabilities, labels, strict=True):
            if b / 15 < p.max().item() <= (b + 1) / 15:
                hits.append(float(p.argmax() == label))
                confidences.append(p.max().item())
        total += abs(sum(hits) - sum(confidences))
    return total / len(labels)


def plain_loop(model, directions, x, y, points, weight_decay=0.0):
    """Every point by hand in float64: a fresh copy, all samples at once, the model's own loss."""
    values = {name: [] for name in ("nll", "l2", "accuracy", "ece")}
    for a, b in points:
        net = copy.deepcopy(model).double().eval()
        with torch.no_grad():
            for name, p in net.named_parameters():
                if name in directions.names:
                    d1, d2 = (torch.from_numpy(v[name]).double() for v in directions.vectors)
                    p.copy_(p + a * d1 + b * d2)
            logits = net(x.double())
            values["nll"].append(F.cross_entropy(logits, y).item())
            squares = sum(p.square().sum() for p in net.parameters())
            values["l2"].append(0.5 * weight_decay * float(squares))
            values["accuracy"].append((logits.argmax(1) == y).double().mean().item())
            values["ece"].append(naive_ece(logits, y))
    return values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rule", ["filter", None])
@pytest.mark.parametrize("name", MODELS)
def test_surface_equals_a_plain_loop(name, rule, dtype):
    model = make_model(name, dtype).train()
    batches = make_batches((7, 7, 3), dtype)
    directions = random_directions(model, normalization=rule, ignore_1d=rule is not None)
    surface = loss_surface(
        model,
        batches,
        directions=directions,
        points=(5, 4),
        objective=Objective(weight_decay=0.1),
        metrics=ALL,
    )
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    points = [(a, b) for a in surface.x for b in surface.y]
    expected = plain_loop(model, directions, x, y, points, weight_decay=0.1)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    for column, values in expected.items():
        ours = getattr(surface, column).ravel()
        np.testing.assert_allclose(ours, values, rtol=rtol, atol=1e-6 * (rtol > 1e-6))
    assert len(np.unique(surface.nll)) == 20


@pytest.mark.parametrize("name", MODELS)
def test_batching_changes_nothing(name):
    model = make_model(name)
    surfaces = [
        loss_surface(model, make_batches(sizes), points=3, metrics=ALL)
        for sizes in [(17,), (8, 8, 1), (1, 16)]
    ]
    for other in surfaces[1:]:
        assert_same(surfaces[0], other, exactly=False, rtol=1e-10)


def test_a_seed_fixes_the_surface_whatever_was_drawn_before():
    model, batches = make_model("conv"), make_batches((9, 4))
    seeded = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    first = loss_surface(model, batches, points=3, generator=seeded(5))
    torch.manual_seed(123)
    loss_surface(model, batches, points=2)
    again = loss_surface(model, batches, points=3, generator=seeded(5))
    other = loss_surface(model, batches, points=3, generator=seeded(6))
    assert_same(first, again)
    assert not np.allclose(first.nll, other.nll)
    assert first.nll[1, 1] == other.nll[1, 1]  # both centres are the model


def test_points_do_not_depend_on_each_other():
    model, batches = make_model("attention", torch.float32), make_batches((9,), torch.float32)
    whole = loss_surface(model, batches, points=5, span=3.0)
    for i, j in [(0, 0), (2, 2), (4, 1)]:
        alone = loss_surface(model, batches, points=(whole.x[[i]], whole.y[[j]]))
        assert alone.nll[0, 0] == whole.nll[i, j]
    centre = Objective().freeze(model, batches).value()
    assert whole.nll[2, 2] == centre


class Interruption:
    """A loss that raises at its n-th call."""

    def __init__(self, error, after):
        self.error, self.after, self.calls = error, after, 0

    def __call__(self, outputs, targets):
        self.calls += 1
        if self.calls > self.after:
            raise self.error
        return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("batch_norm", ["fixed", "recalibrate"])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_found(name, batch_norm, error):
    model = make_model(name).train()
    model.head = getattr(model, "head", None)
    next(model.children()).eval()  # flags of its own for each module
    model.register_forward_hook(lambda *_: None)
    list(model.parameters())[0].requires_grad_(False)
    F.cross_entropy(model(make_batches((4,))[0][0]), make_batches((4,))[0][1]).backward()
    before = snapshot(model)
    arguments = {"points": 3, "batch_norm": batch_norm, "metrics": ALL}
    if error is None:
        loss_surface(model, make_batches((5, 3)), **arguments)
    else:
        objective = Objective(loss=Interruption(error, after=30))
        with pytest.raises(type(error)):
            loss_surface(model, make_batches((5, 3)), objective=objective, **arguments)
        assert objective.loss.calls == 31
    assert_untouched(model, before)


def test_a_failing_forward_leaves_the_model_as_found():
    model = make_model("conv").train()
    model[2] = nn.Module()
    calls = []

    def forward(x):
        calls.append(1)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return x

    model[2].forward = forward
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        loss_surface(model, make_batches((5, 3)), points=3, batch_norm="recalibrate")
    assert_untouched(model, before)


class Root(nn.Module):
    """√w is NaN for negative w, −log w infinite at 0."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))
        self.function = function

    def forward(self, x):
        return self.function(self.weight) * x


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (torch.sqrt, [np.nan, np.nan, 0, 1, 2]),
        (lambda w: w.reciprocal().sqrt(), [np.nan, np.nan, np.inf, 1, 0.5]),
    ],
)
def test_values_that_are_not_finite_are_kept_and_counted(function, expected):
    model, batches = Root(function), [(torch.ones(3, 1), torch.zeros(3, 1))]
    line = loss_line(
        model,
        batches,
        directions=fixed_directions([1.0]),
        points=[-3.0, -2.0, -1.0, 0.0, 1.0],
        objective=Objective(loss=F.mse_loss, weight_decay=1.0),
        metrics="loss",
    )
    nan, inf = np.isnan(expected), np.isinf(expected)
    np.testing.assert_array_equal(np.isnan(line.nll), nan)
    np.testing.assert_array_equal(np.isinf(line.loss), inf)
    np.testing.assert_allclose(line.l2, [2, 0.5, 0, 0.5, 2])
    assert line.num_nonfinite == (nan | inf).sum()


def test_a_sample_without_a_prediction_has_no_accuracy():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).repeat(4, 1)
    logits[2, 1] = torch.nan
    data = [(logits[:2], torch.zeros(2).long()), (logits[2:], torch.zeros(2).long())]
    model = nn.Linear(3, 3, bias=False)
    nn.init.eye_(model.weight)
    line = loss_line(model, data, points=[0.0], metrics=ALL)
    assert np.isnan([line.nll[0], line.accuracy[0], line.ece[0], line.nll_stderr[0]]).all()
    whole = loss_line(model, data[:1], points=[0.0], metrics=ALL)
    assert whole.accuracy[0] == 1


def test_large_logits_do_not_overflow():
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    data = [(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([1, 1, 1, 0]))]
    line = loss_line(
        model,
        data,
        directions=Directions(({"weight": np.eye(2)},), kind="random"),
        points=[0.0, 1e4 - 1],
        metrics=ALL,
    )
    assert line.nll[1] == pytest.approx(7500)
    assert line.accuracy[1] == 0.25
    assert line.ece[1] == pytest.approx(0.75)
    assert line.num_nonfinite == 0


def test_labels_soft_ignored_and_weighted(generator):
    model = nn.Linear(4, 3, dtype=torch.float64)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    hard = torch.randint(3, (12,), generator=generator)
    logits = model(x).detach()
    one = {"points": [0.0], "metrics": ALL}

    soft = torch.rand(12, 3, generator=generator, dtype=torch.float64).softmax(1)
    line = loss_line(model, [(x, soft)], **one)
    terms = -(soft * logits.log_softmax(1)).sum(1).numpy()
    assert line.nll[0] == pytest.approx(terms.mean())
    assert line.nll_stderr[0] == pytest.approx(terms.std(ddof=1) / np.sqrt(12))
    assert line.accuracy[0] == np.mean(logits.argmax(1).numpy() == soft.argmax(1).numpy())
    assert line.ece[0] == pytest.approx(naive_ece(logits, soft.argmax(1)))

    ignored = hard.clone()
    ignored[:5] = -100
    line = loss_line(model, [(x[:7], ignored[:7]), (x[7:], ignored[7:])], **one)
    rest = loss_line(model, [(x[5:], hard[5:])], **one)
    assert_same(line, rest, exactly=False, rtol=1e-12)

    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    for loss in (nn.CrossEntropyLoss(weight), functools.partial(F.cross_entropy, weight=weight)):
        data = [(x[:7], hard[:7]), (x[7:], hard[7:])]
        line = loss_line(model, data, objective=Objective(loss=loss), **one)
        assert line.nll[0] == pytest.approx(F.cross_entropy(logits, hard, weight).item())
        a = weight[hard].numpy()
        c = F.cross_entropy(logits, hard, weight, reduction="none").numpy()
        spread = ((c - a * line.nll[0]) ** 2).sum() / a.sum() ** 2
        s, t = (((a / a.sum()) ** power).sum() for power in (2, 3))
        assert line.nll_stderr[0] == pytest.approx(np.sqrt(spread * s / (s + s**2 - 2 * t)))


def test_the_error_of_few_weighted_samples_is_the_spread_over_all_their_losses():
    """Each of four samples has a loss of 0.5 or 1.5: the mean over all 16 cases is exact."""
    model = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    nn.init.eye_(model.weight)
    labels = torch.tensor([0, 0, 1, 2])
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64))
    means, errors = [], []
    for losses in itertools.product([0.5, 1.5], repeat=4):
        own = torch.tensor(losses, dtype=torch.float64).neg().exp()[:, None]
        p = torch.where(labels[:, None] == torch.arange(3), own, (1 - own) / 2)
        line = loss_line(model, [(p.log(), labels)], points=[0.0], objective=Objective(loss=loss))
        means.append(line.nll[0])
        errors.append(line.nll_stderr[0])
    assert np.square(errors).mean() == pytest.approx(np.var(means), rel=1e-9)


def test_a_loss_without_terms_by_sample_has_no_error():
    model, batches = make_model("attention"), make_batches((6, 3))
    known = loss_line(model, batches, points=[0.0])
    unknown = loss_line(
        model, batches, points=[0.0], objective=Objective(loss=lambda o, t: F.cross_entropy(o, t))
    )
    assert unknown.nll[0] == known.nll[0]
    assert np.isnan(unknown.nll_stderr[0])
    assert known.nll_stderr[0] > 0


def test_a_loss_whose_terms_have_another_mean_has_no_error(generator):
    """`batchmean` is a sum over classes, and its terms are one a class."""
    x = torch.randn(12, 4, generator=generator)
    y = torch.randn(12, 3, generator=generator).softmax(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1))
    objective = Objective(loss=nn.KLDivLoss(reduction="batchmean"))
    line = loss_line(model, [(x, y)], points=[0.0], objective=objective, metrics="loss")
    assert np.isfinite(line.nll).all()
    assert np.isnan(line.nll_stderr).all()


def test_the_loss_of_every_pixel_counts(generator):
    model = nn.Conv2d(2, 3, 1, dtype=torch.float64)
    x = torch.randn(6, 2, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (6, 4, 4), generator=generator)
    line = loss_line(model, [(x[:4], y[:4]), (x[4:], y[4:])], points=[0.0], metrics=ALL)
    logits = model(x).detach()
    assert line.nll[0] == pytest.approx(F.cross_entropy(logits, y).item())
    assert line.accuracy[0] == pytest.approx((logits.argmax(1) == y).double().mean().item())
    images = F.cross_entropy(logits, y, reduction="none").mean((1, 2)).numpy()
    assert line.nll_stderr[0] == pytest.approx(images.std(ddof=1) / np.sqrt(6))


class OwnLoss(nn.Module):
    """Mapping in, mapping out, as Hugging Face models do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, pixel_values, labels=None):
        logits = self.head(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


@pytest.mark.parametrize("metrics", ["loss", ALL])
@pytest.mark.parametrize("loss", [None, F.cross_entropy])
def test_mapping_batches_and_models_with_their_own_loss(loss, metrics, generator):
    model = OwnLoss()
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (9,), generator=generator)
    data = [{"pixel_values": x[:5], "labels": y[:5]}, {"pixel_values": x[5:], "labels": y[5:]}]
    arguments = {"points": 3, "metrics": metrics}
    ours = loss_line(model, data, objective=Objective(loss=loss), **arguments)
    directions = Directions(
        ({"weight": ours.directions.vectors[0]["head.weight"]},), "random", ignored=("bias",)
    )
    plain = loss_line(model.head, [(x, y)], directions=directions, **arguments)
    np.testing.assert_allclose(ours.nll, plain.nll, rtol=1e-12)
    if metrics == ALL:
        np.testing.assert_array_equal(ours.accuracy, plain.accuracy)


@pytest.mark.parametrize("metrics", ["loss", ALL])
def test_a_later_batch_without_a_loss_of_its_own_is_refused_by_name(metrics, generator):
    x = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (4,), generator=generator)
    data = [{"pixel_values": x, "labels": y}, {"pixel_values": x}]
    with pytest.raises(ValueError, match="pass batches that are mappings with labels"):
        loss_line(OwnLoss(), data, objective=Objective(loss=None), points=3, metrics=metrics)


def mix(x, y, generator):
    order = torch.randperm(len(x), generator=generator)
    share = torch.rand((), generator=generator)
    y = F.one_hot(y, 3).to(x.dtype)
    return share * x + (1 - share) * x[order], share * y + (1 - share) * y[order]


def test_a_shuffling_loader_and_random_mixup_are_one_function():
    """Along two equal directions a point depends on the sum of its coordinates only."""
    model, batches = make_model("conv"), make_batches((40,))
    data = DataLoader(TensorDataset(*batches[0]), batch_size=8, shuffle=True)
    one = random_directions(model, num=1)
    twice = Directions(one.vectors * 2, kind="random", ignored=one.ignored)
    surface = loss_surface(
        model, data, directions=twice, points=5, objective=Objective(transform=mix)
    )
    flipped = surface.nll[:, ::-1]
    for offset in range(-4, 5):
        np.testing.assert_allclose(np.ptp(np.diag(flipped, offset)), 0, atol=1e-12)
    assert np.ptp(np.diag(surface.nll)) > 1e-3


def test_a_subset_of_parameters_is_what_moves_and_what_l2_counts():
    model, batches = make_model("attention"), make_batches((6,))
    line = loss_line(
        model, batches, points=3, objective=Objective(weight_decay=2.0, parameters="head.*")
    )
    assert line.directions.names == ("head.weight",)
    expected = sum(p.detach().square().sum() for p in model.head.parameters())
    assert line.l2[1] == pytest.approx(float(expected))
    # directions may leave the subset: the loss follows, L2 does not
    outside = loss_line(
        model,
        batches,
        points=3,
        directions=random_directions(model, num=1, parameters="qkv.*"),
        objective=Objective(weight_decay=2.0, parameters="head.*"),
    )
    assert np.ptp(outside.l2) == 0
    assert np.ptp(outside.nll) > 0


def test_a_line_is_a_row_of_the_surface():
    model, batches = make_model("conv"), make_batches((9, 2))
    directions = random_directions(model)
    surface = loss_surface(model, batches, directions=directions, points=5, metrics=ALL)
    first = loss_line(model, batches, directions=directions.select(0), points=5, metrics=ALL)
    second = loss_line(model, batches, directions=directions.select(1), points=5, metrics=ALL)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(first, name), getattr(surface, name)[:, 2])
        np.testing.assert_array_equal(getattr(second, name), getattr(surface, name)[2, :])


def test_fixed_statistics_stay_and_recalibrated_ones_are_those_of_training():
    model, batches = make_model("conv"), make_batches((20,))
    second = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    model = nn.Sequential(*model[:3], *(m.double() for m in second), *model[3:])
    directions = random_directions(model)
    arguments = {"directions": directions, "points": 3}
    fixed = loss_surface(model, batches, **arguments)
    again = loss_surface(model, batches, batch_norm="recalibrate", **arguments)
    x, y = batches[0]
    for i, a in enumerate(fixed.x):
        net = copy.deepcopy(model).train()
        with torch.no_grad():
            for name in directions.names:
                d1, d2 = (torch.from_numpy(v[name]) for v in directions.vectors)
                net.get_parameter(name).add_(a * d1 + fixed.y[0] * d2)
            net[1].momentum = net[4].momentum = 1.0
            net(x)
            expected = F.cross_entropy(net.eval()(x), y).item()
        assert again.nll[i, 0] == pytest.approx(expected, rel=1e-9)
    assert not np.allclose(fixed.nll, again.nll)
    assert again.provenance.num_forwards == 18


@pytest.mark.parametrize(
    ("classes", "loss", "targets"),
    [
        (1, nn.BCEWithLogitsLoss(), torch.ones(8, 1)),
        (3, nn.BCEWithLogitsLoss(), torch.ones(8, 3).tril()),
        (1, F.mse_loss, torch.randn(8, 1)),
        (3, F.mse_loss, torch.randn(8, 3)),
    ],
    ids=["binary", "several labels", "regression", "several outputs"],
)
def test_accuracy_is_refused_where_the_targets_are_no_classes(classes, loss, targets):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).double()
    data, objective = [(make_batches((8,))[0][0], targets)], Objective(loss=loss)
    with pytest.raises(ValueError, match=r"`metrics` must be \('loss',\) where the targets are no"):
        loss_line(model, data, points=3, objective=objective, metrics=("accuracy",))
    line = loss_line(model, data, points=[0.0], objective=objective, metrics="loss")
    assert line.nll[0] == pytest.approx(loss(model(data[0][0]), targets.double()).item())


def test_a_regression_on_one_hot_targets_has_an_accuracy():
    model, (x, y) = make_model("conv"), make_batches((9,))[0]
    objective = Objective(loss=F.mse_loss)
    line = loss_line(model, [(x, F.one_hot(y, 3).double())], points=[0.0], objective=objective)
    model.eval()
    assert line.accuracy[0] == np.mean(model(x).argmax(1).numpy() == y.numpy())


def test_recalibration_needs_two_values_a_channel():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"got 1 in '2'; choose a batch size that leaves no"):
        loss_line(model.double(), make_batches((5, 1)), points=3, batch_norm="recalibrate")


def test_two_lists_are_the_points_of_two_axes():
    model, batches = make_model("conv"), make_batches((5,))
    surface = loss_surface(model, batches, points=[[-1.0, 0.0, 1.0], [0.0]])
    assert surface.nll.shape == (3, 1)
    assert loss_surface(model, batches, points=[0.0, 1.0]).nll.shape == (2, 2)


def test_recalibration_of_one_layer_does_not_depend_on_batches_and_needs_a_batch_norm():
    model = make_model("conv")
    a, b = (
        loss_line(model, make_batches(sizes), points=3, batch_norm="recalibrate")
        for sizes in [(20,), (7, 12, 1)]
    )
    np.testing.assert_allclose(a.nll, b.nll, rtol=1e-10)
    plain, batches = make_model("attention"), make_batches((5, 4))
    assert_same(
        loss_line(plain, batches, points=3),
        loss_line(plain, batches, points=3, batch_norm="recalibrate"),
    )


def test_far_points_keep_valid_statistics():
    """Statistics that moved with the weights would have negative variances: NaN."""
    surface = loss_surface(make_model("conv"), make_batches((9,)), span=20.0, points=5)
    assert surface.num_nonfinite == 0


@pytest.mark.parametrize("span", [1.0, 0.3, 1, 7.7])
@pytest.mark.parametrize("points", [3, 21, 49, 101])
def test_odd_axes_hold_the_model_itself(span, points):
    case = Quadratic()
    line = loss_line(
        case.model,
        case.batches((20,)),
        directions=case.directions.select(0),
        span=span,
        points=points,
        metrics="loss",
        objective=case.objective,
    )
    assert line.x[points // 2] == 0
    assert (line.x[0], line.x[-1]) == (-span, span)
    np.testing.assert_allclose(np.diff(line.x), 2 * span / (points - 1))


def test_results_come_back_from_disk(tmp_path):
    model, batches = make_model("conv"), make_batches((9,))
    surface = loss_surface(model, batches, points=(3, 2), metrics=ALL)
    loaded = LossSurface.load(surface.save(tmp_path / "surface"))
    assert_same(surface, loaded)
    reused = loss_surface(model, batches, points=(3, 2), metrics=ALL, directions=loaded.directions)
    assert_same(surface, reused)
    line = loss_line(model, batches, points=3)
    assert LossLine.load(line.save(tmp_path / "line")).ece is None


def test_progress_is_shown_on_request(capfd):
    loss_line(make_model("attention"), make_batches((4,)), points=2)
    assert capfd.readouterr() == ("", "")
    loss_line(make_model("attention"), make_batches((4,)), points=2, progress=True)
    assert "Loss line" in capfd.readouterr().err


# --- resume ---


class Counter(nn.Module):
    """√w · x with a count of forward passes; NaN for negative weights, loss 0 at weight 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.weight.sqrt() * x


class Stop(Exception):
    pass


def counted_surface(model, path, stop_at=None, points=(5, 4), **arguments):
    def loss(outputs, targets):
        if stop_at is not None and model.calls > stop_at:
            raise Stop
        return F.mse_loss(outputs, targets)

    loss.__name__ = "mse"
    return loss_surface(
        model,
        [(torch.ones(2, 1), torch.zeros(2, 1))],
        directions=fixed_directions([1.0], [0.5]),
        span=2.0,
        points=points,
        objective=Objective(loss=loss),
        metrics="loss",
        resume=path,
        **arguments,
    )


def test_an_interrupted_surface_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "deep" / "points"
    whole = counted_surface(Counter(), None)
    assert np.isnan(whole.nll).any()
    assert (whole.nll == 0).any()
    model = Counter()
    with pytest.raises(Stop):
        counted_surface(model, path, stop_at=12)
    done = len(path.read_bytes().splitlines()) - 1
    assert 0 < done < 20
    model.calls = 0
    rest = counted_surface(model, path)
    assert_same(whole, rest)
    setup = model.calls - (20 - done)
    assert rest.provenance.num_forwards == 20 - done + 1
    assert len(path.read_bytes().splitlines()) - 1 == 20
    model.calls = 0
    complete = counted_surface(model, path)
    assert model.calls == setup  # NaN and 0 are values like any other: not computed again
    assert complete.provenance.num_forwards == 1  # a check of one point
    assert_same(whole, complete)


@pytest.mark.parametrize("damage", ["cut", "cut before newline", "changed", "garbage"])
def test_a_damaged_end_is_computed_again(damage, tmp_path):
    path = tmp_path / "points"
    whole = counted_surface(Counter(), path)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    kept = 20
    if damage == "cut":
        path.write_bytes(content[:-7])
        kept = 19
    elif damage == "cut before newline":
        path.write_bytes(content[:-1])
        kept = 19
    elif damage == "changed":
        lines[4] = lines[4].replace(b"[", b"[1", 1)
        path.write_bytes(b"".join(lines))
        kept = 3
    else:
        path.write_bytes(content + b"\x00\xff garbage")
    model = Counter()
    again = counted_surface(model, path)
    assert again.provenance.num_forwards == 20 - kept + 1
    assert_same(whole, again)
    assert path.read_bytes() == content


def changed(kind, model, batches, arguments):
    if kind == "model":
        model = copy.deepcopy(model)
        with torch.no_grad():
            model[0].weight[0, 0, 0, 0] += 1e-3
    elif kind == "buffers":
        model = copy.deepcopy(model)
        model[1].running_var[0] += 1e-3
    elif kind == "data":
        batches = make_batches((9, 4), seed=2)
    elif kind == "targets":
        batches = [(x, y.flip(0)) for x, y in batches]
    elif kind == "directions":
        arguments = {**arguments, "generator": torch.Generator().manual_seed(1)}
    elif kind == "weight decay":
        arguments = {**arguments, "objective": Objective(weight_decay=0.2)}
    elif kind == "loss of the same name":
        loss = lambda o, t: 2 * F.cross_entropy(o, t)  # noqa: E731
        loss.__name__ = "cross_entropy"
        arguments = {**arguments, "objective": Objective(loss=loss, weight_decay=0.1)}
    elif kind == "grid":
        arguments = {**arguments, "points": (4, 3)}
    else:
        arguments = {
            **arguments,
            **{
                "metrics": {"metrics": ALL},
                "l2": {"l2": "norms"},
                "batch_norm": {"batch_norm": "recalibrate"},
            }[kind],
        }
    return model, batches, arguments


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("model", "model"),
        ("buffers", "model"),
        ("data", "data"),
        ("targets", "data"),
        ("directions", "directions"),
        ("weight decay", "objective"),
        ("loss of the same name", "loss"),
        ("grid", "grid"),
        ("metrics", "metrics"),
        ("l2", "l2"),
        ("batch_norm", "batch_norm"),
    ],
)
def test_points_of_another_surface_are_refused(kind, word, tmp_path):
    path = tmp_path / "points"
    model, batches = make_model("conv"), make_batches((9, 4))
    arguments = {"points": (3, 2), "objective": Objective(weight_decay=0.1), "resume": path}
    loss_surface(model, batches, **arguments)
    content = path.read_bytes()
    model, batches, arguments = changed(kind, model, batches, arguments)
    with pytest.raises(ValueError, match=rf"`resume` must hold .* another {word}"):
        loss_surface(model, batches, **arguments)
    assert path.read_bytes() == content


def test_points_of_other_class_weights_are_refused(tmp_path):
    """However little it shows in the loss of the point that is checked."""
    model, batches, path = make_model("conv"), make_batches((9,)), tmp_path / "points"
    for last in (1.0, 1.00001):
        loss = nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, last]).double())
        arguments = {"points": 2, "objective": Objective(loss=loss), "resume": path}
        if last == 1:
            loss_line(model, batches, **arguments)
    with pytest.raises(ValueError, match="`resume` must hold .* another objective"):
        loss_line(model, batches, **arguments)


def test_the_same_data_in_other_batches_go_on(tmp_path):
    path, model = tmp_path / "points", make_model("conv")
    loss_surface(model, make_batches((9, 4)), points=2, resume=path)
    again = loss_surface(model, make_batches((13,)), points=2, resume=path)
    assert again.provenance.num_forwards == 1


def test_statistics_estimated_again_are_exact_far_from_zero_and_of_no_one_else(generator):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    x = 1000 + torch.randn(64, 4, generator=generator)
    y = torch.arange(64) % 3
    frozen = Objective().freeze(model, [(x[:40], y[:40]), (x[40:], y[40:])])
    before = {name: t.clone() for name, t in frozen.space.buffers.items()}
    value = frozen.value()
    found = recalibrated_buffers(frozen, frozen.space.values)
    torch.testing.assert_close(
        found["0.running_var"].double(), x.double().var(0), rtol=1e-4, atol=0
    )
    assert all(torch.equal(t, before[name]) for name, t in frozen.space.buffers.items())
    assert frozen.value() == value


@pytest.mark.filterwarnings("ignore:`model` has a batch norm without:UserWarning")
@pytest.mark.parametrize("kept", [True, False])
def test_other_batches_are_another_surface_where_norms_see_batches(kept, tmp_path):
    """A norm that is recalibrated, or keeps no statistics."""
    path = tmp_path / "points"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(3, track_running_stats=kept)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), norm).double()
    arguments = {"points": 2, "resume": path, "batch_norm": "recalibrate" if kept else "fixed"}
    loss_surface(model, make_batches((9, 4)), **arguments)
    with pytest.raises(ValueError, match="`resume` must hold .* another batch sizes"):
        loss_surface(model, make_batches((13,)), **arguments)


def test_points_of_a_loss_that_differs_a_little_are_refused(tmp_path, generator):
    model, path = nn.Linear(5, 3), tmp_path / "points"
    data = [(torch.randn(20, 5, generator=generator), torch.arange(20) % 3)]

    def line(factor, **arguments):
        loss = Objective(loss=lambda o, t: F.cross_entropy(factor * o, t))
        return loss_line(model, data, points=3, objective=loss, **arguments).nll

    line(1.0, resume=path)
    with pytest.raises(ValueError, match="`resume` must hold .* got points of another loss"):
        line(1.002, resume=path)
    with pytest.raises(ValueError, match="`resume` must be a file, got the folder"):
        line(1.0, resume=tmp_path)


def test_a_line_of_which_a_part_is_written_is_written_to_its_end(tmp_path, monkeypatch):
    path, write = tmp_path / "points", os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:7]))
    counted_surface(Counter(), path)
    assert len(path.read_bytes().splitlines()) == 1 + 20
    assert_same(counted_surface(Counter(), path), counted_surface(Counter(), None))


def test_a_call_that_fails_at_once_leaves_no_file(tmp_path):
    path, data = tmp_path / "points", [(torch.ones(4, 3), torch.ones(4))]
    arguments = {"objective": Objective(loss=lambda o, t: F.mse_loss(o[:, 0], t)), "resume": path}
    with pytest.raises(ValueError, match="`metrics` must be"):
        loss_line(nn.Linear(3, 1), data, points=2, **arguments)
    assert not path.exists()
    assert loss_line(nn.Linear(3, 1), data, points=2, metrics="loss", **arguments).x[1] == 1


@pytest.mark.parametrize("content", [b"", b"my notes\n", b"\x89PNG\r\n\x1a\n", b'{"a": 1}\n'])
def test_a_foreign_file_is_refused_and_kept(content, tmp_path):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="`resume` must be a new file or one written by"):
        loss_surface(make_model("conv"), make_batches((4,)), points=2, resume=path)
    assert path.read_bytes() == content


KILLED = """
import os, sys, time, torch
from torch import nn
from landscape.probes.surface import loss_surface
torch.set_num_threads(1)
class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(float(sys.argv[2]))
        return super().forward(x)
g = torch.Generator().manual_seed(0)
model = Slow(4, 3)
with torch.no_grad():
    model.weight.normal_(generator=g)
    model.bias.normal_(generator=g)
data = [(torch.randn(8, 4, generator=g), torch.randint(3, (8,), generator=g))]
surface = loss_surface(model, data, points=(6, 5), resume=sys.argv[1] or None)
surface.save(sys.argv[3])
print(surface.provenance.num_forwards)
"""


def run_script(path, delay, result):
    command = [sys.executable, "-c", KILLED, str(path), str(delay), str(result)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        cwd=os.getcwd(),
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )


def test_a_killed_process_loses_and_doubles_no_point(tmp_path):
    path = tmp_path / "points"
    process = run_script(path, 0.05, tmp_path / "never")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") > 7:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "never.npz").exists()
    done = path.read_bytes().count(b"\n") - 1
    assert 7 <= done < 30
    output, _ = run_script(path, 0.0, tmp_path / "resumed").communicate()
    assert float(output) == 30 - done + 1
    run_script("", 0.0, tmp_path / "whole").communicate()
    assert_same(
        LossSurface.load(tmp_path / "resumed.npz"), LossSurface.load(tmp_path / "whole.npz")
    )


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"points": 1}, ValueError, r"`points` must be at least 2, got 1; pass `\[0.0\]`"),
        ({"points": (3, 0)}, ValueError, "`points` must be at least 2, got 0"),
        ({"points": [0.0, 0.0, 1.0]}, ValueError, "`points` must increase"),
        ({"points": [0.0, np.nan]}, ValueError, "`points` must be a number or finite"),
        ({"points": (0.5, 3)}, ValueError, "`points` must be a number or finite"),
        ({"span": 0.0}, ValueError, "`span` must be finite and increasing, got 0.0"),
        ({"span": (1, -1)}, ValueError, "`span` must be finite and increasing"),
        ({"span": (2, 2, 0, 1)}, ValueError, "`span` must be finite and increasing"),
        ({"span": (0, 1, 2, 2)}, ValueError, "`span` must be finite and increasing"),
        ({"span": (0, 1, 2)}, ValueError, r"`span` must be a number, \(low, high\) or"),
        ({"span": np.inf}, ValueError, "`span` must be finite"),
        ({"metrics": ("f1",)}, ValueError, "`metrics` must be one of 'loss', 'accuracy', 'ece'"),
        ({"l2": "theirs"}, ValueError, "`l2` must be one of 'squared', 'norms'"),
        ({"batch_norm": "train"}, ValueError, "`batch_norm` must be one of 'fixed'"),
        ({"generator": 0}, TypeError, "`generator` must be a torch.Generator"),
        ({"directions": "random"}, TypeError, "`directions` must be Directions, got str"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments, error, message):
    loss = Interruption(AssertionError("work was done"), after=0)
    with pytest.raises(error, match=message):
        loss_surface(
            make_model("conv"), make_batches((4,)), objective=Objective(loss=loss), **arguments
        )


def test_directions_that_do_not_fit_are_refused():
    model, batches = make_model("conv"), make_batches((4,))
    with pytest.raises(ValueError, match=r"`directions` must hold 1, got 2; choose with"):
        loss_line(model, batches, directions=random_directions(model))
    with pytest.raises(ValueError, match=r"`directions` must hold 2, got 1"):
        loss_surface(model, batches, directions=random_directions(model, num=1))
    with pytest.raises(ValueError, match="`directions` must be made for this model"):
        loss_surface(model, batches, directions=random_directions(make_model("attention")))
    still = copy.deepcopy(model)
    for p in still.parameters():
        nn.init.zeros_(p)
    with pytest.raises(ValueError, match="`directions` must have finite lengths above 0"):
        loss_surface(still, batches)


@pytest.mark.parametrize("scan", [loss_line, loss_surface])
def test_results_without_vectors_are_small_and_the_same_otherwise(scan, tmp_path):
    model, batches = make_model("conv"), make_batches((4,))
    result = scan(model, batches, points=3)
    bare = type(result).load(result.without_vectors().save(tmp_path / "bare"))
    assert (tmp_path / "bare.npz").stat().st_size < 4000
    assert dataclasses.replace(bare, directions=result.directions) == result
    assert (len(bare.directions), bare.directions.names) == (len(result.directions), ())
    assert bare.directions.ignored == result.directions.ignored
    for use in (
        lambda: scan(model, batches, directions=bare.directions),
        lambda: project_trajectory([model.state_dict()] * 3, bare.directions),
    ):
        with pytest.raises(ValueError, match="`directions` must hold their vectors, got none"):
            use()


def test_bad_data_are_refused():
    model = make_model("conv")
    with pytest.raises(TypeError, match="one-shot generator"):
        loss_surface(model, (b for b in make_batches((4,))), points=2)
    regression, loss = nn.Linear(3, 1), lambda o, t: F.mse_loss(o[:, 0], t)  # noqa: E731
    data = [(torch.ones(4, 3), torch.ones(4))]
    with pytest.raises(ValueError, match=r"`metrics` must be \('loss',\) where the targets"):
        loss_line(regression, data, points=2, objective=Objective(loss=loss))
    with pytest.raises(ValueError, match="`span` must be a number"):
        loss_line(model, make_batches((4,)), span=(0, 1, 0, 2))


def test_one_output_has_no_accuracy():
    model, data = nn.Linear(4, 1), [(torch.randn(6, 4), torch.arange(6) % 2)]
    binary = Objective(
        loss=lambda o, t: F.binary_cross_entropy_with_logits(o.squeeze(1), t.float())
    )
    with pytest.raises(ValueError, match="no labels of two or more classes"):
        loss_line(model, data, objective=binary, points=3)
    assert loss_line(model, data, objective=binary, points=3, metrics="loss").nll.shape == (3,)
