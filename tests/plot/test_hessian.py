import itertools
from dataclasses import replace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.stats import gaussian_kde

from landscape import plot
from landscape.plot import style
from landscape.plot.density import FEWEST, finite_eigenvalues
from tests.plot.cases import density, full_spectrum, max_spectrum, random_spectrum


def by_gid(ax, gid):
    return [line for line in ax.lines if line.get_gid() == gid]


def area(grid, values, log=False):
    return trapezoid(values, np.log10(np.abs(grid)) * np.sign(grid) if log else grid)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("negative", [0.1, 0.5, 0.9])
def test_areas_are_nep_and_its_complement(log, negative):
    result = random_spectrum(negative=negative)
    below = plot.half_density(result, -1, log=log)
    above = plot.half_density(result, 1, log=log)
    assert area(*below[:2], log) == pytest.approx(result.nep, rel=1e-3)
    assert area(*above[:2], log) == pytest.approx(1 - result.nep, rel=1e-3)
    assert below[0].max() <= 0 <= above[0].min()
    assert (np.diff(below[0]) > 0).all()


def test_area_is_exact_beside_zero_and_with_heavy_tails():
    rng = np.random.default_rng(0)
    result = max_spectrum(rng.standard_cauchy((60, 5)))  # mass at 0, values of hundreds
    for sign, share in ((-1, result.nep), (1, 1 - result.nep)):
        grid, values, _ = plot.half_density(result, sign)
        assert area(grid, values) == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize(("power", "heavy_tail"), [(1, False), (3, True)])
def test_density_equals_scipy_with_the_bandwidth_of_silverman(power, heavy_tail):
    result = max_spectrum(random_spectrum(negative=0).eigenvalues ** power)
    grid, values, h = plot.half_density(result, 1)
    data = result.eigenvalues.ravel()
    q75, q25 = np.percentile(data, [75, 25])
    assert heavy_tail == ((q75 - q25) / 1.34 < data.std(ddof=1))
    assert h == pytest.approx(0.9 * min(data.std(ddof=1), (q75 - q25) / 1.34) * data.size**-0.2)
    kde = gaussian_kde(data, bw_method=h / data.std(ddof=1))
    expected = kde(grid) + kde(-grid)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6 * expected.max())


def test_zero_and_non_finite_eigenvalues_belong_to_no_half():
    values = np.r_[np.zeros(10), np.full(5, np.nan), np.linspace(1, 2, 30), -np.linspace(1, 2, 10)]
    result = max_spectrum(values[:, None])
    assert finite_eigenvalues(result).size == 50
    assert area(*plot.half_density(result, 1)[:2]) == pytest.approx(30 / 50, rel=1e-3)
    assert area(*plot.half_density(result, -1)[:2]) == pytest.approx(10 / 50, rel=1e-3)


@pytest.mark.parametrize(
    "values", [np.linspace(1, 2, FEWEST - 1), np.full(30, 2.0), np.empty(0)], ids=len
)
def test_few_or_equal_values_have_a_rug_and_no_density(values):
    result = max_spectrum(values[:, None])
    grid, drawn, h = plot.half_density(result, 1)
    assert (grid.size, drawn.size, h) == (0, 0, 0)
    ax = plot.hessian_max_spectrum(result, half="positive")
    ax.figure.canvas.draw()
    np.testing.assert_array_equal(by_gid(ax, "rug")[0].get_xdata(), values)
    assert f"n = {values.size}" in ax.get_legend_handles_labels()[1][0]
    assert ax.get_yticks().size == 0
    assert not ax.get_ylabel()


def test_drawn_density_and_rug_are_those_of_the_result():
    results = {"ResNet": random_spectrum(0), "ViT": random_spectrum(1, negative=0.5)}
    ax = plot.hessian_max_spectrum(results, half="negative")
    curves, rugs = by_gid(ax, "density"), by_gid(ax, "rug")
    for (name, result), curve, rug in zip(results.items(), curves, rugs, strict=True):
        grid, values, _ = plot.half_density(result, -1)
        np.testing.assert_array_equal(curve.get_xdata(), grid)
        np.testing.assert_array_equal(curve.get_ydata(), values)
        eigenvalues = result.eigenvalues[result.eigenvalues < 0]
        np.testing.assert_array_equal(np.sort(rug.get_xdata()), np.sort(eigenvalues))
        color = plot.style.family_color(name)
        assert curve.get_color() == rug.get_color() == color
    heights = {rug.get_ydata()[0] for rug in rugs}
    assert len(heights) == 2  # rugs do not hide each other


@pytest.mark.parametrize("half", ["negative", "positive", "both"])
@pytest.mark.parametrize("log", [False, True])
def test_limits_hold_every_eigenvalue_and_zero(half, log):
    results = {"ResNet": random_spectrum(0, scale=300), "ViT": random_spectrum(1, scale=3)}
    ax = plot.hessian_max_spectrum(results, half=half, log=log)
    low, high = ax.get_xlim()
    values = np.concatenate([result.eigenvalues.ravel() for result in results.values()])
    assert low == 0 if half == "positive" else low < values.min()
    assert high == 0 if half == "negative" else high > values.max()
    assert ax.get_xscale() == ("symlog" if log else "linear")
    assert ax.get_xlabel() == r"Hessian max eigenvalue $\lambda$ (nats)"
    assert ax.get_ylabel() == ("Density per decade" if log else "Density (1/nats)")
    assert ax.get_ylim()[1] > max(line.get_ydata().max() for line in by_gid(ax, "density"))


@pytest.mark.parametrize("half", ["negative", "positive", "both"])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("spread", [1.0, 0.02], ids=["tails", "narrow"])
def test_no_density_is_cut_off(half, log, spread):
    values = np.exp(spread * np.random.default_rng(0).standard_normal((20, 5)))
    values[::3] *= -1
    ax = plot.hessian_max_spectrum(
        {"ResNet": max_spectrum(values), "ViT": max_spectrum(3 * values)}, half=half, log=log
    )
    low, high = ax.get_xlim()
    curves = by_gid(ax, "density")
    longest = max(np.abs(curve.get_xdata()).max() for curve in curves)
    assert max(-low, high) < max(longest, 1.6 * 3 * np.abs(values).max())  # and no longer
    assert len(curves) == (4 if half == "both" else 2)
    for curve in curves:
        grid, heights = curve.get_data()
        inside = (low <= grid) & (grid <= high)
        assert heights[~inside].max(initial=0) <= 0.01 * heights.max()


def far(first, last):
    values = 10.0 ** np.arange(first, last)
    return max_spectrum(np.stack([values, -values], axis=1))


WIDE = {
    "both": lambda spectrum: plot.hessian_max_spectrum(spectrum, log=True).figure,
    "negative": lambda spectrum: (
        plot.hessian_max_spectrum(spectrum, log=True, half="negative").figure
    ),
    "runs": lambda spectrum: plot.spectra_over_runs({"ResNet": [spectrum], "ViT": [spectrum]}),
}


@pytest.mark.parametrize("decades", [(0, 5), (-8, 0), (-20, 12)], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_ticks_over_many_decades_stay_apart(name, decades):
    figure = WIDE[name](far(*decades))
    figure.canvas.draw()
    for ax in figure.axes[: 2 if name == "runs" else 1]:
        low, high = ax.get_xlim()
        shown = [tick for tick in ax.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        extents = [tick.label1.get_window_extent() for tick in shown]
        assert len(extents) >= 2
        assert 0 in [tick.get_loc() for tick in shown]
        for left, right in itertools.pairwise(extents):
            assert left.x1 < right.x0


def test_legend_gives_estimates_with_intervals_and_counts():
    result = max_spectrum(np.r_[[-4.0, -2.0], np.full(8, 20.0)][:, None])
    entries = {
        half: plot.hessian_max_spectrum({"ViT": result}, half=half).get_legend_handles_labels()[1]
        for half in ("negative", "positive", "both")
    }
    assert entries["negative"] == ["ViT: NEP 0.20 [0.10, 0.30], n = 2"]
    assert entries["positive"] == ["ViT: APE 20 [18, 22], n = 8"]
    assert entries["both"] == ["ViT: n = 10\nNEP 0.20 [0.10, 0.30]\nAPE 20 [18, 22]"]


@pytest.mark.parametrize("size", [(3.25, 2.4), (6.4, 4.8)], ids=str)
@pytest.mark.parametrize("count", [1, 3, 12])
def test_legends_leave_room_for_the_densities(size, count):
    results = {f"model {i}": random_spectrum(negative=0.5, seed=i) for i in range(count)}
    with mpl.rc_context(style.rc()):
        figure, ax = plt.subplots(figsize=size, layout="constrained")
        plot.hessian_max_spectrum(results, ax=ax)
        figure.canvas.draw()
    legend = ax.get_legend().get_window_extent()
    curves = by_gid(ax, "density")
    tops = [ax.transData.transform(curve.get_xydata())[:, 1].max() for curve in curves]
    assert legend.y0 > max(tops) or not ax.bbox.overlaps(legend)
    assert (max(tops) - ax.bbox.y0) * ax.bbox.width > 0.15 * figure.bbox.width * figure.bbox.height
    for edge in (legend.x0, legend.y0, figure.bbox.x1 - legend.x1, figure.bbox.y1 - legend.y1):
        assert edge >= 0


@pytest.mark.parametrize("half", ["both", "negative", "positive"])
def test_legends_of_many_spectra_and_of_long_names_hide_nothing(half):
    many = {f"model {i}": random_spectrum(negative=0.5, seed=i) for i in range(9)}
    ax = plot.hessian_max_spectrum(many, half=half)
    ax.figure.canvas.draw()
    legend = ax.get_legend().get_window_extent()
    assert legend.x0 > ax.bbox.x1  # beside the axes, on the figure
    assert legend.x1 <= ax.figure.bbox.x1
    assert legend.y0 >= 0
    name = "a model with a very long name, trained elsewhere with weight decay and mixup"
    ax = plot.hessian_max_spectrum({name: many["model 0"]}, half=half)
    ax.figure.canvas.draw()
    inside, legend = ax.bbox, ax.get_legend().get_window_extent()
    assert inside.x0 < legend.x0
    assert legend.x1 < inside.x1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (123456.0, "123000"), (2.5e7, "2.50e+07"), (3.2e-6, "3.2e−06")],
)
def test_numbers_have_three_digits(value, text):
    ax = plot.hessian_max_spectrum(max_spectrum([[value]]), half="positive")
    assert ax.get_legend_handles_labels()[1][0].startswith(f"APE {text} [")


def test_legend_says_what_has_not_converged_and_what_does_not_exist():
    result = max_spectrum([[-4.0], [-2.0]], converged=False)
    ax = plot.hessian_max_spectrum(result, half="positive")
    assert ax.get_legend_handles_labels()[1] == ["APE – [–, –], n = 0, 2 not converged"]


def test_several_spectra_without_a_negative_eigenvalue_draw():
    results = {"ResNet": random_spectrum(negative=0), "ViT": random_spectrum(1, k=1, negative=0)}
    for log in (False, True):
        ax = plot.hessian_max_spectrum(results, half="negative", log=log)
        ax.figure.canvas.draw()
        assert all(line.get_xdata().size == 0 for line in by_gid(ax, "rug"))
        assert ax.get_legend_handles_labels()[1][0] == "ResNet: NEP 0.00 [0.00, 0.10], n = 0"


def test_spectrum_errors():
    with pytest.raises(ValueError, match="`half` must be one of 'both', 'negative', 'positive'"):
        plot.hessian_max_spectrum(random_spectrum(), half="left")
    with pytest.raises(ValueError, match="`result` must hold at least one result"):
        plot.hessian_max_spectrum({})


def test_spectral_density_is_drawn_down_to_a_single_eigenvalue():
    result = density(dim=50, sigma=0.3)
    ax = plot.spectral_density(result)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), result.grid)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), result.values)
    single = 1 / (50 * 0.3 * np.sqrt(2 * np.pi))
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[0] == pytest.approx(single / 10)
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(1.2 * result.values.max())
    assert ax.get_xlabel() == r"Hessian eigenvalue $\lambda$ (nats)"
    assert ax.get_ylabel() == "Density (1/nats)"


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_spectral_density_lies_within_its_scale(scale):
    values = scale * density().values
    result = replace(density(dim=50, sigma=0.3), values=values, values_stderr=0.1 * values)
    single = 1 / (50 * 0.3 * np.sqrt(2 * np.pi))
    top = max(1.2 * values.max(), single / 10)
    assert plot.spectral_density(result).get_ylim()[1] == pytest.approx(3 * top)


def test_several_spectra_have_the_densities_of_their_results():
    results = {
        name: replace(full_spectrum(), density=density(sigma=sigma))
        for name, sigma in (("ResNet", 0.3), ("ViT", 0.5))
    }
    ax = plot.hessian_spectrum(results | {"Swin": full_spectrum(with_density=False)})
    drawn = [line for line in ax.lines if len(line.get_xdata()) > 5]  # not the eigenvalues
    assert [line.get_color() for line in drawn] == [style.family_color(name) for name in results]
    for line, result in zip(drawn, results.values(), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), result.density.values)


@pytest.mark.parametrize("with_density", [True, False])
def test_edges_have_their_residuals_and_unconverged_ones_are_hollow(with_density):
    result = full_spectrum(with_density)
    ax = plot.hessian_spectrum(result)
    drawn = {bars.get_label(): bars for bars in ax.containers}
    assert set(drawn) == {"2 largest", "1 smallest", "1 smallest, not converged"}
    np.testing.assert_array_equal(drawn["2 largest"].lines[0].get_xdata(), [4.0, 3.5])
    (segments,) = drawn["2 largest"].lines[2]
    ends = np.array([segment[:, 0] for segment in segments.get_segments()])
    np.testing.assert_allclose(ends, [[3.96, 4.04], [3.465, 3.535]])
    assert drawn["1 smallest, not converged"].lines[0].get_markerfacecolor() == "none"
    assert "trace 20 ± 1.5" in ax.get_legend_handles_labels()[1]
    ax.figure.canvas.draw()


@pytest.mark.parametrize("height", [2.2, 4.8])
def test_a_legend_stands_above_the_densities(height):
    with mpl.rc_context(style.rc()):
        figure, axes = plt.subplots(1, 2, figsize=(6, height), layout="constrained")
        plot.hessian_spectrum(full_spectrum(), ax=axes[0])
        plot.hessian_max_spectrum(random_spectrum(negative=0.5), ax=axes[1])
        figure.canvas.draw()
    peaks = (
        density().values.max(),
        max(line.get_ydata().max() for line in by_gid(axes[1], "density")),
    )
    for ax, peak in zip(axes, peaks, strict=True):
        top = ax.transData.transform((0, peak))[1]
        bottom = ax.get_legend().get_window_extent().y0
        assert top < bottom < top + 0.35 * ax.get_window_extent().height


def test_results_draw_themselves():
    assert random_spectrum().plot(half="positive").get_xlim()[0] == 0
    assert density().plot().get_yscale() == "log"
    assert full_spectrum().plot().get_legend() is not None


def test_given_axes_are_used():
    figure, axes = plt.subplots(1, 3)
    assert plot.hessian_max_spectrum(random_spectrum(), ax=axes[0]) is axes[0]
    assert plot.spectral_density(density(), ax=axes[1]) is axes[1]
    assert plot.hessian_spectrum(full_spectrum(), ax=axes[2]) is axes[2]
    assert plt.get_fignums() == [figure.number]


def test_eigenvalues_within_their_error_of_zero_are_in_no_half_and_in_no_label():
    values = np.tile([3.0, -0.1, 1e-7, -2.0], (20, 1)) * np.linspace(1, 2, 20)[:, None]
    errors = np.tile([0.1, 0.5, 0.0, 0.1], (20, 1))
    result = replace(max_spectrum(values), errors=errors, nep=0.25, ape=4.5)
    below, above = ([*plot.half_density(result, sign)[:2]] for sign in (-1, 1))
    assert (area(*below), area(*above)) == pytest.approx((0.25, 0.25), rel=1e-3)
    ax = plot.hessian_max_spectrum(result)
    assert ax.get_legend_handles_labels()[1][0].startswith(
        "n = 40, 40 are 0 within error\nNEP 0.25"
    )
    drawn = np.concatenate([rug.get_xdata() for rug in by_gid(ax, "rug")])
    np.testing.assert_array_equal(np.sort(drawn), np.sort(values[:, [0, 3]].ravel()))
    figure = plot.interactive.hessian_max_spectrum(result)
    assert [trace.name for trace in figure.data if trace.name] == ["NEP 0.25", "APE 4.5"]
    assert sum(len(trace.x) for trace in figure.data if trace.mode == "markers") == 40


def test_a_spectrum_of_nothing_finite_has_no_nep():
    named = plot.interactive.hessian_max_spectrum({"ViT": max_spectrum([[np.nan, np.nan]])})
    assert named.data[0].name == "ViT (NEP –)"
