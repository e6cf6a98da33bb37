"""One fixed draw of the data, seen the same at every pass.

A random transform is drawn once: batch i has a random stream of its own, so it is the same
whichever passes came before. Small data are kept on the device as prepared; large data are drawn
again at each pass, and a fingerprint of every batch tells when they are not the same (a
shuffling loader).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from landscape._checks import check_data
from landscape._loaders import generators_of, one_pass
from landscape._streams import OwnStreams
from landscape.batches import (
    Drawn,
    Placement,
    PreparedBatch,
    Transform,
    batch_tensors,
    copied,
    size_of,
    split_batch,
    transformed,
)

_CHANGED = (
    "`data` must yield the same batches at every pass, but batch {} differs from before; "
    "use shuffle=False and move random augmentation to `Objective(transform=…)`."
)


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
        placement: Placement,
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
        self._kept: list[Drawn] | None = []
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
                t.data_ptr()
                for t in batch_tensors(drawn)
                if t.numel() and t.layout is torch.strided
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

    def _redraw(self) -> Iterator[Drawn]:
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

    def _prepare(self, raw: Any, index: int) -> Drawn:
        inputs, targets = split_batch(raw, index)
        placement = self._placement
        inputs, targets = placement.place(inputs), self._place_targets(targets)
        if self._copies:
            inputs, targets = copied(inputs), copied(targets)
        size = size_of(inputs, targets)
        if self._transform is not None:
            generator = torch.Generator().manual_seed(_mix(self._seed, index))
            with OwnStreams(_mix(self._seed, index)).entered():  # some draw from the global ones
                inputs, targets = transformed(self._transform, inputs, targets, generator)
            inputs, targets = placement.place(inputs), self._place_targets(targets)
            if size_of(inputs, targets) != size:
                raise ValueError(
                    f"`transform` must keep the number of samples, got {size} -> "
                    f"{size_of(inputs, targets)}."
                )
        if self._labels and targets is not None and not targets.is_floating_point():
            targets = targets.long()
        return inputs, targets, size


def _extremes(labels: Tensor, ignore: int) -> Tensor:
    """Return the smallest and the largest label that counts, `(2,)`."""
    limits = torch.iinfo(labels.dtype)
    skipped = labels == ignore
    low, high = labels.masked_fill(skipped, limits.max), labels.masked_fill(skipped, limits.min)
    return torch.stack([low.min(), high.max()])


def _num_bytes(drawn: Drawn) -> int:
    return sum(t.numel() * t.element_size() for t in batch_tensors(drawn))


def _fingerprint(drawn: Drawn) -> Tensor:
    """Return numbers that change when a sample of the batch changes, or something moves."""
    sums = []
    for t in batch_tensors(drawn):
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
