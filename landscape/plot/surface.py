"""Loss surfaces and lines: what was evaluated is drawn, what is not finite is a counted gap."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import FigureBase
from matplotlib.ticker import LogLocator, MaxNLocator
from mpl_toolkits.mplot3d import Axes3D
from numpy.typing import NDArray

from landscape._checks import check_choice
from landscape.plot import style

if TYPE_CHECKING:
    from landscape.probes.surface import LossLine, LossSurface

Quantity = Literal["loss", "nll", "l2", "accuracy", "ece"]
Kind = Literal["surface3d", "contour"]

LABELS: dict[str, str] = {
    "loss": "Loss: NLL + L2 (nats)",
    "nll": "NLL (nats)",
    "l2": "L2 term (nats)",
    "accuracy": "Accuracy (fraction)",
    "ece": "ECE (fraction)",
}
X_LABEL = "$a$ (units of $d_1$)"
Y_LABEL = "$b$ (units of $d_2$)"


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
    and counted in a note inside the axes. In 3D the same holds for points outside `vmin`, `vmax`.

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
        ValueError: If `kind` is unknown, `quantity` was not evaluated, `ax` does not suit
            `kind`, or `log` meets values that are not positive.
    """
    check_choice("kind", kind, get_args(Kind))
    values = finite_values(result, quantity, log=log)
    low, high = shared_limits([result], quantity)
    low, high = low if vmin is None else vmin, high if vmax is None else vmax
    norm = make_norm(low, high, log=log)
    artist = {"cmap": style.SEQUENTIAL, **artist}
    if kind == "contour":
        ax = ax if ax is not None else plt.subplots()[1]
        _draw_contour(ax, result, values, norm, LABELS[quantity] if colorbar else None, artist)
        return ax
    if ax is None:
        ax = plt.subplots(subplot_kw={"projection": "3d"})[1]
    if not isinstance(ax, Axes3D):
        raise ValueError(
            "`ax` must be 3D axes for `kind='surface3d'`, got flat ones; make it with "
            "`projection='3d'`, or draw `kind='contour'`."
        )
    _draw_surface3d(ax, result, values, norm, LABELS[quantity], artist)
    return cast(Axes, ax)


def loss_line(
    result: "LossLine",
    *,
    ax: Axes | None = None,
    quantity: Quantity = "loss",
    log: bool = False,
    label: str | None = None,
    **line: Any,
) -> Axes:
    """Draw a quantity along one direction, with a band of two standard errors each side.

    The band is that of the mean over samples of the NLL; L2 is exact, and accuracy and ECE have
    none. Points that are not finite break the line, and are marked by crosses and counted.

    Args:
        result: The line.
        ax: Axes to draw on; fresh ones by default.
        quantity: What to draw: the objective, one of its two terms, accuracy or ECE.
        log: Logarithmic height.
        label: Name in a legend; its model family decides the colour.
        **line: Passed to `Axes.plot`.

    Returns:
        The axes.

    Raises:
        ValueError: If `quantity` was not evaluated, or `log` meets values that are not positive.
    """
    values = finite_values(result, quantity, log=log)
    ax = ax if ax is not None else plt.subplots()[1]
    if label is not None:
        line = {**style.line_styles([label])[label], "label": label, **line}
    (drawn,) = ax.plot(result.x, values, **line)
    if quantity in {"loss", "nll"}:
        error = 2 * np.ma.masked_invalid(result.nll_stderr)
        low, high = values - error, values + error
        ax.fill_between(result.x, low, high, color=drawn.get_color(), alpha=0.2, lw=0, zorder=1)
    if log:
        ax.set_yscale("log")
    missing = np.ma.getmaskarray(values)
    if missing.any():
        at = result.x[missing]
        floor = ax.get_xaxis_transform()
        ax.plot(at, np.full(at.shape, 0.02), "x", ms=3, color=drawn.get_color(), transform=floor)
        _note(ax, _count_missing(missing))
    ax.set(xlabel=X_LABEL, ylabel=LABELS[quantity], xlim=(result.x.min(), result.x.max()))
    return ax


def shared_limits(
    results: Iterable["LossSurface | LossLine"], quantity: Quantity = "loss"
) -> tuple[float, float]:
    """Return the smallest and the largest finite value over `results`, for `vmin` and `vmax`.

    Args:
        results: Surfaces or lines to draw on one scale.
        quantity: What will be drawn.

    Returns:
        The two limits; 0 and 1 where no value is finite.
    """
    values = np.concatenate([finite_values(result, quantity).compressed() for result in results])
    return (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)


def finite_values(
    result: "LossSurface | LossLine", quantity: Quantity, *, log: bool = False
) -> np.ma.MaskedArray:
    """Return the values of a quantity with what is not finite masked.

    Args:
        result: The surface or line.
        quantity: What to read.
        log: Whether it will be drawn on a logarithmic scale.

    Returns:
        Masked array of the shape of the result.

    Raises:
        ValueError: If `quantity` was not evaluated, or `log` meets values that are not positive.
    """
    evaluated = [name for name in LABELS if getattr(result, name) is not None]
    check_choice("quantity", quantity, evaluated)
    values = np.ma.masked_invalid(getattr(result, quantity))
    if log and values.count() and values.min() <= 0:
        raise ValueError(
            f"`log` must be False for values that are not positive, got a smallest {quantity} "
            f"of {values.min():g}."
        )
    return values


def color_bar(figure: FigureBase, norm: Normalize, label: str, **place: Any) -> None:
    """Add a colour bar with plainly written ticks, logarithmic where `norm` is.

    Args:
        figure: The figure of the axes.
        norm: Scale of the colours.
        label: Quantity and unit.
        **place: Passed to `Figure.colorbar`; `cmap` names the colour map.
    """
    bar = figure.colorbar(ScalarMappable(norm, place.pop("cmap", style.SEQUENTIAL)), **place)
    bar.set_label(label)
    if isinstance(norm, LogNorm):
        bar.set_label(_log_label(label))
        ticks = _log_ticks(*_ends(norm))
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks], minor=False)
        bar.minorticks_off()
    else:
        bar.locator = MaxNLocator(4)
        bar.update_ticks()


def make_norm(low: float, high: float, *, log: bool | None = None) -> Normalize:
    """Return the scale from `low` to `high`, a little more where they are equal.

    Args:
        low: Lower end.
        high: Upper end.
        log: Whether it is logarithmic; by default where `high` is over ten times a positive
            `low`, a heuristic.

    Returns:
        The scale.
    """
    if not low < high:  # a constant surface
        low, high = low - 0.01 * abs(low or 1.0), high + 0.01 * abs(high or 1.0)
    log = 0 < 10 * low < high if log is None else log
    return LogNorm(low, high) if log else Normalize(low, high)


def _ends(norm: Normalize) -> tuple[float, float]:
    return cast(float, norm.vmin), cast(float, norm.vmax)


def _log_label(label: str) -> str:
    return label.replace(")", ", log scale)")


def _log_ticks(low: float, high: float) -> list[float]:
    """Return ticks at 1, 2, 5 times powers of ten, or at powers of ten over many decades."""
    subs = (1, 2, 5) if high < 300 * low else (1,)
    candidates = LogLocator(subs=subs).tick_values(low, high)
    ticks = [float(tick) for tick in candidates if low <= tick <= high]
    return ticks if len(ticks) > 1 else [low, high]


def _draw_surface3d(
    ax: Any,
    result: "LossSurface",
    values: np.ma.MaskedArray,
    norm: Normalize,
    label: str,
    artist: dict[str, Any],
) -> None:
    x, y = np.meshgrid(result.x, result.y, indexing="ij")
    inside = np.ma.masked_outside(values, *_ends(norm))
    heights = inside.filled(np.nan)
    floor, ceiling = _ends(norm)
    if isinstance(norm, LogNorm):  # 3D axes have no log scale of their own: log10, labelled back
        ticks = _log_ticks(floor, ceiling)
        ax.set_zticks(np.log10(ticks), [f"{tick:g}" for tick in ticks])
        heights, floor, ceiling = np.log10(heights), np.log10(floor), np.log10(ceiling)
        label = _log_label(label)
    else:
        ax.zaxis.set_major_locator(MaxNLocator(5))
    if inside.count():
        mesh = {"rstride": 1, "cstride": 1, "linewidth": 0.15, "edgecolor": (0, 0, 0, 0.35)}
        ax.plot_surface(x, y, heights, vmin=floor, vmax=ceiling, **{**mesh, **artist})
    missing = np.ma.getmaskarray(inside)
    if missing.any():
        ax.scatter(x[missing], y[missing], floor, marker="x", s=4, lw=0.5, color=style.MUTED)
        outside = int(missing.sum() - np.ma.getmaskarray(values).sum())
        _note(ax, _count_missing(np.ma.getmaskarray(values)), _count_outside(outside))
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL, zlabel=label, zlim=(floor, ceiling))
    ax.set(xlim=(result.x.min(), result.x.max()), ylim=(result.y.min(), result.y.max()))


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
    levels: NDArray[np.float64] = spaced(*_ends(norm), 25)
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
        _note(ax, _count_missing(missing))
    ax.plot(0, 0, "+", ms=4, mew=0.8, color="w", gid="weights")
    ax.set(xlim=(result.x.min(), result.x.max()), ylim=(result.y.min(), result.y.max()))
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL)


def _count_missing(missing: NDArray[np.bool_]) -> str:
    return f"×: {missing.sum()} of {missing.size} not finite" if missing.any() else ""


def _count_outside(count: int) -> str:
    return f"×: {count} outside the scale" if count else ""


def _note(ax: Any, *lines: str) -> None:
    text = "\n".join(line for line in lines if line)
    place = {"transform": ax.transAxes, "fontsize": style.NOTE_SIZE, "color": style.MUTED}
    if isinstance(ax, Axes3D):
        ax.text2D(0.5, 0.99, text, ha="center", va="top", gid="note", **place)
    else:
        ax.text(1.0, 1.01, text, ha="right", va="bottom", gid="note", **place)
