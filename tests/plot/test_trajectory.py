import matplotlib as mpl
import numpy as np
import pytest

from landscape import plot
from tests.plot.cases import polar, surface, trajectory


def paths(ax):
    return [line for line in ax.lines if line.get_gid() is None]


def test_polar_path_is_the_result_and_ends_at_the_origin():
    ax = plot.polar_trajectory(polar(), label="ViT-Ti")
    (path,) = paths(ax)
    np.testing.assert_array_equal(path.get_ydata(), [1, 0.9, 0.5, 0])
    np.testing.assert_array_equal(path.get_xdata(), [0, 0.6, 1.2, 1.2])  # no angle at radius 0
    assert path.get_color() == plot.style.family_color("ViT")
    assert ax.get_xlabel() == r"radius $\|\Delta w_t\|\,/\,\|\Delta w_0\|$, angle in degrees"


def test_start_and_end_are_marked_once_for_several_paths():
    ax = plot.polar_trajectory(polar(), label="ResNet")
    plot.polar_trajectory(polar(), ax=ax, label="ViT")
    marks = {line.get_gid(): (line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines}
    assert marks["w_init"] == (0, 1)
    assert marks["w_opt"] == (0, 0)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [r"$w_\mathrm{init}$", r"$w_\mathrm{opt}$", "ResNet", "ViT"]


@pytest.mark.parametrize(
    ("results", "degrees", "radius"),
    [
        ([polar()], 90, 1.05),
        ([polar(angle=(0, 1.0, 1.6, np.nan))], 180, 1.05),
        ([polar(angle=(0, 1.0, 2.6, np.nan)), polar()], 180, 1.05),
        ([polar(), polar(radius=(1, 2, 0.5, 0), angle=(0, 1, 3, np.nan))], 180, 2.1),
        ([polar(radius=(1, 2, 0.5, 0)), polar()], 90, 2.1),
        ([polar(radius=(1, 2, 0.5, 0))], 90, 2.1),
    ],
    ids=["quarter", "half", "stays half", "grows", "far", "far alone"],
)
def test_sector_holds_every_path(results, degrees, radius):
    ax = None
    for result in results:
        ax = plot.polar_trajectory(result, ax=ax)
    assert ax.get_thetamin() == pytest.approx(0)
    assert ax.get_thetamax() == pytest.approx(degrees)
    assert ax.get_rmin() == 0
    assert ax.get_rmax() == pytest.approx(radius)
    ax.figure.canvas.draw()


def test_a_legend_of_long_names_leaves_the_paths_and_their_angles_alone():
    names = [f"{name} with augmentation" for name in ("ViT-Ti", "ResNet-50", "mine")]
    paths = {name: polar(angle=(0, 0.8, 1, np.nan)) for name in names}
    with mpl.rc_context({**plot.style.rc(), "figure.figsize": (plot.style.COLUMN_WIDTH, 2.6)}):
        ax = plot.polar_trajectory(paths)
        ax.figure.draw_without_rendering()
    legend = ax.get_legend().get_window_extent()
    ticks = [tick.label1.get_window_extent() for tick in ax.xaxis.get_major_ticks()]
    assert legend.count_overlaps(ticks) == 0
    assert not legend.count_contains(ax.transData.transform([(0.8, 0.9), (1.0, 0.5)]))


def test_flat_axes_are_refused_for_a_polar_path():
    with pytest.raises(ValueError, match="`ax` must be polar axes"):
        plot.polar_trajectory(polar(), ax=mpl.figure.Figure().add_subplot())


def test_trajectory_lies_over_the_contours_of_its_plane():
    points = [(0.8, 0.6), (0.3, 0.1), (0.0, 0.0)]
    ground = plot.loss_surface(surface(), kind="contour", colorbar=False)
    limits = ground.get_xlim(), ground.get_ylim()
    ax = plot.trajectory(trajectory(points), ax=ground, color="w")
    assert ax is ground
    assert (ax.get_xlim(), ax.get_ylim()) == limits
    np.testing.assert_array_equal(paths(ax)[0].get_xydata(), points)
    marks = {line.get_gid(): tuple(line.get_xydata()[0]) for line in ax.lines}
    assert marks["w_init"] == (0.8, 0.6)
    assert marks["w_opt"] == (0, 0)


def test_trajectory_alone_has_labelled_axes():
    ax = plot.trajectory(trajectory([(1, 2), (0, 0)]), label="Swin-T")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$a$ (units of $d_1$)", "$b$ (units of $d_2$)")
    assert paths(ax)[0].get_color() == plot.style.family_color("swin")


@pytest.mark.parametrize("coordinates", [[(1,), (0,)], [(1, 2, 3)], [1.0, 2.0]])
def test_other_numbers_of_directions_are_refused(coordinates):
    with pytest.raises(ValueError, match=r"coordinates of shape \(t, 2\)"):
        plot.trajectory(trajectory(coordinates))


def test_results_draw_themselves():
    assert polar().plot().get_thetamax() == pytest.approx(90)
    assert trajectory([(1, 2), (0, 0)]).plot().get_xlabel() == "$a$ (units of $d_1$)"
