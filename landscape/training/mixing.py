"""Soft targets, mixup and cutmix, and the paper's whole recipe as one transform."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from landscape._checks import check_at_least, check_count, check_finite, check_within
from landscape.batches import Transform
from landscape.training.augment import (
    Compose,
    Denormalize,
    HorizontalFlip,
    Normalize,
    RandomCrop,
    RandomErasing,
    box_mask,
    check_floats,
    uniform,
)
from landscape.training.randaugment import RandAugment


@dataclass(frozen=True)
class LabelSmoothing:
    """Turn class indices into soft targets: `(1 - s) · one-hot + s / num_classes`.

    Mixup and cutmix need soft targets; `smoothing=0` gives them one-hot ones.

    Attributes:
        num_classes: Number of classes.
        smoothing: Share `s` of the weight that is spread evenly over all classes.
    """

    num_classes: int
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_count("num_classes", self.num_classes, 1)
        check_within("smoothing", self.smoothing, 0, 1)

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the images as they are and targets `(n, num_classes)` of their dtype."""
        if y.is_floating_point() or y.ndim != 1:
            raise ValueError(
                f"`y` must be class indices (n,), got {y.dtype} of shape {tuple(y.shape)}; apply "
                "LabelSmoothing once."
            )
        if y.device.type == "cpu" and len(y):  # looking would make the host wait for a GPU
            first, last = (int(end) for end in torch.aminmax(y))
            if first < 0 or last >= self.num_classes:
                raise ValueError(
                    "`y` must be class indices from 0 to num_classes - 1 = "
                    f"{self.num_classes - 1}, got {first} to {last}."
                )
        dtype = x.dtype if x.is_floating_point() else torch.float32
        low = self.smoothing / self.num_classes
        target = torch.full((len(y), self.num_classes), low, dtype=dtype, device=y.device)
        return x, target.scatter_(1, y.long().unsqueeze(1), 1 - self.smoothing + low)


@dataclass(frozen=True)
class Mixup:
    """Mix each sample with another one of the batch (Zhang et al., 2018).

    `x_i ← λ x_i + (1 - λ) x_π(i)`, targets alike, with `λ ~ Beta(alpha, alpha)` and a random
    permutation π of the batch.

    Attributes:
        alpha: Parameter of the beta distribution; 1 in the paper's recipe.
        per_sample: Draw a λ for each sample rather than, as in the paper's setting, for the batch.
    """

    alpha: float = 1.0
    per_sample: bool = False

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return mixed images and targets."""
        _check_mixable("Mixup", x, y)
        other = torch.randperm(len(x), generator=generator, device=generator.device)
        share = _beta(self.alpha, len(x) if self.per_sample else 1, generator)
        other, share = (t.to(x.device, non_blocking=True) for t in (other, share))
        share = share.to(x.dtype)
        mixed = torch.lerp(x[other], x, share.view(-1, 1, 1, 1))
        return mixed, torch.lerp(y[other], y, share.view(-1, 1).to(y.dtype))


@dataclass(frozen=True)
class CutMix:
    """Paste a box of another sample of the batch (Yun et al., 2019).

    The box has `1 - λ` of the area and the image's proportions, `λ ~ Beta(alpha, alpha)`; its
    centre is uniform and what sticks out is cut off. Targets are mixed by the area that was pasted.

    Attributes:
        alpha: Parameter of the beta distribution; 0.8 in the paper's recipe.
        per_sample: Draw a box for each sample rather than, as in the paper's setting, for the
            batch.
    """

    alpha: float = 0.8
    per_sample: bool = False

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return mixed images and targets."""
        _check_mixable("CutMix", x, y)
        h, w = x.shape[2:]
        count = len(x) if self.per_sample else 1
        other = torch.randperm(len(x), generator=generator, device=generator.device)
        side = (1 - _beta(self.alpha, count, generator)).sqrt()
        centre = uniform(generator, count, 2)
        edges = []
        for axis, size in enumerate((h, w)):
            length = (side * size).floor()
            middle = (centre[:, axis] * size).floor()
            first = middle - (length / 2).floor()
            edges += [first.clamp(0, size), (first + length).clamp(0, size)]
        box = torch.stack(edges, 1)
        pasted = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) / (h * w)
        other, box, pasted = (t.to(x.device, non_blocking=True) for t in (other, box, pasted))
        mixed = torch.where(box_mask(box, h, w), x[other], x)
        return mixed, torch.lerp(y, y[other], pasted.view(-1, 1).to(y.dtype))


@dataclass(frozen=True)
class OneOf:
    """One of several transforms, drawn for each batch with equal probability.

    Attributes:
        transforms: The transforms to draw from.
        probability: Of applying any.
    """

    transforms: Sequence[Transform]
    probability: float = 1.0

    def __post_init__(self) -> None:
        check_within("probability", self.probability, 0, 1)
        if not self.transforms:
            raise ValueError("`transforms` must hold at least one transform, got none.")

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the batch after the transform drawn."""
        draw = uniform(generator, 2).tolist()
        if draw[0] >= self.probability:
            return x, y
        chosen = self.transforms[min(int(draw[1] * len(self.transforms)), len(self.transforms) - 1)]
        mixed: tuple[Tensor, Tensor] = chosen(x, y, generator)
        return mixed


def recipe(
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int,
    *,
    padding: int = 4,
    flip: float = 0.5,
    randaugment: RandAugment | None = None,
    erasing: float = 0.0,
    smoothing: float = 0.1,
    mixup: float = 1.0,
    cutmix: float = 0.8,
    probability: float = 1.0,
) -> Compose:
    """Return the augmentation of Park & Kim (2022) as one transform of normalised batches.

    Padded crop, flip, RandAugment (`rand-m9-n2-mstd1.0`), erasing, label smoothing, then mixup or
    cutmix with equal probability. It takes normalised images with class indices, as `DeviceImages`
    yields them without `augment`, and returns normalised images with soft targets; so one object
    serves `fit(transform=…)` and `Objective(transform=…)`.

    Args:
        mean: Mean of each channel that the batches were normalised with, in units of full scale.
        std: Standard deviation of each channel, in the same units.
        num_classes: Number of classes.
        padding: Of the random crop, in pixels; 0 leaves it out.
        flip: Probability of a horizontal flip.
        randaugment: RandAugment with other settings; by default the paper's, with the mean colour
            as fill. `RandAugment(num_ops=0)` leaves it out.
        erasing: Probability of random erasing; the paper has 0 on CIFAR and 0.25 on ImageNet.
        smoothing: Label smoothing.
        mixup: α of mixup; 0 leaves it out.
        cutmix: α of cutmix; 0 leaves it out.
        probability: Of mixing a batch at all.

    Returns:
        `Compose` of the parts in use.

    Raises:
        ValueError: If an argument is out of range.
    """
    for name, share in (("flip", flip), ("erasing", erasing), ("probability", probability)):
        check_within(name, share, 0, 1)
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        check_at_least(name, alpha, 0)
    chain: list[Transform] = [Denormalize(mean, std)]
    if randaugment is None:
        if len(mean) not in (1, 3):
            raise ValueError(
                f"`mean` must have 1 or 3 channels for RandAugment, got {len(mean)}; leave it out "
                "with `randaugment=RandAugment(num_ops=0)`."
            )
        colour = (min(max(float(value), 0.0), 1.0) for value in mean)
        randaugment = RandAugment(fill=tuple(round(255 * value) for value in colour))
    mixing: list[Transform] = [Mixup(mixup)] if mixup else []
    mixing += [CutMix(cutmix)] if cutmix else []
    chain += [RandomCrop(padding)] if padding else []
    chain += [HorizontalFlip(flip)] if flip else []
    chain += [randaugment] if randaugment.num_ops else []
    chain += [Normalize(mean, std)]
    chain += [RandomErasing(erasing)] if erasing else []
    chain += [LabelSmoothing(num_classes, smoothing)]
    chain += [OneOf(mixing, probability)] if mixing and probability else []
    return Compose(chain)


def _beta(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """Return draws from Beta(alpha, alpha) on the generator's device, float32 `(count,)`."""
    share = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
    if alpha == 1.0:
        return share.float()
    from scipy.special import betaincinv

    quantiles = torch.from_numpy(betaincinv(alpha, alpha, share.cpu().numpy()))
    return quantiles.to(generator.device).float()


def _check_alpha(alpha: float) -> None:
    """Refuse a parameter that defines no beta distribution."""
    check_finite("alpha", alpha)
    if not alpha > 0:
        raise ValueError(f"`alpha` must be positive, got {alpha}; leave the transform out instead.")


def _check_mixable(transform: str, x: Tensor, y: Tensor) -> None:
    """Refuse bytes and class indices, which cannot be mixed."""
    check_floats(transform, x)
    if not y.is_floating_point():
        raise ValueError(
            f"`y` must be soft targets (n, num_classes) for {transform}, got {y.dtype} of shape "
            f"{tuple(y.shape)}; put `LabelSmoothing` first."
        )
    if x.dim() != 4 or y.dim() != 2 or len(x) != len(y):
        raise ValueError(
            f"`x` and `y` must be images (n, c, h, w) and soft targets (n, num_classes) for "
            f"{transform}, got shapes {tuple(x.shape)} and {tuple(y.shape)}."
        )
