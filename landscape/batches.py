"""Batches of the user's data: on the model's device, in its precision, by rows, copied."""

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from landscape._checks import check_data, check_module
from landscape._loaders import one_pass

Inputs = Tensor | Mapping[str, Any]
Transform = Callable[[Any, Any, torch.Generator], tuple[Any, Any]]

LABEL_KEYS = ("labels", "label", "targets", "target")

Drawn = tuple[Any, Any, int]
"""Inputs, targets and number of samples of a batch."""


@dataclass(frozen=True)
class PreparedBatch:
    """One batch on the model's device, transformed.

    Attributes:
        inputs: Tensor, or mapping of keyword arguments, for the model.
        targets: Labels or soft targets; `None` where only the model's own loss uses them.
        size: Number of samples.
        weight: Share of the batch in the mean over all data; the weights sum to 1.
    """

    inputs: Inputs
    targets: Tensor | None
    size: int
    weight: float

    @property
    def samples(self) -> tuple[Inputs, Tensor | None]:
        """Inputs and targets."""
        return self.inputs, self.targets

    def part(self, rows: slice) -> "PreparedBatch":
        """Return some of the samples as a batch with the same weight."""
        targets = None if self.targets is None else self.targets[rows]
        inputs = rows_of(self.inputs, self.size, rows)
        return PreparedBatch(inputs, targets, rows.stop - rows.start, self.weight)


@dataclass(frozen=True)
class Placement:
    """Device and precision of a model: where its inputs go.

    Attributes:
        device: Device of its parameters.
        dtype: Precision of its floating-point parameters, of its first layer where they differ.
    """

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> "Placement":
        """Read them off a layer, another parameter or a buffer; float32 on CPU without."""
        check_module(model)
        for p in model.parameters():  # at every step of a training: no further than needed
            if p.is_floating_point() and (is_lazy(p) or p.dim() > 0):  # no single factor
                return cls(p.device, p.dtype)
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                return cls(tensor.device, tensor.dtype)
        return cls(torch.device("cpu"), torch.float32)

    def place(self, value: Any) -> Any:
        """Return tensors, in mappings and lists too, on the device and in the precision."""
        if isinstance(value, Mapping):
            return {k: self.place(v) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self.place, value))
        if not isinstance(value, Tensor):
            return value
        dtype = self.dtype if value.is_floating_point() else value.dtype
        placed = value.to(self.device, dtype)
        return placed.clone() if placed.is_inference() else placed  # autograd cannot save those

    def place_targets(self, targets: Tensor | None) -> Tensor | None:
        """Return targets on the device, in float32 where a model in half precision would round."""
        wider = targets is not None and targets.dtype.itemsize > self.dtype.itemsize
        dtype = torch.promote_types(self.dtype, torch.float32) if wider else self.dtype
        placed: Tensor | None = replace(self, dtype=dtype).place(targets)
        return placed


def stream_batches(
    model: nn.Module, data: Iterable[Any], other: nn.Module | None = None
) -> Iterator[Drawn]:
    """Return one pass over the data as `(inputs, targets, size)` on the model's device.

    For probes that need no second pass; nothing is kept.

    Args:
        model: Whose device and precision the batches take.
        data: Re-iterable of batches, each `(x, y)` or a mapping.
        other: A model that sees them too: they lose no digit that one of both keeps.

    Returns:
        Iterator of `(inputs, targets, size)`. It raises a ValueError at its end if there was no
        sample.

    Raises:
        TypeError: If `data` cannot be iterated over twice.
    """
    check_data(data)
    placement = Placement.of(model)
    if other is not None:
        dtype = torch.promote_types(placement.dtype, Placement.of(other).dtype)
        placement = replace(placement, dtype=dtype)
    return _stream(placement, data)


def _stream(placement: Placement, data: Iterable[Any]) -> Iterator[Drawn]:
    total = 0
    for index, raw in enumerate(one_pass(data)):
        inputs, targets = split_batch(raw, index)
        inputs, targets = copied(placement.place(inputs)), placement.place_targets(targets)
        size = size_of(inputs, targets)
        total += size
        if size:
            versions = versions_of(inputs)
            yield inputs, targets, size
            check_unchanged(inputs, versions)
    if not total:
        raise ValueError("`data` must yield at least one sample, got none; is it empty?")


def argument_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a model; none where its `forward` does not tell."""
    try:
        return tuple(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return ()


def call_on(function: Callable[..., Any], inputs: Inputs) -> Any:
    """Return what a function of the model's arguments returns for the inputs of a batch."""
    return function(**inputs) if isinstance(inputs, Mapping) else function(inputs)


def rows_of(
    inputs: Inputs, size: int, rows: slice | Tensor, names: Collection[str] | None = None
) -> Any:
    """Return some samples of the inputs of a batch.

    Args:
        inputs: A tensor, or keyword arguments; what does not have a row per sample is left whole,
            and so are lists but beside a list of annotations.
        size: Number of samples.
        rows: Which of them, a slice or indices.
        names: Of a mapping, which entries may have a row per sample; by default those as long.

    Raises:
        IndexError: If an entry may hold the numbers of samples, as the edges of a graph do, on a
            GPU, which does not survive a number that is out of range.
    """
    if isinstance(inputs, Mapping):
        for name, value in inputs.items():
            if _may_number(value, size):
                raise IndexError(f"`{name}` may hold the numbers of samples, which would change.")
        if any(_are_annotations(inputs.get(key)) for key in LABEL_KEYS):
            few = torch.arange(size, device="cpu")[rows].tolist()
            lists = [n for n, v in inputs.items() if type(v) in (list, tuple) and len(v) == size]
            inputs = {**inputs, **{name: [inputs[name][i] for i in few] for name in lists}}
        return {
            name: rows_of(value, size, rows) if names is None or name in names else value
            for name, value in inputs.items()
        }
    return inputs[rows] if _has_rows(inputs, size) else inputs


def names_of_rows(inputs: Inputs, size: int) -> frozenset[str]:
    """Return which entries of a mapping are as long as its samples are many."""
    if not isinstance(inputs, Mapping):
        return frozenset()
    return frozenset(name for name, value in inputs.items() if _has_rows(value, size))


def _may_number(value: Any, size: int) -> bool:
    """Whether a table on a GPU, not of positions alone, may hold the numbers of samples."""
    if not isinstance(value, Tensor) or value.device.type != "cuda" or value.dim() < 2:
        return False
    whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return whole and len(value) not in (1, size)


def _has_rows(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def transformed(
    transform: Transform, inputs: Any, targets: Any, generator: torch.Generator
) -> tuple[Any, Any]:
    """Return what a transform makes of a batch, which it gets a copy of.

    Raises:
        TypeError: If it returns something else than (x, y).
    """
    drawn = transform(copied(inputs), copied(targets), generator)
    if not isinstance(drawn, tuple | list) or len(drawn) != 2:
        many = f" of {len(drawn)}" if isinstance(drawn, tuple | list) else ""
        raise TypeError(
            "`transform` must return (x, y) when called as `transform(x, y, generator)`, got a "
            f"{type(drawn).__name__}{many}."
        )
    return drawn[0], drawn[1]


def copied(values: Any) -> Any:
    """Return a tensor, or tensors in mappings and lists, that may be changed in place."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, values)


def versions_of(inputs: Inputs) -> list[int]:
    """Return how often each tensor has been changed in place; none for those of inference mode."""
    return [t._version for t in batch_tensors((inputs, None, 0)) if not t.is_inference()]


def check_unchanged(inputs: Inputs, versions: list[int]) -> None:
    """Refuse inputs that the model has changed in place: the next pass would see others.

    Args:
        inputs: The inputs of the model.
        versions: What `versions_of` said of them before.
    """
    if versions_of(inputs) != versions:
        raise ValueError(
            "`model` must not modify its input in place, but does; begin its forward pass with "
            "`x = x.clone()`."
        )


def split_batch(raw: Any, index: int) -> tuple[Inputs, Tensor | None]:
    """Return a raw batch as (inputs, targets).

    Raises:
        TypeError: If the batch is neither `(x, y)` nor a mapping.
        ValueError: If `x` and `y` have different lengths.
    """
    if isinstance(raw, Mapping):
        key = next((k for k in LABEL_KEYS if k in raw), None)
        inputs: Inputs = {k: v for k, v in raw.items() if k != key}
        targets = None if key is None else raw[key]
        if _are_annotations(targets):  # one a sample, for a model that takes its own loss
            inputs, targets = raw, None
    elif isinstance(raw, Sequence) and len(raw) == 2:
        inputs, targets = raw
    else:
        got = type(raw).__name__
        if isinstance(raw, Sequence):
            got += f" of {len(raw)} items"
        raise TypeError(
            f"`data` must yield (x, y) or a mapping, got a {got} as batch {index}; use a "
            "`collate_fn` that keeps what model and loss take, or pass a list of such pairs."
        )
    for value in [targets, *([inputs] if not isinstance(inputs, Mapping) else [])]:
        if value is not None and not isinstance(value, Tensor):
            remedy = "pass several inputs as a mapping of the model's argument names"
            if isinstance(value, np.ndarray) or isinstance(raw, Mapping):
                remedy = "convert it with `torch.as_tensor`"
            raise TypeError(
                f"`data` must yield tensors, got a {type(value).__name__} in batch {index}; "
                f"{remedy}."
            )
    if (
        isinstance(inputs, Tensor)
        and targets is not None
        and (inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets))
    ):
        raise ValueError(
            f"`data` must yield x and y of one length, got shapes {tuple(inputs.shape)} and "
            f"{tuple(targets.shape)} in batch {index}."
        )
    return inputs, targets


def _are_annotations(targets: Any) -> bool:
    """Whether targets are a list of tensors or mappings, such as the boxes of each image."""
    return type(targets) in (list, tuple) and any(isinstance(t, Tensor | Mapping) for t in targets)


def size_of(inputs: Inputs, targets: Tensor | None) -> int:
    """Return the number of samples of a batch."""
    if targets is not None:
        return len(targets)
    if isinstance(inputs, Tensor):
        return len(inputs)
    tensors = [v for v in inputs.values() if isinstance(v, Tensor) and v.dim()]
    if not tensors:  # images of several sizes are in a list
        return max((len(v) for v in inputs.values() if type(v) in (list, tuple)), default=0)
    shared = Counter(len(v) for v in tensors)
    # The length that most have, of several alike that of the largest; one of 1 is broadcast.
    return len(
        max(tensors, key=lambda v: (len(v) > 1, shared[len(v)], v.is_floating_point(), v.dim()))
    )


def batch_tensors(drawn: Drawn) -> list[Tensor]:
    """Return all tensors of a batch, those in mappings and lists too."""
    return [leaf for leaf in tree_leaves(drawn[:2]) if isinstance(leaf, Tensor)]
