import numpy as np
import pytest

from landscape import plot
from tests.plot.cases import (
    density,
    full_spectrum,
    line,
    max_spectrum,
    polar,
    random_spectrum,
    surface,
    trajectory,
)


def test_surfaces_are_the_results_with_gaps_and_a_common_scale():
    results = {"ResNet": surface(missing=[(6, 4)]), "ViT": surface(surface().nll / 2)}
    figure = plot.interactive.loss_surface(results)
    assert len(figure.data) == 3 * 2
    for trace, result in zip(figure.data[:2], results.values(), strict=True):
        np.testing.assert_array_equal(trace.x, result.x)
        np.testing.assert_array_equal(trace.y, result.y)
        expected = np.where(np.isfinite(result.loss), result.loss, np.nan)
        np.testing.assert_array_equal(np.array(trace.z), expected.T)  # plotly: a row is one y
        assert not trace.connectgaps
        assert trace.hovertemplate.startswith("a = %{x:.3g}<br>b = %{y:.3g}<br>loss = %{z:.4g}")
    scales = plot.shared_limits(results.values())
    for scene in (figure.layout.scene, figure.layout.scene2):
        assert scene.zaxis.range == pytest.approx(scales)
        assert scene.zaxis.title.text == "Loss: NLL + L2 (nats)"
    assert figure.layout.coloraxis.cmin == pytest.approx(scales[0])
    titles = [each.text for each in figure.layout.annotations]
    assert titles == ["ResNet (1 of 35 points not finite)", "ViT"]


def test_buttons_show_one_quantity_on_its_own_scale():
    results = {"ResNet": surface(), "ViT": surface(surface().nll / 2)}
    figure = plot.interactive.loss_surface(results)
    assert [trace.visible for trace in figure.data] == [True, True, False, False, False, False]
    (menu,) = figure.layout.updatemenus
    assert [button.label for button in menu.buttons] == ["loss", "nll", "l2"]
    shown, layout = menu.buttons[2].args
    assert shown["visible"] == [False, False, False, False, True, True]
    ends = plot.shared_limits(results.values(), "l2")
    assert tuple(layout["scene2.zaxis.range"]) == pytest.approx(ends)


def test_wide_surface_has_logarithmic_height_and_colour():
    result = surface(np.exp(3 * np.random.default_rng(0).standard_normal((7, 5))))
    figure = plot.interactive.loss_surface(result, quantities=("nll",))
    (trace,) = figure.data
    np.testing.assert_allclose(np.array(trace.surfacecolor), np.log10(result.nll.T))
    np.testing.assert_array_equal(np.array(trace.z), result.nll.T)
    ends = np.log10([result.nll.min(), result.nll.max()])
    assert figure.layout.scene.zaxis.type == "log"
    assert figure.layout.scene.zaxis.range == pytest.approx(ends)
    bar = figure.layout.coloraxis.colorbar
    np.testing.assert_allclose(bar.tickvals, np.log10([float(text) for text in bar.ticktext]))


def test_polar_paths_have_degrees_steps_and_family_colours():
    figure = plot.interactive.polar_trajectory({"ResNet": polar(), "ViT": polar()})
    for name, trace in zip(("ResNet", "ViT"), figure.data, strict=True):
        np.testing.assert_allclose(trace.theta, np.degrees([0, 0.6, 1.2, 1.2]))
        np.testing.assert_array_equal(trace.r, [1, 0.9, 0.5, 0])
        np.testing.assert_array_equal(trace.customdata, range(4))
        assert (trace.name, trace.line.color) == (name, plot.style.family_color(name))
    assert figure.layout.polar.sector == (0, 90)
    wide = plot.interactive.polar_trajectory(polar(angle=(0, 1, 2, np.nan)))
    assert wide.layout.polar.sector == (0, 180)


def test_a_path_that_diverged_leaves_others_their_sector():
    paths = {"diverged": polar((np.nan,) * 4, (np.nan,) * 4), "b": polar(angle=(0, 1, 2, np.nan))}
    assert plot.interactive.polar_trajectory(paths).layout.polar.sector == (0, 180)


@pytest.mark.parametrize("log", [False, True])
def test_spectra_have_halves_apart_and_every_eigenvalue(log):
    result = random_spectrum()
    figure = plot.interactive.hessian_max_spectrum({"ViT": result}, log=log)
    for (curve, rug), sign in zip((figure.data[:2], figure.data[2:]), (-1, 1), strict=True):
        grid, values, _ = plot.half_density(result, sign, log=log)
        shown = sign * grid if log else grid
        np.testing.assert_array_equal(curve.x, shown)
        np.testing.assert_array_equal(curve.y, values)
        hovered = np.array(rug.customdata)
        batch, index = hovered[:, 1].astype(int), hovered[:, 2].astype(int) - 1
        np.testing.assert_array_equal(hovered[:, 0], result.eigenvalues[batch, index])
        np.testing.assert_array_equal(hovered[:, 3], result.residuals[batch, index])
        assert len(hovered) == (np.sign(result.eigenvalues) == sign).sum()
        assert curve.line.color == plot.style.family_color("ViT")
    assert figure.layout.xaxis2.type == ("log" if log else "linear")
    assert figure.data[0].name == f"ViT (NEP {result.nep:.3g})"


def test_a_spectrum_without_negative_eigenvalues_is_drawn():
    figure = plot.interactive.hessian_max_spectrum(max_spectrum([[2.0], [3.0]]))
    assert [len(trace.x) for trace in figure.data] == [0, 0, 0, 2]


def test_lines_have_bands_and_gaps():
    results = {"ResNet": line([3.0, 2.0, 2.5]), "ViT": line([2.0, np.inf, 1.0])}
    figure = plot.interactive.loss_line(results)
    curves = [trace for trace in figure.data if trace.fill is None]
    for curve, (name, result) in zip(curves, results.items(), strict=True):
        finite = np.where(np.isfinite(result.loss), result.loss, np.nan)
        np.testing.assert_array_equal(curve.y, finite)
        np.testing.assert_array_equal(curve.x, result.x)
        assert (curve.name, curve.line.color) == (name, plot.style.family_color(name))
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert [len(band.x) for band in bands] == [6, 2, 2]  # in pieces around the gap
    np.testing.assert_allclose(bands[0].y, [3.7, 2.7, 3.2, 2.8, 2.3, 3.3])
    assert figure.layout.yaxis.title.text == "Loss: NLL + L2 (nats)"
    assert plot.interactive.loss_line(results, log=True).layout.yaxis.type == "log"
    accuracy = plot.interactive.loss_line(results["ViT"], quantity="l2")
    assert [trace.fill for trace in accuracy.data] == [None]


def test_trajectories_go_from_star_to_square():
    (trace,) = plot.interactive.trajectory(trajectory([[0, 1], [1, 1], [2, 0.5]])).data
    assert (tuple(trace.x), tuple(trace.y)) == ((0, 1, 2), (1, 1, 0.5))
    assert trace.marker.symbol == ("star", "circle", "square")
    assert tuple(trace.customdata) == (0, 1, 2)
    with pytest.raises(ValueError, match=r"shape \(t, 2\), got \(2, 3\)"):
        plot.interactive.trajectory(trajectory(np.zeros((2, 3))))


def test_densities_are_those_of_the_result_above_what_one_eigenvalue_makes():
    result = density()
    band, curve = plot.interactive.spectral_density({"ViT": result}).data
    np.testing.assert_array_equal(curve.y, result.values)
    np.testing.assert_array_equal(curve.x, result.grid)
    floor = 0.1 / (result.dim * result.sigma * np.sqrt(2 * np.pi))
    assert min(band.y) == pytest.approx(floor)
    assert curve.name == "ViT, σ = 0.3"


@pytest.mark.parametrize("with_density", [True, False])
def test_edges_show_eigenvalues_with_residuals_hollow_where_not_converged(with_density):
    result = full_spectrum(with_density)
    figure = plot.interactive.hessian_spectrum(result)
    largest, smallest = figure.data[-2:]
    assert len(figure.data) == 2 + 2 * with_density
    np.testing.assert_array_equal(largest.x, result.largest.values)
    np.testing.assert_array_equal(largest.error_x.array, result.largest.residuals)
    np.testing.assert_array_equal(np.array(smallest.customdata)[:, 1], result.smallest.errors)
    assert largest.marker.symbol == ("triangle-up", "triangle-up")
    assert smallest.marker.symbol == ("triangle-down", "triangle-down-open")
    assert figure.layout.title.text == "trace 20 ± 1.5"
    mixed = plot.interactive.hessian_spectrum({"one": full_spectrum(False), "two": result})
    colors = {trace.name.split(",")[0]: set() for trace in mixed.data if trace.name}
    for trace in mixed.data:
        if trace.name:
            colors[trace.name.split(",")[0]].add(trace.marker.color or trace.line.color)
    assert [len(each) for each in colors.values()] == [1, 1]
    assert len(set.union(*colors.values())) == 2
    both = plot.interactive.hessian_spectrum({"ResNet": result, "ViT": result})
    titles = {trace.legendgroup: trace.legendgrouptitle.text for trace in both.data}
    assert titles == {name: f"{name}: trace 20 ± 1.5" for name in ("ResNet", "ViT")}
    assert both.layout.title.text is None


def test_axes_have_the_units_of_the_static_plots():
    draw, eigenvalue = plot.interactive, "Hessian eigenvalue λ (nats)"
    a, b = "a (units of d₁)", "b (units of d₂)"
    path = draw.trajectory(trajectory([(1, 2), (0, 0)])).layout
    assert (path.xaxis.title.text, path.yaxis.title.text) == (a, b)
    scene = draw.loss_surface(surface()).layout.scene
    assert (scene.xaxis.title.text, scene.yaxis.title.text) == (a, b)
    assert draw.loss_line(line([3, 1, 2])).layout.xaxis.title.text == a
    assert draw.spectral_density(density()).layout.xaxis.title.text == eigenvalue
    assert draw.hessian_spectrum(full_spectrum(False)).layout.xaxis.title.text == eigenvalue


def test_every_result_with_axes_of_its_own_has_an_interactive_figure():
    static = {"block_diagram"}  # of structure: there is nothing to read off
    assert set(plot.__all__[: plot.__all__.index("run_columns")]) - static == set(
        plot.interactive.__all__
    )


def test_pages_are_small_and_load_plotly_from_the_network_address_only(tmp_path):
    path = tmp_path / "fig1a.html"
    plot.interactive.loss_surface(surface()).write_html(path, include_plotlyjs="cdn")
    assert path.stat().st_size < 100_000
    assert "cdn" in path.read_text()


def test_errors():
    with pytest.raises(ValueError, match="`result` must hold at least one result"):
        plot.interactive.polar_trajectory({})
    with pytest.raises(ValueError, match="`quantities` must name at least one"):
        plot.interactive.loss_surface(surface(), quantities=())
    with pytest.raises(ValueError, match="`quantity` must be one of .* got 'ece'"):
        plot.interactive.loss_surface(surface(), quantities=("ece",))
