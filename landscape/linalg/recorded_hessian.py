"""The Hessian of one batch after another, recorded once for all of the same shape.

The recordings read the batch, and the product reads what the gradient leaves, from memory of their
own: another batch is copied into place, and the gradient replayed.
"""

from functools import partial

import torch
from torch import Tensor, nn

from landscape.batches import PreparedBatch, copied
from landscape.linalg.gradient import (
    GradientGraph,
    Precision,
    check_twice_differentiable,
    hessian_product,
    twice_differentiable,
    unchanged_gradients,
)
from landscape.objective import FrozenObjective
from landscape.recording import Recording, apart, overwrite, shape_of, trial
from landscape.restore import tensors_of


class RecordedHessian:
    """Gradient and Hessian product of one batch after another as recordings.

    The loss is that of the batch alone, without weight decay.
    """

    def __init__(
        self,
        frozen: FrozenObjective,
        batch: PreparedBatch,
        precision: Precision,
        stream: torch.cuda.Stream,
    ) -> None:
        """Take a first batch; nothing is computed yet.

        Args:
            frozen: The objective.
            batch: Any batch of the shape that is to be recorded.
            precision: As in `HessianOperator`; `"tf32"` records exact products too.
            stream: Where it is recorded and replayed.
        """
        space = frozen.space
        self._frozen, self._precision, self._stream = frozen, precision, stream
        with apart(stream):
            self._batch = PreparedBatch(
                copied(batch.inputs), copied(batch.targets), batch.size, 1.0
            )
            self._leaves = {n: v.clone().requires_grad_() for n, v in space.values.items()}
            self._vector = torch.zeros(space.dim, dtype=space.dtype, device=space.device)
        # One graph serves both: what it keeps is in full precision.
        self._precisions: tuple[Precision, ...] = (precision,)
        if precision == "tf32":
            self._precisions = ("tf32", "full")
        self._products: dict[Precision, Recording[Tensor]] = {}

    def try_out(self) -> bool:
        """Return whether it can be recorded; a gradient and a product."""
        with apart(self._stream), twice_differentiable():
            with unchanged_gradients():
                graph, recordable = trial(self._gradient)
            check_twice_differentiable(graph.gradient)
            return recordable and all(
                trial(partial(self._product, graph, precision))[1] for precision in self._precisions
            )

    def record(self) -> None:
        """Record, and compute the gradient; the host takes the time of an eager one and product."""
        loss = self._frozen.objective.loss
        modules = (self._frozen.model, *([loss] if isinstance(loss, nn.Module) else []))
        # What the recordings read of these may be replaced while they are in use.
        self._held = [tensor for module in modules for tensor in tensors_of(module)]
        with twice_differentiable():
            self._gradients = Recording(self._gradient, self._stream)
            graph = self._gradients.result
            self._gradients.replay(self._stream)
            for precision in self._precisions:
                self._products[precision] = Recording(
                    partial(self._product, graph, precision), self._stream, self._gradients
                )

    def load(self, batch: PreparedBatch) -> bool:
        """Take another batch; one gradient.

        Args:
            batch: On the same device.

        Returns:
            Whether it has the shape of the one that was recorded; no other is taken.
        """
        if shape_of(batch.samples) != shape_of(self._batch.samples):
            return False
        with apart(self._stream):
            overwrite(self._batch.samples, batch.samples)
        self._gradients.replay(self._stream)
        return True

    def product(self, v: Tensor, precision: Precision) -> Tensor:
        """Return H v.

        Args:
            v: Shape `(dim,)`, of any floating type.
            precision: One of those that were recorded.
        """
        recording = self._products[precision]
        with apart(self._stream):
            self._vector.copy_(v)
            recording.replay(self._stream)
            return recording.result.clone()

    def _gradient(self) -> GradientGraph:
        def loss() -> Tensor:
            return self._frozen.data_term(self._leaves, self._batch)

        return GradientGraph(loss, self._leaves, precision=self._precision)

    def _product(self, graph: GradientGraph, precision: Precision) -> Tensor:
        return hessian_product(graph, self._frozen.space, precision, self._vector)
