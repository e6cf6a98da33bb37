"""Eigen-density by stochastic Lanczos quadrature.

For a vector v uniform on the unit sphere, E[vᵀ f(A) v] = (1/n) tr f(A), and a Krylov space of v
gives vᵀ f(A) v ≈ Σ_i w_i f(θ_i) with the Ritz values θ and the squared first coordinates w (Golub &
Welsch, 1969; Ubaru, Chen & Saad, 2017). The variance of vᵀ f(A) v is known (n + 2 counts the
constraint ‖v‖ = 1), so one probe has a standard error too:

    Var(vᵀ B v) = 2 / (n + 2) · (tr(B²)/n − (tr(B)/n)²)

An eigenvalue that is known exactly need not be sampled: it weighs 1/n, and v is used on the
rest of the spectrum alone. Outliers carry most of the variance, so this is where the error goes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from landscape._checks import check_count, check_positive
from landscape.linalg.gram_schmidt import are_long, inner, length, orthogonalise
from landscape.linalg.operators import SymmetricOperator, not_finite
from landscape.linalg.search import BASIS_BYTES, random_unit_vector
from landscape.results import Provenance, Result


@dataclass(frozen=True)
class SpectralDensity(Result):
    """Eigen-density: point masses, and their Gaussian smoothing on a grid.

    Attributes:
        outliers: Eigenvalues counted exactly, each of mass 1/dim, shape `(c,)`.
        nodes: Quadrature nodes of the rest of the spectrum, shape `(probes, m)`.
        weights: Their masses, shape `(probes, m)`; each row sums to 1 − c/dim.
        dim: Number of eigenvalues in all.
        grid: Where the smoothed density is given, shape `(g,)`.
        values: Smoothed density, shape `(g,)`, per unit of eigenvalue; its integral is 1.
        values_stderr: Standard error of `values` from the random probes, shape `(g,)`.
        sigma: Standard deviation of the smoothing kernel, in units of eigenvalue.
        provenance: Where it came from, if a probe made it by itself.
    """

    outliers: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray
    dim: int
    grid: np.ndarray
    values: np.ndarray
    values_stderr: np.ndarray
    sigma: float
    provenance: Provenance | None = None

    _plot: ClassVar[str | None] = "spectral_density"

    @property
    def trace(self) -> float:
        """Estimate of the trace, dim · ∫ λ."""
        return self.dim * self.moment(1)[0]

    @property
    def trace_stderr(self) -> float:
        """Standard error of `trace`."""
        return self.dim * self.moment(1)[1]

    def moment(self, power: int) -> tuple[float, float]:
        """Return the estimate of tr(A^power) / dim and its standard error.

        Args:
            power: Exact under the quadrature up to twice the number of Lanczos steps less one.
        """
        mean, stderr = _expectation(self, self.outliers**power, self.nodes**power)
        return float(mean), float(stderr)


def spectral_density(
    nodes: np.ndarray,
    weights: np.ndarray,
    dim: int,
    *,
    outliers: np.ndarray | None = None,
    sigma: float | None = None,
    points: int = 1024,
) -> SpectralDensity:
    """Return the density of quadrature nodes, smoothed on a grid.

    Args:
        nodes: Quadrature nodes, shape `(probes, m)`.
        weights: Their masses, shape `(probes, m)`.
        dim: Number of eigenvalues.
        outliers: Eigenvalues counted exactly and left out of `nodes`, shape `(c,)`.
        sigma: Kernel width; by default a hundredth of the range of the spectrum (a heuristic).
        points: Number of grid points.

    Returns:
        The density; each row of weights is scaled to 1 − c/dim.

    Raises:
        ValueError: If `sigma` is not positive and finite.
    """
    outliers = np.zeros(0) if outliers is None else outliers
    if len(outliers) < dim:
        weights = weights / weights.sum(1, keepdims=True) * (1 - len(outliers) / dim)
    known = np.concatenate([nodes.ravel(), outliers])
    low, high = float(known.min()), float(known.max())
    if sigma is None:
        size = max(abs(low), abs(high))
        spread = high - low if high - low > _SPREAD * size else size  # copies differ by rounding
        sigma = spread / 100 or 1.0
    _check_sigma(sigma)
    # 8 standard deviations of margin and at most half of one between points: integral 1 to 1e-12.
    margin = 8 * sigma
    points = max(points, int(np.ceil(2 * (high - low + 2 * margin) / sigma)) + 1)
    grid = np.linspace(low - margin, high + margin, points)
    bare = SpectralDensity(outliers, nodes, weights, dim, grid, grid, grid, sigma)
    with np.errstate(under="ignore"):  # far from its centre a Gaussian is 0
        parts = [
            _expectation(
                bare, _gaussian(x - outliers, sigma), _gaussian(x[..., None] - nodes, sigma)
            )
            for x in np.split(grid[:, None], range(_CHUNK, points, _CHUNK))
        ]
    values, stderr = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return SpectralDensity(outliers, nodes, weights, dim, grid, values, stderr, sigma)


def lanczos_quadrature(
    operator: SymmetricOperator,
    start: torch.Tensor,
    num_steps: int,
    basis_bytes: int = BASIS_BYTES,
    tick: Callable[[], object] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Gauss quadrature of vᵀ f(A) v by Lanczos.

    Orthogonality is kept against as many past vectors as fit `basis_bytes`. Beyond these, copies
    of converged Ritz values appear; they share the mass of the one, so the measure stays right.

    Args:
        operator: Symmetric, of size `dim`.
        start: Unit vector v, shape `(dim,)`.
        num_steps: Number of products.
        basis_bytes: Memory for past vectors.
        tick: Called after each product.

    Returns:
        Nodes and masses, each of shape `(m,)` with `m ≤ num_steps`; the masses sum to 1.

    Raises:
        ValueError: If a product is not finite.
    """
    num_steps = min(num_steps, operator.dim)
    long = are_long(operator.dim, operator.dtype, operator.device)
    dtype = torch.float32 if long else torch.float64
    window = int(np.clip(basis_bytes // (dtype.itemsize * operator.dim), 2, num_steps))
    basis = torch.zeros(window, operator.dim, dtype=dtype, device=operator.device)
    diagonal: list[torch.Tensor] = []
    off: list[torch.Tensor] = []
    q = start.to(dtype)
    every = 1 if operator.device.type == "cpu" else _READS
    rounding = 10 * torch.finfo(operator.dtype).eps
    for step in range(num_steps):
        basis[step % window] = q
        w = operator.matvec(q.to(operator.dtype)).to(dtype)
        tick()
        diagonal.append(inner(q, w).double())
        w, _ = orthogonalise(w, basis[: step + 1], every > 1)
        off.append(length(w).double())
        q = w / off[-1].clamp_min(torch.finfo(w.dtype).tiny)
        if (step + 1) % every == 0 or step + 1 == num_steps:
            alpha, beta = torch.stack([torch.stack(diagonal), torch.stack(off)]).cpu().numpy()
            scale = np.maximum(np.maximum.accumulate(abs(alpha)), np.maximum.accumulate(beta))
            ended = np.flatnonzero(~(beta > rounding * scale))
            if len(ended):
                break
    size = int(ended[0]) + 1 if len(ended) else num_steps
    if not np.isfinite([alpha[:size], beta[:size]]).all():
        raise not_finite(operator.dtype)
    off_diagonal = beta[: size - 1]
    values, vectors = np.linalg.eigh(
        np.diag(alpha[:size]) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)
    )
    return values, vectors[0] ** 2


def density_of(
    operator: SymmetricOperator,
    *,
    num_steps: int = 80,
    num_probes: int = 1,
    sigma: float | None = None,
    generator: torch.Generator,
    tick: Callable[[], object] = lambda: None,
) -> SpectralDensity:
    """Eigen-density of any symmetric operator.

    Args:
        operator: The operator.
        num_steps: Lanczos steps a probe.
        num_probes: Number of random probes.
        sigma: Kernel width; by default a hundredth of the range of the spectrum.
        generator: Source of the probes.
        tick: Called after each product.

    Returns:
        The density, after `num_steps · num_probes` products.

    Raises:
        ValueError: If an argument is out of range or a product is not finite.
    """
    check_density(num_steps, num_probes, sigma)
    rules = [
        lanczos_quadrature(operator, random_unit_vector(operator, generator), num_steps, tick=tick)
        for _ in range(num_probes)
    ]
    longest = max(len(values) for values, _ in rules)
    nodes = np.stack([np.pad(v, (0, longest - len(v)), mode="edge") for v, _ in rules])
    weights = np.stack([np.pad(w, (0, longest - len(w))) for _, w in rules])
    return spectral_density(nodes, weights, operator.dim, sigma=sigma)


def check_density(num_steps: int, num_probes: int, sigma: float | None) -> None:
    """Refuse bad arguments of a density."""
    check_count("num_steps", num_steps, 2)  # one step tells a mean, and no spread
    check_count("num_probes", num_probes, 1)
    _check_sigma(sigma)


def _check_sigma(sigma: float | None) -> None:
    """Refuse a width that is not positive and finite."""
    if sigma is not None:
        check_positive("sigma", sigma)


def _expectation(
    density: SpectralDensity, at_outliers: np.ndarray, at_nodes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return means of functions over the spectrum, and their standard errors.

    Args:
        density: Its masses.
        at_outliers: Values of the functions at the outliers, shape `(…, c)`.
        at_nodes: Values at the nodes, shape `(…, probes, m)`.
    """
    n, c, probes = density.dim, len(density.outliers), len(density.nodes)
    weights = density.weights
    mean = at_outliers.sum(-1) / n + (weights * at_nodes).sum((-2, -1)) / probes
    if n == c:
        return mean, np.zeros_like(mean)
    # The rest of the spectrum, as a distribution. A random probe may hardly see an eigenvalue; no
    # node weighs less than one eigenvalue does, and the error estimate counts it at least so.
    mass = np.where(weights > 0, np.maximum(weights, 1 / n), 0.0)
    mass = mass / mass.sum()
    first, second = (mass * at_nodes).sum((-2, -1)), (mass * at_nodes**2).sum((-2, -1))
    variance = 2 / (n - c + 2) * np.maximum(second - first**2, 0.0) / probes
    return mean, (1 - c / n) * np.sqrt(variance)


def _gaussian(x: np.ndarray, sigma: float) -> np.ndarray:
    kernel: np.ndarray = np.exp(-0.5 * (x / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    return kernel


_READS = 16  # products on a GPU between two looks at whether the chain has ended
_SPREAD = 1e-9  # of the largest value: a narrower range has no grid in float64
_CHUNK = 1024  # grid points smoothed at once
