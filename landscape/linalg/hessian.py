"""Curvature matrices of a frozen objective, and the Hessian among them.

For the objective of `landscape.objective`, H = ∂²L/∂θ² = (1/N) Σ_n ∂²ℓ_n/∂θ² + λI. Attention runs
under the math kernel, the only one with a second derivative.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any, Self

import torch
from torch import Tensor, nn

from landscape._checks import check_at_least, is_number
from landscape.batches import PreparedBatch
from landscape.linalg.differences import GradientDifferences
from landscape.linalg.gradient import (
    GradientGraph,
    Precision,
    check_precision,
    hessian_product,
    twice_differentiable,
)
from landscape.linalg.gram_schmidt import are_long
from landscape.linalg.kinks import Kinks
from landscape.linalg.operators import SymmetricOperator
from landscape.linalg.recorded_hessian import RecordedHessian
from landscape.memory import free_memory
from landscape.objective import FrozenObjective, Objective, check_objective
from landscape.parameters import ParameterSpace
from landscape.recording import Repeated, apart
from landscape.threads import num_threads, side_by_side

Memory = int | float | str

WORTHWHILE = 16
"""Bytes of activations over those of the parameters from which differences of gradients are
cheaper, a heuristic: 7 is too few (a Mixer), 20 enough (an EfficientNet)."""


class CurvatureOperator(SymmetricOperator):
    """A curvature matrix over all samples, as the weighted sum of its batches plus λI.

    The operator is taken at the parameters as they are when it is built.

    Attributes:
        frozen: The objective on one fixed draw of the data.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        objective: Objective = Objective(),
    ) -> None:
        """Draw the data and fix the parameters.

        Args:
            model: Any module; see `Objective`.
            data: Re-iterable of batches.
            objective: Whose curvature.

        Raises:
            ValueError: If the loss is not finite on some batch, or the model has gradient
                checkpointing on.
        """
        check_objective(objective)
        self._set_frozen(objective.freeze(model, data))

    def _set_frozen(self, frozen: FrozenObjective) -> None:
        check_keeps(frozen)
        self.frozen = frozen
        space = frozen.space
        super().__init__(space.dim, space.dtype, space.device)
        self._weight_decay = frozen.objective.weight_decay
        self._setup()

    def _setup(self) -> None:
        """Prepare what is kept between products; refuse a loss that is not finite."""
        check_losses(self.frozen)


class HessianOperator(CurvatureOperator):
    """The Hessian, by double backward.

    The graph of each batch's gradient is kept for as many batches as fit `memory`; the product
    with a kept batch costs about 1.5 to 2.5 gradients (median 2.1 over 108 models), with another
    2.5 to 3.5. On a CPU two kept ones are worked on at a time, on half of PyTorch's threads each.
    On a GPU all of it is recorded and replayed (`landscape.recording`), which holds the memory of
    one batch more.

    What a model detaches is a constant here, as it is in the gradient. Where it depends on the
    parameters (the codes of a VQ-VAE, equilibrium models with a Jacobian-free step), the matrix is
    not the second derivative of the loss that `loss_surface` draws.

    Attributes:
        num_kept: Number of batches whose graph is kept.
        kinks: `"none"` where the loss is known to have no kinks, as those of a ReLU, `"held"` where
            all of them can be held (`landscape.linalg.kinks`), otherwise `"free"`.
        bytes_per_sample: Memory of a graph a sample, measured on the first batch; infinite, so that
            none is kept, for a model that takes derivatives by `torch.func`.
        precision: Of the products: `"full"` is the model's, `"tf32"` lets a GPU round the factors
            of matrix products and convolutions to 10 bits, `"bf16"` runs the model under bfloat16
            autocast; both accumulate in float32. What that does to a spectrum, `hessian_spectrum`
            measures.
    """

    precision: Precision = "full"
    bytes_per_sample: float = 0.0
    kinks: Kinks = "free"

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        objective: Objective = Objective(),
        *,
        memory: Memory = "auto",
    ) -> None:
        """Draw the data and fix the parameters.

        Args:
            model: Any module; see `Objective`.
            data: Re-iterable of batches.
            objective: Whose Hessian.
            memory: What may be kept between products: bytes, a fraction of the free memory of the
                device (a float up to 1), or `"auto"` (half of it).

        Raises:
            ValueError: If the loss is not finite on some batch, an argument is out of range, or the
                model has gradient checkpointing on.
        """
        check_memory(memory)
        self.memory = memory
        super().__init__(model, data, objective)

    @classmethod
    def of(
        cls,
        frozen: FrozenObjective,
        *,
        memory: Memory = "auto",
        precision: Precision = "full",
        bytes_per_sample: float = 0.0,
        kinks: Kinks = "free",
    ) -> Self:
        """Return the operator of an objective that is already frozen.

        Args:
            frozen: The objective on one fixed draw of the data.
            memory: As in the constructor.
            precision: Of the products; see the class.
            bytes_per_sample: Memory of a graph, where it is known.
            kinks: Whether the loss has kinks, where the memory is known.

        Raises:
            ValueError: If the model is not in float32 for a reduced precision, or `"tf32"` has no
                GPU to run on.
        """
        check_precision(precision, frozen.space)
        check_memory(memory)
        self = cls.__new__(cls)
        self.precision, self.bytes_per_sample, self.kinks = precision, bytes_per_sample, kinks
        self.memory = memory
        self._set_frozen(frozen)
        return self

    def exact(self) -> "HessianOperator":
        """Return the operator with products in full precision; one in TF32 lends its graphs."""
        if self.precision == "full":
            return self
        if self.precision == "bf16":
            return HessianOperator.of(self.frozen, memory=self.memory)
        other = copy.copy(self)
        other.precision, other.num_matvecs = "full", 0
        other._multiply_kept = other._repeated()
        return other

    def _setup(self) -> None:
        budget = bytes_of(self.memory, self.device)
        self._graphs: list[GradientGraph] = []
        # Leaves of our own: the user's parameters and their `.grad` take no part.
        values = self.frozen.space.values
        self._leaves = {n: v.clone().requires_grad_() for n, v in values.items()}
        self._multiply_kept = self._repeated()
        self._recorded: RecordedHessian | None = None  # of batches that are not kept, in turns
        self._recordable = self._multiply_kept.stream is not None and not self.frozen.draws
        losses: list[Tensor] = []
        with self._differentiating():
            for batch in self.frozen.batches:
                if len(self._graphs) < len(losses) or self.bytes_per_sample * batch.size > budget:
                    with torch.no_grad():
                        losses.append(self.frozen.data_term(self._leaves, batch))
                    continue
                measure = not self.bytes_per_sample
                graph = self._graph(batch, measure)
                if measure:
                    self.kinks = graph.kinks
                if not losses and not graph.depends:
                    warn_independent()
                losses.append(graph.loss)
                self.bytes_per_sample = self.bytes_per_sample or graph.num_bytes / batch.size
                if self.bytes_per_sample * batch.size <= budget:
                    self._graphs.append(graph)
                    budget -= int(self.bytes_per_sample * batch.size)
        _check_finite(losses)

    def _repeated(self) -> Repeated:
        """Return what multiplies with the graphs that are kept, and holds no reference to this."""
        space, pool = self.frozen.space, ThreadPoolExecutor(2)  # starts a thread when it has work
        multiply_all = partial(
            _product_of_all, self._graphs, space, self._weight_decay, self.precision, pool
        )
        return Repeated(multiply_all, self.device)

    @property
    def num_kept(self) -> int:
        """Number of batches whose gradient graph is kept between products."""
        return len(self._graphs)

    def gradient(self) -> Tensor:
        """Return the gradient of the objective, shape `(dim,)`; one gradient over all data."""
        space = self.frozen.space
        out = self._weight_decay * space.flatten(space.values)
        with self._differentiating():
            for graph in chain(self._graphs, map(self._graph, self._other_batches())):
                out.add_(space.flatten([g.detach() for g in graph.gradient]), alpha=graph.weight)
        return out

    def differences(self, certify: bool | float = True) -> GradientDifferences | None:
        """Return products by differences of gradients, where they are cheaper; one gradient.

        That is for a loss without kinks, or whose kinks can be held as the graphs have noted them,
        and for long vectors on a CPU, where what is done with activations outweighs what is done
        with vectors; on a GPU products are recorded. Accurate products of networks with kinks,
        which are mostly convolutions, are so cheap that a short search does not repay its check.

        Args:
            certify: As in `top_eigenpairs`; without, the search is short.
        """
        noted = self.kinks == "held" and self.num_kept == self.frozen.num_batches and certify
        usable = (noted or self.kinks == "none") and self.precision == "full"
        if not usable or not are_long(self.dim, self.dtype, self.device):
            return None
        activations = self.bytes_per_sample * self.frozen.num_samples
        if activations < WORTHWHILE * self.dim * self.dtype.itemsize:
            return None
        if not any(value.any() for value in self.frozen.space.values.values()):
            return None  # a step has no measure
        choices = [graph.choices for graph in self._graphs] if noted else None
        return GradientDifferences(self.frozen, self.gradient(), choices)

    @contextmanager
    def _differentiating(self) -> Iterator[None]:
        """Build and use graphs on one stream: that of the recording."""
        with apart(self._multiply_kept.stream), twice_differentiable():
            yield

    def _graph(self, batch: PreparedBatch, measure: bool = False) -> GradientGraph:
        def loss() -> Tensor:
            return self.frozen.data_term(self._leaves, batch)

        return GradientGraph(loss, self._leaves, batch.weight, self.precision, measure)

    def _other_batches(self) -> Iterator[PreparedBatch]:
        """Yield the batches whose graphs are not kept."""
        if len(self._graphs) < self.frozen.num_batches:
            yield from islice(self.frozen.batches, len(self._graphs), None)

    def _matmat(self, vectors: Tensor) -> Tensor:
        columns = vectors.unbind(1)
        with self._differentiating():
            out = [self._multiply_kept(v) for v in columns]
            for batch in self._other_batches():
                product = self._multiplication(batch)
                for total, v in zip(out, columns, strict=True):
                    total.add_(product(v), alpha=batch.weight)
        return torch.stack(out, 1) if len(out) > 1 else out[0][:, None]

    def _multiplication(self, batch: PreparedBatch) -> Callable[[Tensor], Tensor]:
        """Return what multiplies with the Hessian of a batch that is not kept: one gradient."""
        stream = self._multiply_kept.stream
        if self._recordable and self._recorded is None and stream is not None:
            recorded = RecordedHessian(self.frozen, batch, self.precision, stream)
            self._recordable = recorded.try_out()
            if self._recordable:
                recorded.record()
                self._recorded = recorded
        if self._recorded is not None and self._recorded.load(batch):
            return partial(self._recorded.product, precision=self.precision)
        return partial(hessian_product, self._graph(batch), self.frozen.space, self.precision)


def _product_of_all(
    graphs: Sequence[GradientGraph],
    space: ParameterSpace,
    weight_decay: float,
    precision: Precision,
    pool: ThreadPoolExecutor,
    v: Tensor,
) -> Tensor:
    """Return the product of the weighted sum of Hessians, and of the L2 term, with a vector."""
    if not graphs:
        return weight_decay * v
    multiply = partial(_product_of_some, space=space, precision=precision, v=v)
    if len(graphs) > 1 and space.device.type == "cpu" and num_threads() > 1:
        halves = [partial(multiply, some) for some in (graphs[::2], graphs[1::2])]
        out, other = side_by_side(halves, pool=pool)
        out.add_(other)
    else:
        out = multiply(graphs)
    if weight_decay:
        out.add_(v, alpha=weight_decay)
    return out


def _product_of_some(
    graphs: Sequence[GradientGraph], space: ParameterSpace, precision: Precision, v: Tensor
) -> Tensor:
    """Return the product of the weighted sum of Hessians with a vector."""
    # Long vectors: a pass over one, and memory that is new, cost as much as some layers.
    first, *others = graphs
    out = hessian_product(first, space, precision, v)
    if first.weight != 1:
        out *= first.weight
    for graph in others:
        out.add_(hessian_product(graph, space, precision, v), alpha=graph.weight)
    return out


def warn_independent() -> None:
    """Warn of a loss in which none of the chosen parameters appears."""
    warnings.warn(
        "The loss depends on none of the chosen parameters, so its curvature is zero. If it "
        "should depend on them, remove `no_grad`, `inference_mode` and `detach` from the model.",
        stacklevel=2,
    )


def check_keeps(frozen: FrozenObjective) -> None:
    """Refuse a model that does not keep its activations."""
    if frozen.recomputes:
        raise ValueError(
            "`model` must not use gradient checkpointing, which computes activations again; turn "
            "it off (in timm: `model.set_grad_checkpointing(False)`)."
        )


def check_losses(frozen: FrozenObjective) -> None:
    """Refuse NaN and infinite batch losses; a forward pass over the data."""
    with torch.no_grad():
        losses = [frozen.data_term(frozen.space.values, batch) for batch in frozen.batches]
    _check_finite(losses)


def _check_finite(losses: list[Tensor]) -> None:
    """Refuse NaN and infinite batch losses."""
    bad = (~torch.isfinite(torch.stack(losses))).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"`model` must have a finite loss on every batch, got {float(losses[bad[0]])} on batch "
            f"{bad[0]} ({len(bad)} of {len(losses)} batches)."
        )


def check_memory(memory: Memory) -> None:
    """Refuse what is no amount of memory."""
    if isinstance(memory, str) and memory == "auto":
        return
    if not is_number(memory):
        raise ValueError(f"`memory` must be 'auto', bytes or a fraction, got {memory!r}.")
    check_at_least("memory", memory, 0)  # type: ignore[arg-type]  # no text is a number


def bytes_of(memory: Memory, device: torch.device) -> int:
    """Return how many bytes of a device may be kept between products."""
    if memory == "auto":
        memory = 0.5
    if isinstance(memory, float) and memory <= 1:
        return int(memory * free_memory(device))
    return int(memory)
