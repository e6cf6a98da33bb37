"""One fixed draw of the data, seen the same at every pass.

A random transform is drawn once: batch i has a random stream of its own, so it is the same
whichever passes came before. Small data are kept on the device as prepared; large data are drawn
again at each pass, and a fingerprint of every batch tells when they are not the same (a
shuffling loader).
"""

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
from landscape._loaders import generators_of, one_pass
from landscape._streams import OwnStreams

Inputs = Tensor | Mapping[str, Any]
Transform = Callable[[Any, Any, torch.Generator], tuple[Any, Any]]

LABEL_KEYS = ("labels", "label", "targets", "target")

_CHANGED = (
    "`data` must yield the same batches at every pass, but batch {} differs from before; "
    "use shuffle=False and move random augmentation to `Objective(transform=…)`."
)


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


class FrozenBatches:
    """Prepared batches: on one device, in one precision, transformed once.

    Attributes:
        num_samples: Number of samples over all batches.
        num_batches: Number of batches that count.
        num_drawn: Number of all, also of those without a sample or label that counts.
        label_range: Smallest and largest integer label that is not ignored, or `None`.
    """

    def __init__(
        self,
        data: Iterable[Any],
        *,
        placement: "Placement",
        transform: Transform | None,
        seed: int,
        amount: Callable[[Tensor | None, int], Tensor | float],
        ignore: int,
        labels: bool,
        wide: bool,
        keep_bytes: int,
    ) -> None:
        """Draw every batch once.

        Args:
            data: Re-iterable of batches, each `(x, y)` or a mapping.
            placement: Where the batches go, and in what precision.
            transform: Random transform of a batch, or `None`.
            seed: Seed of its stream.
            amount: `amount(targets, size)`, the weight of a batch in the mean over all data.
            ignore: The label that does not count.
            labels: Whether integer targets are class labels, of any integer type.
            wide: Whether the loss is taken in float32 at least, of targets as well.
            keep_bytes: Batches are kept up to this size.

        Raises:
            ValueError: If the data hold no sample, or none that counts.
        """
        check_data(data)
        self._data, self._placement = data, placement
        self._transform, self._seed, self._labels = transform, seed, labels
        self._place_targets = placement.place_targets if wide else placement.place
        self._generators = [generator.get_state() for generator in generators_of(data)]
        self._kept: list[_Drawn] | None = []
        self._prints: list[Tensor] = []
        self._copies = False  # of data that write each batch where the last one was
        while not self._first_pass(amount, ignore, keep_bytes):
            self._kept, self._copies = [], True

    def __len__(self) -> int:
        return self.num_batches

    @property
    def are_kept(self) -> bool:
        """Whether all are kept, so that a pass over them costs nothing."""
        return self._kept is not None

    def __iter__(self) -> Iterator[PreparedBatch]:
        """Yield the same batches in the same order at every pass, but for those of weight 0.

        Raises:
            ValueError: If `data` yields other batches than in the first pass.
        """
        drawn = self._redraw() if self._kept is None else self._kept
        for (inputs, targets, size), weight in zip(drawn, self._weights, strict=True):
            if weight:  # the mean over no counted label is NaN
                yield PreparedBatch(inputs, targets, size, weight)

    def _first_pass(
        self,
        amount: Callable[[Tensor | None, int], Tensor | float],
        ignore: int,
        keep_bytes: int,
    ) -> bool:
        """Draw every batch; return whether those that are kept are tensors of their own."""
        places: set[int] = set()
        sizes: list[int] = []
        amounts: list[Tensor | float] = []
        extremes: list[Tensor] = []
        held = 0
        for index, raw in enumerate(one_pass(self._data, self._generators)):
            drawn = self._prepare(raw, index)
            targets = drawn[1]
            sizes.append(drawn[2])
            amounts.append(amount(targets, drawn[2]))
            if targets is not None and not targets.is_floating_point() and targets.numel():
                extremes.append(_extremes(targets.long(), ignore))
            here = {
                t.data_ptr() for t in _tensors(drawn) if t.numel() and t.layout is torch.strided
            }
            if here & places and not self._copies:
                return False
            if self._kept is None:
                self._prints.append(_fingerprint(drawn))
                places = here  # a product may need the last batch and this one
                continue
            places |= here
            self._kept.append(drawn)
            held += _num_bytes(drawn)
            if held > keep_bytes:
                self._prints = [_fingerprint(d) for d in self._kept]
                self._kept, places = None, here  # the memory of the others is free to be used again
        self.num_samples = sum(sizes)
        if not self.num_samples:
            raise ValueError("`data` must yield at least one sample, got none; is it empty?")
        total = float(sum(float(a) for a in amounts))
        if not total > 0:
            raise ValueError("`data` must hold a target that counts, got only ignored labels.")
        self._weights = [float(a) / total for a in amounts]
        self.num_drawn = len(amounts)
        self.num_batches = sum(weight > 0 for weight in self._weights)
        self.label_range = None
        if extremes:
            both = torch.stack(extremes)
            self.label_range = (int(both[:, 0].min()), int(both[:, 1].max()))
        return True

    def _redraw(self) -> Iterator["_Drawn"]:
        count = 0
        for index, raw in enumerate(one_pass(self._data, self._generators)):
            drawn = self._prepare(raw, index)
            count += 1
            known = self._prints[index : index + 1]
            found = _fingerprint(drawn)
            if (
                not known
                or found.shape != known[0].shape
                or not torch.allclose(found, known[0], rtol=0, atol=0, equal_nan=True)
            ):
                raise ValueError(_CHANGED.format(index))
            yield drawn
        if count != len(self._prints):
            raise ValueError(_CHANGED.format(count))

    def _prepare(self, raw: Any, index: int) -> "_Drawn":
        inputs, targets = split_batch(raw, index)
        placement = self._placement
        inputs, targets = placement.place(inputs), self._place_targets(targets)
        if self._copies:
            inputs, targets = copied(inputs), copied(targets)
        size = _size(inputs, targets)
        if self._transform is not None:
            generator = torch.Generator().manual_seed(_mix(self._seed, index))
            with OwnStreams(_mix(self._seed, index)).entered():  # some draw from the global ones
                inputs, targets = transformed(self._transform, inputs, targets, generator)
            inputs, targets = placement.place(inputs), self._place_targets(targets)
            if _size(inputs, targets) != size:
                raise ValueError(
                    f"`transform` must keep the number of samples, got {size} -> "
                    f"{_size(inputs, targets)}."
                )
        if self._labels and targets is not None and not targets.is_floating_point():
            targets = targets.long()
        return inputs, targets, size


_Drawn = tuple[Any, Any, int]


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


def stream_batches(model: nn.Module, data: Iterable[Any]) -> "Iterator[_Drawn]":
    """Return one pass over the data as `(inputs, targets, size)` on the model's device.

    For probes that need no second pass; nothing is kept.

    Args:
        model: Whose device and precision the batches take.
        data: Re-iterable of batches, each `(x, y)` or a mapping.

    Returns:
        Iterator of `(inputs, targets, size)`. It raises a ValueError at its end if there was no
        sample.

    Raises:
        TypeError: If `data` cannot be iterated over twice.
    """
    check_data(data)
    return _stream(Placement.of(model), data)


def _stream(placement: Placement, data: Iterable[Any]) -> "Iterator[_Drawn]":
    total = 0
    for index, raw in enumerate(one_pass(data)):
        inputs, targets = split_batch(raw, index)
        inputs, targets = copied(placement.place(inputs)), placement.place_targets(targets)
        size = _size(inputs, targets)
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
        inputs: A tensor, or keyword arguments; what does not have a row per sample is left whole.
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
    return [t._version for t in _tensors((inputs, None, 0)) if not t.is_inference()]


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
            if isinstance(value, np.ndarray):
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


def _extremes(labels: Tensor, ignore: int) -> Tensor:
    """Return the smallest and the largest label that counts, `(2,)`."""
    limits = torch.iinfo(labels.dtype)
    skipped = labels == ignore
    low, high = labels.masked_fill(skipped, limits.max), labels.masked_fill(skipped, limits.min)
    return torch.stack([low.min(), high.max()])


def _size(inputs: Inputs, targets: Tensor | None) -> int:
    if targets is not None:
        return len(targets)
    if isinstance(inputs, Tensor):
        return len(inputs)
    tensors = [v for v in inputs.values() if isinstance(v, Tensor) and v.dim()]
    shared = Counter(len(v) for v in tensors)
    # The length that most have, of several alike that of the largest; one of 1 is broadcast.
    if not tensors:
        return 0
    return len(
        max(tensors, key=lambda v: (len(v) > 1, shared[len(v)], v.is_floating_point(), v.dim()))
    )


def _tensors(drawn: _Drawn) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(drawn[:2]) if isinstance(leaf, Tensor)]


def _num_bytes(drawn: _Drawn) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(drawn))


def _fingerprint(drawn: _Drawn) -> Tensor:
    """Return numbers that change when a sample of the batch changes, or something moves."""
    sums = []
    for t in _tensors(drawn):
        rows = t.detach().double()
        if rows.dim() > 1:
            rows = rows.flatten(1)
            places = torch.arange(rows.shape[1], device=t.device, dtype=torch.float64)
            rows = (rows * (1 + places / len(places))).sum(1)
        rows = rows.reshape(-1)
        ramp = torch.arange(1, len(rows) + 1, device=t.device, dtype=torch.float64)
        sums.append(torch.stack([rows.sum(), (rows * ramp).sum(), rows.new_tensor(t.numel())]))
    return torch.stack(sums)


def _mix(seed: int, index: int) -> int:
    return (seed * 0x9E3779B1 + index * 0x85EBCA77 + 1) % (1 << 63)
