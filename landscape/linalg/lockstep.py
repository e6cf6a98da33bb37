"""Hessians of several mini-batches at once, each with a vector of its own.

Let every mini-batch b have a copy θ_b of the parameters. The Hessian of Σ_b ℓ_b(θ_b) in all of them
is block diagonal, with the Hessian H_b of each mini-batch as a block, so that one product with
(v_1, …, v_B) gives every H_b v_b: a double backward through one `vmap`. It has the operations of
one mini-batch's product, each B times as large, which is what a GPU wants of mini-batches so small
that it waits for the launches. On a CPU it is slower than one mini-batch after the other.

Eigenpairs of all of them are sought together: every search is at the same step and hands in its
vector, and those that have converged drop out. Once they are half, the graph is built again for the
others.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from landscape._checks import check_at_least
from landscape.batches import PreparedBatch
from landscape.linalg.hessian import GradientGraph, HessianOperator, Precision, twice_differentiable
from landscape.linalg.search import Products
from landscape.memory import free_memory
from landscape.objective import FrozenObjective

BASIS = 32
"""Basis vectors kept a mini-batch besides the wanted, a heuristic: 15 to 25 products are made, and
beyond it the search restarts."""

MAX_GROUP = 64
"""Most mini-batches at once, a heuristic: launches hardly count any more."""


class StackedHessian:
    """The Hessians of mini-batches of one shape, kept as one graph.

    Attributes:
        losses: Mean loss of each mini-batch, shape `(B,)`.
        num_bytes: Memory of the graph, where it was measured.
    """

    def __init__(
        self,
        frozen: FrozenObjective,
        batches: Sequence[PreparedBatch],
        precision: Precision = "full",
        measure: bool = False,
    ) -> None:
        """Build the graph; one gradient of all mini-batches.

        Args:
            frozen: The objective.
            batches: Mini-batches of one shape.
            precision: As in `HessianOperator`.
            measure: Measure the memory of the graph.

        Raises:
            RuntimeError: If `vmap` cannot run the model, or the shapes differ.
            TypeError: If a batch holds something that cannot be stacked.
        """
        self._space = space = frozen.space
        self._weight_decay = frozen.objective.weight_decay
        count, size = len(batches), batches[0].size
        inputs = _stack([batch.inputs for batch in batches])
        targets = _stack([batch.targets for batch in batches])
        leaves = {n: v.expand(count, *v.shape).requires_grad_() for n, v in space.values.items()}
        losses: list[Tensor] = []

        def one(parameters: Mapping[str, Tensor], inputs: Any, targets: Any) -> Tensor:
            return frozen.data_term(parameters, PreparedBatch(inputs, targets, size, 1.0))

        def total() -> Tensor:
            dims = (0, 0, None if targets is None else 0)
            losses.append(vmap(one, dims)(leaves, inputs, targets))
            return losses[0].sum()

        with twice_differentiable():
            self._graph = GradientGraph(total, leaves, precision=precision, measure=measure)
        self.losses = losses[0].detach()
        self.num_bytes = self._graph.num_bytes

    def product(self, vectors: Tensor) -> Tensor:
        """Return H_b v_b for every mini-batch.

        Args:
            vectors: One a row, shape `(B, dim)`.

        Returns:
            Shape `(B, dim)`.
        """
        tangents: dict[str, Tensor] = vmap(self._space.unflatten)(vectors)
        with twice_differentiable():
            products = self._graph.product(list(tangents.values()))
        out: Tensor = vmap(lambda *tensors: self._space.flatten(tensors))(*products)
        return out.add_(vectors, alpha=self._weight_decay)


def multiply_in_step(
    searches: Sequence[Products],
    frozen: FrozenObjective,
    batches: Sequence[PreparedBatch],
    precision: Precision = "full",
) -> None:
    """Make the products that are asked for of all mini-batches, those of one step together.

    Args:
        searches: One a mini-batch: each yields the vectors, and is sent the products.
        frozen: The objective.
        batches: Mini-batches of one shape.
        precision: As in `HessianOperator`.

    Raises:
        ValueError: If a product is not finite.
    """
    wanted = {index: next(search) for index, search in enumerate(searches)}
    rows: list[int] = []
    nothing = torch.zeros(frozen.space.dim, dtype=frozen.space.dtype, device=frozen.space.device)
    while wanted:
        if not rows or 2 * len(wanted) <= len(rows):
            rows = list(wanted)
            alive = [batches[index] for index in rows]
            hessian = StackedHessian(frozen, alive, precision)
        vectors = [wanted[index].to(nothing) if index in wanted else nothing for index in rows]
        products = hessian.product(torch.stack(vectors))
        for index, product in zip(rows, products, strict=True):
            if index in wanted:
                try:
                    wanted[index] = searches[index].send(product)
                except StopIteration:
                    del wanted[index]


def group_size(frozen: FrozenObjective, group: int | None, precision: Precision = "full") -> int:
    """Return how many mini-batches to solve together.

    Args:
        frozen: The objective; its first two mini-batches are tried, at about 10 gradients of one.
        group: The number, or `None` for 1 on a CPU, and on a GPU for as many as fit half of the
            free memory: the graph of each twice (what a product makes on the way) and its basis, a
            heuristic. The caller halves the group when memory runs out all the same.
        precision: Of the products; `"bf16"` allows a group of 1 only.

    Raises:
        ValueError: If `group` is below 1, or above it where `vmap` cannot run the model.
    """
    if group is not None:
        check_at_least("group", group, 1)
    if precision == "bf16":
        if group not in (None, 1):
            raise ValueError(
                f'`group` must be 1 with `precision="bf16"`, got {group}: autocast does not reach '
                "under vmap."
            )
        return 1
    batches = list(itertools.islice(frozen.batches, 2))
    on_cpu = frozen.space.device.type == "cpu"
    alike = len(batches) == 2 and shape_of(batches[0]) == shape_of(batches[1])
    if group == 1 or (group is None and on_cpu) or not alike:
        return 1
    graph = _stacked_bytes(frozen, batches)
    if graph is None:
        if group is not None:
            raise ValueError(f"`group` must be 1 for a model that vmap cannot run, got {group}.")
        return 1
    space = frozen.space
    each = 2 * graph + (BASIS + 8) * space.dim * space.dtype.itemsize
    return group or max(1, min(MAX_GROUP, free_memory(space.device) // 2 // each))


def shape_of(batch: PreparedBatch) -> Any:
    """Return the shapes of all that a mini-batch holds; those of one shape can be stacked."""
    return _shape(batch.inputs), _shape(batch.targets)


def _stacked_bytes(frozen: FrozenObjective, batches: Sequence[PreparedBatch]) -> int | None:
    """Return the memory of the graph a mini-batch, or `None` if the stacked product is wrong."""
    space = frozen.space
    vectors = torch.randn(len(batches), space.dim, generator=torch.Generator().manual_seed(0))
    vectors = vectors.to(space.device, space.dtype)
    try:
        with warnings.catch_warnings():  # an operation without a batching rule runs in a loop
            warnings.filterwarnings("error", "There is a performance drop", UserWarning)
            hessian = StackedHessian(frozen, batches, measure=True)
            found = hessian.product(vectors)
    except (RuntimeError, TypeError, UserWarning):  # control flow on data, or no memory
        return None
    tolerance = min(1e4 * torch.finfo(space.dtype).eps, 1e-2)
    for batch, v, product in zip(batches, vectors, found, strict=True):
        expected = HessianOperator.of(frozen.of_batch(batch), memory=0).matvec(v)
        if not (product - expected).norm() <= tolerance * expected.norm():
            return None
    return hessian.num_bytes // len(batches)


def _shape(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((name, _shape(entry)) for name, entry in value.items())
    return (value.shape, value.dtype) if isinstance(value, Tensor) else repr(value)


def _stack(values: Sequence[Any]) -> Any:
    """Return tensors, mappings of them or `None`s as one."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack(list(values))
    if isinstance(first, Mapping):
        return {name: _stack([value[name] for value in values]) for name in first}
    if all(value is None for value in values):
        return None
    raise TypeError(f"Cannot stack values of type {type(first).__name__}.")
