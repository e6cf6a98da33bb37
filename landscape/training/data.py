"""Images as unsigned bytes that live on one device, served in normalised batches.

A pass over the data costs one gather and one multiply-add a batch, with no worker processes: on
one CPU thread this is an order of magnitude faster than decoding and collating sample by sample.

Augmentation, if any, acts on the bytes of a batch before normalisation: `x = (bytes / 255 - mean)
/ std`, per channel.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from landscape._checks import check_count
from landscape._digest import bytes_of
from landscape._names import lasting_name
from landscape.batches import Transform
from landscape.training.seeding import stream

_ORDER, _AUGMENT = 0, 1  # which random stream of an epoch
_CHUNK = 1024  # samples prepared at a time: few operations each, yet all fits into the cache


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return `(images / 255 - mean) / std` as float32.

    Args:
        images: Unsigned bytes `(n, c, h, w)`.
        mean: Mean of each channel `(c,)`, in units of full scale (0 to 1).
        std: Standard deviation of each channel `(c,)`, in the same units.

    Returns:
        Tensor `(n, c, h, w)`.
    """
    shift, scale = _shift_and_scale(mean, std, images.device)
    floats = images.float()
    return (floats.clone() if floats is images else floats).mul_(scale).add_(shift)


def denormalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the unsigned bytes that `normalize` took: rounded, and cut off at 0 and 255.

    Args:
        x: Normalised images `(n, c, h, w)`.
        mean: Mean of each channel `(c,)`, as given to `normalize`.
        std: Standard deviation of each channel `(c,)`, as given to `normalize`.

    Returns:
        Unsigned bytes `(n, c, h, w)`; `denormalize(normalize(images))` equals `images`.
    """
    shift, scale = _shift_and_scale(mean, std, x.device)
    return ((x - shift) / scale).round_().clamp_(0, 255).to(torch.uint8)


def check_mean_and_std(
    mean: Sequence[float], std: Sequence[float], channels: int | None = None
) -> None:
    """Refuse numbers that images cannot be normalised with.

    Args:
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        channels: Number of channels; `None` is that of `mean`.

    Raises:
        ValueError: If there is not one finite number a channel, or a deviation is not positive.
    """
    for name, values in (("mean", mean), ("std", std)):
        try:
            numbers = tuple(float(value) for value in values)
        except (TypeError, ValueError):
            raise ValueError(
                f"`{name}` must be a sequence of numbers, one per channel, got {values!r}."
            ) from None
        channels = len(numbers) if channels is None else channels
        if len(numbers) != channels:
            raise ValueError(
                f"`{name}` must have one value per channel ({channels}), got {len(numbers)}."
            )
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"`{name}` must be finite, got {numbers}.")
    if min(numbers, default=1.0) <= 0:
        raise ValueError(
            f"`std` must be positive, got {numbers}; take 1 for a channel that is constant."
        )


def _shift_and_scale(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return `a` and `b`, each `(c, 1, 1)`, of the map `a + b · bytes`."""
    deviations = torch.as_tensor(std, dtype=torch.float64, device="cpu").view(-1, 1, 1)
    shift = -torch.as_tensor(mean, dtype=torch.float64, device="cpu").view(-1, 1, 1) / deviations
    both = torch.stack((shift, 1 / (255 * deviations))).float().to(device, non_blocking=True)
    return both[0], both[1]


@dataclass(frozen=True, eq=False)
class DeviceImages:
    """Labelled images resident on one device: a re-iterable of batches `(x, y)`.

    `x` is float32 `(batch, c, h, w)`, normalised; `y` is int64 `(batch,)` unless `augment` changes
    it. Iterating draws nothing from the global random state and always yields the same batches:
    those of epoch 0. `batches(epoch)` gives those of another epoch: the order and the augmentation
    of an epoch are functions of `(seed, epoch)` alone, on whatever device, but that what is drawn
    for an image depends on how many batches are augmented at once: on `batch_size`, `drop_last`.

    Attributes:
        images: Unsigned bytes `(n, c, h, w)`.
        labels: Class indices, int64 `(n,)`, on the same device.
        mean: Mean of each channel `(c,)`, in units of full scale (0 to 1).
        std: Standard deviation of each channel `(c,)`, in the same units.
        classes: Class names `(num_classes,)`; by default "0", "1", … up to the largest label.
        batch_size: Samples per batch; the last batch may be smaller.
        shuffle: Whether each epoch has an order of its own.
        drop_last: Whether to leave out a smaller last batch.
        augment: Applied to `(bytes, labels, generator)` before normalisation; it sees several small
            batches at once, so it must treat samples one by one. Mixup and cutmix belong into the
            `transform` of `fit`.
        seed: Seed of order and augmentation.
    """

    images: Tensor
    labels: Tensor
    _: KW_ONLY
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str] | None = None
    batch_size: int = 128
    shuffle: bool = False
    drop_last: bool = False
    augment: Transform | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)
        if self.classes is None:
            names = tuple(str(label) for label in range(int(self.labels.max()) + 1))
            object.__setattr__(self, "classes", names)
        lowest, highest = (int(label) for label in self.labels.aminmax())
        if lowest < 0 or highest >= self.num_classes:
            raise ValueError(
                f"`labels` must lie in [0, {self.num_classes - 1}] for {self.num_classes} classes, "
                f"got {lowest} to {highest}; is the file corrupt, or `classes` of another set?"
            )

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of classes, those without a sample included."""
        return len(self.classes or ())

    @property
    def device(self) -> torch.device:
        """Where the images are and where batches are made."""
        return self.images.device

    def __repr__(self) -> str:
        shape, device = tuple(self.images.shape), self.device
        return (
            f"DeviceImages({shape} on {device}, {self.num_classes} classes, "
            f"batch_size={self.batch_size}, shuffle={self.shuffle}, augment={self.augment!r})"
        )

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        full, rest = divmod(self.num_samples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches(epoch=0)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one epoch, the same ones whenever it is asked for.

        Args:
            epoch: Number of the epoch, at least 0.

        Yields:
            Normalised images float32 `(batch, c, h, w)` and labels `(batch,)`.

        Raises:
            ValueError: If `epoch` is negative.
        """
        check_count("epoch", epoch, 0)
        order = None
        if self.shuffle:
            permutation = torch.randperm(
                self.num_samples, generator=stream(self.seed, epoch, _ORDER), device="cpu"
            )
            order = permutation.to(self.device, non_blocking=True)
        generator = stream(self.seed, epoch, _AUGMENT)
        end = len(self) * self.batch_size
        step = self.batch_size * max(1, _CHUNK // self.batch_size)
        for start in range(0, end, step):
            part = slice(start, min(start + step, end))
            if order is None:
                x, y = self.images[part], self.labels[part].clone()
            else:
                x = self.images.index_select(0, order[part])
                y = self.labels.index_select(0, order[part])
            if self.augment is not None:
                x, y = self.augment(x.clone() if order is None else x, y, generator)
            for first in range(0, len(y), self.batch_size):
                batch = slice(first, first + self.batch_size)
                yield normalize(x[batch], self.mean, self.std), y[batch]

    def identity(self) -> dict[str, Any]:
        """Return what the batches are made of, alike for alike images on whatever device.

        Returns:
            Settings by name, numbers and words, and a checksum of all images and labels: one pass.
        """
        checksum = zlib.crc32(bytes_of(self.labels))
        for part in torch.split(self.images, _CHUNK):
            checksum = zlib.crc32(bytes_of(part), checksum)
        return {
            "shape": tuple(self.images.shape),
            "batch_size": int(self.batch_size),
            "shuffle": bool(self.shuffle),
            "drop_last": bool(self.drop_last),
            "seed": int(self.seed),
            "mean": tuple(float(value) for value in self.mean),
            "std": tuple(float(value) for value in self.std),
            "augment": None if self.augment is None else lasting_name(self.augment),
            "checksum": f"{checksum:08x}",
        }

    def subset(
        self,
        which: int | Sequence[int] | Tensor,
        *,
        stratified: bool = True,
        generator: torch.Generator | None = None,
    ) -> "DeviceImages":
        """Return some of the images, in the order they have here.

        Args:
            which: How many to draw without replacement, or the indices to take as they are, or one
                bool an image.
            stratified: Whether a drawn subset keeps the proportions of the classes: to within
                one sample a class where these are alike in size. Draws of two sizes from equal
                generators are nested.
            generator: CPU source of the draw; `None` is a fresh one with seed 0.

        Returns:
            `DeviceImages` with the same settings and classes.

        Raises:
            ValueError: If a count is not between 1 and `num_samples`, or `which` is none of these.
        """
        if not isinstance(which, int | np.integer):
            index = torch.as_tensor(which, device=self.device)
            whole = not (index.is_floating_point() or index.is_complex())
            if not whole or (index.dtype == torch.bool and index.shape != self.labels.shape):
                raise ValueError(
                    f"`which` must be a count, indices, or one bool an image, got {index.dtype} of "
                    f"shape {tuple(index.shape)}."
                )
            index = index if index.dtype == torch.bool else index.long()
            return self.with_(images=self.images[index], labels=self.labels[index])
        if not 1 <= which <= self.num_samples:
            raise ValueError(f"`which` must be between 1 and {self.num_samples}, got {which}.")
        generator = generator or torch.Generator().manual_seed(0)
        order = torch.randperm(self.num_samples, generator=generator, device="cpu")
        if stratified:
            order = _interleave_classes(order, self.labels.cpu())
        index = order[:which].sort().values.to(self.device)
        return self.with_(images=self.images[index], labels=self.labels[index])

    def with_(self, **changes: Any) -> "DeviceImages":
        """Return a copy with some attributes changed; the images are shared, not copied.

        Args:
            **changes: Attributes and their new values, for instance `batch_size=16`.

        Returns:
            New `DeviceImages`.
        """
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str) -> "DeviceImages":
        """Return the same images on another device.

        Args:
            device: Where images and labels shall live.

        Returns:
            New `DeviceImages`; order and augmentation draws stay the same.
        """
        return self.with_(images=self.images.to(device), labels=self.labels.to(device))

    def resized(self, size: int | None = None, channels: int | None = None) -> "DeviceImages":
        """Return the images padded with zeros to `size` and repeated to `channels`.

        Nothing is resampled. Mean and standard deviation stay those of the unpadded images.

        Args:
            size: Height and width, at least the present ones; an odd difference puts the extra row
                and column last. `None` keeps them.
            channels: Number of channels; only a single channel can be repeated. `None` keeps them.

        Returns:
            New `DeviceImages`.

        Raises:
            ValueError: If the images are larger than `size`, or several channels would change.
        """
        images, mean, std = self.images, tuple(self.mean), tuple(self.std)
        if size is not None:
            rest = [size - images.shape[3], size - images.shape[2]]
            if min(rest) < 0:
                raise ValueError(
                    f"`size` must be at least {max(images.shape[2:])}, the size of the images, "
                    f"got {size}; images are padded, never cut."
                )
            images = F.pad(images, [part for r in rest for part in (r // 2, r - r // 2)])
        if channels is not None and channels != images.shape[1]:
            if images.shape[1] != 1 or channels < 1:
                raise ValueError(
                    f"`channels` must be {images.shape[1]}, the channels of the images, got "
                    f"{channels}; only a single channel can be repeated."
                )
            images, mean, std = images.repeat(1, channels, 1, 1), mean * channels, std * channels
        return self.with_(images=images, mean=mean, std=std)


def _interleave_classes(order: Tensor, labels: Tensor) -> Tensor:
    """Return `order` rearranged so that every beginning of it has the classes' proportions."""
    labels = labels[order]
    position = torch.empty(len(order), dtype=torch.float64, device="cpu")
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().squeeze(1)
        ranks = torch.arange(len(members), dtype=torch.float64, device="cpu")
        position[members] = (ranks + 0.5) / max(len(members), 1)
    return order[position.argsort(stable=True)]


def _check(data: DeviceImages) -> None:
    """Raise if images, labels and settings do not fit together."""
    images, labels = data.images, data.labels
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            "`images` must be unsigned bytes of shape (n, c, h, w), got "
            f"{images.dtype} of shape {tuple(images.shape)}."
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"`labels` must be int64 of shape ({len(images)},), one per image and at least one, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if labels.device != images.device:
        raise ValueError(
            f"`labels` must be on the device of `images` ({images.device}), got {labels.device}."
        )
    check_mean_and_std(data.mean, data.std, images.shape[1])
    check_count("batch_size", data.batch_size, 1)
    check_count("seed", data.seed, 0)


def identity_of(**data: Any) -> dict[str, Any]:
    """Return what runs on these data must have in common, as far as it can be told.

    Args:
        **data: Data by the name of their argument; of others than `DeviceImages` nothing is told.

    Returns:
        Numbers and words, by names such as `data.batch_size`.
    """
    told: dict[str, Any] = {}
    for name, images in data.items():
        known = isinstance(images, DeviceImages)
        told[name] = "DeviceImages" if known else "no DeviceImages"
        settings = images.identity() if known else {}
        told |= {f"{name}.{setting}": value for setting, value in settings.items()}
    return told
