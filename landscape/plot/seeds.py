"""Quantities over several runs: every run a point, their mean with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import ArrayLike

from landscape.intervals import mean_interval
from landscape.plot import style, texts
from landscape.plot.figures import HALVES
from landscape.plot.hessian import (
    MAX_LABEL,
    density_text,
    hessian_max_spectrum,
    limit_eigenvalues,
    spread_far,
    trim_spectrum,
)

_LONGEST_COLUMN = 12  # characters of a label that stands aslant

if TYPE_CHECKING:
    from landscape.probes.hessian_max import HessianMaxSpectrum

    Runs = Mapping[str, Sequence[HessianMaxSpectrum]]


def run_columns(values: Mapping[str, ArrayLike], *, ax: Axes | None = None) -> Axes:
    """Draw one column per label: its runs as points, their mean with its 95 % interval.

    Labels that are longer than their columns are aslant, and shortened in their middle.

    Args:
        values: One value per run, `(runs,)`, by label; model families decide the colours.
        ax: Axes to draw on; fresh ones by default.

    Returns:
        The axes, with the labels at the columns.

    Raises:
        ValueError: If `values` is empty.
    """
    named = style.named(values, argument="values")
    ax = ax if ax is not None else style.fresh_axes()
    styles = style.line_styles(named)
    for column, (label, runs) in enumerate(named.items()):
        color = styles[label]["color"]
        _draw_runs(ax, np.array([column]), np.asarray(runs, dtype=float)[None], color)
    width = texts.size_of(ax)[0] / len(named)
    room = int(width / (0.55 * texts.points(mpl.rcParams["xtick.labelsize"])))  # characters
    labels = list(texts.short_names(named, max(room, _LONGEST_COLUMN)).values())
    ax.set_xticks(range(len(named)), labels)
    ax.set_xlim(-0.5, len(named) - 0.5)
    if max(map(len, labels)) > room:
        tilt_labels(ax)
    return ax


def run_curves(
    x: ArrayLike, values: ArrayLike, *, label: str, ax: Axes | None = None, **line: Any
) -> Axes:
    """Draw a curve of means over runs, with their 95 % intervals and every run as a point.

    Args:
        x: Where the points are, `(points,)`; categories are placed by `range`.
        values: One value per run, `(points, runs)`.
        label: Label of the curve; its model family decides the colour.
        ax: Axes to draw on; fresh ones by default.
        **line: Passed to `Axes.plot` for the curve.

    Returns:
        The axes.

    Raises:
        ValueError: If the shapes do not go together.
    """
    x, values = np.asarray(x, dtype=float), np.asarray(values, dtype=float)
    if values.ndim != 2 or x.shape != values.shape[:1]:
        raise ValueError(
            f"`values` must be (points, runs) for `x` of {x.shape}, got {values.shape}."
        )
    ax = ax if ax is not None else style.fresh_axes()
    look: dict[str, Any] = {**texts.labelled_line(ax, label), **line}
    means = values.mean(axis=1)
    ax.plot(x, means, **{"lw": 1.0, **look})
    _draw_runs(ax, x, values, look["color"])
    return ax


def spectra_over_runs(results: "Runs") -> Figure:
    """Draw Hessian max eigenvalue spectra of several runs per network (Park & Kim, 2022, Fig. 4).

    The eigenvalues of all runs of a network are drawn as one spectrum, negative and positive
    halves apart; beside them stand NEP and APE of every run, with mean and 95 % interval over runs.
    Labels of more than 12 characters are shortened in their middle.

    Args:
        results: Spectra of the runs, by label; model families decide the colours.

    Returns:
        The figure, 5.5 in wide.

    Raises:
        ValueError: If `results` is empty, or a network has no runs.
    """
    height = 2.1 + 0.12 * max(len(results) - 3, 0)
    with style.paper_figure(results, style.TEXT_WIDTH, height) as figure:
        draw_spectra_over_runs(figure, results)
    return figure


def draw_spectra_over_runs(figure: Figure | SubFigure, results: "Runs") -> None:
    """Draw what `spectra_over_runs` draws on a part of a larger figure.

    Args:
        figure: Where to draw.
        results: Spectra of the runs, by label.

    Raises:
        ValueError: If `results` is empty, or a network has no runs.
    """
    short = texts.short_names(style.named(results, argument="results"), _LONGEST_COLUMN)
    results = {short[label]: runs for label, runs in results.items()}
    named = {label: pool_runs(runs) for label, runs in results.items()}
    log = spread_far(named.values())
    inch = figure.dpi / figure.bbox.height
    aslant = 0.12 + 0.027 * max(map(len, named))  # inches below the columns
    height = {"top": 1 - 0.12 * inch, "bottom": max(0.5, aslant) * inch}
    left: Any = figure.add_gridspec(1, 2, left=0.02, right=0.67, wspace=0.06, **height).subplots()
    right: Any = figure.add_gridspec(1, 2, left=0.74, right=0.99, wspace=0.85, **height).subplots()
    for ax, half in zip(left, HALVES, strict=True):
        hessian_max_spectrum(named, ax=ax, half=half, log=log)
        trim_spectrum(ax, half, line_height=0.14)
        limit_eigenvalues(ax, named.values(), half, log=log)
    text: dict[str, Any] = {"x": 0.345, "ha": "center", "va": "center"}
    figure.text(y=0.2 * inch, s=MAX_LABEL, size=8, **text)
    note = f"{density_text(log)}. n: eigenvalues of all runs. [ ]: 95 % interval over runs"
    figure.text(y=0.06 * inch, s=note, size=style.NOTE_SIZE, color=style.MUTED, **text)
    for ax, name in zip(right, ("nep", "ape"), strict=True):
        run_columns({n: [getattr(s, name) for s in runs] for n, runs in results.items()}, ax=ax)
        ax.set_ylabel({"nep": "NEP", "ape": "APE (nats)"}[name])
        tilt_labels(ax)
        if name == "nep":
            ax.set_ylim(top=min(1 + style.EDGE, ax.get_ylim()[1]))
        style.begin_at_zero(ax)  # neither is negative, and an interval of a few runs may be


def pool_runs(spectra: "Sequence[HessianMaxSpectrum]") -> "HessianMaxSpectrum":
    """Return the spectra of several runs of one network as one.

    Args:
        spectra: One a run.

    Returns:
        The eigenvalues of all mini-batches of all runs; NEP and APE are means over runs and their
        intervals those of the spread between runs (`mean_interval`), NaN for one run. That of NEP,
        a share, ends at 0 and 1.

    Raises:
        ValueError: If there is none.
    """
    if not spectra:
        raise ValueError("`spectra` must hold at least one spectrum, got none.")
    nep, *nep_ends = mean_interval([spectrum.nep for spectrum in spectra])
    nep_ends = np.clip(nep_ends, 0.0, 1.0).tolist()
    ape, *ape_ends = mean_interval([spectrum.ape for spectrum in spectra])
    names = ("eigenvalues", "residuals", "converged", "errors", "miss")
    tables: dict[str, Any] = {n: _joined([getattr(each, n) for each in spectra]) for n in names}
    return replace(
        spectra[0],
        **tables,
        nep=nep,
        nep_interval=(nep_ends[0], nep_ends[1]),
        ape=ape,
        ape_interval=(ape_ends[0], ape_ends[1]),
        num_hvps=sum(spectrum.num_hvps for spectrum in spectra),
    )


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Return the rows of all runs; `None` where a run has none."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def draw_mean(ax: Axes, x: float, runs: ArrayLike, *, color: str) -> None:
    """Draw the mean over runs with its 95 % interval.

    Args:
        ax: Axes to draw on.
        x: Where.
        runs: One value per run, `(runs,)`.
        color: Colour of mark and bar.
    """
    mean, low, high = mean_interval(runs)
    bar = None if np.isnan(low) else [[mean - low], [high - mean]]
    ax.errorbar(
        x, mean, yerr=bar, fmt="s", ms=3.5, color=color, mec="white", mew=0.4, capsize=2,
        elinewidth=0.9, gid="mean",
    )  # fmt: skip


def tilt_labels(ax: Axes) -> None:
    """Set the labels of the columns small and aslant, for narrow axes."""
    for text in ax.get_xticklabels():
        text.set(rotation=40, rotation_mode="anchor", ha="right", size=style.NOTE_SIZE)


def _draw_runs(ax: Axes, x: np.ndarray, values: np.ndarray, color: str) -> None:
    """Draw the runs of each point faintly and the mean over them with its interval."""
    runs: dict[str, Any] = {"color": color, "alpha": 0.45, "ms": 2.5, "mew": 0, "gid": "run"}
    ax.plot(np.repeat(x, values.shape[1]), values.ravel(), "o", **runs)
    for place, of_point in zip(x, values, strict=True):
        draw_mean(ax, place, of_point, color=color)
