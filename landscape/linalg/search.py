"""The search for extreme eigenpairs in one growing Krylov space."""

from collections.abc import Callable, Generator, Iterator
from math import sqrt

import numpy as np
import torch

from landscape._checks import (
    check_choice,
    check_count,
    check_device,
    check_positive,
    check_type,
)
from landscape.linalg.certificate import OWN, chances, check_certify, watched
from landscape.linalg.differences import GradientDifferences
from landscape.linalg.eigenpairs import Eigenpairs, error_estimates, rank, select
from landscape.linalg.gram_schmidt import are_long, inner_products, length
from landscape.linalg.krylov import KrylovSpace, RitzPairs
from landscape.linalg.operators import VectorSpace, generator_on, to_array

Products = Generator[torch.Tensor, torch.Tensor, None]
"""Yields each vector whose product is wanted, and is sent the product."""

BASIS_BYTES = 4 << 30
SINGLE_TOL = 1e-4
"""Tolerance from which a basis in float32 does as well, a heuristic: it shows at 1e-6 of ‖A‖."""
FEWEST = 8
"""Products that a certificate may take at least, a heuristic: few pairs are told apart too soon."""
SKEWED = 0.01
"""Asymmetry over ‖A‖ from which products are no use, a heuristic: differences of gradients of a
smooth network have 3e-4 to 2e-3, over kinks 0.1 and more."""
REFINEMENTS = 2
"""Times that a check may widen the space of the vectors that it has found."""
DEPENDENT = 1e-4
"""Eigenvalue of a matrix of cosines up to which vectors are dependent, a heuristic."""
ROUGH_TOL = 5e-4
"""Tolerance from which a rough search pays, a heuristic: errors of 1e-3 of ‖A‖ must do."""
READS = 2
"""Products on a GPU between two looks at convergence, a heuristic: a look waits for the device."""


class EigenSearch:
    """One growing Krylov space and the sets of extreme pairs that are wanted of it.

    Rough products, which are only about right, make the residuals of the space those of another
    operator. `check` then takes one accurate product a pair, and gives the Ritz pairs of the space
    of these vectors: their residuals are true, and their errors of the order of the vectors'
    squared errors.

    Attributes:
        space: The Krylov space.
        basis_at_restart: Ritz pairs and start weights just before the first restart, if any.
        num_matvecs: Products spent.
        miss: Bound on the probability that a wanted value is missing.
    """

    def __init__(
        self,
        vectors: VectorSpace,
        wanted: dict[str, tuple[int, str]],
        *,
        tol: float,
        max_iter: int,
        max_basis: int | None,
        generator: torch.Generator,
        basis_dtype: torch.dtype | None = None,
        basis_device: torch.device | str | None = None,
        reads: int | None = None,
        rough: bool = False,
        spent: int = 0,
    ) -> None:
        """Set out the search.

        Args:
            vectors: What the vectors of the symmetric operator are like; the operator itself is.
            wanted: Name to (number of pairs, which end).
            tol: Relative tolerance.
            max_iter: Largest number of products.
            max_basis: Largest number of basis vectors, or `None` for what fits 4 GiB, but at least
                twice the wanted pairs and 10.
            generator: Source of the random start vectors.
            basis_dtype: Precision of the basis, float64 or float32, or `None` for what `tol` wants
                and what fits.
            basis_device: Device of the basis, or `None` for the operator's.
            reads: Number of products between two looks at convergence; 1 on a CPU by default, and
                `READS` on a GPU.
            rough: The products are rough, and `check` will follow: their rounding does not hold
                the stop, and it has its products of `max_iter`.
            spent: Products that were made before, of `max_iter`.

        Raises:
            ValueError: If an argument is out of range.
        """
        for k, _ in wanted.values():
            check_count("k", k, 1)
            if k > vectors.dim:
                raise ValueError(
                    f"`k` must be at most the dimension {vectors.dim}, got {k}; lower `k`."
                )
        total = sum(k for k, _ in wanted.values())
        check_count("max_iter", max_iter, min(total, vectors.dim) + total * rough)
        check_positive("tol", tol)
        check_basis(max_basis, basis_dtype, basis_device)
        long = are_long(vectors.dim, vectors.dtype, vectors.device)
        if basis_dtype is None and long and tol >= SINGLE_TOL:
            basis_dtype = torch.float32
        capacity, dtype = _basis_size(
            vectors.dim, max(max_iter, total + 2), 2 * total + 10, max_basis, basis_dtype
        )
        if capacity < min(total + 2, vectors.dim):
            raise ValueError(
                f"`max_basis` must be at least {total + 2} for {total} pairs, got {capacity}."
            )
        if reads is None:
            reads = 1 if vectors.device.type == "cpu" else READS
        self.space = KrylovSpace(vectors, capacity, dtype, basis_device, reads)
        self._vectors = vectors
        self.basis_at_restart: tuple[RitzPairs, np.ndarray] | None = None
        self._wanted = {name: (int(k), which) for name, (k, which) in wanted.items()}
        self._tol = float(tol)  # plain, whatever kind of number
        self._max_iter = max_iter
        self._limit = max_iter - total * rough  # of the search: the rest is for the check
        self._generator = generator
        self._rough = rough
        self._checked: dict[str, tuple[np.ndarray, np.ndarray, torch.Tensor]] = {}
        self._own = False  # whether the first start vector was given
        self.num_matvecs, self._spent = spent, spent
        self.miss = 1.0

    def run(
        self,
        matvec: Callable[[torch.Tensor], torch.Tensor],
        *,
        starts: int,
        certify: bool | float,
        min_iter: int = 0,
        first: torch.Tensor | np.ndarray | None = None,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        """Grow the space until every wanted pair has converged, or `max_iter` products are spent.

        Args:
            matvec: `matvec(v) -> A v`, both of shape `(dim,)`.
            starts: Number of random start vectors (chains) grown together.
            certify: Look for multiple and missed eigenvalues afterwards; a number is the
                probability of a miss to admit.
            min_iter: Fewest products.
            first: Start vector, or vectors whose sum is taken, instead of the first random one.
            tick: Called after each product.

        Raises:
            ValueError: If `certify` is a number outside (0, 1), `first` is no direction, or a
                product is not finite.
        """
        if first is not None:
            first = start_vector(first, self.space.dim)
        steps = self.steps(starts=starts, certify=certify, min_iter=min_iter, first=first)
        for _ in multiply(steps, matvec):
            tick()

    def steps(
        self,
        *,
        starts: int,
        certify: bool | float,
        min_iter: int = 0,
        first: torch.Tensor | None,
    ) -> Products:
        """Search as `run` does, with products from outside; `first` is what `start_vector` returns.

        Raises:
            ValueError: If `certify` is a number outside (0, 1), or a product is not finite.
        """
        admitted = check_certify(certify)
        space = self.space
        if first is not None:
            space.start(self._mixed(first) if admitted else first)
            self._own = True
        while len(space.alive) < starts:
            space.start(self._random())
        found = known = None
        target = min_iter  # number of products before the next look at convergence
        while self.num_matvecs < self._limit:
            if not space.alive:
                if space.size == space.dim:
                    break
                space.start(self._random())
            if space.full and space.size < space.dim:
                self._restart(starts)
            space.take((yield space.next(space.alive[self.num_matvecs % len(space.alive)])))
            self.num_matvecs += 1
            if space.behind and self.num_matvecs < self._limit:
                continue
            self._ritz = space.ritz(rounding=not self._rough)
            if found is None and self._all_within(0.1):
                found = max(self.num_matvecs - self._spent, 2)
            waiting = bool(space.alive) and self.num_matvecs < target
            if known is not None:
                # Stopped as soon as it is low enough, so the level is all that can be claimed.
                self.miss = max(self._bound_of_a_miss(), admitted)
                waiting = waiting and self.miss > admitted
            if waiting:
                continue
            if not self._all_within(self._tol):
                space.resume()
                continue
            values = self._wanted_values()
            if not admitted or space.size == space.dim or self._agree(values, known):
                break
            # First convergence, or the last chain found something: look once more.
            known = values
            for chain in space.alive:
                space.stop(chain)
            space.start(self._random())
            space.watch(self._marks())
            self.miss = 1.0
            # A start vector from the user may tell the pairs apart at once; that says nothing here.
            fewest = max(FEWEST, 2 * len(values)) if self._own else FEWEST
            target = self.num_matvecs + max(found or 0, fewest)
        if space.size == space.dim:
            self.miss = 0.0  # nothing lies outside

    def check(self, refine: bool = False) -> Products:
        """Find the residuals of all wanted pairs, and better values, from accurate products.

        Args:
            refine: Take residuals of pairs that have not converged into the space of their vectors,
                at one more product each, up to `REFINEMENTS` times.
        """
        for name, (k, which) in self._wanted.items():
            new = self.space.vectors(self._coordinates(name))
            rows = images = new[:0]
            for _ in range(1 + REFINEMENTS * refine):
                rows, products = torch.cat([rows, new]), []
                for row in new:
                    products.append((yield row).to(new))
                    self.num_matvecs += 1
                images = torch.cat([images, torch.stack(products)])
                values, small = _projected(rows, images, k, which)
                found = small @ rows
                rest = (small @ images).addcmul_(torch.from_numpy(-values).to(rows)[:, None], found)
                residuals = np.array([float(length(row)) for row in rest])
                self._checked[name] = values, residuals, found
                off = np.flatnonzero(~self.pairs(name).converged)
                if not len(off) or self.num_matvecs + len(off) > self._max_iter:
                    break
                new = rest[off] / torch.from_numpy(residuals[off]).to(rows)[:, None]

    @property
    def converged(self) -> bool:
        """Whether every wanted pair has, as `check` has found them if it was called."""
        return all(self.pairs(name).converged.all() for name in self._wanted)

    @property
    def can_go_on(self) -> bool:
        """Whether another search may take the products that this one has left."""
        return self._max_iter - self.num_matvecs >= sum(k for k, _ in self._wanted.values())

    def pairs(self, name: str, vectors: bool = False) -> Eigenpairs:
        """Return one wanted set, as `check` has found it if it was called.

        Args:
            name: Its name.
            vectors: Return the eigenvectors too.
        """
        k, which = self._wanted[name]
        ritz, chosen = self._ritz, select(self._ritz.values, k, which)
        if name in self._checked:
            better, true, rows = self._checked[name]
            ritz = RitzPairs(ritz.values.copy(), ritz.residuals.copy(), ritz.coordinates)
            ritz.values[chosen], ritz.residuals[chosen] = better, true
        values, residuals = ritz.values[chosen], ritz.residuals[chosen]
        estimates = error_estimates(ritz)[chosen]
        converged = estimates <= self._tolerances(values, self._tol)
        errors = np.maximum(estimates, 0.0 if self._rough else self.space.asymmetry)
        found = None
        if vectors:
            if name not in self._checked:
                rows = self.space.vectors(self._coordinates(name))
            found = to_array(rows, self._vectors.dtype)
        return Eigenpairs(
            values, residuals, errors, converged, which, self.num_matvecs, found, self.miss
        )

    def direction(self) -> torch.Tensor:
        """Return the sum of all wanted vectors, to start from on an operator near this one."""
        total = sum(self._coordinates(name).sum(1, keepdims=True) for name in self._wanted)
        return self.space.vectors(total)[0]

    def snapshot(self, starts: int) -> tuple[RitzPairs, np.ndarray] | None:
        """Return Ritz pairs and quadrature weights of the first random start vectors.

        Taken before the first restart, which forgets part of the Krylov space. After a start vector
        from the user the only random one is that of the certificate; `None` where it is missing.
        """
        if self._own:
            if self.basis_at_restart is not None or self.space.num_starts < 2:
                return None
            return self._ritz, self.space.start_weights(self._ritz, 1, first=1)
        if self.basis_at_restart is not None:
            return self.basis_at_restart
        return self._ritz, self.space.start_weights(self._ritz, starts)

    def remedy(self) -> str:
        """Return what to do about pairs that have not converged."""
        off = self.space.asymmetry
        if off > self._tol * float(np.abs(self._ritz.values).max()) and not self._rough:
            return (
                "the products are not those of a symmetric matrix (uᵀAv and vᵀAu differ by "
                f"{off:.2g}), as where a function of the model has a wrong second derivative"
            )
        return "raise `max_iter`"

    def _coordinates(self, name: str) -> np.ndarray:
        """Return a wanted set's vectors in the basis, one per column."""
        k, which = self._wanted[name]
        return self._ritz.coordinates[:, select(self._ritz.values, k, which)]

    def _mixed(self, v: torch.Tensor) -> torch.Tensor:
        """Return a vector from the user with a random one added, so that it may see everything."""
        random = self._random()
        mixed: torch.Tensor = sqrt(1 - OWN) * v.to(random) / v.norm() + sqrt(OWN) * random
        return mixed if mixed.any() else random  # in one dimension they may cancel

    def _random(self) -> torch.Tensor:
        return random_unit_vector(self._vectors, self._generator)

    def _restart(self, starts: int) -> None:
        space = self.space
        ritz = space.ritz(rounding=not self._rough)
        if self.basis_at_restart is None:
            self.basis_at_restart = (ritz, space.start_weights(ritz, starts))
        total = sum(k for k, _ in self._wanted.values())
        extra = max((space.capacity - total) // 2, 1)
        keep: set[int] = set()
        for k, which in self._wanted.values():
            keep.update(select(ritz.values, k + extra // len(self._wanted), which).tolist())
        space.compress(ritz, np.array(sorted(keep)))

    def _tolerances(self, values: np.ndarray, tol: float) -> np.ndarray:
        # Below the rounding of the products nothing can be told: relative to ‖A‖, no absolute ε.
        eps = torch.finfo(self._vectors.dtype).eps
        floor = 10 * eps * np.abs(self._ritz.values).max(initial=0.0)
        if not self._rough:
            # Zeros of a low-rank matrix have no more digits than this; what is no symmetric matrix
            # at all must not pass.
            floor = max(floor, min(2 * self.space.asymmetry, 100 * floor))
        bounds: np.ndarray = np.maximum(tol * np.abs(values), floor)
        return bounds

    def _all_within(self, tol: float) -> bool:
        """Whether every wanted pair has converged, and no other could still displace one."""
        values, errors = self._ritz.values, error_estimates(self._ritz)
        within = errors <= self._tolerances(values, tol)
        for k, which in self._wanted.values():
            chosen = select(values, k, which)
            if len(chosen) < k or not within[chosen].all():
                return False
            reach = rank(values, which) + errors
            reach[chosen] = -np.inf
            if (~within & (reach > rank(values[chosen], which).min())).any():
                return False
        return True

    def _marks(self) -> np.ndarray:
        """Return where the space is watched."""
        values = self._wanted_values()
        mirrored = any(which == "LM" for _, which in self._wanted.values())
        return watched(values, 2 * self._tolerances(values, self._tol), mirrored)

    def _bound_of_a_miss(self) -> float:
        """Return the probability with which the last chain has missed what it was to find."""
        space, copies = self.space, sum(k for k, _ in self._wanted.values())
        matrices = space.visibility()
        own = self._own and matrices.shape[1] == space.num_starts
        bounds = chances(matrices, copies, space.dim, own)
        worst = 0.0
        for k, which in self._wanted.values():
            last = self._ritz.values[select(self._ritz.values, k, which)][-1:]
            beyond = rank(last, which) + 2 * self._tolerances(last, self._tol)
            reached = bounds[rank(space.marks, which) > beyond]
            worst = max(worst, float(reached.max(initial=0.0)))
        return worst

    def _agree(self, values: np.ndarray, known: np.ndarray | None) -> bool:
        """Whether the wanted values are those that were known before."""
        if known is None:
            return False
        larger = np.maximum(np.abs(values), np.abs(known))
        return bool(np.all(np.abs(values - known) <= 2 * self._tolerances(larger, self._tol)))

    def _wanted_values(self) -> np.ndarray:
        chosen = [select(self._ritz.values, k, which) for k, which in self._wanted.values()]
        values: np.ndarray = self._ritz.values[np.concatenate(chosen)]
        return values


def _projected(
    rows: torch.Tensor, images: torch.Tensor, k: int, which: str
) -> tuple[np.ndarray, torch.Tensor]:
    """Return `k` Ritz values of the space of some rows, and coordinates `(k, m)` of their vectors.

    Args:
        rows: Vectors of length 1, shape `(m, dim)`; almost dependent ones count once.
        images: Their products.
        k: Number of pairs.
        which: Which end.
    """
    lengths, axes = np.linalg.eigh(inner_products(rows, rows).cpu().numpy())
    independent = lengths > DEPENDENT
    axes = axes[:, independent] / np.sqrt(lengths[independent])
    projection = axes.T @ inner_products(rows, images).cpu().numpy() @ axes
    values, rotation = np.linalg.eigh((projection + projection.T) / 2)
    order = select(values, k, which)
    small = np.ascontiguousarray((axes @ rotation[:, order]).T)
    return values[order], torch.from_numpy(small).to(rows)


def may_be_rough(tol: float, max_iter: int, k: int) -> bool:
    """Whether a search for `k` pairs can go by rough products, and has the budget to check them."""
    return tol >= ROUGH_TOL and max_iter > 3 * k


def search_roughly(
    make: Callable[..., EigenSearch],
    rough: GradientDifferences,
    matvec: Callable[[torch.Tensor], torch.Tensor],
    *,
    certify: bool | float,
    first: torch.Tensor | None,
) -> Generator[None, None, EigenSearch]:
    """Search with rough products, and check what is found, or search with accurate ones after all.

    Pauses after each product.

    Args:
        make: `make(rough=…, spent=…)` makes the search.
        rough: Rough products.
        matvec: Accurate ones.
        certify: As in `EigenSearch.run`.
        first: Start vector of shape `(dim,)`, if any.

    Returns:
        The search that found the pairs.
    """
    search = make(rough=True)
    spent = 0
    for _ in multiply(search.steps(starts=1, certify=certify, first=first), rough.matvec):
        spent += 1
        yield
        if search.space.size > 2:  # it knows the scale of A
            rough.scale = search.space.scale
            if search.space.asymmetry > SKEWED * rough.scale:
                break
    else:
        yield from multiply(search.check(refine=True), matvec)
        if search.converged or not search.can_go_on:
            return search
        first, spent = search.direction(), search.num_matvecs
    again = make(rough=False, spent=spent)
    yield from multiply(again.steps(starts=1, certify=certify, first=first), matvec)
    return again


def check_basis(
    max_basis: int | None,
    basis_dtype: torch.dtype | None,
    basis_device: torch.device | str | None,
) -> None:
    """Refuse a basis of vectors that cannot be made, whatever the operator."""
    if max_basis is not None:
        check_count("max_basis", max_basis, 1)
    check_choice("basis_dtype", basis_dtype, (None, torch.float64, torch.float32))
    if basis_device is not None:
        check_device("basis_device", basis_device)


def start_vector(start: torch.Tensor | np.ndarray, dim: int) -> torch.Tensor:
    """Return the vector to start from: the sum of those given.

    Args:
        start: Shape `(dim,)` or `(m, dim)`.
        dim: Number of parameters.

    Raises:
        ValueError: If it has another shape, or its sum is zero or not finite.
        TypeError: If it is no tensor or array.
    """
    check_type("start", start, torch.Tensor | np.ndarray, "vectors in a tensor or an array")
    start = start if isinstance(start, torch.Tensor) else torch.from_numpy(start)
    if start.dim() not in (1, 2) or start.shape[-1] != dim or not len(start):
        raise ValueError(
            f"`start` must have shape ({dim},) or (m, {dim}), got {tuple(start.shape)}."
        )
    total = start if start.is_floating_point() else start.double()
    total = total.sum(0) if start.dim() == 2 else total
    if not total.isfinite().all():
        raise ValueError("`start` must be finite, got NaN or infinity.")
    if not total.any():
        raise ValueError("`start` must not be zero, nor vectors whose sum is.")
    return total


def multiply(products: Products, matvec: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Make the products that are asked for, and pause after each, before it is taken in.

    Args:
        products: Yields the vectors, and is sent the products.
        matvec: `matvec(v) -> A v`.
    """
    try:
        v = next(products)
        while True:
            product = matvec(v)
            yield
            v = products.send(product)
    except StopIteration:
        return


def finish(work: Generator[None, None, EigenSearch], tick: Callable[[], object]) -> EigenSearch:
    """Return the search that pauses after each product, when it is done.

    Args:
        work: As `search_roughly` makes it.
        tick: Called at each pause.
    """
    while True:
        try:
            next(work)
        except StopIteration as done:
            search: EigenSearch = done.value
            return search
        tick()


def random_unit_vector(vectors: VectorSpace, generator: torch.Generator) -> torch.Tensor:
    """Return a vector drawn uniformly from the unit sphere, on the device of the others."""
    generator = generator_on(vectors.device, generator)
    dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    v = torch.randn(vectors.dim, generator=generator, device=generator.device, dtype=dtype)
    v /= v.norm()
    return v.to(vectors.device, torch.float64)


def _basis_size(
    dim: int, max_iter: int, fewest: int, max_basis: int | None, dtype: torch.dtype | None
) -> tuple[int, torch.dtype]:
    """Return the number of basis vectors and their precision: float64 where all products fit.

    Of very long vectors `fewest` are kept, whatever memory that takes: with fewer a search would
    restart all the time.
    """
    needed = min(max_iter, dim)
    if dtype is None:
        fits = max_basis is not None or BASIS_BYTES // (8 * dim) >= needed
        dtype = torch.float64 if fits else torch.float32
    if max_basis is not None:
        return min(max_basis, dim), dtype
    room = BASIS_BYTES // (dtype.itemsize * dim) - 8  # work vectors
    return min(needed, max(room, fewest)), dtype
