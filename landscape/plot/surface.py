"""Loss surfaces and lines: what was evaluated is drawn, what is not finite is a counted gap."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D
from numpy.typing import NDArray

from landscape._checks import check_choice
from landscape.plot import style, texts
from landscape.plot.scale import (
    LABELS,
    Quantity,
    color_bar,
    finite_values,
    log_label,
    make_norm,
    nice_ticks,
    norm_ends,
    shared_limits,
    tick_texts,
)

if TYPE_CHECKING:
    from landscape.probes.surface import LossLine, LossSurface

Kind = Literal["surface3d", "contour"]

X_LABEL = "$a$ (units of $d_1$)"
Y_LABEL = "$b$ (units of $d_2$)"

_NARROW = 4.0  # inches of 3D axes whose labels need room


def loss_surface(
    result: "LossSurface",
    *,
    ax: Axes | None = None,
    kind: Kind = "surface3d",
    quantity: Quantity = "loss",
    log: bool = False,
    vmin: float | None = None,
    vmax: float | None = None,
    colorbar: bool = True,
    **artist: Any,
) -> Axes:
    """Draw a quantity over the plane `θ + a·d₁ + b·d₂` (Park & Kim, 2022, Fig. 1a).

    Nothing is interpolated over points that are not finite: they are holes, marked by crosses
    and counted in a note. In 3D so are points outside `vmin`, `vmax`, marked by pluses.

    Args:
        result: The surface.
        ax: Axes to draw on (3D ones for `kind="surface3d"`); fresh ones by default.
        kind: A 3D surface through every evaluated point, or filled contours with a plus at the
            weights themselves.
        quantity: What to draw: the objective, one of its two terms, accuracy or ECE.
        log: Logarithmic height and colour; every finite value must be positive.
        vmin: Lower end of the scale; the smallest finite value by default. `shared_limits` gives
            a scale that several surfaces share.
        vmax: Upper end of the scale; the largest finite value by default.
        colorbar: Whether to add a colour bar to contours.
        **artist: Passed to `Axes3D.plot_surface` or `Axes.contourf`.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `LossSurface`.
        ValueError: If `kind` is unknown, `quantity` was not evaluated, `ax` does not suit
            `kind`, `vmin` is above `vmax`, `log` meets values that are not positive, or there is
            one point only along a direction.
    """
    style.check_result(result, "LossSurface")
    check_choice("kind", kind, get_args(Kind))
    if min(len(result.x), len(result.y)) < 2:
        raise ValueError(
            "`result` must have two points or more along each direction, got "
            f"{len(result.x)} x {len(result.y)}; evaluate more, or a row as a `loss_line`."
        )
    values = finite_values(result, quantity, log=log)
    low, high = shared_limits([result], quantity)
    low, high = low if vmin is None else vmin, high if vmax is None else vmax
    norm = make_norm(low, high, log=log and values.count() > 0)
    artist = {"cmap": style.SEQUENTIAL, **artist}
    if kind == "contour":
        ax = ax if ax is not None else style.fresh_axes()
        if isinstance(ax, Axes3D):
            raise ValueError(
                "`ax` must be flat axes for `kind='contour'`, got 3D ones; make it without "
                "`projection='3d'`, or draw `kind='surface3d'`."
            )
        _draw_contour(ax, result, values, norm, LABELS[quantity] if colorbar else None, artist)
        return ax
    if ax is None:
        ax = style.fresh_axes("3d")
    if not isinstance(ax, Axes3D):
        raise ValueError(
            "`ax` must be 3D axes for `kind='surface3d'`, got flat ones; make it with "
            "`projection='3d'`, or draw `kind='contour'`."
        )
    _draw_surface3d(ax, result, values, norm, LABELS[quantity], artist)
    return cast(Axes, ax)


def loss_line(
    result: "LossLine | Mapping[str, LossLine]",
    *,
    ax: Axes | None = None,
    quantity: Quantity = "loss",
    log: bool = False,
    label: str | None = None,
    **line: Any,
) -> Axes:
    """Draw a quantity along one direction, with a band of two standard errors each side.

    The band is that of the mean over samples of the NLL; L2 is exact, and accuracy and ECE have
    none. Points that are not finite break the line, and are marked by crosses and counted; a point
    between two of them is a dot.

    Args:
        result: The line of one model, or of several by label.
        ax: Axes to draw on; fresh ones by default.
        quantity: What to draw: the objective, one of its two terms, accuracy or ECE.
        log: Logarithmic height.
        label: Name of one model in a legend; its family decides the colour.
        **line: Passed to `Axes.plot`.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `LossLine`.
        ValueError: If `quantity` was not evaluated, `log` meets values that are not positive,
            `result` is an empty mapping, or a mapping comes with a `label`.
    """
    if isinstance(result, Mapping):
        draw = partial(loss_line, quantity=quantity, log=log, **line)
        return style.draw_each(draw, result, ax, label)
    style.check_result(result, "LossLine")
    values = finite_values(result, quantity, log=log)
    ax = ax if ax is not None else style.fresh_axes()
    (drawn,) = ax.plot(result.x, values, **{**texts.labelled_line(ax, label), **line})
    if quantity in {"loss", "nll"}:
        error = 2 * np.ma.masked_invalid(result.nll_stderr)
        low, high = values - error, values + error
        ax.fill_between(result.x, low, high, color=drawn.get_color(), alpha=0.2, lw=0, zorder=1)
    if log and values.count():  # a logarithmic axis needs a value
        ax.set_yscale("log")
    missing = np.ma.getmaskarray(values)
    beside = np.pad(missing, 1, constant_values=True)
    alone = ~missing & beside[:-2] & beside[2:]
    if alone.any():
        ax.plot(result.x[alone], values[alone], ".", color=drawn.get_color())
    texts.mark_missing(ax, result.x, missing, drawn.get_color())
    texts.add_note(ax, texts.missing_note(missing, label))
    ax.set(xlabel=X_LABEL, ylabel=LABELS[quantity])
    if len(result.x) > 1:
        ax.set_xlim(result.x.min(), result.x.max())
    if label is not None:
        texts.place_legend(ax, **texts.OVER_DATA)
    return ax


def _draw_surface3d(
    ax: Any,
    result: "LossSurface",
    values: np.ma.MaskedArray,
    norm: Normalize,
    label: str,
    artist: dict[str, Any],
) -> None:
    x, y = np.meshgrid(result.x, result.y, indexing="ij")
    inside = np.ma.masked_outside(values, *norm_ends(norm))
    heights = inside.filled(np.nan)
    ticks, (floor, ceiling) = nice_ticks(norm), norm_ends(norm)
    written = tick_texts(ticks)
    if isinstance(norm, LogNorm):  # 3D axes have no log scale of their own: log10, labelled back
        ticks = np.log10(ticks).tolist()
        heights, floor, ceiling = np.log10(heights), np.log10(floor), np.log10(ceiling)
        label = log_label(label)
    ax.set_zticks(ticks, written)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    longest = max(0 if "$" in text else len(text) for text in written)
    _make_room(ax, longest)
    # No layout keeps room for the labels of a box.
    narrow = ax.get_window_extent().width < _NARROW * ax.figure.dpi
    ax.set_box_aspect(None, zoom=(0.8 if narrow else 1) * (0.85 if longest > 7 else 1))
    if inside.count():
        mesh = {"rstride": 1, "cstride": 1, "linewidth": 0.15, "edgecolor": (0, 0, 0, 0.35)}
        ax.plot_surface(x, y, heights, vmin=floor, vmax=ceiling, **{**mesh, **artist})
    missing = np.ma.getmaskarray(values)
    outside = np.ma.getmaskarray(inside) & ~missing
    mark = {"s": 4, "lw": 0.5, "color": style.MUTED, "depthshade": False}
    for absent, marker in ((missing, "x"), (outside, "+")):
        if absent.any():
            ax.scatter(x[absent], y[absent], floor, marker=marker, **mark)
    _note(ax, missing, outside)
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL, zlabel=label, zlim=(floor, ceiling))
    ax.set(xlim=(result.x.min(), result.x.max()), ylim=(result.y.min(), result.y.max()))


def _make_room(ax: Any, longest: int) -> None:
    """Move the label of the heights aside for a tick of so many characters."""
    size = ax.zaxis.get_major_ticks(1)[0].label1.get_size()
    extra = 0.5 * size * max(longest - 4, 0)  # points of what is longer than "16.5"
    ax.zaxis.labelpad = mpl.rcParams["axes.labelpad"] + extra
    ax.zaxis.set_tick_params(pad=mpl.rcParams["xtick.major.pad"] + extra / 2)


def _draw_contour(
    ax: Axes,
    result: "LossSurface",
    values: np.ma.MaskedArray,
    norm: Normalize,
    label: str | None,
    artist: dict[str, Any],
) -> None:
    log = isinstance(norm, LogNorm)
    spaced = np.geomspace if log else np.linspace
    levels: NDArray[np.float64] = spaced(*norm_ends(norm), 25)
    ends = ["neither", "min", "max", "both"]
    below, above = values.min() < levels[0], values.max() > levels[-1]
    filled = {"levels": levels, "extend": ends[bool(below) + 2 * bool(above)], "norm": norm}
    if values.count():
        drawn = ax.contourf(result.x, result.y, values.T, **{**filled, **artist})
        ax.contour(drawn, levels=levels[::4], colors="w", linewidths=0.4, alpha=0.7)
        if label is not None:
            bar = {"cmap": artist["cmap"], "extend": filled["extend"]}
            color_bar(ax.figure, norm, label, ax=ax, **bar)
    missing = np.ma.getmaskarray(values)
    if missing.any():
        rows, columns = np.nonzero(missing)
        ax.plot(
            result.x[rows], result.y[columns], "x", ms=2, mew=0.5, color=style.MUTED, clip_on=False
        )
    if values.count():
        ax.plot(0, 0, "P", ms=4, color="w", mec="k", mew=0.4, gid="weights")
    _note(ax, missing)
    ax.set(xlim=(result.x.min(), result.x.max()), ylim=(result.y.min(), result.y.max()))
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL)


def _note(ax: Any, missing: NDArray[np.bool_], outside: NDArray[np.bool_] | None = None) -> None:
    """Say in the axes how many points are marked by a cross, and how many by a plus."""
    lines = [texts.missing_note(missing)] if missing.any() else []
    if outside is not None and outside.any():
        lines.append(f"+: {outside.sum()} of {outside.size} outside the scale")
    if not isinstance(ax, Axes3D):
        texts.add_note(ax, *lines)
    elif lines:
        place: dict[str, Any] = {"ha": "center", "va": "top", "transform": ax.transAxes}
        look = {"fontsize": style.NOTE_SIZE, "color": style.MUTED, "gid": "note"}
        ax.text2D(0.5, 0.99, "\n".join(lines), **place, **look)
