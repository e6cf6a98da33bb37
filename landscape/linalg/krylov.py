"""A Krylov space that grows one product at a time.

For a symmetric A of size n the space keeps an orthonormal basis V (n × m), the projection T = VᵀAV,
and the residual directions R (n × p, one column a chain, orthogonal to V), such that at any time

    A V = V T + R Eᵀ

with small coefficients E (m × p). A chain is a Lanczos recurrence from a start vector of its own;
several chains make a band Lanczos process (Ruhe, 1979), and a chain may start at any time. From
this one relation follow, without further products, the Ritz pairs (eigenpairs of T), the residual
norm of each, and, for a start vector v = V c, the quadrature vᵀ f(A) v ≈ cᵀ f(T) c.

What would the space see of a unit eigenvector x of A, with eigenvalue μ? Let z = Vᵀx, w = Rᵀx and
let S, P be the coordinates of the start vectors, V S + R P. Then

    μ zᵀ = zᵀ T + wᵀ Eᵀ,    zᵀ S + wᵀ P = g    with g_c = x·v_c for each start vector v_c

determine z and w from g, and the part of x in the space has the squared length |z|² + wᵀ(RᵀR)⁻¹w =
gᵀ M g with a small matrix M(μ), the inverse of a Christoffel function. It is at most 1, and grows
with every product: `landscape.linalg.certificate` concludes which g an eigenvector that has not
shown itself can still have.

Orthogonality is kept by Gram-Schmidt against the whole basis, with a second pass where the first
is seen to leave something along it (Parlett, 1998, sec. 6.9). When the basis is full it is
compressed to chosen Ritz vectors (thick restart, Wu & Simon, 2000). Basis and recurrence are
float64 by default, whatever the precision of the products.

The space does not multiply: `next` gives the vector to multiply, `take` takes the product. V and R
are on the device and T, E on the host, where the coefficients arrive at every `reads`-th product:
nothing waits for the device in between.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from landscape.linalg.gram_schmidt import CHUNK, inner, length, orthogonalise
from landscape.linalg.operators import VectorSpace, not_finite

BEYOND_DOUBT = 1e60
"""Entry of M at which an eigenvector is seen whatever its g."""


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs from a Krylov space, ascending.

    Attributes:
        values: Ritz values, shape `(m,)`.
        residuals: Norms ‖A y − θ y‖ of the unit Ritz vectors, shape `(m,)`.
        coordinates: Ritz vectors in the basis, one per column, shape `(m, m)`.
    """

    values: np.ndarray
    residuals: np.ndarray
    coordinates: np.ndarray


class KrylovSpace:
    """Orthonormal basis, projection and residual directions of a growing Krylov space.

    Attributes:
        dim: Number of entries of a vector.
        capacity: Largest number of basis vectors.
        size: Number of basis vectors.
        marks: Points μ at which `visibility` is known, shape `(marks,)`.
        asymmetry: Largest measured |uᵀA v − vᵀA u| over basis vectors: rounding of the products.
    """

    def __init__(
        self,
        vectors: VectorSpace,
        capacity: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        reads: int = 1,
    ) -> None:
        """Start empty.

        Args:
            vectors: What the vectors of the symmetric operator are like.
            capacity: Largest number of basis vectors; memory is `capacity × dim` numbers.
            dtype: Precision of the basis and the recurrence.
            device: Device of the basis; that of the vectors by default.
            reads: Number of products after which the coefficients are read from the device; with 1
                a second pass of Gram-Schmidt is left out where it is not needed.
        """
        self.dim = vectors.dim
        self.capacity = capacity = min(capacity, self.dim)
        self._dtype = vectors.dtype
        self._rounding = 10 * torch.finfo(vectors.dtype).eps
        self._reads = reads
        self._basis = torch.empty(capacity, self.dim, dtype=dtype, device=device or vectors.device)
        self._projection = np.zeros((capacity, capacity))
        self._frontier: list[Tensor] = []
        self._coupling = np.zeros((capacity, 0))  # E
        self._starts = np.zeros((capacity, 0))  # coordinates of the start vectors in V ...
        self._pending = np.zeros((0, 0))  # ... and in R: (chains, start vectors)
        self._alive: list[bool] = []
        self._history: list[tuple[int | None, np.ndarray]] = []  # starts and steps since a restart
        self.marks = np.zeros(0)  # μ
        self._rows = np.zeros(0)  # μ of each row: the marks once for each start vector
        self._marked = np.zeros((0, capacity))  # z for g = (0, …, 1, …, 0), one per row ...
        self._marked_frontier = np.zeros((0, 0))  # ... and w: (rows, chains)
        self.size = 0
        self.asymmetry = 0.0
        self._unread: list[_Step] = []
        self._fresh: int | None = None  # chain whose direction was made orthogonal last

    @property
    def full(self) -> bool:
        """Whether the basis has reached its capacity."""
        return self.size == self.capacity

    @property
    def scale(self) -> float:
        """Largest entry of T, about ‖A‖ after a few products."""
        return float(np.abs(self._projection[: self.size, : self.size]).max(initial=0.0))

    @property
    def alive(self) -> list[int]:
        """Chains that can still grow."""
        return [chain for chain, alive in enumerate(self._alive) if alive]

    @property
    def behind(self) -> bool:
        """Whether there are products whose coefficients have not been read."""
        return bool(self._unread)

    @property
    def num_starts(self) -> int:
        """Number of chains that were opened."""
        return len(self._alive)

    def start(self, vector: Tensor) -> int:
        """Open a chain from a start vector, and return its number.

        Args:
            vector: Shape `(dim,)`; normalised here, and orthogonalised against the basis.
        """
        self.read()
        v = vector.to(self._basis)
        v = v / length(v)
        v, coordinates = orthogonalise(v, self._basis[: self.size])
        chains, starts = self._pending.shape
        self._frontier.append(v)
        self._alive.append(bool(length(v) > _NEGLIGIBLE))
        self._coupling = np.pad(self._coupling, ((0, 0), (0, 1)))
        self._starts = np.pad(self._starts, ((0, 0), (0, 1)))
        self._starts[: self.size, starts] = coordinates.double().cpu().numpy()
        self._pending = np.pad(self._pending, ((0, 1), (0, 1)))
        self._pending[chains, starts] = 1.0
        self._history.append((None, self._starts[: self.size, starts].copy()))
        self.watch(self.marks)
        return chains

    def watch(self, marks: np.ndarray) -> None:
        """Follow what the space would see of an eigenvector with eigenvalue μ.

        Args:
            marks: Points μ, shape `(marks,)`; earlier ones are forgotten.
        """
        self.read()
        # A restart has forgotten what earlier start vectors have to do with the space.
        chains = len(self._frontier)
        known = sum(chain is None for chain, _ in self._history)
        self.marks, self._rows = marks, np.tile(marks, known)
        self._marked = np.zeros((len(self._rows), self.capacity))
        self._marked_frontier = np.zeros((len(self._rows), chains - known))
        row, opened = self.size - sum(chain is not None for chain, _ in self._history), 0
        for chain, numbers in self._history:
            if chain is None:
                own = np.repeat(np.arange(known) == opened, len(marks))
                column = own - self._marked[:, : len(numbers)] @ numbers
                self._marked_frontier = np.column_stack([self._marked_frontier, column])
                opened += 1
            else:
                self._follow(chain, row, numbers)
                row += 1

    def _follow(self, chain: int, row: int, share: np.ndarray) -> None:
        """Enter one product into z and w."""
        if not len(self._rows):
            return
        value = self._marked_frontier[:, chain] / share[chain]
        self._marked_frontier -= np.outer(value, share)
        self._marked[:, row] = value
        seen = self._marked[:, : row + 1] @ self._projection[: row + 1, row]
        self._marked_frontier[:, chain] = self._rows * value - seen
        size = np.abs(self._marked_frontier).max(1, initial=0.0)
        if (size > _OVERFLOWS).any():
            # Seen beyond doubt: a smaller row says less, and is still beyond doubt.
            smaller = np.where(size > _OVERFLOWS, _SMALLER, 1.0)[:, None]
            self._marked *= smaller
            self._marked_frontier *= smaller

    def visibility(self) -> np.ndarray:
        """Return M at every mark, shape `(marks, c, c)`, for start vectors since a restart.

        Entries above `BEYOND_DOUBT` may be too small, with what is in their rows and columns.
        """
        self.read()
        chains = len(self._rows) // len(self.marks)
        gram = self._gram()
        inverse = np.linalg.pinv(gram, rcond=1e-12, hermitian=True)
        # Of a chain that has ended nothing is left but rounding: what lies along that is seen.
        ended = gram.diagonal() == 0
        inverse[ended, ended] = 1 / max((self._rounding * self.scale) ** 2, _TINY)
        z = self._marked[:, : self.size].reshape(chains, len(self.marks), -1)
        w = self._marked_frontier.reshape(chains, len(self.marks), -1)
        squares: np.ndarray = np.einsum("cai,dai->acd", z, z)
        squares += np.einsum("cai,ij,daj->acd", w, inverse, w)
        return squares

    def stop(self, chain: int) -> None:
        """Let a chain grow no further; its residual direction stays known."""
        self.read()
        self._alive[chain] = False

    def resume(self) -> None:
        """Let every stopped chain that has not ended grow again."""
        self._alive = [bool(frontier.any()) for frontier in self._frontier]

    def next(self, chain: int) -> Tensor:
        """Extend the basis by a chain's direction, and return it: the vector to multiply.

        Args:
            chain: Number of a chain in `alive`; `full` must be false.
        """
        r = self._frontier[chain]
        m = self.size
        norm = length(r)
        tiny = torch.finfo(r.dtype).tiny  # of a chain that has ended unread, nothing is left
        q: Tensor = torch.div(r, norm.clamp_min(tiny), out=self._basis[m])
        if chain != self._fresh or (self._reads == 1 and self._is_small(norm)):
            # What rounding left of the basis has grown with the steps since, or with 1 / norm,
            # which two passes of Gram-Schmidt allow for.
            rest, _ = orthogonalise(q, self._basis[:m], self._reads > 1)
            torch.div(rest, length(rest).clamp_min(tiny), out=q)
        # Move the component along q from the frontier (R) to the basis (V).
        shares = [norm if other == chain else inner(f, q) for other, f in enumerate(self._frontier)]
        for other, frontier in enumerate(self._frontier):
            if other != chain:
                frontier.addcmul_(q, shares[other], value=-1)
        self._unread.append(_Step(chain, m, torch.stack(shares)))
        return q

    def take(self, product: Tensor) -> None:
        """Take the product of the operator with the vector that `next` returned last.

        Args:
            product: Shape `(dim,)`.
        """
        step = self._unread[-1]
        self.size = m = step.row + 1
        spent = self._frontier[step.chain]  # its direction is in the basis: memory to write to
        w, column = orthogonalise(product.to(self._basis), self._basis[:m], self._reads > 1, spent)
        step.coefficients = torch.cat([step.shares, column, length(w)[None]])
        self._frontier[step.chain] = w
        self._fresh = step.chain
        if len(self._unread) >= self._reads or self.full or len(self.alive) > 1:
            self.read()

    def read(self) -> None:
        """Wait for the device, and take in the coefficients of all products so far."""
        steps, self._unread = self._unread, []
        if not steps:
            return
        numbers = torch.cat([step.coefficients for step in steps]).double().cpu().numpy()
        if not np.isfinite(numbers).all():
            raise not_finite(self._dtype)
        for index, step in enumerate(steps):
            part, numbers = np.split(numbers, [len(step.coefficients)])
            self._note(step, *np.split(part, [len(step.shares), len(part) - 1]))
            if not self._alive[step.chain]:
                self._forget(steps[index + 1 :])
                return

    def _note(self, step: "_Step", share: np.ndarray, column: np.ndarray, norm: np.ndarray) -> None:
        """Enter one product into T and E."""
        chain, m = step.chain, step.row
        row = self._coupling[:m] @ share
        self._projection[m, :m] = row
        self._starts[m] = share @ self._pending
        self._coupling[:, chain] = 0.0
        self._pending[chain] = 0.0
        self._projection[: m + 1, m] = column
        if m:
            self.asymmetry = max(self.asymmetry, float(np.abs(column[:m] - row).max()))
        self._history.append((chain, share))
        self._follow(chain, m, share)
        self._coupling[m, chain] = 1.0
        scale = np.abs(self._projection[: m + 1, : m + 1]).max()
        ended = [] if norm[0] > self._rounding * max(scale, norm[0]) else [chain]
        if m + 1 == self.dim:
            ended = list(range(len(self._alive)))
        for other in ended:  # the space is invariant under A: there is nothing more to find
            self._frontier[other] = torch.zeros_like(self._frontier[other])
            self._alive[other] = False

    def _forget(self, steps: "list[_Step]") -> None:
        """Undo steps of a chain that had nothing more to find."""
        for step in reversed(steps):
            self.size = step.row
            for other, frontier in enumerate(self._frontier):
                if other != step.chain:
                    frontier.addcmul_(self._basis[step.row], step.shares[other])

    def _is_small(self, norm: Tensor) -> bool:
        """Whether a direction is so short beside A that rounding shows in it."""
        return bool(norm < _CANCELLED * self.scale)

    def ritz(self, rounding: bool = True) -> RitzPairs:
        """Return the Ritz pairs of the whole space, ascending.

        Args:
            rounding: Count the rounding of the products, `asymmetry`, into the residuals.
        """
        self.read()
        m = self.size
        projection = self._projection[:m, :m]
        values, coordinates = np.linalg.eigh((projection + projection.T) / 2)
        tails = self._coupling[:m].T @ coordinates
        squares = np.einsum("im,ij,jm->m", tails, self._gram(), tails)
        residuals = np.sqrt(np.maximum(squares, 0.0) + (self.asymmetry**2 if rounding else 0.0))
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
        self._history = []
        small = ritz.coordinates[:, keep]
        rotation = torch.from_numpy(np.ascontiguousarray(small.T)).to(self._basis)
        for columns in torch.split(self._basis, CHUNK, dim=1):  # slices: in place
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
        r, count = self._frontier, len(self._frontier)
        upper = np.triu_indices(count)
        products = [
            length(r[i]).double().square() if i == j else inner(r[i], r[j]).double()
            for i, j in zip(*upper, strict=True)
        ]
        gram = np.zeros((count, count))
        gram[upper] = torch.stack(products).cpu().numpy()
        gram.T[upper] = gram[upper]
        return gram


@dataclass
class _Step:
    """A product whose coefficients are still on the device.

    Attributes:
        chain: Number of its chain.
        row: Number of its basis vector q.
        shares: Components of the residual directions along q, shape `(chains,)`.
        coefficients: `shares`, components of the product along the basis, norm of the rest.
    """

    chain: int
    row: int
    shares: Tensor
    coefficients: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))


_TINY = 1e-200
_CANCELLED = 1e-3  # of the scale of A
_NEGLIGIBLE = 1e-10  # of a unit start vector: it lies in the space already
_OVERFLOWS = 1e100  # its square is a number, and so is what a product makes of it
_SMALLER = 1e-60  # what is left, 1e40, has a square that is still beyond doubt
