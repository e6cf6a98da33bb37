import numpy as np
import pytest
import torch
from torch import nn

from landscape import load_published_surface, plot
from landscape.objective import Objective
from landscape.probes import adaptive
from landscape.probes.directions import Directions, random_directions
from landscape.probes.surface import LossLine, LossSurface, loss_line, loss_surface
from tests.cases import assert_untouched, make_batches, make_model, snapshot
from tests.probes.test_published_surface import FILES, reference

ALL = ("loss", "accuracy", "ece")


def look_up(x, y, values, tol, known=None):
    """Interpolate a known grid; returns the result and the masks that were asked for."""
    values = values if values.ndim == 3 else values[..., None]
    asked = []

    def measure(mask):
        asked.append(mask.copy())
        return np.where(mask[..., None], values, np.nan)

    known = np.zeros_like(values) if known is None else known
    tol = np.broadcast_to(np.asarray(tol, dtype=float), values.shape[2:])
    result = adaptive.interpolate(x, y, measure, tol, known)
    for before, after in zip(asked, asked[1:], strict=False):
        assert (after | ~before).all()
    np.testing.assert_array_equal(result.measured, asked[-1])
    exact = np.where(result.measured[..., None], values, 0)
    np.testing.assert_array_equal(np.where(result.measured[..., None], result.values, 0), exact)
    return result


def largest_error(result, values):
    """True largest error at the interpolated points; infinite if one of them is not finite."""
    missing = ~result.measured
    error = np.abs(result.values[..., 0][missing] - values[missing])
    return np.nan_to_num(error, nan=np.inf).max(initial=0.0)


AXIS = np.linspace(-1, 1, 41)
X, Y = np.meshgrid(AXIS, AXIS, indexing="ij")
SHAPES = {
    "bowl": X**2 + 3 * Y**2 - X * Y,
    "cone": np.hypot(X, Y),
    "pit": X**2 + Y**2 - 5 * np.exp(-(X**2 + Y**2) / 0.04),
    "step": np.tanh(10 * (X + 0.3 * Y)) + 0.2 * X,
    "flat": np.full_like(X, 7.3),
}


@pytest.mark.parametrize("tol", [0.2, 0.1, 0.05, 0.02, 0.01, 0.001])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_within_the_estimate_and_the_estimate_within_the_tolerance(shape, tol):
    values = SHAPES[shape]
    result = look_up(AXIS, AXIS, values, tol)
    rounding = 1e-14
    assert result.error[0] <= tol * np.ptp(values) + rounding
    assert largest_error(result, values) <= result.error[0] + rounding
    if shape in ("bowl", "flat"):  # the polynomials hold them exactly
        assert result.measured.sum() == 41
    assert result.measured[20, 20]


def test_first_cells_meet_at_the_origin_wherever_it_is():
    axis = np.linspace(-0.35, 1.65, 41)
    x, y = np.meshgrid(axis, AXIS, indexing="ij")
    bowl = look_up(axis, AXIS, x**2 + y**2, 0.05)
    assert bowl.measured[7, 20]  # where the model is
    assert bowl.measured.sum() < 60


def test_a_cell_fears_what_its_neighbours_have_seen():
    from types import SimpleNamespace

    from landscape.probes.adaptive import _errors

    cells = [
        SimpleNamespace(window=np.s_[0:2, 0:2], surplus=np.array([1.0])),
        SimpleNamespace(window=np.s_[0:2, 1:3], surplus=np.array([0.0])),
    ]
    np.testing.assert_array_equal(_errors(cells, (2, 3)), [[3.0], [1.5]])


def test_smooth_surfaces_take_few_points_and_noise_takes_all():
    cone = look_up(AXIS, AXIS, SHAPES["cone"], 0.05).measured.sum()
    assert cone < AXIS.size**2 / 8
    noise = np.random.default_rng(0).standard_normal((41, 41))
    everything = look_up(AXIS, AXIS, noise, 0.05)
    assert everything.measured.all()
    assert everything.error[0] == 0


def test_tolerance_is_relative_to_the_range_of_the_sum_with_the_known_part():
    known = (30 * X**2)[..., None]
    counts = [look_up(AXIS, AXIS, SHAPES["cone"], 0.01, k).measured.sum() for k in (None, known)]
    same = look_up(AXIS, AXIS, SHAPES["cone"], 0.01 * 30 / np.sqrt(2)).measured.sum()
    assert counts[1] == pytest.approx(same, abs=4)
    assert counts[1] < counts[0] / 4


def test_a_quantity_that_does_not_matter_stays_within_its_nodes():
    """A polynomial through a peak at a node dips below 0 beside it, where an error cannot be."""
    x = np.linspace(-1, 1, 33)
    smooth, peak = np.ones((33, 1)), np.exp(-((x[:, None] / 0.1) ** 2))
    found = adaptive.interpolate(
        x,
        np.zeros(1),
        lambda wanted: np.where(wanted[..., None], np.stack([smooth, peak], -1), np.nan),
        np.array([0.1, np.inf]),
        np.zeros((33, 1, 2)),
    )
    assert not found.measured.all()
    assert found.values[..., 1].min() >= 0
    assert found.values[..., 1].max() == 1


def test_every_quantity_is_within_its_own_tolerance_and_infinite_ones_do_not_matter():
    noise = np.random.default_rng(0).standard_normal((41, 41))
    noise[3, 3] = np.nan
    both = np.stack([SHAPES["bowl"], noise], axis=2)
    assert look_up(AXIS, AXIS, both, [0.05, np.inf]).measured.sum() == 41
    assert look_up(AXIS, AXIS, both, [0.05, 0.05]).measured.all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nothing_is_interpolated_over_points_that_are_not_finite(value):
    values = SHAPES["bowl"].copy()
    values[X + Y > 1.5] = value
    result = look_up(AXIS, AXIS, values, 0.05)
    bad = ~np.isfinite(values)
    assert result.measured[bad].all()
    around = np.zeros_like(bad)
    for i, j in zip(*np.nonzero(bad), strict=True):
        around[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] = True
    assert result.measured[around].all()
    assert largest_error(result, values) < 1e-14
    assert result.measured.sum() < values.size / 2


@pytest.mark.parametrize(
    "sizes", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 5), (4, 9), (37, 1), (8, 23)]
)
@pytest.mark.parametrize("low", [-1.0, 0.3])
def test_any_grid(sizes, low):
    generator = np.random.default_rng(1)
    x, y = (np.sort(generator.uniform(low, 2, n)) for n in sizes)
    values = np.add.outer(x**2 - x, 2 * y**2) + np.outer(x, y)
    result = look_up(x, y, values, 0.01)
    assert largest_error(result, values) < 1e-12
    if min(sizes) > 7:
        assert result.measured.sum() < values.size / 3
    rough = look_up(x, y, generator.standard_normal(sizes), 1e-6)
    assert rough.measured.all()


@pytest.mark.parametrize("quantity", ["nll", "loss", "accuracy"])
@pytest.mark.parametrize("name", list(FILES))
def test_published_surfaces_are_within_the_reported_error(name, quantity):
    """The grids of Park & Kim (2022) as ground truth; of the loss only the NLL is interpolated."""
    surface = load_published_surface(reference(name))
    values = surface.accuracy if quantity == "accuracy" else surface.nll
    known = surface.l2 if quantity == "loss" else np.zeros_like(values)
    total = values + known
    spread = np.ptp(total[np.isfinite(total)])
    counts = []
    for tol in (0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002):
        result = look_up(surface.x, surface.y, values, tol, known[..., None])
        assert result.measured[~np.isfinite(values)].all()
        assert result.error[0] <= tol * spread
        assert largest_error(result, values) <= result.error[0]
        counts.append(int(result.measured.sum()))
    assert counts == sorted(counts)
    fewest = {"ViT-Ti": 441 / 2, "ResNet-50": 440}  # the second is rough and not finite all around
    assert counts[0] < fewest[name]
    if (name, quantity) == ("ViT-Ti", "loss"):
        assert counts[2] < 441 / 8


# --- through the probe ---


class Bowl(nn.Module):
    """Its loss is a given function of two weights."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
        self.function, self.calls = function, 0

    def forward(self, x):
        self.calls += 1
        return self.function(self.weight[0, 0], self.weight[0, 1]) * x


def bowl_surface(model, **arguments):
    rows = ({"weight": np.array([[1.0, 0.0]])}, {"weight": np.array([[0.0, 1.0]])})
    arguments = {"points": 17, "objective": Objective(loss=mean, weight_decay=0.5), **arguments}
    return loss_surface(
        model,
        [(torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))],
        directions=Directions(rows, kind="random"),
        metrics="loss",
        **arguments,
    )


def mean(outputs, targets):
    return (outputs - targets).mean()


def kink(a, b):
    return (a * a + b * b + 1e-4).sqrt() + 0.1 * torch.sin(5 * a)


def test_the_surface_says_what_was_measured_and_how_well(tmp_path):
    full, part = (bowl_surface(Bowl(kink), tol=tol) for tol in (None, 0.05))
    assert full.evaluated is None
    assert full.interpolation_error is None
    done = part.evaluated
    assert done.shape == (17, 17)
    assert 41 < done.sum() < 200
    assert part.provenance.num_forwards == done.sum()
    assert part.provenance.settings["tol"] == 0.05
    np.testing.assert_array_equal(part.nll[done], full.nll[done])
    np.testing.assert_array_equal(part.l2[done], full.l2[done])
    np.testing.assert_allclose(part.l2, full.l2, rtol=1e-12)
    np.testing.assert_array_equal(part.loss, part.nll + part.l2)
    error = np.abs(part.loss - full.loss).max()
    assert 0 < error <= part.interpolation_error["loss"] <= 0.05 * np.ptp(full.loss)
    loaded = LossSurface.load(part.save(tmp_path / "surface"))
    np.testing.assert_array_equal(loaded.evaluated, done)
    assert loaded.interpolation_error == part.interpolation_error
    plot.loss_surface(loaded)
    plot.loss_surface(loaded, kind="contour")


def test_a_surface_saved_before_there_was_a_tolerance_loads(tmp_path, monkeypatch):
    path = bowl_surface(Bowl(kink), points=3).save(tmp_path / "surface")
    with np.load(path) as archive:
        arrays = dict(archive)
    text = str(arrays.pop("meta"))
    for field in (', "evaluated": null', ', "interpolation_error": null'):
        assert field in text
        text = text.replace(field, "")
    np.savez(path, meta=np.array(text), **arrays)
    assert LossSurface.load(path).evaluated is None


@pytest.mark.parametrize("name", ["conv", "attention"])
def test_all_metrics_of_a_network_are_within_their_errors_however_batched(name):
    model, whole = make_model(name).train(), make_batches((400,))
    arguments = {
        "points": 13,
        "span": 0.5,
        "metrics": ALL,
        "objective": Objective(weight_decay=0.1),
    }
    arguments["directions"] = random_directions(model)
    full = loss_surface(model, whole, **arguments)
    before = snapshot(model)
    parts = [
        loss_surface(model, make_batches(s), tol=0.3, **arguments) for s in [(400,), (250, 150)]
    ]
    assert_untouched(model, before)
    for part in parts:
        assert part.evaluated.sum() < 169
        assert set(part.interpolation_error) == set(ALL)
        for column, error in part.interpolation_error.items():
            true = getattr(full, column)
            assert np.abs(getattr(part, column) - true).max() <= error <= 0.3 * np.ptp(true)
        assert ((part.accuracy >= 0) & (part.accuracy <= 1) & (part.nll_stderr > 0)).all()
    np.testing.assert_array_equal(parts[0].evaluated, parts[1].evaluated)
    np.testing.assert_allclose(parts[0].nll, parts[1].nll, rtol=1e-10)


@pytest.mark.parametrize("l2", ["squared", "norms"])
@pytest.mark.parametrize("parameters", [None, "head.*"])
def test_the_l2_term_of_interpolated_points_has_its_closed_form(l2, parameters):
    model, batches = make_model("attention"), make_batches((6,))
    arguments = {
        "points": (7, 9),
        "metrics": "loss",
        "l2": l2,
        "objective": Objective(weight_decay=0.05, parameters=parameters),
        "directions": random_directions(model),
    }
    full, part = (loss_surface(model, batches, tol=tol, **arguments) for tol in (None, 10.0))
    assert not part.evaluated.all()
    np.testing.assert_allclose(part.l2, full.l2, rtol=1e-12)
    assert np.ptp(part.l2) > 0


def test_a_line_is_interpolated_like_a_surface(tmp_path):
    model, batches = make_model("conv"), make_batches((60,))
    arguments = {"directions": random_directions(model, num=1), "points": 65, "metrics": "loss"}
    full = loss_line(model, batches, **arguments)
    part = loss_line(model, batches, tol=0.01, **arguments)
    assert part.evaluated.shape == (65,)
    assert part.evaluated.sum() < 40
    error = np.abs(part.loss - full.loss).max()
    assert error <= part.interpolation_error["loss"] <= 0.01 * np.ptp(full.loss)
    plot.loss_line(LossLine.load(part.save(tmp_path / "line")))


def test_points_without_a_finite_loss_are_measured_and_counted():
    root = lambda a, b: (1.2 - a - b).sqrt()  # noqa: E731
    full, part = (bowl_surface(Bowl(root), tol=tol) for tol in (None, 0.05))
    np.testing.assert_array_equal(np.isnan(part.nll), np.isnan(full.nll))
    assert part.num_nonfinite == full.num_nonfinite > 0
    assert not part.evaluated.all()


class Stop(Exception):
    pass


def test_an_interrupted_adaptive_surface_goes_on_and_serves_the_full_grid(tmp_path):
    path = tmp_path / "points"
    whole = bowl_surface(Bowl(kink), tol=0.05)
    model = Bowl(kink)

    def stopping(outputs, targets):
        if model.calls > 30:
            raise Stop
        return mean(outputs, targets)

    stopping.__name__ = "mean"
    with pytest.raises(Stop):
        bowl_surface(
            model, tol=0.05, resume=path, objective=Objective(loss=stopping, weight_decay=0.5)
        )
    done = path.read_bytes().count(b"\n") - 1
    assert 10 < done < whole.evaluated.sum()
    rest = bowl_surface(Bowl(kink), tol=0.05, resume=path)
    assert rest.provenance.num_forwards == whole.evaluated.sum() - done + 1
    np.testing.assert_array_equal(rest.evaluated, whole.evaluated)
    np.testing.assert_array_equal(rest.nll, whole.nll)
    assert rest.interpolation_error == whole.interpolation_error
    full = bowl_surface(Bowl(kink), resume=path)
    assert full.provenance.num_forwards == 289 - whole.evaluated.sum() + 1
    assert full.evaluated is None
    again = bowl_surface(Bowl(kink), tol=0.05, resume=path)  # all of it is known by now
    assert again.provenance.num_forwards == 1
    assert again.evaluated.all()
    assert again.interpolation_error == {"loss": 0.0}
    np.testing.assert_array_equal(again.nll, full.nll)


@pytest.mark.parametrize("tol", [-0.1, np.nan])
def test_a_tolerance_below_zero_is_refused(tol):
    with pytest.raises(ValueError, match="`tol` must be at least 0, got"):
        loss_surface(make_model("conv"), make_batches((4,)), points=2, tol=tol)
    with pytest.raises(ValueError, match="`tol` must be at least 0, got"):
        loss_line(make_model("conv"), make_batches((4,)), points=2, tol=tol)


def test_progress_of_an_adaptive_surface_is_shown(capfd):
    bowl_surface(Bowl(kink), tol=0.1, progress=True)
    assert "Loss surface" in capfd.readouterr().err


def test_interpolated_shares_stay_between_0_and_1():
    """Accuracy is 0, then 1: a polynomial through such nodes leaves the interval."""
    model = nn.Linear(1, 2, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    line = loss_line(
        model,
        [(torch.ones(4, 1, dtype=torch.float64), torch.ones(4).long())],
        directions=Directions(({"weight": np.array([[-1.0], [1.0]])},), kind="random"),
        points=np.linspace(-1, 1, 33),
        metrics=ALL,
        tol=10.0,
    )
    assert not line.evaluated.all()
    for share in (line.accuracy, line.ece):
        assert share.min() >= 0
        assert share.max() <= 1
    assert line.accuracy[~line.evaluated].max() == 1


def test_a_quarter_keeps_a_share_of_the_surplus_of_its_cell():
    """Points that happen to lie on the polynomial do not prove that the others do."""
    cell = adaptive._Cell((0, 8), (0, 8), np.array([1.0]))
    axis, values, asked = np.arange(9.0), np.zeros((9, 9, 1)), np.ones((9, 9), dtype=bool)
    for quarter in cell.quarters():
        found = quarter.compared(axis, axis, values, asked)
        np.testing.assert_array_equal(found.surplus, [adaptive.INHERITED])
