"""Hessian spectra per mini-batch, those of the paper."""

import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from matplotlib.axes import Axes

from landscape._checks import check_choice
from landscape.plot import style, texts
from landscape.plot.density import finite_eigenvalues, half_density
from landscape.plot.scale import SignedDecades

if TYPE_CHECKING:
    from landscape.probes.hessian_max import HessianMaxSpectrum

Half = Literal["both", "negative", "positive"]

_SHORTEST = 16  # characters of a line of a legend, however narrow the axes
MAX_LABEL = r"Hessian max eigenvalue $\lambda$ (nats)"


def hessian_max_spectrum(
    result: "HessianMaxSpectrum | Mapping[str, HessianMaxSpectrum]",
    *,
    ax: Axes | None = None,
    half: Half = "both",
    log: bool = False,
    label: str | None = None,
    **line: Any,
) -> Axes:
    """Draw densities of the per-mini-batch top eigenvalues (Park & Kim, 2022, Fig. 1c).

    Each half of each spectrum is a kernel density of its own because their scales differ
    (`half_density`): the area under the negative half is the NEP. Every eigenvalue that has a sign
    (`HessianMaxSpectrum.signed_eigenvalues`) is a tick of the rug below. The legend gives NEP
    (negative half) and APE (positive half) with their intervals, and counts: `n` eigenvalues drawn,
    for both halves those that are 0 within their error, and how many have not converged. Of more
    than four spectra it gives no intervals.

    Args:
        result: One spectrum, or several by label; model families decide the colours.
        ax: Axes to draw on; fresh ones by default.
        half: The half to draw, or both on one axis.
        log: Logarithmic |λ|, and densities per decade, for spectra over several decades.
        label: Name of one model in the legend; its family decides the colour.
        **line: Passed to `Axes.plot` for the densities.

    Returns:
        The axes.

    Raises:
        ValueError: If `half` is unknown or `result` is empty, or a mapping comes with a `label`.
    """
    check_choice("half", half, get_args(Half))
    named = style.named(result, "HessianMaxSpectrum", label=label)
    ax = ax if ax is not None else style.fresh_axes()
    drawn, limits = len(texts.entries_of(ax)), ax.get_xlim()
    brief = len(named) > texts.MOST_IN_FULL
    entries = texts.wrapped_entries({n: _legend_text(one, half, brief) for n, one in named.items()})
    step = min(0.05, 0.96 / (drawn + len(named)))  # from one rug to the next
    for row, (name, one) in enumerate(named.items(), start=drawn):
        look = style.added_line(ax, entries[name] if name else "")
        entry = entries[name]
        for sign in (-1, 1):
            if half != {-1: "positive", 1: "negative"}[sign]:
                _draw_half(ax, one, sign, 0.02 + step * row, log, {**look, "label": entry, **line})
                entry = "_"  # one legend entry a spectrum
    if half == "both":
        ax.axvline(0, color=style.MUTED, lw=0.6, zorder=0)
    limit_eigenvalues(ax, named.values(), half, log=log)
    if drawn:  # by the calls before
        ax.set_xlim(min(limits[0], ax.get_xlim()[0]), max(limits[1], ax.get_xlim()[1]))
    ax.set(xlabel=MAX_LABEL, ylabel="Density per decade" if log else "Density (1/nats)")
    _limit_densities(ax)
    backed = {"frameon": True, "edgecolor": "none", "framealpha": 0.8} if half == "both" else {}
    texts.place_legend(ax, "upper left" if half == "negative" else "upper right", **backed)
    return ax


def limit_eigenvalues(
    ax: Axes, results: Iterable["HessianMaxSpectrum"], half: Half, *, log: bool
) -> None:
    """Set scale and limits of the eigenvalue axis: 0, every eigenvalue and its density lie within.

    A density ends where it has fallen to a percent of its peak for the last time.

    Args:
        ax: The axes.
        results: The spectra that are drawn, or share the scale.
        half: The half that is drawn.
        log: Whether |λ| is logarithmic: `symlog`, linear only below the smallest of all.
    """
    results = list(results)
    values = np.concatenate([finite_eigenvalues(result) for result in results])
    kept = {"both": values != 0, "negative": values < 0, "positive": values > 0}[half]
    values = values[kept] if kept.any() else np.array([-1.0, 1.0])
    if log:
        decade = 10 ** np.floor(np.log10(np.abs(values).min()))
        if ax.get_xscale() == "symlog":  # what was drawn before may be smaller
            scale: Any = ax.xaxis.get_transform()
            decade = min(decade, scale.linthresh)
        ax.set_xscale("symlog", linthresh=decade, linscale=0.6)
        ax.xaxis.set_major_locator(SignedDecades())
        low, high = 1.5 * min(values.min(), 0), 1.5 * max(values.max(), 0)
    else:
        margin = 0.05 * np.abs(values).max()
        low, high = min(values.min() - margin, 0), max(values.max() + margin, 0)
    low = min(low, -_density_end(results, -1, log))
    high = max(high, _density_end(results, 1, log))
    ax.set_xlim(0 if half == "positive" else low, 0 if half == "negative" else high)


def _density_end(results: Iterable["HessianMaxSpectrum"], sign: Literal[-1, 1], log: bool) -> float:
    """Return the largest |λ| of one sign at which a density is over a percent of its peak."""
    ends = [0.0]
    for result in results:
        grid, density, _ = half_density(result, sign, log=log)
        if grid.size:
            ends.append(np.abs(grid[density > 0.01 * density.max()]).max())
    return max(ends)


def _limit_densities(ax: Axes, line_height: float | None = None) -> None:
    """Set the density axis from 0 to the largest density and the lines of the legend above it.

    Args:
        ax: The axes.
        line_height: Room for one line of the legend, in units of the largest density; by default
            what it takes in axes of this size, where it stands inside of them.
    """
    densities = [np.asarray(line.get_ydata()) for line in ax.lines if line.get_gid() == "density"]
    peak = max((density.max(initial=0.0) for density in densities), default=0.0)
    lines = sum(1 + entry.count("\n") for entry in texts.entries_of(ax))
    room = texts.room_for_legend(ax) if line_height is None else line_height * lines
    ax.set_ylim(0, peak * (1.05 + room) or 1.0)
    if peak == 0:
        ax.set(yticks=[], ylabel="")  # a rug has no scale


def trim_spectrum(ax: Axes, half: Half, line_height: float = 0.5) -> None:
    """Give the legend room above the densities and drop the arbitrary vertical scale.

    Entries that are wider than the axes, which have their place in a figure by now, are broken.

    Args:
        ax: The axes, with one half of a spectrum.
        half: That half.
        line_height: Room for one line of the legend, in units of the largest density.
    """
    ax.set(yticks=[], xlabel="", ylabel="")
    ax.spines["left"].set_visible(half == "positive")
    ax.spines["right"].set_visible(half == "negative")
    side = "upper left" if half == "negative" else "upper right"
    look: dict[str, Any] = {"loc": side, "fontsize": style.NOTE_SIZE, "labelspacing": 0.3}
    look |= {"handletextpad": 0.4}
    longest = max((len(entry) for entry in texts.entries_of(ax)), default=0)
    while ax.legend(**look).get_window_extent().width > ax.bbox.width and longest > _SHORTEST:
        longest -= 1
        for line in ax.get_legend_handles_labels()[0]:
            line.set_label(textwrap.fill(str(line.get_label()), longest))
    _limit_densities(ax, line_height)


def density_text(log: bool) -> str:
    """Return what the heights of a spectrum without a scale are, to begin a note with."""
    return r"Density of $\log_{10}|\lambda|$" if log else r"Density of $\lambda$"


def spread_far(results: Iterable["HessianMaxSpectrum"]) -> bool:
    """Return whether, in a half, the largest |λ| is over 30 times the smallest median of |λ|.

    A heuristic: on a linear axis that spectrum would be a needle at 0.

    Args:
        results: The spectra that share the scale.
    """
    spectra = [finite_eigenvalues(result) for result in results]
    for sign in (-1, 1):
        halves = [values for each in spectra if (values := sign * each[sign * each > 0]).size]
        if halves and max(map(np.max, halves)) > 30 * min(map(np.median, halves)):
            return True
    return False


def _draw_half(
    ax: Axes,
    result: "HessianMaxSpectrum",
    sign: Literal[-1, 1],
    rug: float,
    log: bool,
    line: dict[str, Any],
) -> None:
    grid, density, _ = half_density(result, sign, log=log)
    ax.plot(grid, density, gid="density", **line)
    ax.fill_between(grid, density, color=line["color"], alpha=0.15, lw=0)
    values = finite_eigenvalues(result)
    values = values[np.sign(values) == sign]
    height = np.full(values.shape, rug)
    size = 3 if grid.size else 6  # alone, it is all there is to see
    marks = {"color": line["color"], "ms": size, "mew": 0.4, "alpha": 0.7, "gid": "rug"}
    ax.plot(values, height, "|", transform=ax.get_xaxis_transform(), **marks)


def _legend_text(result: "HessianMaxSpectrum", half: str, brief: bool) -> str:
    values = finite_eigenvalues(result)
    below, above = int((values < 0).sum()), int((values > 0).sum())
    shown = {"both": below + above, "negative": below, "positive": above}
    counts = f"n = {shown[half]}"
    if half == "both" and below + above < values.size:
        counts += f", {values.size - below - above} are 0 within error"
    missing = int((~np.asarray(result.converged, dtype=bool)).sum())
    if missing:
        counts += f", {missing} not converged"
    nep, ape = f"NEP {_share(result.nep)}", f"APE {number(result.ape)}"
    if not brief:
        nep += _interval(result.nep_interval, _share)
        ape += _interval(result.ape_interval, number)
    if brief:
        numbers = {"both": f"{nep}, {ape}", "negative": nep, "positive": ape}[half]
        return f"{numbers}, {counts}" if missing else numbers
    if half == "both":
        return f"{counts}\n{nep}\n{ape}"
    return f"{nep if half == 'negative' else ape}, {counts}"


def _interval(ends: Iterable[float], text: Callable[[float], str]) -> str:
    return f" [{', '.join(map(text, ends))}]"


def _share(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "–"


def number(value: float) -> str:
    """Return `value` with three significant digits, without exponent where it is readable."""
    if not np.isfinite(value):
        return "–"
    text = f"{value:.2e}" if abs(value) >= 1e6 else f"{float(f'{value:.3g}'):g}"
    return text.replace("-", "−")
