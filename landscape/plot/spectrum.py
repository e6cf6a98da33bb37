"""Hessian spectra over all data: both edges and the density between them."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from landscape.plot import style, texts
from landscape.plot.hessian import number

if TYPE_CHECKING:
    from landscape.linalg.eigenpairs import Eigenpairs
    from landscape.linalg.quadrature import SpectralDensity
    from landscape.probes.hessian import HessianSpectrum

_SIDES = ("largest", "smallest")
_COLORS = {"^": "#D55E00", "v": "#0072B2"}  # of the marks of both sides
LABEL = r"Hessian eigenvalue $\lambda$ (nats)"


def spectral_density(
    result: "SpectralDensity | Mapping[str, SpectralDensity]",
    *,
    ax: Axes | None = None,
    label: str | None = None,
    **line: Any,
) -> Axes:
    """Draw an eigen-density on a logarithmic scale, with a band of two standard errors each side.

    It is drawn down to a tenth of the peak that a single eigenvalue makes, mass 1/dim smoothed
    by a Gaussian of width `sigma`.

    Args:
        result: The density of one model, `values (g,)` on `grid (g,)`, or of several by label.
        ax: Axes to draw on; fresh ones by default.
        label: Name of one model in a legend; its family decides the colour.
        **line: Passed to `Axes.plot`.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `SpectralDensity`.
        ValueError: If `result` is an empty mapping, or a mapping comes with a `label`.
    """
    if isinstance(result, Mapping):
        return style.draw_each(partial(spectral_density, **line), result, ax, label)
    style.check_result(result, "SpectralDensity")
    ax = ax if ax is not None else style.fresh_axes()
    width = f"σ = {number(result.sigma)}"
    entry = f"density, {width}" if label is None else texts.wrapped_entries({label: width})[label]
    look = {} if label is None else style.added_line(ax, entry)
    _draw_density(ax, result, {**look, "label": entry, **line})
    if label is not None:
        texts.place_legend(ax, **texts.OVER_DATA)
    return ax


def _draw_density(ax: Axes, result: "SpectralDensity", line: dict[str, Any]) -> None:
    """Draw a density and its band; the scale holds those that are there already, too."""
    (drawn,) = ax.plot(result.grid, result.values, **line)
    floor, low, high = density_band(result)
    band: dict[str, Any] = {"alpha": 0.25, "lw": 0, "gid": "band"}
    ax.fill_between(result.grid, low, high, color=drawn.get_color(), **band)
    ax.set_yscale("log")
    bands = [each for each in ax.collections if each.get_gid() == "band"]
    tops = [np.asarray(path.vertices)[:, 1].max() for each in bands for path in each.get_paths()]
    bottom = floor if len(bands) == 1 else min(floor, ax.get_ylim()[0])
    ax.set_ylim(bottom, 3 * max([floor, *tops]))
    ax.set(xlabel=LABEL, ylabel="Density (1/nats)")


def density_band(
    result: "SpectralDensity",
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Return a tenth of the peak that one eigenvalue makes, and two standard errors above that."""
    floor = float(0.1 / (result.dim * result.sigma * np.sqrt(2 * np.pi)))  # mass 1/dim, width σ
    error = 2 * result.values_stderr
    return floor, np.maximum(result.values - error, floor), np.maximum(result.values + error, floor)


def hessian_spectrum(
    result: "HessianSpectrum | Mapping[str, HessianSpectrum]",
    *,
    ax: Axes | None = None,
    label: str | None = None,
    **line: Any,
) -> Axes:
    """Draw the eigen-density with the largest and the smallest eigenvalues at its edges.

    An edge eigenvalue is a mark with a bar of its residual `‖Hv − λv‖` each side, within which a
    true eigenvalue lies; hollow where it has not converged. The legend gives the trace with its
    standard error.

    Args:
        result: The spectrum of one model, or of several by label; without a density the edges are
            drawn alone.
        ax: Axes to draw on; fresh ones by default.
        label: Name of one model in the legend; its family decides the colour.
        **line: Passed to `Axes.plot` for the density.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `HessianSpectrum`.
        ValueError: If `result` is an empty mapping, or a mapping comes with a `label`.
    """
    if isinstance(result, Mapping):
        return style.draw_each(partial(hessian_spectrum, **line), result, ax, label)
    style.check_result(result, "HessianSpectrum")
    ax = ax if ax is not None else style.fresh_axes()
    if result.density is None and not ax.has_data():
        ax.set(xlabel=LABEL, yticks=[])
    trace = f"trace {number(result.trace)} ± {number(result.trace_stderr)}"
    if label is None:
        _draw_alone(ax, result, trace, line)
    else:
        _draw_among_others(ax, result, texts.wrapped_entries({label: trace})[label], line)
    scale = [each for each in ax.collections if each.get_gid() == "band"]
    if scale:
        low, high = ax.get_ylim()
        ax.set_ylim(low, low * (high / low) ** (1 + texts.room_for_legend(ax)))
    handles, labels = ax.get_legend_handles_labels()
    first = sorted(range(len(labels)), key=lambda i: labels[i].split(",")[0] in _SIDES)
    texts.place_legend(ax, "upper right", handles=[handles[i] for i in first])
    return ax


def _draw_alone(ax: Axes, result: "HessianSpectrum", trace: str, line: dict[str, Any]) -> None:
    """Draw a spectrum whose edges have the colours of their sides and entries of their own."""
    if result.density is not None:
        spectral_density(result.density, ax=ax, **line)
    for pairs, chosen, name, marker in _edges(result):
        color, label = _COLORS[marker], f"{chosen.sum()} {name}"
        _draw_edge(ax, pairs, chosen, marker, color, label=label)
    ax.plot([], [], " ", label=trace)


def _draw_among_others(
    ax: Axes, result: "HessianSpectrum", entry: str, line: dict[str, Any]
) -> None:
    """Draw one of several spectra in the colour of its model, edges a row above the last ones."""
    row = sum(each.get_gid() == "spectrum" for each in ax.lines)
    look = {**style.added_line(ax, entry), **line}
    if result.density is not None:
        _draw_density(ax, result.density, look)
    ax.plot([], [], label=entry, gid="spectrum", **look)
    known = set(ax.get_legend_handles_labels()[1])
    mark: dict[str, Any] = {"ls": "None", "color": style.MUTED, "ms": 4}
    for pairs, chosen, name, marker in _edges(result):
        _draw_edge(ax, pairs, chosen, marker, look["color"], height=0.06 + 0.05 * row)
        if name not in known:
            fill = "full" if name in _SIDES else "none"
            ax.plot([], [], marker=marker, fillstyle=fill, label=name, **mark)


def _edges(
    result: "HessianSpectrum",
) -> "Iterator[tuple[Eigenpairs, NDArray[np.bool_], str, str]]":
    """Yield the pairs of each side, which of them are meant, what these are called, and a mark."""
    for pairs, name, marker in zip((result.largest, result.smallest), _SIDES, _COLORS, strict=True):
        converged = np.asarray(pairs.converged, dtype=bool)
        for chosen, note in ((converged, ""), (~converged, ", not converged")):
            if chosen.any():
                yield pairs, chosen, name + note, marker


def _draw_edge(
    ax: Axes,
    pairs: "Eigenpairs",
    chosen: NDArray[np.bool_],
    marker: str,
    color: str,
    *,
    height: float = 0.06,
    label: str = "_",
) -> None:
    """Draw some of the eigenvalues of a side, hollow those that have not converged."""
    ax.errorbar(
        pairs.values[chosen],
        np.full(chosen.sum(), height),
        xerr=pairs.residuals[chosen],
        fmt=marker,
        color=color,
        fillstyle="full" if np.asarray(pairs.converged)[chosen].all() else "none",
        markersize=4,
        markeredgewidth=0.7,
        elinewidth=0.8,
        transform=ax.get_xaxis_transform(),
        label=label,
    )
