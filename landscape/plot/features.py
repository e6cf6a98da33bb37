"""What blocks do to a signal: Fourier amplitude, variance, similarity, and removal of units."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.container import ErrorbarContainer
from matplotlib.ticker import MaxNLocator

from landscape.plot import style, texts
from landscape.plot.scale import color_bar

if TYPE_CHECKING:
    from landscape.probes.cka import CKA
    from landscape.probes.feature_maps import BlockTable
    from landscape.probes.fourier import FourierAmplitude
    from landscape.probes.lesion import LesionStudy
    from landscape.probes.variance import FeatureVariance

AMPLITUDE_LABEL = r"$\Delta$ log amplitude"
HIGHEST_LABEL = r"$\Delta$ log amplitude at $\pi$"
BELOW_LABEL = "$\\Delta$ log amplitude\nat the highest frequency"
"""Label where a map of odd sides has no frequency π."""
VARIANCE_LABEL = "Feature map variance"
DEPTH_LABEL = "Relative depth"
LOSS_LABEL = "Accuracy loss (points)"
UNIT_LABEL = "Removed unit"

SHADES = {style.KIND_NAMES[kind]: style.KIND_COLORS[kind] for kind in ("msa", "pool")}
_LONGEST_TABLE = 3  # times the shorter side up to which cells are squares
_SHADE: dict[str, Any] = {"alpha": style.KIND_ALPHA, "lw": 0, "zorder": 0}


def depth_map() -> Colormap:
    """Return the colours of relative depth: viridis without its lightest end, lost on white."""
    colors = mpl.colormaps[style.SEQUENTIAL](np.linspace(0, 0.9, 256))
    return ListedColormap(colors, name="depth")


def fourier_amplitude(
    result: "FourierAmplitude", *, ax: Axes | None = None, colorbar: bool = True, **line: Any
) -> Axes:
    """Draw a curve for each block, coloured by relative depth (Park & Kim, 2022, Fig. 2a).

    A band shows two standard errors each side. Maps of one column or row have no curve. Values that
    are not finite are gaps, marked by crosses and counted, as in the other drawings of blocks.

    Args:
        result: The curves.
        ax: Axes to draw on; fresh ones by default.
        colorbar: Whether to add the colour bar of depth.
        **line: Passed to `Axes.plot`.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `FourierAmplitude`.
    """
    style.check_result(result, "FourierAmplitude")
    ax = ax if ax is not None else style.fresh_axes()
    colors, missing = depth_map(), [np.empty(0, dtype=bool)]
    for i, name in enumerate(result.names):
        frequency, curve = result.frequency[i], result.delta_log_amplitude[i]
        if len(curve) < 2:
            continue
        color = colors(float(result.depth[i]))
        ax.plot(frequency, curve, **{"color": color, "lw": 1, "gid": name, **line})
        error = 2 * result.stderr[i]
        band: dict[str, Any] = {"color": color, "alpha": 0.2, "lw": 0, "zorder": 1}
        ax.fill_between(frequency, curve - error, curve + error, **band)
        missing.append(~np.isfinite(curve))
        texts.mark_missing(ax, frequency, missing[-1], color)
    texts.add_note(ax, texts.missing_note(np.concatenate(missing)))
    ax.set_xticks([0, 0.5, 1], labels=["0", r"$\pi/2$", r"$\pi$"])
    ax.set(xlim=(0, 1), xlabel=frequency_label(result), ylabel=AMPLITUDE_LABEL)
    if colorbar:
        color_bar(ax.figure, Normalize(0, 1), DEPTH_LABEL, ax=ax, cmap=colors)
    return ax


def fourier_depth(
    result: "FourierAmplitude | Mapping[str, FourierAmplitude]",
    *,
    ax: Axes | None = None,
    label: str | None = None,
    **line: Any,
) -> Axes:
    """Draw the amplitude at the highest frequency against depth (Park & Kim, 2022, Fig. 8).

    The step that leads to a block is shaded violet for attention and yellow for subsampling; of
    several models the blocks are marked instead, hollow and by triangles. Bars are two standard
    errors each side.

    Args:
        result: The curves of one model, or of several by label.
        ax: Axes to draw on; fresh ones by default.
        label: Name of one model in the legend; its family decides the colour.
        **line: Passed to `Axes.errorbar`.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `FourierAmplitude`.
        ValueError: If `result` is an empty mapping, or a mapping comes with a `label`.
    """
    if isinstance(result, Mapping):
        return style.draw_each(partial(fourier_depth, **line), result, ax, label)
    style.check_result(result, "FourierAmplitude")
    ax = ax if ax is not None else style.fresh_axes()
    missing = missing_amplitudes(result)
    _draw_steps(ax, result, result.highest, result.highest_stderr, missing, label, line)
    if ax.get_ylabel() != BELOW_LABEL:  # one of the curves drawn before ends below π
        ax.set_ylabel(highest_label([result]))
    return ax


def feature_variance(
    result: "FeatureVariance | Mapping[str, FeatureVariance]",
    *,
    ax: Axes | None = None,
    log: bool = False,
    label: str | None = None,
    **line: Any,
) -> Axes:
    """Draw the variance of the feature maps against depth (Park & Kim, 2022, Fig. 9).

    The step that leads to a block is shaded violet for attention and yellow for subsampling; of
    several models the blocks are marked instead, hollow and by triangles. Bars are two standard
    errors each side.

    Args:
        result: The variances of one model, or of several by label.
        ax: Axes to draw on; fresh ones by default.
        log: Logarithmic variance, for networks over which it grows by orders of magnitude; one of 0
            has no place there, and is marked and counted.
        label: Name of one model in the legend; its family decides the colour.
        **line: Passed to `Axes.errorbar`.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `FeatureVariance`.
        ValueError: If `result` is an empty mapping, or a mapping comes with a `label`.
    """
    if isinstance(result, Mapping):
        return style.draw_each(partial(feature_variance, log=log, **line), result, ax, label)
    style.check_result(result, "FeatureVariance")
    ax = ax if ax is not None else style.fresh_axes()
    missing = missing_variances(result, log=log)
    _draw_steps(ax, result, result.variance, result.stderr, missing, label, line)
    if log:
        if (result.variance > 0).any():  # a logarithmic axis needs a value
            ax.set_yscale("log")
    else:
        ax.set_autoscaley_on(True)  # to what was drawn before, too
        ax.autoscale_view()
        style.begin_at_zero(ax)
    ax.set_ylabel(VARIANCE_LABEL)
    return ax


def cka(result: "CKA", *, ax: Axes | None = None, colorbar: bool = True, **image: Any) -> Axes:
    """Draw the similarity of all pairs of blocks, with lines between stages (Fig. 10a).

    Blocks are numbered in network order from 1, at the bottom left: rows are those of `model_a`,
    columns those of `model_b`. Grey pairs have no similarity: the features of one of them are
    constant or not finite. Cells are squares where one side has at most three times the other's.

    Args:
        result: The similarities.
        ax: Axes to draw on; fresh ones by default.
        colorbar: Whether to add the colour bar.
        **image: Passed to `Axes.imshow`.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `CKA`.
    """
    style.check_result(result, "CKA")
    ax = ax if ax is not None else style.fresh_axes()
    colors = mpl.colormaps[style.SEQUENTIAL].with_extremes(bad="0.85")
    a, b = result.values.shape
    ax.imshow(
        np.ma.masked_invalid(result.values),
        **{
            "aspect": "equal" if max(a, b) <= _LONGEST_TABLE * min(a, b) else "auto",
            "origin": "lower",
            "extent": (0.5, b + 0.5, 0.5, a + 0.5),
            "cmap": colors,
            "vmin": 0,
            "vmax": 1,
            "interpolation": "nearest",
            **image,
        },
    )
    for table, draw in ((result.blocks_a, ax.axhline), (result.blocks_b, ax.axvline)):
        for edge in stage_edges(table.stage):
            draw(edge + 0.5, color="w", lw=0.6, gid="stage")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    row, column = block_labels(result)
    ax.set(xlabel=column, ylabel=row)
    if colorbar:
        color_bar(ax.figure, Normalize(0, 1), "CKA", ax=ax, cmap=colors)
    return ax


def lesion_study(result: "LesionStudy", *, ax: Axes | None = None, **bar: Any) -> Axes:
    """Draw the accuracy lost by each removed unit in network order, by kind (Fig. 10b).

    Bars of error are two paired standard errors each side; dotted lines are between stages. Units
    that could not be removed are counted in a note.

    Args:
        result: The study.
        ax: Axes to draw on; fresh ones by default.
        **bar: Passed to `Axes.bar`.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `LesionStudy`.
    """
    style.check_result(result, "LesionStudy")
    ax = ax if ax is not None else style.fresh_axes()
    number = np.arange(1, len(result.names) + 1)
    loss = -100 * result.delta_accuracy
    error = 200 * result.delta_accuracy_stderr
    missing = ~np.isfinite(loss)
    kinds = colored_kinds(result.kinds)
    ink = mpl.rcParams["text.color"]
    whisker: dict[str, Any] = {"elinewidth": 0.6, "ecolor": ink}
    for kind in dict.fromkeys(kinds.tolist()):
        chosen = kinds == kind
        look: dict[str, Any] = {"color": style.KIND_COLORS[kind], "width": 0.8}
        look |= {"label": style.KIND_NAMES[kind], **bar}
        ax.bar(number[chosen], loss[chosen], yerr=error[chosen], error_kw=whisker, **look)
    ax.axhline(0, color=ink, lw=0.6)
    for edge in stage_edges(result.stage):
        ax.axvline(edge + 0.5, color=style.MUTED, lw=0.6, ls=":", zorder=0, gid="stage")
    texts.mark_missing(ax, number, missing, style.MUTED)
    skipped = f"{len(result.skipped)} not removable" if result.skipped else ""
    texts.add_note(ax, texts.missing_note(missing), skipped)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    ax.set(xlim=(0.3, len(number) + 0.7), xlabel=UNIT_LABEL, ylabel=LOSS_LABEL)
    texts.place_legend(ax, **texts.OVER_DATA)
    return ax


Missing = Mapping[str, np.ndarray]
"""Which values cannot be drawn, by what they are."""


def missing_amplitudes(result: "FourierAmplitude") -> Missing:
    """Return which values at the ends of curves are missing, `(b,)`; a map may have no curve."""
    curved = np.array([len(curve) > 1 for curve in result.delta_log_amplitude])
    return {"not finite": curved & ~np.isfinite(result.highest)}


def missing_variances(result: "FeatureVariance", *, log: bool) -> Missing:
    """Return which variances are missing, `(b,)`."""
    finite = np.isfinite(result.variance)
    return {"not finite": ~finite, "not positive": log & finite & (result.variance <= 0)}


def highest_label(results: "Iterable[FourierAmplitude]") -> str:
    """Return what the values at the ends of curves are: at π, or below where a side is odd."""
    ends = {ends[-1] for result in results for ends in result.frequency if len(ends) > 1}
    return HIGHEST_LABEL if ends <= {1} else BELOW_LABEL


def frequency_label(result: "FourierAmplitude") -> str:
    """Return what the frequencies of a result are."""
    return "Radial frequency" if result.radial else "Frequency"


def block_labels(result: "CKA") -> tuple[str, str]:
    """Return what rows and columns are, and whose where they are of two networks."""
    model_b = result.provenance.settings.get("model_b")
    if model_b is None and result.blocks_a == result.blocks_b:
        return "Block", "Block"
    names = {"model_a": result.provenance.model, "model_b": model_b or ""}
    row, column = (f"Block of {key}" + (f"\n({n})" if n else "") for key, n in names.items())
    return row, column


def colored_kinds(kinds: Iterable[str]) -> np.ndarray:
    """Return kinds, `"other"` for those without a colour."""
    return np.array([kind if kind in style.KIND_COLORS else "other" for kind in kinds])


def stage_edges(stage: np.ndarray) -> np.ndarray:
    """Return how many blocks lie before each change of stage."""
    edges: np.ndarray = np.flatnonzero(np.diff(stage)) + 1
    return edges


def shaded_steps(table: "BlockTable") -> list[tuple[str, float, float]]:
    """Return the steps to shade: what for, from which depth, to which."""
    steps = []
    for i in range(1, len(table.names)):
        ends = float(table.depth[i - 1]), float(table.depth[i])
        if table.kinds[i] == "msa":
            steps.append(("MSA", *ends))
        if table.subsamples[i]:
            steps.append(("subsampling", *ends))
    return steps


def _draw_steps(
    ax: Axes,
    table: "BlockTable",
    values: np.ndarray,
    stderr: np.ndarray,
    missing: Missing,
    label: str | None,
    line: dict[str, Any],
) -> None:
    """Draw values against depth, over shades for kinds of blocks or with marks of the kinds."""
    look: dict[str, Any] = {"marker": "o", "elinewidth": 0.6, "label": "_"}
    look |= texts.labelled_line(ax, label) if label else style.added_line(ax, "")
    drawn = ax.errorbar(table.depth, values, yerr=2 * stderr, **{**look, **line}).lines[0]
    for why, which in missing.items():
        texts.mark_missing(ax, table.depth, which, drawn.get_color())
        texts.add_note(ax, texts.missing_note(which, label, why))
    alone = sum(isinstance(each, ErrorbarContainer) for each in ax.containers) == 1
    kinds = {"MSA": np.array(table.kinds) == "msa", "subsampling": np.array(table.subsamples)}
    for what, chosen in kinds.items():
        if chosen.any():  # to be seen once another curve comes
            mark = _mark(ax, what, drawn.get_color(), drawn.get_markersize())
            at = table.depth[chosen], values[chosen]
            ax.plot(*at, zorder=drawn.get_zorder() + 0.1, gid=what, visible=not alone, **mark)
    if alone:
        for what, start, stop in shaded_steps(table):
            entry = "_" if what in texts.entries_of(ax) else what
            ax.axvspan(start, stop, color=SHADES[what], label=entry, gid="step", **_SHADE)
    else:
        for step in [patch for patch in ax.patches if patch.get_gid() == "step"]:
            step.remove()
        for what in SHADES:
            marks = [each for each in ax.lines if each.get_gid() == what]
            for each in marks:
                each.set_visible(True)
            if marks and what not in texts.entries_of(ax):
                mark = _mark(ax, what, style.MUTED, drawn.get_markersize())
                ax.plot([], [], label=what, **mark)
    ax.set(xlim=(-0.02, 1.02), xlabel=DEPTH_LABEL)
    if texts.entries_of(ax):
        texts.place_legend(ax, **texts.OVER_DATA)


def _mark(ax: Axes, what: str, color: Any, size: float) -> dict[str, Any]:
    """Return the mark of a kind of block on its curve: hollow, or a triangle."""
    if what == "MSA":
        face: dict[str, Any] = {"marker": "o", "ms": size, "mfc": ax.get_facecolor()}
    else:
        face = {"marker": "^", "ms": 1.7 * size, "mfc": color}
    return {"ls": "None", "mec": color, "mew": 0.8, **face}
