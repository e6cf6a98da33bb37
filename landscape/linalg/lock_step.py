"""The top eigenpairs of every mini-batch, several of them sought side by side.

A few workers solve one mini-batch after another. A search is a generator that pauses while the
device works on its product (`EigenSearch.steps`). On a GPU each worker has a stream of its own, and
the host gives its turn to whichever has its product. On a CPU each has a thread of its own, with
its share of PyTorch's: operations on a few images are too small to fill several cores. How many
workers there are depends on the free memory.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from threading import Event, Lock
from typing import Any

import torch

from landscape.batches import PreparedBatch
from landscape.linalg.eigenpairs import Eigenpairs
from landscape.linalg.gradient import Precision
from landscape.linalg.hessian import Memory, bytes_of
from landscape.linalg.mini_batches import Known, MiniBatchHessian
from landscape.linalg.search import EigenSearch, may_be_rough, multiply, search_roughly
from landscape.memory import free_memory
from landscape.objective import FrozenObjective
from landscape.threads import num_threads, side_by_side

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

ON_A_CPU = 2
"""Most mini-batches side by side by default on a CPU: on two cores they take 0.8 of the time of one
after the other; more were not measured, and the model itself serves one at a time."""

FEWEST = 4
"""Mini-batches that each place should have by default, a heuristic: to record them takes the time
of 10 to 20 products."""

_NAP = 1e-4  # seconds between two looks whether a product is made


class MiniBatchSolver:
    """Finds the top eigenpairs of mini-batches, several of them side by side.

    Attributes:
        size: Mini-batches solved side by side.
        kept: Number of mini-batches whose graph was kept between products.
    """

    def __init__(
        self,
        frozen: FrozenObjective,
        k: int,
        *,
        tol: float,
        max_iter: int,
        certify: bool | float,
        memory: Memory,
        generator: torch.Generator,
        group: int | None,
        first: torch.Tensor | None,
        precision: Precision,
    ) -> None:
        """Set up without a product.

        The arguments are those of `hessian_max_spectrum`; `first` is the start vector `(dim,)` of
        the first mini-batch.
        """
        self._frozen, self._k, self._certify, self._memory = frozen, k, certify, memory
        self._precision: Precision = precision
        self._settings: dict[str, Any] = {"tol": tol, "max_iter": max_iter}
        self._settings |= {"wanted": {"top": (k, "LM")}}
        self._may_be_rough = may_be_rough(tol, max_iter, k)
        # A generator each: what one draws does not depend on how far the others have come.
        self._seeds = torch.randint(
            1 << 62, (frozen.num_batches,), generator=generator, device=generator.device
        ).tolist()
        self._group, self._first = group, first
        self._known = Known()
        self._lock = Lock()  # of what the workers share
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
            if len(crew) > 1 and self._has_threads(crew[0]):
                self._on_threads(crew)
            else:
                self._in_turns(crew)
            # The last one may have run out of memory beside others.
            crew = [self._hire(0)] if len(self._rows) < self._frozen.num_batches else []
        return [self._rows[index] for index in range(len(self._rows))]

    def _in_turns(self, crew: list["_Worker"]) -> None:
        """Let the workers work until all are done, whichever has its product first."""
        while crew:
            for worker in _ready(crew):
                if not self._turn(worker):
                    crew.remove(worker)

    def _on_threads(self, crew: list["_Worker"]) -> None:
        """Let the workers work until all are done, each on its share of PyTorch's threads."""
        stopped = Event()

        def work(worker: "_Worker") -> None:
            while not stopped.is_set() and self._turn(worker):
                pass

        side_by_side([partial(work, worker) for worker in crew], stopped)

    def _has_threads(self, worker: "_Worker") -> bool:
        """Whether workers may have threads; only one could draw batches again."""
        return worker.hessian.stream is None and self._frozen.are_kept and num_threads() > 1

    def _room(self, worker: "_Worker") -> int:
        """Return how many workers there is memory for."""
        if self._group is not None:
            return min(self._group, self._frozen.num_batches)
        space, hessian = self._frozen.space, worker.hessian
        if hessian.recorded:
            most = min(MAX_GROUP, -(-self._frozen.num_batches // FEWEST))
        elif hessian.kept and self._has_threads(worker):
            graphs = bytes_of(self._memory, space.device) // hessian.num_bytes
            most = min(ON_A_CPU, self._frozen.num_batches, graphs)
        else:
            return 1
        basis = (self._k + BASIS + 8) * space.dim * self._basis_dtype.itemsize
        more = free_memory(space.device) // 2 // (hessian.num_bytes + basis)
        return max(min(most, 1 + more), 1)

    def _hire(self, place: int) -> "_Worker":
        hessian = MiniBatchHessian(self._frozen, self._precision, self._memory, place, self._known)
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
            with self._lock:
                if self.size == 1 or worker.item is None:  # what is not drawn is for no other
                    raise
                self.size -= 1
                self._queue.leave(worker.place, worker.item)
            return False
        return True

    def _work(self, worker: "_Worker") -> Work:
        hessian, first = worker.hessian, self._first
        while (item := self._next(worker.place)) is not None:
            worker.item = index, batch = item
            hessian.load(batch)
            make = partial(self._search, index, compact=hessian.recorded and self._group != 1)
            start: dict[str, Any] = {"certify": self._certify, "first": first}
            rough = hessian.differences(self._certify) if self._may_be_rough else None
            if rough is not None:
                search = yield from search_roughly(make, rough, hessian.matvec, **start)
            else:
                search = make(rough=self._precision != "full")
                yield from multiply(search.steps(starts=1, **start), hessian.matvec)
                if self._precision != "full":
                    yield from multiply(search.check(), hessian.exact_matvec)
            found, first = search.pairs("top"), search.direction()
            worker.item = None
            with self._lock:
                self._rows[index] = found
                self.kept += hessian.kept
                self._tick()

    def _next(self, place: int) -> Item | None:
        with self._lock:
            return self._queue.next(place)

    def _search(self, index: int, compact: bool, rough: bool, spent: int = 0) -> EigenSearch:
        """Return the search of a mini-batch, if compact with a basis that leaves memory for others.

        Args:
            index: Number of the mini-batch.
            compact: Whether there are others.
            rough: As in `EigenSearch`.
            spent: As there.
        """
        space = self._frozen.space
        generator = torch.Generator(space.device).manual_seed(self._seeds[index])
        room: dict[str, Any] = {"max_basis": None}
        if compact:
            room = {"max_basis": self._k + BASIS, "basis_dtype": self._basis_dtype}
        how: dict[str, Any] = room | self._settings | {"rough": rough, "spent": spent}
        return EigenSearch(space, generator=generator, **how)


class _Worker:
    """Solves one mini-batch after another.

    Attributes:
        place: Number of its place.
        hessian: Its operator.
        work: What it does, in turns.
        item: Number and data of the mini-batch at hand, `None` while the next is drawn.
    """

    item: Item | None = None

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
