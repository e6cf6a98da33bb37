import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape.objective import Objective
from landscape.probes.directions import random_directions
from landscape.probes.forward import Forward, _close
from landscape.probes.planes import between
from landscape.probes.surface import loss_line, loss_surface
from landscape.probes.weights import MovedWeights
from tests.cases import MODELS, assert_untouched, make_batches, make_model, snapshot

ALL = ("loss", "accuracy", "ece")
SIZES = (40, 23)  # both above a part, the second cut unevenly


class Viewed(nn.Module):
    """Its `view` wants channels first in memory."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 1)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1))


class Standardised(Viewed):
    """So does one of its weights, chosen or not."""

    def forward(self, x):
        w = self.conv.weight
        w = w / w.view(len(w), -1).std(dim=1).view(-1, 1, 1, 1)
        return self.head(F.conv2d(x, w, padding=1).flatten(1))


def standardised():
    model = Standardised()
    model.conv = nn.Conv2d(4, 3, 2, padding=1)
    model.head = nn.Linear(27, 3)
    return model


def standardised_and_fixed():
    model = standardised()
    model.conv.requires_grad_(False)
    return model


def batch_statistics():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3, track_running_stats=False)
    )


def behind_a_head_of_zeros():
    model = nn.Sequential(batch_statistics(), nn.Linear(3, 3))
    nn.init.zeros_(model[1].weight)
    return model


def plain(model, directions, batches, a, b, loss=F.cross_entropy):
    """The mean loss at one point by hand: a float64 copy, every batch whole."""
    net = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name in directions.names:
            d1, d2 = (torch.from_numpy(v[name]).double() for v in directions.vectors)
            net.get_parameter(name).add_(a * d1 + b * d2)
        total = sum(len(y) * loss(net(x.double()), y) for x, y in batches)
    return float(total) / sum(len(y) for _, y in batches)


class Normed(nn.Module):
    """Convolutions with batch norms of every kind, and as many ways not to fold one."""

    def __init__(self, kind="plain"):
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, groups=2, bias=False, padding=1)
        self.last = nn.BatchNorm2d(6, affine=False, eps=0.1)
        self.gate = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(6, 3)
        if kind == "tied":
            self.other = nn.Conv2d(4, 6, 3, padding=1)
            self.other.weight = self.first.weight
        if kind == "batch statistics":
            self.norm = nn.BatchNorm2d(6, track_running_stats=False)
        if kind == "replaced":
            norm = self.norm
            norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x) + self.gate
        if kind == "hooked":
            self.first.register_forward_hook(lambda module, args, out: out + self.gate)

    def forward(self, x):
        y = self.first(x)
        h = self.norm(y)
        if self.kind == "used twice":
            h = h + self.gate * y
        if self.kind == "called twice":
            h = h + self.gate * self.norm(self.first(-x))
        if self.kind == "tied":
            h = h + self.gate * self.other(x)
        return self.head(self.last(self.second(h.relu())).mean((2, 3)))


def normed(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Normed(kind)
        model.train()(3 + 2 * torch.randn(64, 4, 5, 5))
    return model


@pytest.mark.parametrize(
    ("kind", "norms"),  # how often one is called: the second is folded in all but the last
    [
        ("plain", 0),
        ("used twice", 1),
        ("called twice", 2),
        ("tied", 1),
        ("hooked", 1),
        ("replaced", 1),
        ("batch statistics", 2),
    ],
)
def test_batch_norms_are_folded_where_that_changes_nothing(kind, norms, monkeypatch):
    model = normed(kind)
    x = torch.randn(40, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    frozen = Objective().freeze(model, [(x, torch.zeros(40, dtype=torch.long))])
    before = snapshot(model)
    forward = Forward(frozen)
    state = {name: value + 0.1 for name, value in frozen.space.values.items()}
    with torch.no_grad():
        expected = frozen.logits(state, x)
        calls = []
        monkeypatch.setattr(F, "batch_norm", lambda *a, _f=F.batch_norm: calls.append(1) or _f(*a))
        outputs = forward.logits(state, x, 40)
    assert len(calls) == norms
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    state["head.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError):
        forward.logits(state, x, 40)
    assert_untouched(model, before)
    assert model.second.bias is None
    assert "forward" not in vars(model.last)


@pytest.mark.parametrize(
    ("make", "dtype", "way"),
    [
        (lambda: make_model("conv"), torch.float32, (True, True)),
        (lambda: make_model("conv"), torch.float64, (True, False)),
        (lambda: make_model("attention"), torch.float32, (True, False)),
        (lambda: make_model("tied"), torch.float64, (True, False)),
        (Viewed, torch.float32, (True, False)),
        (standardised, torch.float32, (True, False)),
        (standardised_and_fixed, torch.float32, (True, False)),
        (batch_statistics, torch.float32, (False, False)),
        (behind_a_head_of_zeros, torch.float32, (False, False)),
    ],
    ids=[
        "conv",
        "conv float64",
        "attention",
        "tied",
        "view",
        "view of a weight",
        "view of a fixed weight",
        "batch statistics",
        "zeros",
    ],
)
@pytest.mark.filterwarnings("ignore:`model` has a batch norm without:UserWarning")
def test_batches_are_cut_only_where_that_changes_nothing(make, dtype, way):
    model, batches = make().to(dtype).train(), make_batches(SIZES, dtype)
    before = snapshot(model)
    forward = Forward(Objective().freeze(model, batches))
    assert (forward.part > 0, forward.channels_last) == way
    directions = random_directions(model)
    surface = loss_surface(model, batches, directions=directions, points=2)
    assert_untouched(model, before)
    expected = [[plain(model, directions, batches, a, b) for b in (-1, 1)] for a in (-1, 1)]
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(surface.nll, expected, rtol=rtol)


def test_parts_are_larger_where_activations_are_small():
    batches = make_batches((40,), torch.float32)
    assert Forward(Objective().freeze(make_model("conv", torch.float32), batches)).part == 64
    for width, part in [(2**16, 16), (44000, 23), (2**14, 64)]:  # 4 bytes · width a sample
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Linear(width, 3))
        assert Forward(Objective().freeze(model, batches)).part == part


class Graph(nn.Module):
    """Needs all of a batch: a matrix of its neighbours goes with the samples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, x, edges):
        return edges @ self.layer(x)


class Memory(nn.Module):
    """Looks into a table that is no part of the samples, and may be as long as a batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x, table):
        keys = self.layer(table)
        return self.head((self.layer(x) @ keys.T).softmax(1) @ keys)


def test_tables_of_a_mapping_are_not_cut(generator):
    def numbers(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    table = numbers(100, 5)
    data = [{"x": numbers(n, 5), "table": table, "labels": torch.arange(n) % 3} for n in (128, 100)]
    graph = [{"x": numbers(50, 5), "edges": numbers(50, 50), "labels": torch.arange(50) % 3}]
    for model, batches in ((Memory(), data), (Graph(), graph)):
        nll = loss_line(model, batches, points=[0.0]).nll[0]
        assert nll == pytest.approx(Objective().freeze(model, batches).value(), rel=1e-12)


def test_zeros_that_must_stay_so_are_left(generator):
    class Rooted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3, dtype=torch.float64)
            self.size = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x):
            if (self.size < 0).any():
                raise ValueError("a size below 0")
            return self.layer(x) + self.size

    x = torch.rand(40, 5, generator=generator, dtype=torch.float64)
    model, batches = Rooted(), [(x, torch.arange(40) % 3)]
    forward = Forward(Objective().freeze(model, batches))
    assert forward.part
    assert loss_line(model, batches, points=3).nll.shape == (3,)


def test_a_loss_of_the_whole_batch_sees_the_whole_batch():
    model, batches = make_model("attention"), make_batches((40,))
    hardest = lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none").max()  # noqa: E731
    directions = random_directions(model)
    objective = Objective(loss=hardest)
    surface = loss_surface(model, batches, directions=directions, points=2, objective=objective)
    expected = plain(model, directions, batches, -1, 1, hardest)
    assert surface.nll[0, 1] == pytest.approx(expected, rel=1e-12)


def test_mapping_batches_are_cut_too():
    class Named(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.sizes = model, []

        def forward(self, pixels, scale):
            self.sizes.append(len(pixels))
            return self.model(pixels * scale)

    model, (x, y) = make_model("attention"), make_batches((80,))[0]
    named = Named(model)
    data = [{"pixels": x, "scale": torch.tensor(1.0), "labels": y}]
    directions = random_directions(named, num=1)
    line = loss_line(named, data, directions=directions, points=[0.0])
    assert named.sizes[-2:] == [40, 40]
    assert line.nll[0] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_moved_weights_are_the_sum_rounded_once_in_the_wanted_format(name):
    model = make_model(name, torch.bfloat16)
    directions = random_directions(model)
    vectors = directions.tensors(model)
    start = {n: p.detach() for n, p in model.named_parameters()}
    points = [(0.0, 0.0), (0.5, -1.5), (1.0, 0.25)]
    for channels_last in (False, True):
        weights = MovedWeights(start, vectors, channels_last=channels_last)
        for a, b in points:
            moved = weights.at(torch.tensor([a, b], dtype=torch.float64))
            assert list(moved) == list(directions.names)
            for key, value in moved.items():
                exact = start[key].double() + a * vectors[0][key] + b * vectors[1][key]
                torch.testing.assert_close(value, exact.float().bfloat16(), rtol=8e-3, atol=0)
                if channels_last and value.dim() == 4:
                    assert value.is_contiguous(memory_format=torch.channels_last)
                    assert weights.start[key].is_contiguous(memory_format=torch.channels_last)
                if a == b == 0:
                    assert torch.equal(value, start[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_norm", ["fixed", "recalibrate"])
def test_recorded_points_equal_points_one_by_one(name, dtype, batch_norm, request):
    """The path of a GPU, on the CPU: 16 points a look, the later ones replayed."""
    model, batches = make_model(name, dtype).train(), make_batches((9, 4), dtype)
    arguments = {"points": (3, 7), "metrics": ALL, "objective": Objective(weight_decay=0.1)}
    arguments |= {"batch_norm": batch_norm}
    alone = loss_surface(model, batches, **arguments)
    recorded = request.getfixturevalue("recorded")
    before = snapshot(model)
    found = loss_surface(model, batches, **arguments)
    assert recorded.made == 1
    assert_untouched(model, before)
    for column in ("nll", "nll_stderr", "l2", "accuracy", "ece"):
        np.testing.assert_array_equal(getattr(found, column), getattr(alone, column))
    assert found.provenance.num_forwards == 21 * (2 if batch_norm == "recalibrate" else 1)


class Counting(nn.Module):
    """Writes to its own buffer, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(x.flatten(1)) / self.calls.clamp(max=1)


def test_a_model_that_writes_to_its_buffers_is_left_as_found():
    model, batches = Counting(), make_batches(SIZES, torch.float32)
    before = snapshot(model)
    loss_line(model, batches, points=3)
    assert_untouched(model, before)


class Tied(nn.Module):
    """The weights before a batch norm are those of a decoder too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        return F.conv_transpose2d(self.norm(self.conv(x)).relu(), self.conv.weight)


@pytest.mark.parametrize("batch_norm", ["fixed", "recalibrate"])
def test_no_batch_norm_is_folded_into_weights_that_are_used_again(batch_norm, generator):
    """Near the identity, as it is before training, that would change little at the start."""
    model, x = Tied(), 3 * torch.randn(40, 4, 5, 5, generator=generator)
    directions = random_directions(model, num=1, ignore_1d=False, generator=generator)
    line = loss_line(
        model, [(x, x)], directions=directions, points=[-1.0, 0.0, 1.0], metrics="loss",
        batch_norm=batch_norm, objective=Objective(loss=F.mse_loss),
    )  # fmt: skip
    for a, found in zip(line.x, line.nll, strict=True):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, vector in directions.vectors[0].items():
                moved.get_parameter(name).add_(a * torch.from_numpy(vector))
            if batch_norm == "recalibrate":
                moved.norm.momentum = 1.0
                moved.train()(x)
            assert found == pytest.approx(F.mse_loss(moved.eval()(x), x).item(), rel=1e-4)


def test_no_batch_is_cut_whose_samples_see_each_other_a_little(generator):
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.norm = nn.BatchNorm1d(8, track_running_stats=False)
            self.scale = nn.Parameter(torch.full((8,), scale))

        def forward(self, x):
            x = self.body(x)
            return self.head(x + self.scale * self.norm(x))

    model, other = Scaled(1e-6), Scaled(1.0)
    x = torch.randn(128, 5, generator=generator)
    x, y = x[x[:, 0].argsort()], torch.arange(128) % 3
    line = loss_line(
        model, [(x, y)], directions=between(model, other), points=[1.0], metrics="loss"
    )
    assert line.nll[0] == pytest.approx(F.cross_entropy(other(x), y).item(), rel=1e-5)


def test_a_model_that_wants_its_batch_whole_gets_it(generator):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 3)

        def forward(self, x):
            assert len(x) == 20
            return self.a(x)

    model, x, y = Whole(), torch.randn(20, 5, generator=generator), torch.arange(20) % 3
    line = loss_line(model, [(x, y)], points=[0.0], metrics="loss")
    assert line.nll[0] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)


class Gated(nn.Module):
    """Adds what all samples of a batch have in common, by a gate that is still zero."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.gate = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.head(x) + self.gate * x[:, :3].mean(0)


def test_zeros_do_not_hide_that_samples_depend_on_each_other(generator):
    x = torch.randn(200, 4, generator=generator)
    frozen = Objective().freeze(Gated(), [(x, torch.arange(200) % 3)])
    moved = frozen.space.values | {"gate": torch.ones(3)}
    logits = Forward(frozen).logits(moved, x, 200)
    torch.testing.assert_close(logits, frozen.logits(moved, x))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
def test_a_faster_way_is_the_same_up_to_rounding_or_not_taken(dtype, off, scale):
    expected = scale * torch.linspace(0.1, 1, 10, dtype=dtype)
    assert _close(expected * (1 + torch.finfo(dtype).eps), expected)
    assert not _close(expected + off * scale, expected)
