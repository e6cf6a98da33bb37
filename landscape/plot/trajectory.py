"""Training trajectories: in polar coordinates around the optimum, and in a plane."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.projections.polar import PolarAxes
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from landscape.plot import style, texts
from landscape.plot.surface import X_LABEL, Y_LABEL

if TYPE_CHECKING:
    from landscape.probes.trajectory import PolarTrajectory, Trajectory

POLAR_LABEL = r"radius $\|\Delta w_t\|\,/\,\|\Delta w_0\|$, angle in degrees"
_CLEAR = 1.05  # radii from the origin that a legend in the corner of a quarter disc keeps off


def polar_trajectory(
    result: "PolarTrajectory | Mapping[str, PolarTrajectory]",
    *,
    ax: Axes | None = None,
    label: str | None = None,
    **line: Any,
) -> Axes:
    """Draw a trajectory in polar coordinates around its optimum (Park & Kim, 2022, Fig. 1b).

    Every trajectory starts at radius 1, angle 0 (a star, `w_init`) and ends at the origin (a
    square, `w_opt`), so several share one sector; it opens to 90° or, where an angle is larger,
    to 180°.

    Args:
        result: The trajectory of one model, or of several by label.
        ax: Polar axes to draw on; fresh ones by default.
        label: Name of one model in the legend; its family decides the colour.
        **line: Passed to `Axes.plot`.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `PolarTrajectory`.
        ValueError: If `ax` is not polar, `result` is an empty mapping, or a mapping comes with a
            `label`.
    """
    if isinstance(result, Mapping):
        return style.draw_each(partial(polar_trajectory, **line), result, ax, label)
    style.check_result(result, "PolarTrajectory")
    if ax is None:
        ax = style.fresh_axes("polar")
    if not isinstance(ax, PolarAxes):
        raise ValueError("`ax` must be polar axes; make it with `projection='polar'`.")
    radius, angle = np.asarray(result.radius), known_angles(result)
    fresh = not ax.has_data()
    if fresh:
        ink = mpl.rcParams["text.color"]
        mark: dict[str, Any] = {"color": ink, "ls": "none", "clip_on": False, "zorder": 4}
        ax.plot(0, 1, "*", ms=6, label=r"$w_\mathrm{init}$", gid="w_init", **mark)
        ax.plot(0, 0, "s", ms=4, label=r"$w_\mathrm{opt}$", gid="w_opt", **mark)
    look = {"marker": "o", "ms": 2, **texts.labelled_line(ax, label), **line}
    ax.plot(angle, radius, **look)
    widest, farthest = np.nanmax(angle, initial=0.0), np.nanmax(radius, initial=1.0)
    wide = bool(widest > np.pi / 2) or (not fresh and ax.get_thetamax() > 90)
    ax.set_thetalim(0, np.pi if wide else np.pi / 2)
    ax.set_rmin(0)
    ax.set_rmax(max(1.05 * farthest, 0 if fresh else ax.get_rmax()))
    _label(ax, wide)
    return cast(Axes, ax)


def trajectory(
    result: "Trajectory | Mapping[str, Trajectory]",
    *,
    ax: Axes | None = None,
    label: str | None = None,
    **line: Any,
) -> Axes:
    """Draw a trajectory projected on two directions, from its star to its square.

    Draw it over a surface by passing the axes of `loss_surface(surface, kind="contour")` with
    the same directions.

    Args:
        result: The trajectory of one model, coordinates `(t, 2)`, or of several by label.
        ax: Axes to draw on; fresh ones by default.
        label: Name of one model in the legend; its family decides the colour.
        **line: Passed to `Axes.plot`.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `Trajectory`.
        ValueError: If the trajectory is not projected on exactly two directions, `result` is an
            empty mapping, or a mapping comes with a `label`.
    """
    if isinstance(result, Mapping):
        return style.draw_each(partial(trajectory, **line), result, ax, label)
    style.check_result(result, "Trajectory")
    coordinates = np.asarray(result.coordinates)
    if coordinates.ndim != 2 or coordinates.shape[1] != 2:
        raise ValueError(
            f"`result` must have coordinates of shape (t, 2), got {coordinates.shape}; project "
            "it on two directions."
        )
    ax = ax if ax is not None else style.fresh_axes()
    look = {"marker": "o", "ms": 2, **texts.labelled_line(ax, label), **line}
    (drawn,) = ax.plot(*coordinates.T, **look)
    end = {"color": drawn.get_color(), "mec": mpl.rcParams["text.color"], "mew": 0.4, "zorder": 3}
    ax.plot(*coordinates[0], "*", ms=6, gid="w_init", **end)
    ax.plot(*coordinates[-1], "s", ms=4, gid="w_opt", **end)
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL)
    if label is not None:
        texts.place_legend(ax, **texts.OVER_DATA)
    return ax


def known_angles(result: "PolarTrajectory") -> NDArray[np.float64]:
    """Return the angles; at radius 0, where there is none, the one before it."""
    angle = np.array(result.angle, dtype=np.float64)
    for t in np.flatnonzero(np.asarray(result.radius) == 0):
        angle[t] = angle[t - 1] if t else 0.0
    return angle


def _label(ax: PolarAxes, wide: bool) -> None:
    """Put label and legend around the sector: it is a quarter or a half disc in a square."""
    scale = ax.figure.dpi_scale_trans
    edge = 0.25 if wide else 0.0
    below_ticks = ax.transAxes + ScaledTranslation(0, -18 / 72, scale)
    below_label = ax.transAxes + ScaledTranslation(0, -32 / 72, scale)
    ax.set_xlabel(POLAR_LABEL, va="top")
    ax.xaxis.set_label_coords(0.5, edge, transform=below_ticks)
    legend: dict[str, Any] = {"loc": "upper right", "bbox_to_anchor": (1.15, 1.15)}
    box = ax.legend(**legend).get_window_extent()
    corner = 1.15 - np.array(box.size) / min(ax.bbox.size)  # where the legend begins
    if wide or np.hypot(*corner.clip(0)) < _CLEAR:
        page = np.array(ax.figure.bbox.size) * 72 / ax.figure.dpi
        size = texts.points(mpl.rcParams["legend.fontsize"])
        handles, labels = ax.get_legend_handles_labels()
        lines = [line for label in labels for line in label.split("\n") if "$" not in line]
        longest = max(map(len, lines), default=0)
        columns = int(np.clip(page[0] / ((0.55 * longest + 4) * size), 1, 3))
        legend = {"loc": "upper center", "bbox_to_anchor": (0.5, edge), "ncols": columns}
        legend |= {"bbox_transform": below_label, "columnspacing": 1}
        legend |= texts.fitting_entries(handles, texts.MOST_BELOW * page[1], size, columns)
    ax.legend(**legend)
