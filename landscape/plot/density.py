"""Kernel densities of Hessian max eigenvalue spectra, one for each half."""

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from landscape.probes.hessian_max import HessianMaxSpectrum

FEWEST = 8
"""Fewest values that get a density; fewer are drawn as a rug alone. A heuristic."""


def half_density(
    result: "HessianMaxSpectrum", sign: Literal[-1, 1], *, log: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Return the kernel density of the eigenvalues of one sign.

    Gaussian kernels of Silverman's bandwidth h = 0.9·min(s, IQR/1.34)·n^(-1/5) (Silverman, 1986,
    eq. 3.31) over the n values of that sign, reflected at 0 so that no mass crosses it. The area
    is the share of that sign among all finite eigenvalues: the NEP for `sign=-1`. Those that count
    as neither sign (`HessianMaxSpectrum.signed_eigenvalues`) are in no half.

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


def finite_eigenvalues(result: "HessianMaxSpectrum") -> NDArray[np.float64]:
    """Return the finite eigenvalues of all mini-batches, `(n,)`, 0 for those of neither sign."""
    values = np.ravel(result.signed_eigenvalues)
    return np.asarray(values[np.isfinite(values)], dtype=np.float64)
