"""How probable it is that a Krylov space has missed an eigenvalue.

No residual tells that an eigenvalue is missing. Let x be a unit eigenvector, of eigenvalue μ, that
the space of random start vectors v_c does not hold, and g_c = √n x·v_c, which are standard normal.
The space knows a matrix M(μ) with gᵀ M g = n |part of x in the space|² ≤ n
(`KrylovSpace.visibility`), so g lies in an ellipsoid that shrinks with every product. That has at
most the probability Π_i erf(√(n / 2 m_i)), with m_i the eigenvalues of M: the box around the
ellipsoid. Two cases may be missed and matter:

- a copy of a value that was found. Of an eigenspace a start vector sees one vector, so x can be
  chosen orthogonal to all start vectors but the last, and g has one entry;
- another value, beyond the last that is wanted but for the tolerance. All of g counts, at the worst
  of a grid of μ around the values found.

A start vector that the user gives gets a random one added, as large as itself. Its entry of g is
then normal with half the variance and a mean that is not known, and a mean makes no ellipsoid
around 0 more probable (Anderson, 1955).

The probability is over the start vectors alone, whatever the spectrum; it takes for granted that
the course of the iteration does not depend on an x that it has not seen. It says more than the
bounds of Kuczyński & Woźniakowski (1992), which hold for the worst spectrum. After a restart only
start vectors since then are accounted for.
"""

from math import erf, sqrt

import numpy as np

from landscape._checks import is_number
from landscape.linalg.krylov import BEYOND_DOUBT

MISS = 0.01
"""Probability of missing an eigenvalue that `certify=True` admits."""
OWN = 0.5
"""Share of a random vector in a start vector from the user."""


def check_certify(certify: bool | float) -> float:
    """Return the probability of a miss to admit, or 0 where none is to be looked for.

    Raises:
        ValueError: If it is a number outside (0, 1).
    """
    if isinstance(certify, bool):
        return MISS if certify else 0.0
    if not is_number(certify) or not 0 < certify < 1:
        raise ValueError(f"`certify` must be a bool or a probability in (0, 1), got {certify!r}.")
    return certify


def watched(values: np.ndarray, close: np.ndarray, mirrored: bool) -> np.ndarray:
    """Return where a space is watched: at the wanted values, then around them.

    Args:
        values: Wanted values, shape `(k,)`.
        close: How near to each of them another value would be taken for it, shape `(k,)`.
        mirrored: Values of the other sign are wanted too.
    """
    around = [values + sign * 1.5 * 4.0**j * close for sign in (-1, 1) for j in range(5)]
    if mirrored:
        around += [-points for points in around]
    return np.concatenate([values, *around])


def chances(matrices: np.ndarray, copies: int, dim: int, own: bool) -> np.ndarray:
    """Return for every mark a bound on the probability that an eigenvector there is not seen.

    Args:
        matrices: M at every mark, shape `(marks, c, c)`, from `KrylovSpace.visibility`.
        copies: At so many first marks an eigenvector was found, and a copy is looked for.
        dim: The dimension n.
        own: Whether the first start vector is from the user, a random one added.
    """
    if own:
        matrices = matrices.copy()
        matrices[:, 0] *= sqrt(OWN)
        matrices[:, :, 0] *= sqrt(OWN)
    entries = np.linalg.eigvalsh(matrices)
    diagonal = matrices.diagonal(axis1=1, axis2=2)
    for marks, known in (
        (diagonal.max(1) > BEYOND_DOUBT, diagonal.max(1)),
        (np.arange(len(matrices)) < copies, diagonal[:, -1]),
    ):
        entries[marks] = 0.0  # a factor of 1
        entries[marks, -1] = known[marks]
    factors = _erf(np.sqrt(dim / 2 / np.maximum(entries, 1e-30)))
    product: np.ndarray = factors.prod(1)
    return product


_erf = np.vectorize(erf, otypes=[float])
