import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import LogNorm
from matplotlib.contour import QuadContourSet
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from landscape import plot
from landscape.plot.scale import make_norm, nice_ticks, tick_texts
from tests.plot.cases import line, surface


def notes(ax):
    return [artist.get_text() for artist in ax.texts if artist.get_gid() == "note"]


@pytest.fixture
def cells(monkeypatch):
    """Corners of every cell that is handed to a 3D surface, as distinct points."""
    recorded = []
    original = Poly3DCollection.__init__

    def record(self, verts, *args, **kwargs):
        recorded.extend(np.unique(np.asarray(corners), axis=0) for corners in verts)
        original(self, verts, *args, **kwargs)

    monkeypatch.setattr(Poly3DCollection, "__init__", record)
    return recorded


def vertices(cells):
    return np.unique(np.concatenate(cells).round(9), axis=0)


def contours(ax):
    return [artist for artist in ax.collections if isinstance(artist, QuadContourSet)]


def points_of(result, values):
    x, y = np.meshgrid(result.x, result.y, indexing="ij")
    table = np.stack([x, y, values], axis=-1).reshape(-1, 3)
    return np.unique(table[np.isfinite(table[:, 2])].round(9), axis=0)


@pytest.mark.parametrize("quantity", ["loss", "nll", "l2", "accuracy"])
@pytest.mark.parametrize("size", [(7, 5), (3, 9), (61, 52)], ids=str)
def test_surface_goes_through_every_point_of_a_non_square_grid(quantity, size, cells):
    result = surface(p=size[0], q=size[1])
    ax = plot.loss_surface(result, quantity=quantity)
    drawn = vertices(cells)
    np.testing.assert_allclose(drawn, points_of(result, getattr(result, quantity)), atol=1e-8)
    assert len(cells) == (size[0] - 1) * (size[1] - 1)
    assert notes(ax) == []


def test_log_surface_draws_log10_and_labels_values(cells):
    result = surface(np.exp(2 * np.random.default_rng(0).standard_normal((7, 5))))
    ax = plot.loss_surface(result, quantity="nll", log=True)
    np.testing.assert_allclose(vertices(cells), points_of(result, np.log10(result.nll)), atol=1e-8)
    labels = [float(text.get_text()) for text in ax.get_zticklabels()]
    np.testing.assert_allclose(10 ** ax.get_zticks(), labels)
    assert "log scale" in ax.get_zlabel()


def test_points_that_are_not_finite_are_holes_and_counted(cells):
    result = surface(missing=[(2, 3), (6, 4)])
    result.nll[0, 0] = np.nan
    result.loss[0, 0] = np.nan
    ax = plot.loss_surface(result)
    drawn = vertices(cells)
    assert len(drawn) == 7 * 5 - 3
    np.testing.assert_allclose(drawn, points_of(result, result.loss), atol=1e-8)
    assert sum(len(face) == 4 for face in cells) == 6 * 4 - 4 - 1 - 1  # whole cells
    assert notes(ax) == ["×: 3 of 35 not finite"]
    low, high = plot.shared_limits([result])
    assert ax.get_zlim() == pytest.approx((low, high))


@pytest.mark.parametrize("kind", ["surface3d", "contour"])
@pytest.mark.parametrize("log", [False, True])
def test_a_surface_without_any_finite_point_is_blank_and_says_so(kind, log):
    ax = plot.loss_surface(surface(np.full((7, 5), np.nan)), kind=kind, log=log)
    ax.figure.canvas.draw()
    assert notes(ax) == ["×: 35 of 35 not finite"]
    assert contours(ax) == []


def test_points_outside_the_scale_are_left_out_and_counted(cells):
    result = surface(missing=[(0, 0)])
    ax = plot.loss_surface(result, quantity="nll", vmax=15)
    drawn = vertices(cells)
    assert drawn[:, 2].max() <= 15
    above = int(np.sum(result.nll[np.isfinite(result.nll)] > 15))
    assert notes(ax) == [f"×: 1 of 35 not finite\n+: {above} of 35 outside the scale"]


@pytest.mark.parametrize("log", [False, True])
def test_contours_lie_where_the_plane_has_that_value(log):
    result = surface(p=9, q=4)  # nll = 12 + 3 x + 10 y: contouring a plane is exact
    ax = plot.loss_surface(result, kind="contour", quantity="nll", log=log)
    filled, lines = contours(ax)
    assert filled.filled
    assert filled.zmin == result.nll.min()
    assert filled.zmax == result.nll.max()
    checked = 0
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        for x, y in path.vertices:
            assert 12 + 3 * x + 10 * y == pytest.approx(level, rel=1e-6)
            checked += 1
    assert checked > 10
    assert isinstance(filled.norm, LogNorm) == log


def test_contours_leave_missing_points_blank():
    result = surface(missing=[(5, 3), (6, 3), (5, 4), (6, 4)])
    ax = plot.loss_surface(result, kind="contour", quantity="nll")
    filled, _ = contours(ax)
    corner = (result.x[6], result.y[4])
    inside = (result.x[1], result.y[1])
    assert not any(path.contains_point(corner, radius=-1e-6) for path in filled.get_paths())
    assert any(path.contains_point(inside) for path in filled.get_paths())
    (crosses,) = [artist for artist in ax.lines if artist.get_marker() == "x"]
    missing = sorted(zip(*map(list, crosses.get_data()), strict=True))
    assert missing == sorted((result.x[i], result.y[j]) for i in (5, 6) for j in (3, 4))
    assert notes(ax) == ["×: 4 of 35 not finite"]


def test_contour_marks_the_weights_and_has_a_labelled_colour_bar():
    ax = plot.loss_surface(surface(), kind="contour", quantity="nll")
    assert [artist.get_gid() for artist in ax.lines] == ["weights"]
    bar = ax.figure.axes[1]
    assert bar.get_ylabel() == "NLL (nats)"
    bare = plot.loss_surface(surface(), kind="contour", colorbar=False)
    assert len(bare.figure.axes) == 1


@pytest.mark.parametrize("kind", ["surface3d", "contour"])
def test_axes_are_labelled_with_units_and_span_the_grid(kind):
    result = surface()
    ax = plot.loss_surface(result, kind=kind)
    assert ax.get_xlabel() == "$a$ (units of $d_1$)"
    assert ax.get_ylabel() == "$b$ (units of $d_2$)"
    assert ax.get_xlim() == pytest.approx((-1, 1))
    assert ax.get_ylim() == pytest.approx((-0.4, 0.8))
    if kind == "surface3d":
        assert ax.get_zlabel() == "Loss: NLL + L2 (nats)"


def test_shared_limits_ignore_what_is_not_finite():
    first, second = surface(missing=[(6, 4)]), surface(missing=[(0, 0)])
    low, high = plot.shared_limits([first, second], "nll")
    assert (low, high) == pytest.approx((12 - 3 - 4, 12 + 3 + 8))
    for result in (first, second):
        ax = plot.loss_surface(result, quantity="nll", vmin=low, vmax=high)
        assert ax.get_zlim() == pytest.approx((low, high))


def test_constant_surface_has_a_scale():
    ax = plot.loss_surface(surface(np.full((7, 5), 2.0)), quantity="nll")
    low, high = ax.get_zlim()
    assert low < 2 < high


@pytest.mark.parametrize("value", [-200.0, -1e-9, 0.0, 3.0, 1e12])
def test_scale_of_a_constant_reaches_a_hundredth_beyond_it(value):
    norm = make_norm(value, value)
    beyond = 0.01 * abs(value or 1.0)
    assert (norm.vmin, norm.vmax) == pytest.approx((value - beyond, value + beyond), rel=1e-12)


@pytest.mark.parametrize(
    ("ends", "log"), [((1, 9.9), False), ((1, 11), True), ((0, 100), False), ((-5, 100), False)]
)
def test_scale_is_logarithmic_beyond_a_factor_of_ten(ends, log):
    assert isinstance(make_norm(*ends), LogNorm) == log


@pytest.mark.parametrize(("low", "high"), [(1, 30), (0.02, 400), (2, 2.9), (1e-6, 1e6)])
def test_logarithmic_ticks_are_few_and_inside(low, high):
    ticks = nice_ticks(make_norm(low, high, log=True))
    assert 2 <= len(ticks) <= 12
    assert low <= ticks[0] < ticks[-1] <= high


def test_a_short_logarithmic_scale_has_a_tick_near_each_end():
    assert nice_ticks(make_norm(2.2, 24, log=True)) == [3, 5, 10, 20]


def test_many_decades_have_a_few_powers_of_ten():
    ticks = nice_ticks(make_norm(150, 2e8, log=True))
    assert ticks == [1e3, 1e5, 1e7]
    assert tick_texts(ticks) == ["$10^{3}$", "$10^{5}$", "$10^{7}$"]
    assert tick_texts(ticks, "10<sup>{}</sup>")[0] == "10<sup>3</sup>"
    assert tick_texts([0.1, 1.0, 100.0]) == ["0.1", "1", "100"]
    assert tick_texts([123456.0, 234567.0]) == ["123456", "234567"]
    assert tick_texts([-200000.0, 0.0]) == ["-200000", "0"]


def test_ticks_have_the_digits_that_tell_them_apart():
    assert tick_texts([2.302585, 2.3025855, 2.302586]) == ["2.302585", "2.3025855", "2.302586"]
    assert tick_texts([1e6, 1e6 + 0.5, 1e6 + 1]) == ["1000000", "1000000.5", "1000001"]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_heights_are_written_as_they_are_in_few_characters(scale):
    ax = plot.loss_surface(surface(scale * np.arange(35.0).reshape(7, 5)), quantity="nll")
    labels = [text.get_text() for text in ax.get_zticklabels()]
    np.testing.assert_allclose([float(label) for label in labels], ax.get_zticks())
    assert max(map(len, labels)) <= 7


def test_ticks_of_a_box_of_a_column_do_not_overlap():
    with mpl.rc_context({**plot.style.rc(), "figure.figsize": (plot.style.COLUMN_WIDTH, 2.6)}):
        ax = plot.loss_surface(surface())
        ax.figure.draw_without_rendering()
        for axis in (ax.xaxis, ax.yaxis):
            drawn = [each.label1.get_window_extent() for each in axis.get_major_ticks()]
            assert len(drawn) > 2
            assert not any(a.overlaps(b) for a, b in itertools.pairwise(drawn))


def test_line_draws_the_values_and_two_standard_errors():
    result = line([3, 2, 1, 2, 4.0], stderr=0.25)
    ax = plot.loss_line(result, label="ViT")
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), result.x)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), result.loss)
    assert ax.lines[0].get_color() == plot.style.family_color("ViT")
    band = ax.collections[0].get_paths()[0].vertices
    for x, value in zip(result.x, result.loss, strict=True):
        ends = band[np.isclose(band[:, 0], x), 1]
        assert (ends.min(), ends.max()) == pytest.approx((value - 0.5, value + 0.5))
    assert ax.get_ylabel() == "Loss: NLL + L2 (nats)"
    assert ax.get_legend_handles_labels()[1] == ["ViT"]


def test_line_breaks_at_missing_points_and_l2_has_no_band():
    result = line([3, np.inf, 1, 2, np.nan])
    ax = plot.loss_line(result)
    drawn = ax.lines[0].get_ydata()
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn), [False, True, False, False, True])
    dot, crosses = ax.lines[1:]  # the first point has no neighbour to be joined with
    np.testing.assert_array_equal(dot.get_xydata(), [[result.x[0], 3.5]])
    np.testing.assert_array_equal(crosses.get_xdata(), result.x[[1, 4]])
    assert notes(ax) == ["×: 2 of 5 not finite"]
    assert not plot.loss_line(result, quantity="l2").collections


def test_results_draw_themselves():
    assert surface().plot(kind="contour").get_xlabel() == "$a$ (units of $d_1$)"
    assert line([1, 2]).plot(quantity="nll").get_ylabel() == "NLL (nats)"


def test_given_axes_are_used_and_no_figure_is_opened():
    figure = mpl.figure.Figure()
    flat, deep = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2, projection="3d")
    assert plot.loss_surface(surface(), ax=deep) is deep
    assert plot.loss_line(line([1, 2]), ax=flat) is flat
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "heatmap"}, "`kind` must be one of 'surface3d', 'contour', got 'heatmap'"),
        ({"quantity": "ece"}, "`quantity` must be one of 'loss', 'nll', 'l2', 'accuracy', got"),
        ({"quantity": "accuracy", "log": True}, "`log` must be False .* smallest accuracy of 0"),
        ({"vmin": 5, "vmax": 4}, "`vmin` must be at most `vmax`, got 5 and 4"),
        ({"log": True, "vmin": 0}, "`vmin` must be positive on a logarithmic scale, got 0"),
    ],
    ids=["kind", "not evaluated", "log of zero", "reversed", "log scale from zero"],
)
def test_errors_name_the_argument(arguments, message):
    result = surface()
    result.accuracy[0, 0] = 0
    with pytest.raises(ValueError, match=message):
        plot.loss_surface(result, **arguments)


@pytest.mark.parametrize("kind", ["surface3d", "contour"])
def test_a_surface_of_one_row_is_refused_and_a_line_of_one_point_is_a_dot(kind):
    with pytest.raises(ValueError, match="`result` must have two points or more .*, got 1 x 5"):
        plot.loss_surface(surface(p=1), kind=kind)
    assert plot.loss_line(line([2])).lines[1].get_xydata().tolist() == [[-1, 2.5]]


def test_3d_axes_are_refused_for_contours():
    deep = mpl.figure.Figure().add_subplot(projection="3d")
    with pytest.raises(ValueError, match="`ax` must be flat axes for `kind='contour'`, got 3D"):
        plot.loss_surface(surface(), kind="contour", ax=deep)


def test_flat_axes_are_refused_for_3d():
    with pytest.raises(ValueError, match="`ax` must be 3D axes"):
        plot.loss_surface(surface(), ax=mpl.figure.Figure().add_subplot())
