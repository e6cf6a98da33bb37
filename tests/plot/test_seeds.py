"""Drawings of several runs: every run is there, the mean and its interval are right."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from landscape.intervals import mean_interval
from landscape.plot import style
from landscape.plot.seeds import pool_runs, run_columns, run_curves, spectra_over_runs
from landscape.probes.hessian_max import HessianMaxSpectrum
from landscape.results import Provenance
from tests.plot.page import begins_at_zero, boxes


def spectrum(values, nep, ape):
    values = np.asarray(values, dtype=float)
    return HessianMaxSpectrum(
        eigenvalues=values,
        residuals=np.zeros_like(values),
        converged=np.ones(values.shape, dtype=bool),
        nep=nep,
        nep_interval=(0.0, 1.0),
        ape=ape,
        ape_interval=(0.0, 1.0),
        num_hvps=10,
        provenance=Provenance(),
    )


def bars(ax):
    """Return the (low, high) of every interval drawn."""
    segments = [s for c in ax.collections for s in c.get_segments()]
    return [tuple(segment[:, 1]) for segment in segments]


def points(ax, gid):
    lines = [line for line in ax.lines if line.get_gid() == gid]
    return np.concatenate([line.get_xydata() for line in lines])


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_columns_show_every_run_the_mean_and_its_interval():
    runs = {"ResNet": [1.0, 2.0, 4.0], "ViT": [3.0]}
    ax = run_columns(runs)
    np.testing.assert_array_equal(points(ax, "run"), [[0, 1], [0, 2], [0, 4], [1, 3]])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["ResNet", "ViT"]
    (drawn,) = bars(ax)  # one run has no interval
    assert drawn == pytest.approx(mean_interval(runs["ResNet"])[1:])
    colors = {line.get_color() for line in ax.lines if line.get_gid() == "run"}
    assert colors == {style.family_color("ResNet"), style.family_color("ViT")}


def test_curves_join_the_means():
    values = np.array([[1.0, 3.0], [2.0, 6.0]])
    ax = run_curves([2, 4], values, label="ViT")
    (curve,) = [line for line in ax.lines if line.get_label() == "ViT"]
    np.testing.assert_array_equal(curve.get_xydata(), [[2, 2], [4, 4]])
    assert len(points(ax, "run")) == 4
    assert bars(ax) == [pytest.approx(mean_interval(v)[1:]) for v in values]


def test_curves_refuse_shapes_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"`values` must be \(points, runs\) for `x` of \(3,\)"):
        run_curves([1, 2, 3], np.zeros((2, 3)), label="ViT")


def test_pooled_runs_hold_all_mini_batches_and_the_spread_between_runs():
    runs = [spectrum([[3, -1]], 0.5, 3.0), spectrum([[5, 4], [2, -2]], 0.25, 4.0)]
    pooled = pool_runs(runs)
    np.testing.assert_array_equal(pooled.eigenvalues, [[3, -1], [5, 4], [2, -2]])
    assert (pooled.nep, *pooled.nep_interval) == (0.375, 0, 1)  # Student's is wider than a share
    assert (pooled.ape, *pooled.ape_interval) == pytest.approx(mean_interval([3.0, 4.0]))
    assert pooled.num_hvps == 20
    near = pool_runs([replace(run, nep=nep) for run, nep in zip(runs, (0.5, 0.51), strict=True)])
    assert (near.nep, *near.nep_interval) == pytest.approx(mean_interval([0.5, 0.51]))
    assert pooled.errors is None  # one of them has none
    runs = [
        replace(run, errors=run.residuals + i, miss=np.full(len(run.residuals), i / 100))
        for i, run in enumerate(runs)
    ]
    pooled = pool_runs(runs)
    np.testing.assert_array_equal(pooled.errors, [[0, 0], [1, 1], [1, 1]])
    np.testing.assert_array_equal(pooled.miss, [0, 0.01, 0.01])
    with pytest.raises(ValueError, match="at least one spectrum"):
        pool_runs([])


def test_spectra_over_runs_have_a_rug_of_every_eigenvalue_and_a_point_of_every_run():
    runs = {
        "ResNet": [spectrum([[9, 8, -1]], 1 / 3, 8.5), spectrum([[7, 6, 5]], 0, 6)],
        "ViT": [spectrum([[4, -3, 2]], 1 / 3, 3), spectrum([[3, -2, 1]], 1 / 3, 2)],
    }
    negative, positive, nep, ape = spectra_over_runs(runs).axes
    sizes = [points(ax, "rug").shape[0] for ax in (negative, positive)]
    assert sizes == [3, 9]
    np.testing.assert_allclose(sorted(points(nep, "run")[:, 1]), [0, 1 / 3, 1 / 3, 1 / 3])
    np.testing.assert_allclose(sorted(points(ape, "run")[:, 1]), [2, 3, 6, 8.5])
    assert begins_at_zero(nep)
    assert nep.get_ylim()[1] <= 1 + style.EDGE


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["linear", "log"])
def test_spectra_over_runs_say_what_they_show_and_none_goes_below_zero(scale):
    runs = {
        "ResNet": [spectrum([[900 * scale, 1]], 0, 900), spectrum([[7, 6]], 0, 6)],
        "ViT": [spectrum([[4, -3]], 0.5, 4), spectrum([[3, -2]], 0.5, 3)],
    }
    figure = spectra_over_runs(runs)
    logarithmic = figure.axes[0].get_xscale() == "symlog"
    unit = r"$\log_{10}|\lambda|$" if logarithmic else r"$\lambda$"
    (note,) = [text.get_text() for text in figure.texts if "Density" in text.get_text()]
    expected = f"Density of {unit}. n: eigenvalues of all runs. [ ]: 95 % interval over runs"
    assert note == expected
    drawn = boxes(figure)
    assert all(figure.bbox.padded(1).contains(box.x0, box.y0) for _, box in drawn)
    ape = figure.axes[3]
    assert min(low for low, _ in bars(ape)) < 0  # the interval of two runs
    assert begins_at_zero(ape)
