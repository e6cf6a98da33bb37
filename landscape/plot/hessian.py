"""Hessian spectra: per mini-batch (the paper's) and over all data (edges and density)."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from landscape._checks import check_choice
from landscape.plot import style

if TYPE_CHECKING:
    from landscape.linalg.eigen import Eigenpairs
    from landscape.linalg.quadrature import SpectralDensity
    from landscape.probes.hessian import HessianMaxSpectrum, HessianSpectrum

Half = Literal["both", "negative", "positive"]

LABEL = r"Hessian eigenvalue $\lambda$ (nats)"
MAX_LABEL = r"Hessian max eigenvalue $\lambda$ (nats)"
FEWEST = 8
"""Fewest values that get a density; fewer are drawn as a rug alone. A heuristic."""


def hessian_max_spectrum(
    results: "HessianMaxSpectrum | Mapping[str, HessianMaxSpectrum]",
    *,
    ax: Axes | None = None,
    half: Half = "both",
    log: bool = False,
    **line: Any,
) -> Axes:
    """Draw densities of the per-mini-batch top eigenvalues (Park & Kim, 2022, Fig. 1c).

    Each half of each spectrum is a kernel density of its own because their scales differ
    (`half_density`): the area under the negative half is the NEP. Every eigenvalue is a tick of
    the rug below. The legend gives NEP (negative half) and APE (positive half) with their
    intervals, and counts: `n` eigenvalues drawn, and how many have not converged.

    Args:
        results: One spectrum, or several by label; model families decide the colours.
        ax: Axes to draw on; fresh ones by default.
        half: The half to draw, or both on one axis.
        log: Logarithmic |λ|, and densities per decade, for spectra over several decades.
        **line: Passed to `Axes.plot` for the densities.

    Returns:
        The axes.

    Raises:
        ValueError: If `half` is unknown or `results` is empty.
    """
    check_choice("half", half, get_args(Half))
    named = dict(results) if isinstance(results, Mapping) else {"": results}
    if not named:
        raise ValueError("`results` must hold at least one spectrum, got an empty mapping.")
    ax = ax if ax is not None else plt.subplots()[1]
    styles = style.line_styles(named)
    for row, (name, result) in enumerate(named.items()):
        label = _legend_entry(name, result, half)
        for sign in (-1, 1):
            if half != {-1: "positive", 1: "negative"}[sign]:
                _draw_half(ax, result, sign, row, log, {**styles[name], "label": label, **line})
                label = "_"  # one legend entry a spectrum
    if half == "both":
        ax.axvline(0, color=style.MUTED, lw=0.6, zorder=0)
    limit_eigenvalues(ax, named.values(), half, log=log)
    ax.set_ylim(bottom=0)
    ax.set(xlabel=MAX_LABEL, ylabel="Density per decade" if log else "Density (1/nats)")
    ax.legend(loc="upper left" if half == "negative" else "upper right")
    return ax


def half_density(
    result: "HessianMaxSpectrum", sign: Literal[-1, 1], *, log: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Return the kernel density of the eigenvalues of one sign.

    Gaussian kernels of Silverman's bandwidth h = 0.9·min(s, IQR/1.34)·n^(-1/5) (Silverman, 1986,
    eq. 3.31) over the n values of that sign, reflected at 0 so that no mass crosses it. The area
    is the share of that sign among all finite eigenvalues: the NEP for `sign=-1`.

    Args:
        result: The spectrum.
        sign: -1 for the negative half, 1 for the positive.
        log: Whether kernels, bandwidth and density are those of log10|λ|.

    Returns:
        Eigenvalues `(g,)` in ascending order, density `(g,)` per nat (`log`: per decade) and
        bandwidth; empty arrays and 0 where there are fewer than `FEWEST` values of that sign, or
        no spread among them.
    """
    everything = finite_eigenvalues(result)
    values = np.abs(everything[np.sign(everything) == sign])
    values = np.log10(values) if log else values
    empty = np.empty(0)
    if values.size < FEWEST:
        return empty, empty, 0.0
    spread = min(values.std(ddof=1), np.subtract(*np.percentile(values, [75, 25])) / 1.34)
    h = 0.9 * (spread or values.std(ddof=1)) * values.size**-0.2
    if not h > 1e-12 * np.abs(values).max():
        return empty, empty, 0.0
    low, high = values.min() - 5 * h, values.max() + 5 * h
    low, mirrored = (low, empty) if log else (max(0.0, low), -values[values < 5 * h])
    grid = np.linspace(low, high, int(np.clip(4 * (high - low) / h, 200, 20_000)))
    density = np.zeros_like(grid)
    for center in np.concatenate([values, mirrored]):
        near = slice(*np.searchsorted(grid, [center - 6 * h, center + 6 * h]))
        density[near] += np.exp(-0.5 * ((grid[near] - center) / h) ** 2)
    density /= h * np.sqrt(2 * np.pi) * everything.size
    grid = 10**grid if log else grid
    return (grid, density, h) if sign > 0 else (-grid[::-1], density[::-1], h)


def limit_eigenvalues(
    ax: Axes, results: Iterable["HessianMaxSpectrum"], half: Half, *, log: bool
) -> None:
    """Set scale and limits of the eigenvalue axis: 0 and every eigenvalue lie within.

    Args:
        ax: The axes.
        results: The spectra that are drawn, or share the scale.
        half: The half that is drawn.
        log: Whether |λ| is logarithmic: `symlog`, linear only below the smallest of all.
    """
    values = np.concatenate([finite_eigenvalues(result) for result in results])
    kept = {"both": values != 0, "negative": values < 0, "positive": values > 0}[half]
    values = values[kept] if kept.any() else np.array([-1.0, 1.0])
    if log:
        decade = 10 ** np.floor(np.log10(np.abs(values).min()))
        ax.set_xscale("symlog", linthresh=decade, linscale=0.6)
        low, high = 1.5 * min(values.min(), 0), 1.5 * max(values.max(), 0)
    else:
        margin = 0.05 * np.abs(values).max()
        low, high = min(values.min() - margin, 0), max(values.max() + margin, 0)
    ax.set_xlim(0 if half == "positive" else low, 0 if half == "negative" else high)


def finite_eigenvalues(result: "HessianMaxSpectrum") -> NDArray[np.float64]:
    """Return the finite eigenvalues of all mini-batches, `(n,)`."""
    values = np.ravel(result.eigenvalues)
    return np.asarray(values[np.isfinite(values)], dtype=np.float64)


def spectral_density(result: "SpectralDensity", *, ax: Axes | None = None, **line: Any) -> Axes:
    """Draw an eigen-density on a logarithmic scale, with a band of two standard errors each side.

    It is drawn down to a tenth of the peak that a single eigenvalue makes, mass 1/dim smoothed
    by a Gaussian of width `sigma`.

    Args:
        result: The density: `values (g,)` on `grid (g,)`.
        ax: Axes to draw on; fresh ones by default.
        **line: Passed to `Axes.plot`.

    Returns:
        The axes.
    """
    ax = ax if ax is not None else plt.subplots()[1]
    label = rf"density, $\sigma$ = {_number(result.sigma)}"
    (drawn,) = ax.plot(result.grid, result.values, **{"label": label, **line})
    floor = 0.1 / (result.dim * result.sigma * np.sqrt(2 * np.pi))
    low = np.maximum(result.values - 2 * result.values_stderr, floor)
    high = np.maximum(result.values + 2 * result.values_stderr, floor)
    ax.fill_between(result.grid, low, high, color=drawn.get_color(), alpha=0.25, lw=0)
    ax.set_yscale("log")
    ax.set_ylim(floor, 10 * max(float(np.max(high)), floor))
    ax.set(xlabel=LABEL, ylabel="Density (1/nats)")
    return ax


def hessian_spectrum(result: "HessianSpectrum", *, ax: Axes | None = None, **line: Any) -> Axes:
    """Draw the eigen-density with the largest and the smallest eigenvalues at its edges.

    An edge eigenvalue is a mark with a bar of its residual `‖Hv − λv‖` each side, within which a
    true eigenvalue lies; hollow where it has not converged. The legend gives the trace with its
    standard error.

    Args:
        result: The spectrum; without a density the edges are drawn alone.
        ax: Axes to draw on; fresh ones by default.
        **line: Passed to `Axes.plot` for the density.

    Returns:
        The axes.
    """
    ax = ax if ax is not None else plt.subplots()[1]
    if result.density is not None:
        spectral_density(result.density, ax=ax, **line)
    else:
        ax.set(xlabel=LABEL, yticks=[])
    _draw_edge(ax, result.largest, "largest", "^", "#D55E00")
    _draw_edge(ax, result.smallest, "smallest", "v", "#0072B2")
    trace = rf"trace {_number(result.trace)} $\pm$ {_number(result.trace_stderr)}"
    ax.plot([], [], " ", label=trace)
    ax.legend(loc="upper right")
    return ax


def _draw_edge(ax: Axes, pairs: "Eigenpairs", name: str, marker: str, color: str) -> None:
    converged = np.asarray(pairs.converged, dtype=bool)
    for chosen, fill, note in ((converged, color, ""), (~converged, "none", ", not converged")):
        if chosen.any():
            ax.errorbar(
                pairs.values[chosen],
                np.full(chosen.sum(), 0.06),
                xerr=pairs.residuals[chosen],
                fmt=marker,
                color=color,
                markerfacecolor=fill,
                markersize=4,
                markeredgewidth=0.7,
                elinewidth=0.8,
                transform=ax.get_xaxis_transform(),
                label=f"{chosen.sum()} {name}{note}",
            )


def _draw_half(
    ax: Axes,
    result: "HessianMaxSpectrum",
    sign: Literal[-1, 1],
    row: int,
    log: bool,
    line: dict[str, Any],
) -> None:
    grid, density, _ = half_density(result, sign, log=log)
    ax.plot(grid, density, **line)
    ax.fill_between(grid, density, color=line["color"], alpha=0.15, lw=0)
    values = finite_eigenvalues(result)
    values = values[np.sign(values) == sign]
    height = np.full(values.shape, 0.02 + 0.05 * row)
    rug = {"color": line["color"], "ms": 3, "mew": 0.4, "alpha": 0.7, "gid": "rug"}
    ax.plot(values, height, "|", transform=ax.get_xaxis_transform(), **rug)


def _legend_entry(name: str, result: "HessianMaxSpectrum", half: str) -> str:
    values = finite_eigenvalues(result)
    parts = []
    if half != "positive":
        parts.append(f"NEP {_estimate(result.nep, result.nep_interval)}")
    if half != "negative":
        parts.append(f"APE {_estimate(result.ape, result.ape_interval)}")
    signs = {"both": values.size, "negative": (values < 0).sum(), "positive": (values > 0).sum()}
    parts.append(f"n = {signs[half]}")
    missing = int((~np.asarray(result.converged, dtype=bool)).sum())
    if missing:
        parts.append(f"{missing} not converged")
    return (f"{name}: " if name else "") + ", ".join(parts)


def _estimate(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    """Return `value` with three significant digits, without exponent where it is readable."""
    if not np.isfinite(value):
        return "–"
    return (
        f"{float(f'{value:.3g}'):,g}".replace(",", "\u2009") if abs(value) < 1e6 else f"{value:.2e}"
    )
