"""Eigenpairs with their residuals, and what these say of the errors.

A residual r = ‖A y − θ y‖ of a unit vector y bounds the distance from θ to an eigenvalue of A by r,
and by r² / gap where θ is separated by `gap` from the rest of the spectrum (Parlett, 1998, sec.
11.7). Both shrink in step with the true error.
"""

import warnings
from dataclasses import dataclass

import numpy as np

from landscape.linalg.krylov import RitzPairs
from landscape.results import Result


@dataclass(frozen=True)
class Eigenpairs(Result):
    """Extreme eigenvalues with their residuals.

    Of A as it is computed: the Hessian of a network in float32, whose activations are rounded, is
    off from the one in float64. By 1e-7 to 2e-6 of the largest eigenvalue in ResNet-20 and a small
    ViT, but by 2e-5 to 9e-5 on two mini-batches of eight where rounding puts the input of a ReLU on
    the other side of zero (`benchmarks/precision.py`). `errors` cannot tell that.

    Attributes:
        values: Eigenvalues, shape `(k,)`; LM by magnitude, LA largest first, SA smallest first.
        residuals: ‖A y − θ y‖ of each unit eigenvector, shape `(k,)`: an eigenvalue lies within.
        errors: Estimates min(r, r² / gap) of |θ − λ|, shape `(k,)`, and no less than the rounding
            of products that shows in their asymmetry. No bounds, as `residuals` are: after few
            products the gap is taken too wide. Of 420 largest eigenvalues of small networks, each
            searched for alone, 10 were off by more, by up to 1.42 times the estimate.
        converged: Whether each estimate is at most `tol` times |θ|, shape `(k,)`.
        which: Which end of the spectrum.
        num_matvecs: Products that were spent.
        vectors: Unit eigenvectors, one per row, shape `(k, dim)`, where they were asked for.
        miss: Bound on the probability that a value is missing, over the random start vectors: the
            one admitted, or more where the search ended before; 1 where it was not looked for.
    """

    values: np.ndarray
    residuals: np.ndarray
    errors: np.ndarray
    converged: np.ndarray
    which: str
    num_matvecs: int
    vectors: np.ndarray | None = None
    miss: float = 1.0


def warn_unconverged(
    converged: list[np.ndarray],
    num_matvecs: float,
    tol: float,
    remedy: str,
    stacklevel: int = 3,
) -> None:
    """Warn once where some pair has not converged."""
    flags = np.concatenate([c.ravel() for c in converged])
    if not flags.all():
        warnings.warn(
            f"{int((~flags).sum())} of {len(flags)} eigenpairs have not converged to {tol:g} in "
            f"{num_matvecs:g} products; {remedy}. The residuals tell how far they are.",
            stacklevel=stacklevel,
        )


def rank(values: np.ndarray, which: str) -> np.ndarray:
    """Return numbers that are larger the sooner a value is wanted."""
    ranks: np.ndarray = np.abs(values) if which == "LM" else values if which == "LA" else -values
    return ranks


def select(values: np.ndarray, k: int, which: str) -> np.ndarray:
    """Return the indices of the `k` wanted values, in the order of the result."""
    return np.argsort(-rank(values, which), kind="stable")[:k]


def error_estimates(ritz: RitzPairs) -> np.ndarray:
    """Return min(r, r² / gap) for every Ritz pair, shape `(m,)`.

    The gap is the distance to the nearest other Ritz value, less that one's own residual.
    """
    values, r = ritz.values, ritz.residuals
    if len(values) < 2:
        return r
    distance = np.abs(values[:, None] - values[None, :]) - r[None, :]
    np.fill_diagonal(distance, np.inf)
    gap = np.maximum(distance.min(1), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        squared = np.where(gap > 0, r**2 / gap, np.inf)
    errors: np.ndarray = np.minimum(r, squared)
    return errors
