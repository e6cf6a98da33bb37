"""Mini-batches whose eigenpairs are sought one after another, and side by side.

A product of 16 images does not fill a GPU, which waits for the host most of the time. So gradient
and product are recorded there once for a shape (`landscape.recording`), other mini-batches are
copied into place, and several of them are solved on streams of their own, which the device works on
at the same time. The host gives each search its turn: it takes in the last product and starts the
next. Nor does it fill the cores of a CPU, on which two searches run on threads of their own.

One call of `vmap` over stacked mini-batches would do the same; it was measured (H200, 16 images
each), and its convolutions by many weights take longer: `benchmarks/NOTES.md`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from landscape.batches import PreparedBatch
from landscape.linalg.differences import GradientDifferences
from landscape.linalg.gradient import Precision
from landscape.linalg.hessian import HessianOperator, Memory
from landscape.linalg.kinks import Kinks
from landscape.linalg.recorded_hessian import RecordedHessian
from landscape.objective import FrozenObjective
from landscape.recording import shape_of, side_stream


@dataclass
class Known:
    """What is found on the first mini-batch and holds for the others.

    Attributes:
        tried: Shapes that need no trial before they are recorded.
        bytes_per_sample: As in `HessianOperator`.
        kinks: As there.
    """

    tried: set[Any] = field(default_factory=set)
    bytes_per_sample: float = 0.0
    kinks: Kinks = "free"


class MiniBatchHessian:
    """The Hessian of one mini-batch after another.

    Attributes:
        stream: Stream of its own on a GPU, or `None`.
        recorded: Whether gradient and product are recorded.
        num_bytes: Memory that the recordings took, or the graph that is kept.
        kept: Whether the gradient graph of the mini-batch at hand is kept between products.
    """

    def __init__(
        self,
        frozen: FrozenObjective,
        precision: Precision = "full",
        memory: Memory = "auto",
        place: int = 0,
        known: Known | None = None,
    ) -> None:
        """Set up without a mini-batch.

        Args:
            frozen: The objective.
            precision: As in `HessianOperator`.
            memory: What may be kept of a mini-batch that is not recorded, as in `HessianOperator`.
            place: Number of its stream; those that are used side by side have different ones.
            known: Common to several of these.
        """
        self._frozen, self._precision, self._memory = frozen, precision, memory
        self._place = place
        self.stream = side_stream(frozen.space.device, place)
        self.num_bytes = 0
        self.kept = False
        self._recorded: RecordedHessian | None = None
        self._recordable = self.stream is not None and not frozen.draws
        self._known = known or Known()
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
            known = self._known
            operator = self._operator = HessianOperator.of(
                self._frozen.of_batch(batch),
                memory=self._memory,
                precision=self._precision,
                bytes_per_sample=known.bytes_per_sample,
                kinks=known.kinks,
            )
            known.bytes_per_sample, known.kinks = operator.bytes_per_sample, operator.kinks
            self.num_bytes = operator.num_kept * int(known.bytes_per_sample * batch.size)
        self.kept = self._recorded is not None or bool(self._operator.num_kept)

    def matvec(self, v: Tensor) -> Tensor:
        """Return H v for the mini-batch that was loaded last, in the precision that was asked for.

        Args:
            v: Shape `(dim,)`, of any floating type.
        """
        if self._recorded is not None:
            return self._product(self._recorded, v, self._precision)
        return self._operator.matvec(v)

    def differences(self, certify: bool | float) -> GradientDifferences | None:
        """Return what `HessianOperator.differences` does for the mini-batch at hand."""
        return None if self._recorded is not None else self._operator.differences(certify)

    def exact_matvec(self, v: Tensor) -> Tensor:
        """Return H v in full precision.

        Args:
            v: Shape `(dim,)`, of any floating type.
        """
        if self._recorded is not None and self._precision == "tf32":
            return self._product(self._recorded, v, "full")
        if self._exact is None:
            self._exact = MiniBatchHessian(self._frozen, "full", self._memory, self._place)
        if self._batch is not None and self._exact._batch is not self._batch:
            self._exact.load(self._batch)
        return self._exact.matvec(v)

    def _product(self, recorded: RecordedHessian, v: Tensor, precision: Precision) -> Tensor:
        decay = self._frozen.objective.weight_decay
        return recorded.product(v, precision).add_(v, alpha=decay)

    def _record(self, batch: PreparedBatch, stream: torch.cuda.Stream) -> None:
        """Record gradient and product, if they can be."""
        recorded = RecordedHessian(self._frozen, batch, self._precision, stream)
        shape = shape_of(batch.samples)
        if shape not in self._known.tried:
            self._recordable = recorded.try_out()
            torch.cuda.empty_cache()  # of what the trial has left
            if not self._recordable:
                return
            self._known.tried.add(shape)
        before = torch.cuda.memory_reserved(self._frozen.space.device)
        recorded.record()
        self.num_bytes = torch.cuda.memory_reserved(self._frozen.space.device) - before
        self._recorded = recorded
