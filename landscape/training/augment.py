"""Random transforms of whole batches, drawn per sample: crop, flip, erasing.

A transform is a callable `(x, y, generator) -> (x, y)`; nothing but `generator` is drawn from, on
its own device, so that a CPU generator gives the same draws whatever the device of `x` and no
draw makes the host wait for a GPU. Three kinds meet in a chain, in this order:

1. images of any dtype: `RandomCrop`, `HorizontalFlip`; bytes only: `RandAugment`;
2. from bytes to floats and back: `Normalize`, `Denormalize`;
3. normalised floats: `RandomErasing`, `LabelSmoothing`, `Mixup`, `CutMix`.

`DeviceImages(augment=…)` takes the first kind, since it normalises afterwards. `fit(transform=…)`
and `Objective(transform=…)` get batches that are normalised already: begin with `Denormalize` and
end with `Normalize`, or take `recipe`, which does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from landscape._checks import check_count, check_finite, check_within
from landscape.batches import Transform
from landscape.training.data import check_mean_and_std, denormalize, normalize


@dataclass(frozen=True)
class Compose:
    """Transforms applied one after another.

    Attributes:
        transforms: The transforms, first one first.
    """

    transforms: Sequence[Transform]

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the batch after all transforms."""
        for transform in self.transforms:
            x, y = transform(x, y, generator)
        return x, y


@dataclass(frozen=True)
class Normalize:
    """From bytes to normalised float32: `(x / 255 - mean) / std`, per channel.

    Attributes:
        mean: Mean of each channel, in units of full scale.
        std: Standard deviation of each channel, in the same units.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        check_mean_and_std(self.mean, self.std)

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return normalised images and the labels as they are."""
        return normalize(x, self.mean, self.std), y


@dataclass(frozen=True)
class Denormalize:
    """From normalised floats back to the bytes they came from, rounded.

    Attributes:
        mean: Mean of each channel, as given to `Normalize`.
        std: Standard deviation of each channel, as given to `Normalize`.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        check_mean_and_std(self.mean, self.std)

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return bytes and the labels as they are."""
        return denormalize(x, self.mean, self.std), y


@dataclass(frozen=True)
class RandomCrop:
    """Pad on all sides, then cut out a window of the old size, placed uniformly per sample.

    Attributes:
        padding: Pixels added on each side; 4 in the paper's recipe on CIFAR.
        fill: Value of the added pixels, in units of `x`.
    """

    padding: int = 4
    fill: float = 0.0

    def __post_init__(self) -> None:
        check_count("padding", self.padding, 0)
        check_finite("fill", self.fill)

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the cropped images `(n, c, h, w)` and the labels as they are."""
        if x.dtype == torch.uint8:
            check_within("fill", self.fill, 0, 255)
        n, c, h, w = x.shape
        padded = F.pad(x, (self.padding,) * 4, value=self.fill)
        top, left = torch.randint(
            2 * self.padding + 1, (2, n), generator=generator, device=generator.device
        )
        # Whole rows of pixels are gathered, samples sorted by column; each column is then a slice.
        order = left.argsort(stable=True)
        first = torch.arange(c, device=order.device) + c * order.view(n, 1)
        rows = (first * padded.shape[2] + top[order].view(n, 1)).unsqueeze(2)
        rows = rows + torch.arange(h, device=order.device)
        lines = padded.reshape(-1, padded.shape[3]).index_select(
            0, rows.flatten().to(x.device, non_blocking=True)
        )
        lines = lines.view(n, c, h, -1)
        ends = torch.bincount(left).cumsum(0).tolist()
        cropped = torch.cat(
            [
                lines[start:end, ..., column : column + w]
                for column, (start, end) in enumerate(pairwise([0, *ends]))
            ]
        )
        back = torch.empty_like(order)
        back[order] = torch.arange(n, device=order.device)
        return cropped.index_select(0, back.to(x.device, non_blocking=True)), y


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left and right, decided per sample.

    Attributes:
        probability: Of mirroring a sample.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        check_within("probability", self.probability, 0, 1)

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the images, some of them mirrored, and the labels as they are."""
        mirrored = uniform(generator, len(x))
        order = mirrored.argsort()  # those below the probability come first
        back = order.argsort().to(x.device, non_blocking=True)
        count = int((mirrored < self.probability).sum())
        x = x.index_select(0, order.to(x.device, non_blocking=True))
        x[:count] = x[:count].flip(-1)
        return x.index_select(0, back), y


@dataclass(frozen=True)
class RandomErasing:
    """Replace a random box by noise or a constant, decided per sample (Zhong et al., 2017).

    The box has a share of the area drawn uniformly from `area` and a ratio of height to width
    drawn log-uniformly from `ratio`; of ten such draws the first that fits is taken, none if none
    fits. Acts on normalised floats.

    Attributes:
        probability: Of erasing in a sample; 0.25 in the paper's recipe on ImageNet, 0 on CIFAR.
        area: Smallest and largest share of the image's area.
        ratio: Smallest and largest height / width.
        value: Value put in, in units of `x`; `None` is standard normal noise per pixel.
    """

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)
    value: float | None = None

    def __post_init__(self) -> None:
        check_within("probability", self.probability, 0, 1)
        for name, (low, high) in (("area", self.area), ("ratio", self.ratio)):
            if not 0 < low <= high < math.inf:
                raise ValueError(f"`{name}` must be positive and increasing, got {(low, high)}.")
        if self.value is not None:
            check_finite("value", self.value)

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the images, some of them with a box replaced, and the labels as they are."""
        check_floats("RandomErasing", x)
        n, _, h, w = x.shape
        draws = uniform(generator, n, 41)
        chosen, (areas, ratios, tops, lefts) = draws[:, 0], draws[:, 1:].view(n, 4, 10).unbind(1)
        share = self.area[0] + areas * (self.area[1] - self.area[0])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = (low + ratios * (high - low)).exp()
        heights = (share * h * w * ratio).sqrt().round()
        widths = (share * h * w / ratio).sqrt().round()
        fits = (heights < h) & (widths < w)
        first = fits.int().argmax(1, keepdim=True)
        erased = (chosen < self.probability) & fits.any(1)
        box_h, box_w = (heights.gather(1, first) * erased[:, None], widths.gather(1, first))
        top = (tops.gather(1, first) * (h - box_h + 1)).floor()
        left = (lefts.gather(1, first) * (w - box_w + 1)).floor()
        box = torch.cat((top, top + box_h, left, left + box_w), 1)
        inside = box_mask(box.to(x.device, non_blocking=True), h, w)
        if self.value is not None:
            return x.masked_fill(inside, self.value), y
        noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
        return torch.where(inside, noise.to(x.device, non_blocking=True), x), y


def box_mask(box: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels lie in a box, one box a sample.

    Args:
        box: Top, bottom, left, right `(n, 4)`; bottom and right are exclusive.
        height: Height of the images.
        width: Width of the images.

    Returns:
        Booleans `(n, 1, height, width)`.
    """
    top, bottom, left, right = box.view(-1, 4, 1, 1, 1).unbind(1)
    rows = torch.arange(height, device=box.device).view(-1, 1)
    columns = torch.arange(width, device=box.device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Return float32 draws from [0, 1) on the generator's device, whatever PyTorch's default type.

    Args:
        generator: Source of the draws.
        *shape: Shape of the result.
    """
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)


def check_floats(transform: str, x: Tensor) -> None:
    """Refuse bytes where normalised images are needed.

    Args:
        transform: Name of the transform.
        x: Images.
    """
    if not x.is_floating_point():
        raise ValueError(
            f"`x` must be normalised floats for {transform}, got {x.dtype}; put `Normalize` first."
        )
