"""Top Hessian eigenvalues of every mini-batch (Park & Kim, 2022, Fig. 1c), with NEP and APE.

The Hessian is that of the objective on frozen data, loss and weight decay, in evaluation mode.
Leaving out the weight decay or the augmentation is a common mistake (Park & Kim, 2022, sec. 2).
"""

import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from landscape._checks import check_count
from landscape._progress import progress_bar
from landscape.batches import PreparedBatch
from landscape.linalg.eigenpairs import Eigenpairs, warn_unconverged
from landscape.linalg.gradient import Precision, check_precision
from landscape.linalg.hessian import HessianOperator, Memory, check_finite_losses
from landscape.linalg.mini_batches import MiniBatchHessian
from landscape.linalg.search import EigenSearch, multiply, start_vector
from landscape.memory import free_memory
from landscape.objective import FrozenObjective, Objective, check_objective
from landscape.probes.hessian import (
    Engine,
    HessianSpectrum,
    check_arguments,
    check_native,
    remedy,
    start_vectors,
)
from landscape.provenance import provenance
from landscape.results import Provenance, Result

Work = Iterator[None]
"""Pauses while the device works on what it has started."""

Item = tuple[int, PreparedBatch]
"""Number and data of a mini-batch."""

BASIS = 32
"""Basis vectors a mini-batch besides the wanted where several are solved side by side, a heuristic:
15 to 35 products are made as a rule, and beyond it the search restarts."""

MAX_GROUP = 8
"""Most mini-batches side by side by default: with 8 a GPU (H200) makes 1.3 to 3.2 times as many
products a second as with one, and of 4 to 8 it gains nothing (ViT-Ti) to a third (ResNet-20)."""

FEWEST = 4
"""Mini-batches that each place should have by default, a heuristic: to record them takes the time
of 10 to 20 products."""

_NAP = 1e-4  # seconds between two looks whether a product is made


@dataclass(frozen=True)
class HessianMaxSpectrum(Result):
    """Top eigenvalues of the Hessian of every mini-batch (Park & Kim, 2022, Fig. 1c).

    Attributes:
        eigenvalues: By magnitude, largest first, shape `(batches, k)`.
        residuals: ‖Hv − λv‖ of each, shape `(batches, k)`.
        converged: Whether each error estimate is at most `tol` · |λ|, shape `(batches, k)`.
        nep: Negative max eigenvalue proportion, ∫_{-∞}^0 p(λ)dλ, over all eigenvalues gathered.
        nep_interval: 95 % bootstrap interval of `nep` over mini-batches, (low, high); for fewer
            than ten it is a rough one, for a single one NaN.
            An eigenvalue within its error, or within rounding, of 0 counts as neither negative nor
            positive: those of a rank below `k`.
        ape: Average of the positive max eigenvalues, ∫_0^∞ λp(λ)dλ / ∫_0^∞ p(λ)dλ; NaN if none.
        ape_interval: That of `ape`.
        num_hvps: Mini-batch Hessian-vector products in all.
        provenance: Where it came from.
        errors: Estimates of the eigenvalues' errors (`Eigenpairs`), shape `(batches, k)`.
        miss: Bound on the probability that a value of a mini-batch is missing (`Eigenpairs`), shape
            `(batches,)`.
    """

    eigenvalues: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    nep: float
    nep_interval: tuple[float, float]
    ape: float
    ape_interval: tuple[float, float]
    num_hvps: int
    provenance: Provenance
    errors: np.ndarray | None = None
    miss: np.ndarray | None = None

    _plot: ClassVar[str | None] = "hessian_max_spectrum"


def hessian_max_spectrum(
    model: nn.Module,
    data: Iterable[Any],
    *,
    objective: Objective = Objective(),
    k: int = 5,
    tol: float = 1e-3,
    max_iter: int = 100,
    certify: bool | float = True,
    num_bootstrap: int = 2000,
    start: HessianSpectrum | Eigenpairs | np.ndarray | torch.Tensor | None = None,
    memory: Memory = "auto",
    group: int | None = None,
    precision: Precision = "full",
    generator: torch.Generator | None = None,
    engine: Engine = "native",
    progress: bool = False,
) -> HessianMaxSpectrum:
    """Top-`k` Hessian eigenvalues of every mini-batch (Park & Kim, 2022, Fig. 1c).

    The paper gathers the five largest by magnitude of mini-batches of 16 samples, from a tenth of
    the training set, at the objective that was optimised (loss, weight decay, augmented data).

    Args:
        model: Any module; left as it was found.
        data: Re-iterable of mini-batches, each measured by itself.
        objective: Whose Hessian.
        k: Eigenvalues a mini-batch.
        tol: Relative error of the eigenvalues.
        max_iter: Largest number of products a mini-batch.
        certify: Look for multiple and missed eigenvalues; a number is the probability of a miss
            to admit (`top_eigenpairs`).
        num_bootstrap: Resamplings of mini-batches for the intervals.
        start: What was found before, with vectors, or vectors `(m, dim)`: the first mini-batch's
            Krylov space starts from their sum instead of a random vector. Every other one's starts
            from the sum of the eigenvectors found before it, which saves 1 or 2 products.
        memory: What may be kept of a mini-batch's graph between products on a CPU; a GPU keeps it.
        group: Mini-batches solved side by side (`landscape.linalg.mini_batches`); the next one
            starts from what the one before in its place found. By default 1 on a CPU, where that
            is fastest, and on a GPU as many as half of its free memory holds, up to 8.
        precision: `"tf32"` or `"bf16"` search with cheaper products on a GPU; `k` products in full
            precision a mini-batch then give the residuals (`hessian_spectrum`).
        generator: Source of the start vectors and resamplings; seed 0 by default.
        engine: `"pyhessian"` runs PyHessian on the same frozen objective, as a second opinion
            (`landscape.probes.pyhessian_engine` says what it can do).
        progress: Show a bar.

    Returns:
        Eigenvalues, NEP and APE with intervals. Cost: 15 to 35 products a mini-batch (18 to 46 in
        the figures of this repository).

    Raises:
        ValueError: If an argument is out of range, or the loss of a mini-batch is not finite.
        TypeError: If `data` is not a re-iterable of batches.
    """
    began = time.perf_counter()
    generator = check_arguments(k, engine, tol, certify, start, precision, generator)
    check_count("max_iter", max_iter, k if engine == "native" else 1)
    check_count("num_bootstrap", num_bootstrap, 1)
    if group is not None:
        check_count("group", group, 1)
    check_native(engine, group=group)
    first = start_vectors(start)
    seed = generator.initial_seed()
    check_objective(objective)
    frozen = objective.freeze(model, data, check_mean=False)
    check_precision(precision, frozen.space)
    first = first if first is None else start_vector(first, frozen.space.dim)
    if k > frozen.space.dim:
        raise ValueError(f"`k` must be at most the dimension {frozen.space.dim}, got {k}.")
    _check_finite(frozen)
    total = frozen.num_batches
    if frozen.num_left_out:
        warnings.warn(
            f"{frozen.num_left_out} mini-batches without a sample or label that counts are left "
            "out, so that rows of the result are not numbered as they are.",
            stacklevel=2,
        )
    settings: dict[str, Any] = {}
    with progress_bar("Hessian max spectrum", progress, total) as bar:
        if engine == "pyhessian":
            from landscape.probes import pyhessian_engine

            rows = []
            for batch in frozen.batches:
                operator = HessianOperator.of(frozen.of_batch(batch), memory=memory)
                rows.append(
                    pyhessian_engine.top_eigenpairs(
                        operator, k, tol=tol, max_iter=max_iter, generator=generator
                    )
                )
                bar.update()
        else:
            solver = _Solver(
                frozen, k, tol, max_iter, certify, memory, generator, group, first, precision
            )
            rows = solver.run(bar.update)
            settings = {"certify": certify, "kept_batches": solver.kept, "group": solver.size}
    eigenvalues = np.stack([row.values for row in rows])
    converged = np.stack([row.converged for row in rows])
    num_hvps = sum(row.num_matvecs for row in rows)
    if engine == "pyhessian":
        pyhessian_engine.warn_unconverged([converged], num_hvps, tol)
    else:
        warn_unconverged([converged], num_hvps, tol, remedy(precision))
    errors = np.stack([row.errors for row in rows])
    signed = _signed(eigenvalues, errors, torch.finfo(frozen.space.dtype).eps)
    nep_interval, ape_interval = _bootstrap(signed, num_bootstrap, generator)
    return HessianMaxSpectrum(
        eigenvalues=eigenvalues,
        residuals=np.stack([row.residuals for row in rows]),
        converged=converged,
        nep=_nep(signed),
        nep_interval=nep_interval,
        ape=_ape(signed),
        ape_interval=ape_interval,
        num_hvps=num_hvps,
        errors=errors,
        miss=np.array([row.miss for row in rows]),
        provenance=provenance(
            frozen,
            seed=seed,
            seconds=time.perf_counter() - began,
            num_hvps=num_hvps / total,
            settings={"k": k, "tol": tol, "engine": engine}
            | {"precision": precision, "num_batches": total}
            | settings,
        ),
    )


class _Solver:
    """Finds the top eigenpairs of mini-batches, several of them side by side.

    Attributes:
        size: Mini-batches solved side by side.
        kept: Number of mini-batches whose graph was kept between products.
    """

    def __init__(
        self,
        frozen: FrozenObjective,
        k: int,
        tol: float,
        max_iter: int,
        certify: bool | float,
        memory: Memory,
        generator: torch.Generator,
        group: int | None,
        first: torch.Tensor | None,
        precision: Precision,
    ) -> None:
        self._frozen, self._k, self._certify, self._memory = frozen, k, certify, memory
        self._precision: Precision = precision
        self._settings: dict[str, Any] = {"tol": tol, "max_iter": max_iter}
        self._settings |= {"wanted": {"top": (k, "LM")}, "rough": precision != "full"}
        # A generator each: what one draws does not depend on how far the others have come.
        self._seeds = torch.randint(
            1 << 62, (frozen.num_batches,), generator=generator, device=generator.device
        ).tolist()
        self._group, self._first = group, first
        self._tried: set[Any] = set()
        self._basis_dtype = torch.promote_types(frozen.space.dtype, torch.float32)
        self.size, self.kept = 1, 0

    def run(self, tick: Callable[[], object]) -> list[Eigenpairs]:
        """Return the top eigenpairs of every mini-batch.

        Args:
            tick: Called for each when it is done.
        """
        self._tick = tick
        self._rows: dict[int, Eigenpairs] = {}
        self._queue = _Queue(self._frozen.batches)
        # Streams need not wait for the current one: the check of the losses has.
        crew = [self._hire(0)]
        self._turn(crew[0])  # it takes a mini-batch, and so tells what memory that needs
        self.size = self._queue.places = self._room(crew[0])
        crew += [self._hire(place) for place in range(1, self.size)]
        while crew:
            for worker in _ready(crew):
                if not self._turn(worker):
                    crew.remove(worker)
            if not crew and len(self._rows) < self._frozen.num_batches:
                crew = [self._hire(0)]  # the last one ran out of memory beside others
        return [self._rows[index] for index in range(len(self._rows))]

    def _room(self, worker: "_Worker") -> int:
        """Return how many workers there is memory for."""
        if self._group is not None:
            return min(self._group, self._frozen.num_batches)
        if not worker.hessian.recorded:
            return 1
        space = self._frozen.space
        basis = (self._k + BASIS + 8) * space.dim * self._basis_dtype.itemsize
        each = worker.hessian.num_bytes + basis
        more = free_memory(space.device) // 2 // each
        return min(MAX_GROUP, -(-self._frozen.num_batches // FEWEST), 1 + more)

    def _hire(self, place: int) -> "_Worker":
        hessian = MiniBatchHessian(self._frozen, self._precision, self._memory, place, self._tried)
        return _Worker(place, hessian, self._work)

    def _turn(self, worker: "_Worker") -> bool:
        """Let a worker take in its product and start the next; return whether it goes on."""
        stream = worker.hessian.stream
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                next(worker.work)
        except StopIteration:
            return False
        except torch.OutOfMemoryError:
            if self.size == 1:
                raise
            self.size -= 1
            self._queue.leave(worker.place, worker.item)
            return False
        return True

    def _work(self, worker: "_Worker") -> Work:
        hessian, first = worker.hessian, self._first
        while (item := self._queue.next(worker.place)) is not None:
            worker.item = index, batch = item
            hessian.load(batch)
            search = self._search(index, compact=hessian.recorded and self._group != 1)
            steps = search.steps(starts=1, certify=self._certify, first=first)
            yield from multiply(steps, hessian.matvec)
            if self._precision != "full":
                yield from multiply(search.check(), hessian.exact_matvec)
            self._rows[index], first = search.pairs("top"), search.direction("top")
            self.kept += hessian.kept
            self._tick()

    def _search(self, index: int, compact: bool) -> EigenSearch:
        """Return the search of a mini-batch, if compact with a basis that leaves memory for others.

        Args:
            index: Number of the mini-batch.
            compact: Whether there are others.
        """
        space = self._frozen.space
        generator = torch.Generator(space.device).manual_seed(self._seeds[index])
        room: dict[str, Any] = {"max_basis": None}
        if compact:
            room = {"max_basis": self._k + BASIS, "basis_dtype": self._basis_dtype}
        return EigenSearch(space, generator=generator, **room, **self._settings)


class _Worker:
    """Solves one mini-batch after another.

    Attributes:
        place: Number of its place.
        hessian: Its operator.
        work: What it does, in turns.
        item: Number and data of the mini-batch at hand.
    """

    item: Item

    def __init__(
        self, place: int, hessian: MiniBatchHessian, work: Callable[["_Worker"], Work]
    ) -> None:
        self.place, self.hessian = place, hessian
        self.work = work(self)


class _Queue:
    """Mini-batches, each for a place that does not depend on which place is done first.

    So what a search starts from, and with it the result, is the same in every run.

    Attributes:
        places: Number of places.
    """

    def __init__(self, batches: Iterable[PreparedBatch]) -> None:
        self.places = 1
        self._batches: Iterator[Item] = enumerate(batches)
        self._waiting: dict[int, deque[Item]] = defaultdict(deque)
        self._left: set[int] = set()

    def next(self, place: int) -> Item | None:
        """Return the next mini-batch of a place, then those of places that were given up."""
        while not self._waiting[place]:
            item = next(self._batches, None)
            if item is None:
                given_up = [self._waiting[p] for p in sorted(self._left) if self._waiting[p]]
                return given_up[0].popleft() if given_up else None
            self._waiting[item[0] % self.places].append(item)
        return self._waiting[place].popleft()

    def leave(self, place: int, item: Item) -> None:
        """Give a place up, with the mini-batch that it was at."""
        self._left.add(place)
        self._waiting[place].appendleft(item)


def _ready(crew: Sequence[_Worker]) -> list[_Worker]:
    """Return those for whom the device has nothing left to do; waits until there is one.

    One alone may queue what comes next.
    """
    streams = [worker.hessian.stream for worker in crew]
    if len(crew) == 1 or None in streams:
        return list(crew)
    while True:
        ready = [w for w, s in zip(crew, streams, strict=True) if s is None or s.query()]
        if ready:
            return ready
        time.sleep(_NAP)


def _check_finite(frozen: FrozenObjective) -> None:
    with torch.no_grad():
        losses = [frozen.data_term(frozen.space.values, batch) for batch in frozen.batches]
    check_finite_losses(losses)


def _signed(eigenvalues: np.ndarray, errors: np.ndarray, eps: float) -> np.ndarray:
    """Return the eigenvalues with 0 for those that rounding or their error may have signed."""
    rounding = 10 * eps * np.abs(eigenvalues).max(1, keepdims=True)
    signed: np.ndarray = np.where(np.abs(eigenvalues) > np.fmax(errors, rounding), eigenvalues, 0.0)
    return signed


def _nep(eigenvalues: np.ndarray) -> float:
    return float((eigenvalues < 0).mean())


def _ape(eigenvalues: np.ndarray) -> float:
    positive = eigenvalues[eigenvalues > 0]
    return float(positive.mean()) if len(positive) else float("nan")


def _bootstrap(
    eigenvalues: np.ndarray, count: int, generator: torch.Generator
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return 95 % intervals of NEP and APE over resampled mini-batches, NaN for a single one.

    Percentiles of a bootstrap cover too little where there are few mini-batches: resamples spread
    by √((n − 1)/n) of what they should, and a normal distribution's quantile stands where Student's
    should. So the percentiles are those further out that a normal distribution has there
    (Hesterberg, 2015, sec. 4.4, the expanded percentile interval).
    """
    from scipy import stats  # slow to import

    batches = len(eigenvalues)
    if batches < 2:
        return (float("nan"),) * 2, (float("nan"),) * 2
    quantile = stats.t.ppf(0.975, batches - 1) * np.sqrt(batches / (batches - 1))
    tail = 100 * stats.norm.cdf(-quantile)
    draws = torch.randint(
        batches, (count, batches), generator=generator, device=generator.device
    ).cpu()
    samples = [(_nep(eigenvalues[rows]), _ape(eigenvalues[rows])) for rows in draws.numpy()]
    with warnings.catch_warnings():  # no resample has a positive one: the interval is NaN
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low, high = np.nanpercentile(np.array(samples), [tail, 100 - tail], axis=0)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))
