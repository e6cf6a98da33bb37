"""A Krylov space that grows one product at a time.

For a symmetric A of size n the space keeps an orthonormal basis V (n × m), the projection T = VᵀAV,
and the residual directions R (n × p, one column a chain, orthogonal to V), such that at any time

    A V = V T + R Eᵀ

with small coefficients E (m × p). A chain is a Lanczos recurrence from a start vector of its own;
several chains make a band Lanczos process (Ruhe, 1979), and a chain may start at any time. From
this one relation follow, without further products, the Ritz pairs (eigenpairs of T), the residual
norm of each, and, for a start vector v = V c, the quadrature vᵀ f(A) v ≈ cᵀ f(T) c.

Every vector of the space is Σ_j p_j(A) v_j over its start vectors v_j, with polynomials p_j. For
one chain c and points μ the space can keep the values p_c(μ) of its basis vectors, y (m), with

    μ yᵀ = yᵀ T + fᵀ Eᵀ,    f (p) the values of the residual directions R

so that 1 / |y|² is the least ‖b‖² of a vector b of the space with p_c(μ) = 1 (a Christoffel
function). `landscape.linalg.eigen` concludes from it that an eigenvalue was not missed.

Orthogonality is kept by Gram-Schmidt against the whole basis, with a second pass where the first
cancels too much (Parlett, 1998, sec. 6.9). When the basis is full it is compressed to chosen Ritz
vectors (thick restart, Wu & Simon, 2000). Basis and recurrence are float64 by default, whatever the
precision of the products.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from landscape.linalg.operators import SymmetricOperator


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs from a Krylov space, ascending.

    Attributes:
        values: Ritz values, shape `(m,)`.
        residuals: Norms ‖A y − θ y‖ of the unit Ritz vectors, shape `(m,)`.
        coordinates: Ritz vectors in the basis, one a column, shape `(m, m)`.
    """

    values: np.ndarray
    residuals: np.ndarray
    coordinates: np.ndarray


class KrylovSpace:
    """Orthonormal basis, projection and residual directions of a growing Krylov space.

    Attributes:
        operator: The symmetric operator.
        capacity: Largest number of basis vectors.
        size: Number of basis vectors.
        marks: Points at which the polynomials of a chain are watched, shape `(marks,)`.
        asymmetry: Largest measured |uᵀA v − vᵀA u| over basis vectors: rounding of the products.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        capacity: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        """Start empty.

        Args:
            operator: The symmetric operator.
            capacity: Largest number of basis vectors; memory is `capacity × dim` numbers.
            dtype: Precision of the basis and the recurrence.
            device: Device of the basis; the operator's by default.
        """
        self.operator = operator
        self.capacity = capacity = min(capacity, operator.dim)
        self._basis = torch.empty(
            capacity, operator.dim, dtype=dtype, device=device or operator.device
        )
        self._projection = np.zeros((capacity, capacity))
        self._frontier: list[Tensor] = []
        self._coupling = np.zeros((capacity, 0))  # E
        self._starts = np.zeros((capacity, 0))  # coordinates of the start vectors in V ...
        self._pending = np.zeros((0, 0))  # ... and in R: (chains, start vectors)
        self._alive: list[bool] = []
        self.marks = np.zeros(0)  # μ
        self._marked = np.zeros((0, capacity))  # y, one row a mark ...
        self._marked_frontier = np.zeros((0, 0))  # ... and f: (marks, chains)
        self.size = 0
        self.asymmetry = 0.0

    @property
    def full(self) -> bool:
        """Whether the basis has reached its capacity."""
        return self.size == self.capacity

    @property
    def alive(self) -> list[int]:
        """Chains that can still grow."""
        return [chain for chain, alive in enumerate(self._alive) if alive]

    @property
    def num_starts(self) -> int:
        """Number of chains that were opened."""
        return len(self._alive)

    def start(self, vector: Tensor) -> int:
        """Open a chain from a start vector, and return its number.

        Args:
            vector: Shape `(dim,)`; normalised here, and orthogonalised against the basis.
        """
        v = vector.to(self._basis)
        v = v / v.norm()
        v, coordinates = self._orthogonalise(v)
        chains, starts = self._pending.shape
        self._frontier.append(v)
        self._alive.append(bool(v.norm() > _NEGLIGIBLE))
        self._coupling = np.pad(self._coupling, ((0, 0), (0, 1)))
        self._starts = np.pad(self._starts, ((0, 0), (0, 1)))
        self._starts[: self.size, starts] = coordinates
        self._pending = np.pad(self._pending, ((0, 1), (0, 1)))
        self._pending[chains, starts] = 1.0
        self._marked_frontier = np.pad(self._marked_frontier, ((0, 0), (0, 1)))
        return chains

    def watch(self, marks: np.ndarray) -> None:
        """Keep the polynomials' values at `marks` for the chain opened last, yet without a step.

        Args:
            marks: Points μ, shape `(marks,)`; earlier ones are forgotten.
        """
        self.marks = marks
        self._marked = np.zeros((len(marks), self.capacity))
        self._marked_frontier = np.zeros((len(marks), len(self._frontier)))
        self._marked_frontier[:, -1] = 1.0

    def amplification(self) -> np.ndarray:
        """Return the largest p(μ)² / ‖b‖² of the watched chain over the space, shape `(marks,)`."""
        f = self._marked_frontier
        inverse = np.linalg.pinv(self._gram(), rcond=1e-12, hermitian=True)
        squares: np.ndarray = np.einsum("ai,ij,aj->a", f, inverse, f)
        squares += (self._marked[:, : self.size] ** 2).sum(1)
        return squares

    def stop(self, chain: int) -> None:
        """Let a chain grow no further; its residual direction stays known."""
        self._alive[chain] = False

    def resume(self) -> None:
        """Let every stopped chain that has not ended grow again."""
        self._alive = [bool(frontier.any()) for frontier in self._frontier]

    def step(self, chain: int) -> None:
        """Extend a chain by one basis vector; one product.

        Args:
            chain: Number of a chain in `alive`; `full` must be false.
        """
        r = self._frontier[chain]
        beta = float(r.norm())
        q = r / beta
        m = self.size
        scale = np.abs(self._projection[:m, :m]).max(initial=0.0)
        if len(self._frontier) > 1 or beta < _CANCELLED * scale:
            q, _ = self._orthogonalise(q)  # what rounding left of the basis has grown with 1/β
            q /= q.norm()
        self._basis[m] = q
        # Move the component along q from the frontier (R) to the basis (V).
        share = np.zeros(len(self._frontier))
        for other, frontier in enumerate(self._frontier):
            if other != chain:
                share[other] = float(frontier @ q)
                frontier.sub_(q, alpha=share[other])
        share[chain] = beta
        row = self._coupling[:m] @ share
        self._projection[m, :m] = row
        self._starts[m] = share @ self._pending
        self._coupling[:, chain] = 0.0
        self._pending[chain] = 0.0
        value = self._marked_frontier[:, chain] / beta
        self._marked_frontier -= np.outer(value, share)
        self._marked[:, m] = value
        self.size = m + 1

        w = self.operator.matvec(q).to(q)
        w, column = self._orthogonalise(w)
        self._projection[: m + 1, m] = column
        if m:
            self.asymmetry = max(self.asymmetry, float(np.abs(column[:m] - row).max()))
        self._marked_frontier[:, chain] = self.marks * value - self._marked[:, : m + 1] @ column
        self._coupling[m, chain] = 1.0
        self._frontier[chain] = w
        scale = np.abs(self._projection[: m + 1, : m + 1]).max()
        rounding = 10 * torch.finfo(self.operator.dtype).eps * max(scale, float(w.norm()))
        if not float(w.norm()) > rounding or self.size == self.operator.dim:
            # The space is invariant under A: the chain has nothing more to find.
            self._frontier[chain] = torch.zeros_like(w)
            self._alive[chain] = False

    def ritz(self) -> RitzPairs:
        """Return the Ritz pairs of the whole space, ascending."""
        m = self.size
        projection = self._projection[:m, :m]
        values, coordinates = np.linalg.eigh((projection + projection.T) / 2)
        tails = self._coupling[:m].T @ coordinates
        squares = np.einsum("im,ij,jm->m", tails, self._gram(), tails)
        residuals = np.sqrt(np.maximum(squares, 0.0) + self.asymmetry**2)
        return RitzPairs(values, residuals, coordinates)

    def vectors(self, coordinates: np.ndarray) -> Tensor:
        """Return V times `coordinates` `(m, k)` as rows, shape `(k, dim)`."""
        small = torch.from_numpy(np.ascontiguousarray(coordinates.T)).to(self._basis)
        return small @ self._basis[: self.size]

    def start_weights(self, ritz: RitzPairs, starts: int, first: int = 0) -> np.ndarray:
        """Return the squared coordinates of some start vectors in the Ritz vectors.

        Args:
            ritz: Ritz pairs of the current space.
            starts: Number of start vectors.
            first: Number of the first of them.

        Returns:
            Quadrature weights of shape `(starts, m)`; each row sums to 1.
        """
        chosen = self._starts[: self.size, first : first + starts]
        weights = (chosen.T @ ritz.coordinates) ** 2
        normalised: np.ndarray = weights / weights.sum(1, keepdims=True)
        return normalised

    def compress(self, ritz: RitzPairs, keep: np.ndarray) -> None:
        """Keep only some Ritz vectors as the basis (thick restart).

        Args:
            ritz: Ritz pairs of the current space.
            keep: Indices of the Ritz pairs to keep.
        """
        m, kept = self.size, len(keep)
        small = ritz.coordinates[:, keep]
        rotation = torch.from_numpy(np.ascontiguousarray(small.T)).to(self._basis)
        for columns in torch.split(self._basis, _CHUNK, dim=1):  # slices: in place
            columns[:kept] = rotation @ columns[:m]
        coupling = small.T @ self._coupling[:m]
        starts = small.T @ self._starts[:m]
        projection = small.T @ self._projection[:m, :m] @ small
        marked = self._marked[:, :m] @ small
        for table, part in (
            (self._coupling, coupling),
            (self._starts, starts),
            (self._marked.T, marked.T),
        ):
            table[:] = 0.0
            table[:kept] = part
        self._projection[:] = 0.0
        self._projection[:kept, :kept] = projection
        self.size = kept

    def _gram(self) -> np.ndarray:
        """Return RᵀR."""
        gram = np.zeros((len(self._frontier),) * 2)
        for i, a in enumerate(self._frontier):
            for j in range(i + 1):
                gram[i, j] = gram[j, i] = float(a @ self._frontier[j])
        return gram

    def _orthogonalise(self, w: Tensor) -> tuple[Tensor, np.ndarray]:
        """Return `w` without its components along the basis, and those components."""
        return orthogonalise(w, self._basis[: self.size])


def orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, np.ndarray]:
    """Take from a vector its components along orthonormal ones.

    Args:
        w: Vector of shape `(dim,)`; not changed.
        basis: Orthonormal vectors, one a row, shape `(m, dim)`.

    Returns:
        The rest of `w`, orthogonal to the basis to 1e-13 of its length where the precision allows,
        and the components, shape `(m,)`.
    """
    total = torch.zeros(len(basis), dtype=w.dtype, device=w.device)
    for _ in range(2):
        part = basis @ w
        w = torch.addmv(w, basis.T, part, alpha=-1)
        total += part
        # One pass leaves ε |part| along the basis: enough unless that much was cancelled.
        if float(w.norm()) * _ORTHOGONAL > torch.finfo(w.dtype).eps * float(total.norm()):
            break
    return w, total.double().cpu().numpy()


_CANCELLED = 1e-3  # of the scale of A
_NEGLIGIBLE = 1e-10  # of a unit start vector: it lies in the space already
_ORTHOGONAL = 1e-13  # a unit vector's component along the basis that does no harm
_CHUNK = 1 << 16
