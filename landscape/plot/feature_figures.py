"""Figures 2a, 8, 9 and 10 of Park & Kim (2022) in the style of a paper, a panel per model.

Every function returns a `matplotlib.figure.Figure` that no global state knows of: save it with
`figure.savefig(path)`; there is nothing to close.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D

from landscape.plot import style, texts
from landscape.plot.features import (
    DEPTH_LABEL,
    VARIANCE_LABEL,
    cka,
    depth_map,
    feature_variance,
    fourier_amplitude,
    fourier_depth,
    highest_label,
    lesion_study,
)
from landscape.plot.robustness import (
    clean_entry,
    frequency_robustness,
    legend_entries,
    noise_of,
)
from landscape.plot.scale import color_bar

if TYPE_CHECKING:
    from landscape.probes.cka import CKA
    from landscape.probes.fourier import FourierAmplitude
    from landscape.probes.frequency import RobustnessCurve
    from landscape.probes.lesion import LesionStudy
    from landscape.probes.variance import FeatureVariance
    from landscape.results import Result

_MOST_COLUMNS = 4  # panels side by side
_SPREAD = 10  # ratio of variances over which a linear axis would show one network alone


def figure2a(results: "Mapping[str, FourierAmplitude]") -> Figure:
    """Draw the Fourier amplitudes of several models on one scale, blocks coloured by depth.

    Args:
        results: Curves of each model.

    Returns:
        The figure, 5.5 in wide, or 3.25 in for one model.

    Raises:
        ValueError: If `results` is empty.
    """
    with _panels(2.1, results) as (figure, axes):
        _share(axes[0])
        for ax, (name, result) in zip(axes[0], results.items(), strict=True):
            fourier_amplitude(result, ax=ax, colorbar=False)
            _entitle(ax, name, len(results))
        _label_first(axes[0])
        color_bar(figure, Normalize(0, 1), DEPTH_LABEL, ax=axes[0], cmap=depth_map(), pad=0.02)
    return figure


def figure2(
    amplitudes: "Mapping[str, FourierAmplitude]", curves: "Mapping[str, RobustnessCurve]"
) -> Figure:
    """Draw Fourier amplitudes, a panel per model, beside the robustness to noise by frequency.

    With three models or more the robustness stands below the panels.

    Args:
        amplitudes: Curves of each model.
        curves: Robustness of the same models or others.

    Returns:
        The figure, 5.5 in wide.

    Raises:
        ValueError: If either is empty.
    """
    if not amplitudes or not curves:
        raise ValueError("`amplitudes` and `curves` must hold a result each, got an empty mapping.")
    beside = max(len(amplitudes), len(curves)) <= 2
    entries = legend_entries(curves, clean_entry, noise_of, wrap=True)[1].values()
    lines = sum(1 + entry.count("\n") for entry in entries)
    below = 2.8 + 0.13 * max(lines - (4 if len(curves) <= 4 else 12), 0)  # room for a legend
    size = style.TEXT_WIDTH, 2.2 if beside else 2 + below
    with style.paper_figure(amplitudes, *size, layout="constrained") as figure:
        parts: Any = (
            figure.subfigures(1, 2, width_ratios=(1.15 * len(amplitudes), 1.35))
            if beside
            else figure.subfigures(2, 1, height_ratios=(2, below))
        )
        first, second = parts
        axes = first.subplots(1, len(amplitudes), squeeze=False)[0]
        _share(axes)
        for ax, (name, result) in zip(axes, amplitudes.items(), strict=True):
            fourier_amplitude(result, ax=ax, colorbar=False)
            ax.set_title(texts.wrapped_title(name, len(amplitudes) + beside))
        _label_first(axes)
        color_bar(first, Normalize(0, 1), DEPTH_LABEL, ax=axes, cmap=depth_map(), pad=0.02)
        frequency_robustness(curves, ax=second.subplots())
        for part, letter in ((first, "a"), (second, "b")):
            style.letter_panel(part, letter)
    return figure


def figure8(results: "Mapping[str, FourierAmplitude]") -> Figure:
    """Draw the amplitude at the highest frequency against depth, models side by side.

    Args:
        results: Curves of each model.

    Returns:
        The figure, 5.5 in wide, or 3.25 in for one model.

    Raises:
        ValueError: If `results` is empty.
    """
    return _against_depth(results, fourier_depth, highest_label(results.values()))


def figure9(results: "Mapping[str, FeatureVariance]") -> Figure:
    """Draw the variance of the feature maps against depth, models side by side.

    The common scale is logarithmic where the largest variances of two models, or the smallest and
    the largest of one, are over a factor of ten apart.

    Args:
        results: Variances of each model.

    Returns:
        The figure, 5.5 in wide, or 3.25 in for one model.

    Raises:
        ValueError: If `results` is empty.
    """
    log = _spread_far(result.variance for result in results.values())
    return _against_depth(results, feature_variance, VARIANCE_LABEL, log=log)


def figure10(ckas: "Mapping[str, CKA]", lesions: "Mapping[str, LesionStudy]") -> Figure:
    """Draw the similarity of all blocks over the accuracy that each costs when it is removed.

    Args:
        ckas: Similarities of each model.
        lesions: Lesion studies, of the same models or others.

    Returns:
        The figure, 5.5 in wide, or 3.25 in for one model.

    Raises:
        ValueError: If both are empty.
    """
    names = dict.fromkeys([*ckas, *lesions])
    parts = bool(ckas) + bool(lesions)
    with _panels(2.1, names, parts) as (figure, axes):
        for part in axes if len(names) > _MOST_COLUMNS else axes[:1]:
            for ax, name in zip(part, names, strict=True):
                _entitle(ax, name, len(names))
        for part, letter in zip(axes if parts > 1 else (), "ab", strict=False):
            place: dict[str, Any] = {"xytext": (-28, 6), "textcoords": "offset points"}
            part[0].annotate(letter, (0, 1), xycoords="axes fraction", **place, **style.LETTER)
        if ckas:
            _draw_matrices(figure, dict(zip(names, axes[0], strict=True)), ckas)
        if lesions:
            _draw_lesions(figure, dict(zip(names, axes[-1], strict=True)), lesions)
    return figure


def panels(results: "Mapping[str, Result]") -> Figure:
    """Draw different results side by side, each as it draws itself, under its label.

    They stand in rows of three, four in two rows.

    What a drawing says above its axes is a note under the label, in lines that the panel has room
    for.

    Args:
        results: Results by title.

    Returns:
        The figure, 5.5 in wide, or 3.25 in for one result.

    Raises:
        ValueError: If `results` is empty.
    """
    columns = 2 if len(results) == 4 else min(len(results), 3)
    rows = math.ceil(len(results) / max(columns, 1))
    with _figure(2.3 * rows, results) as figure:
        if columns > 2:
            mpl.rcParams["legend.fontsize"] = style.NOTE_SIZE
        parts = figure.subfigures(rows, 1, squeeze=False)[:, 0]  # each row has its own widths
        notes = [0.0]
        for place, (name, result) in enumerate(results.items()):
            projection = style.PROJECTIONS.get(result._plot or "")
            row, column = divmod(place, columns)
            ax = parts[row].add_subplot(1, columns, column + 1, projection=projection)
            result.plot(ax=ax)
            if isinstance(ax, Axes3D):  # no layout keeps room for the labels of a box
                ax.set_box_aspect(None, zoom=0.8)
                ax.set(title=ax.get_zlabel(), xlabel="$a$", ylabel="$b$", zlabel="")
            notes.append(_head(ax, str(name), columns))
            ax.set_xlabel(texts.wrapped_title(ax.get_xlabel(), columns))
        figure.set_figheight(rows * (2.3 + max(notes)))
    return figure


def _head(ax: Axes, name: str, panels: int) -> float:
    """Put a title over the drawing's own title and notes; return the inches that these take."""
    notes = [text for text in ax.texts if text.get_gid() == "note"]
    said = [ax.get_title(), *(line for note in notes for line in note.get_text().split("\n"))]
    lines = [texts.wrapped_title(line, panels, style.NOTE_SIZE) for line in said if line]
    for note in notes:
        note.remove()
    text = "\n".join(lines)
    look: dict[str, Any] = {"size": style.NOTE_SIZE, "color": style.MUTED, "gid": "note"}
    # That of flat axes: the method of 3D axes wants a third coordinate.
    Axes.text(ax, 0, 1.01, text, transform=ax.transAxes, va="bottom", **look)
    ax.set_title("")
    room = 1.45 * style.NOTE_SIZE * (text.count("\n") + 1) if text else 0.0
    pad = mpl.rcParams["axes.titlepad"] + room
    ax.set_title(texts.wrapped_title(name, panels), loc="left", pad=pad)
    return room / 72


def _draw_matrices(figure: Figure, axes: dict[str, Axes], results: "Mapping[str, CKA]") -> None:
    for name, ax in axes.items():
        if name in results:
            cka(results[name], ax=ax, colorbar=False)
        else:
            ax.set_axis_off()
    below = any(bool((result.values < 0).any()) for result in results.values())
    bar = {
        "ax": list(axes.values()),
        "pad": 0.02,
        "panchor": False,
        "extend": "min" if below else "neither",
    }
    color_bar(figure, Normalize(0, 1), "CKA", **bar)


def _draw_lesions(
    figure: Figure, axes: dict[str, Axes], results: "Mapping[str, LesionStudy]"
) -> None:
    drawn = [ax for name, ax in axes.items() if name in results]
    _share(drawn)
    for name, ax in axes.items():
        if name in results:
            lesion_study(results[name], ax=ax)
        else:
            ax.set_axis_off()
    _label_first(drawn)
    _one_legend(figure, drawn)


def _against_depth(
    results: Mapping[str, Any], draw: Callable[..., Axes], label: str, **look: Any
) -> Figure:
    with _panels(2.1, results) as (figure, axes):
        _share(axes[0])
        for ax, (name, result) in zip(axes[0], results.items(), strict=True):
            draw(result, ax=ax, **style.added_line(ax, name), **look)
            _entitle(ax, name, len(results))
            ax.set_ylabel(label)  # it holds for all panels
        _label_first(axes[0])
        _one_legend(figure, axes[0])
    return figure


@contextmanager
def _panels(
    height: float, results: Mapping[str, Any], parts: int = 1
) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure with a panel a result in each part, and its axes `(parts, results)`."""
    columns = min(len(results), _MOST_COLUMNS)
    rows = math.ceil(len(results) / max(columns, 1))
    with _figure(height * parts * rows, results) as figure:
        axes = figure.subplots(parts * rows, columns, squeeze=False).reshape(parts, rows * columns)
        for ax in axes[:, len(results) :].flat:
            ax.remove()
        yield figure, axes[:, : len(results)]


def _entitle(ax: Axes, name: str, count: int) -> None:
    """Put a name above one of some panels."""
    ax.set_title(texts.wrapped_title(name, min(count, _MOST_COLUMNS)))


def _figure(height: float, results: Mapping[str, Any]) -> AbstractContextManager[Figure]:
    """Return a figure with room for a column a result, as a context."""
    width = style.TEXT_WIDTH if len(results) > 1 else style.COLUMN_WIDTH
    return style.paper_figure(results, width, height, layout="constrained")


def _share(axes: Sequence[Axes]) -> None:
    """Give axes one vertical scale; before anything is drawn."""
    for ax in axes[1:]:
        ax.sharey(axes[0])
        ax.tick_params(which="both", labelleft=_is_first(ax))


def _label_first(axes: Sequence[Axes]) -> None:
    """Label the scale at the left alone."""
    for ax in axes:
        if ax is not axes[0] and not _is_first(ax):
            ax.set_ylabel("")


def _is_first(ax: Axes) -> bool:
    """Return whether axes are the first of their row."""
    place = ax.get_subplotspec()
    return place is not None and place.is_first_col()


def _one_legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Move the legends below the panels, each entry once."""
    entries: dict[str, Any] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
        if (legend := ax.get_legend()) is not None:
            legend.remove()
    if entries:
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": len(entries)}
        figure.legend(entries.values(), entries.keys(), **place)


def _spread_far(variances: Iterable[np.ndarray]) -> bool:
    """Return whether variances spread over more than a factor of ten, a heuristic."""
    positive = [values[(values > 0) & np.isfinite(values)] for values in variances]
    positive = [values for values in positive if values.size]
    if not positive:
        return False
    peaks = [values.max() for values in positive]
    ranges = [values.max() / values.min() for values in positive]
    return bool(max(peaks) > _SPREAD * min(peaks) or max(ranges) > _SPREAD)
