"""Mini-batches whose eigenpairs are sought side by side on a GPU.

A product of 16 images does not fill a GPU, which waits for the host most of the time. So gradient
and product are recorded once for a shape (`landscape.linalg.recording`), other mini-batches are
copied into place, and several of them are solved on streams of their own, which the device works on
at the same time. The host gives each search its turn: it takes in the last product and starts the
next.

One call of `vmap` over stacked mini-batches would do the same; it was measured (H200, 16 images
each), and its convolutions by many weights take longer: `benchmarks/NOTES.md`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from landscape.batches import Inputs, PreparedBatch
from landscape.linalg.gradient import GradientGraph, Precision, twice_differentiable
from landscape.linalg.hessian import HessianOperator, Memory, memory_bytes
from landscape.linalg.recording import Recording, apart, side_stream, trial
from landscape.objective import FrozenObjective


class MiniBatchHessian:
    """The Hessian of one mini-batch after another.

    Attributes:
        stream: Stream of its own on a GPU, or `None`.
        recorded: Whether gradient and product are recorded.
        num_bytes: Memory that the recordings took.
        kept: Whether the gradient graph of the mini-batch at hand is kept between products.
    """

    def __init__(
        self,
        frozen: FrozenObjective,
        precision: Precision = "full",
        memory: Memory = "auto",
        place: int = 0,
        tried: set[Any] | None = None,
    ) -> None:
        """Set up without a mini-batch.

        Args:
            frozen: The objective.
            precision: As in `HessianOperator`.
            memory: What may be kept of a mini-batch between products, as in `HessianOperator`.
            place: Number of its stream; those that are used side by side have different ones.
            tried: Shapes that need no trial before they are recorded; common to several of these.
        """
        self._frozen, self._precision, self._memory = frozen, precision, memory
        self._place = place
        self.stream = side_stream(frozen.space.device, place)
        self.num_bytes = 0
        self.kept = False
        self._recorded: _Recorded | None = None
        self._recordable = self.stream is not None
        self._tried = set[Any]() if tried is None else tried
        self._exact: MiniBatchHessian | None = None
        self._batch: PreparedBatch | None = None

    @property
    def recorded(self) -> bool:
        """Whether gradient and product are recorded."""
        return self._recorded is not None

    def load(self, batch: PreparedBatch) -> None:
        """Take the next mini-batch; one gradient, and three and a product for a new shape."""
        self._batch = batch
        if self._recorded is not None and not self._recorded.load(batch):
            self._recorded = None  # lets go of its memory first
        if self._recorded is None and self._recordable and self.stream is not None:
            self._record(batch, self.stream)
        if self._recorded is None:
            frozen = self._frozen.of_batch(batch)
            self._operator = HessianOperator.of(
                frozen, memory=self._memory, precision=self._precision
            )
        self.kept = self._recorded is not None or bool(self._operator.num_kept)

    def matvec(self, v: Tensor) -> Tensor:
        """Return H v for the mini-batch that was loaded last, in the precision that was asked for.

        Args:
            v: Shape `(dim,)`, of any floating type.
        """
        if self._recorded is not None:
            return self._recorded.product(v, self._precision)
        return self._operator.matvec(v)

    def exact_matvec(self, v: Tensor) -> Tensor:
        """Return H v in full precision.

        Args:
            v: Shape `(dim,)`, of any floating type.
        """
        if self._recorded is not None and self._precision == "tf32":
            return self._recorded.product(v, "full")
        if self._exact is None:
            self._exact = MiniBatchHessian(self._frozen, "full", self._memory, self._place)
        if self._batch is not None and self._exact._batch is not self._batch:
            self._exact.load(self._batch)
        return self._exact.matvec(v)

    def _record(self, batch: PreparedBatch, stream: torch.cuda.Stream) -> None:
        """Record gradient and product, if they can be and their memory is granted."""
        recorded = _Recorded(self._frozen, batch, self._precision, stream)
        if shape_of(batch) not in self._tried:
            granted = memory_bytes(self._memory, self._frozen.space.device)
            self._recordable = recorded.try_out(granted)
            torch.cuda.empty_cache()  # of what the trial has left
            if not self._recordable:
                return
            self._tried.add(shape_of(batch))
        before = torch.cuda.memory_reserved(self._frozen.space.device)
        recorded.record()
        self.num_bytes = torch.cuda.memory_reserved(self._frozen.space.device) - before
        self._recorded = recorded


class _Recorded:
    """Gradient and product of a mini-batch of one shape as recordings."""

    def __init__(
        self,
        frozen: FrozenObjective,
        batch: PreparedBatch,
        precision: Precision,
        stream: torch.cuda.Stream,
    ) -> None:
        space = frozen.space
        self._frozen, self._precision, self._stream = frozen, precision, stream
        with apart(stream):
            self._batch = PreparedBatch(_copy(batch.inputs), _copy(batch.targets), batch.size, 1.0)
            self._leaves = {n: v.clone().requires_grad_() for n, v in space.values.items()}
            self._vector = torch.zeros(space.dim, dtype=space.dtype, device=space.device)
        # One graph serves both: what it keeps is in full precision.
        self._precisions: tuple[Precision, ...] = (precision,)
        if precision == "tf32":
            self._precisions = ("tf32", "full")
        self._products: dict[Precision, Recording[Tensor]] = {}

    def try_out(self, granted: int) -> bool:
        """Return whether it can be recorded, and its graph takes no more bytes than granted."""
        with apart(self._stream), twice_differentiable():
            graph, waits_not = trial(lambda: self._gradient(measure=True))
            if not waits_not or graph.num_bytes > granted:
                return False
            return all(
                trial(partial(self._product, graph, precision))[1] for precision in self._precisions
            )

    def record(self) -> None:
        """Record, and compute the gradient."""
        with twice_differentiable():
            self._gradients = Recording(self._gradient, self._stream)
            graph = self._gradients.result
            self._gradients.replay(self._stream)
            for precision in self._precisions:
                self._products[precision] = Recording(
                    partial(self._product, graph, precision), self._stream, self._gradients
                )

    def load(self, batch: PreparedBatch) -> bool:
        """Take another mini-batch, if it has the shape of the one that was recorded."""
        if shape_of(batch) != shape_of(self._batch):
            return False
        with apart(self._stream):
            _fill(self._batch.inputs, batch.inputs)
            _fill(self._batch.targets, batch.targets)
        self._gradients.replay(self._stream)
        return True

    def product(self, v: Tensor, precision: Precision) -> Tensor:
        """Return H v."""
        recording = self._products[precision]
        with apart(self._stream):
            self._vector.copy_(v)
            recording.replay(self._stream)
            return recording.result.clone()

    def _gradient(self, measure: bool = False) -> GradientGraph:
        def loss() -> Tensor:
            return self._frozen.data_term(self._leaves, self._batch)

        return GradientGraph(loss, self._leaves, 1.0, self._precision, measure)

    def _product(self, graph: GradientGraph, precision: Precision) -> Tensor:
        space = self._frozen.space
        tangents = list(space.unflatten(self._vector).values())
        out = space.flatten(graph.product(tangents, precision))
        return out.add_(self._vector, alpha=self._frozen.objective.weight_decay)


def shape_of(batch: PreparedBatch) -> Any:
    """Return the shapes of all that a mini-batch holds, and what is not a tensor as it is."""
    return _shape(batch.inputs), _shape(batch.targets)


def _shape(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((name, _shape(entry)) for name, entry in value.items())
    return (value.shape, value.dtype) if isinstance(value, Tensor) else repr(value)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copy(entry) for name, entry in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def _fill(place: Inputs | Tensor | None, value: Inputs | Tensor | None) -> None:
    if isinstance(place, Tensor) and isinstance(value, Tensor):
        place.copy_(value)
    elif isinstance(place, Mapping) and isinstance(value, Mapping):
        for name, entry in place.items():
            _fill(entry, value[name])
