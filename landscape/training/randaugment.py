"""RandAugment on whole batches of bytes, operations drawn per sample (Cubuk et al., 2020).

The settings are timm's `rand-m9-n2-mstd1.0`, which Park & Kim (2022) use: two operations a sample,
drawn with replacement from fifteen, each applied with probability 0.5 at a level drawn from
N(9, 1), cut off at 0 and 10. Level 10 means: rotate by 30°, shear by 0.3, translate by 0.45 of the
size (these with random sign); factor 1.9 for brightness, contrast, colour and sharpness (level 0:
0.1); posterize to 4 bits; solarize from 256 up; add 110 to what is under 128. So some operations,
like timm's, get weaker as the level grows.

Results equal Pillow's to one grey level. (Where timm draws bilinear or bicubic interpolation at
random, it is bilinear here.) Samples are sorted by operation, so that each operation costs a few
tensor operations a batch however many samples draw it, and operations of one form share them:

- a *remap* `origin + factor · (image - centre)`, cut off at 0 and 255, with per-channel numbers
  (invert, auto-contrast, brightness, contrast) or with images (colour, sharpness);
- an *affine* map of coordinates, sampled bilinearly; what lies outside gets `fill`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from landscape._checks import check_at_least, check_count, check_within
from landscape.training.augment import uniform


class _Op(NamedTuple):
    """An operation of strength `offset + scale · level / 10`, `whole` or with random sign."""

    name: str
    scale: float = 0.0
    offset: float = 0.0
    whole: bool = False
    signed: bool = False


# In the order of the code below, which takes runs of operations of one form together.
OPS = (
    _Op("posterize", 4, whole=True),
    _Op("solarize", 256, whole=True),
    _Op("solarize_add", 110, whole=True),
    _Op("equalize"),
    _Op("invert"),
    _Op("auto_contrast"),
    _Op("brightness", 1.8, 0.1),
    _Op("contrast", 1.8, 0.1),
    _Op("color", 1.8, 0.1),
    _Op("sharpness", 1.8, 0.1),
    _Op("rotate", 30, signed=True),
    _Op("shear_x", 0.3, signed=True),
    _Op("shear_y", 0.3, signed=True),
    _Op("translate_x", 0.45, signed=True),
    _Op("translate_y", 0.45, signed=True),
)
NONE = len(OPS)  # stands for "leave the sample alone"; sorts last
_INDEX = {op.name: index for index, op in enumerate(OPS)}
_SETTINGS = torch.tensor(
    [(op.scale / 10, op.offset, op.whole, op.signed) for op in OPS] + [(0.0,) * 4],
    dtype=torch.float32,
    device="cpu",
)
# Pillow rounds down; this keeps 200 from becoming 199.99998 and then 199.
_NUDGE = 1e-3


@dataclass(frozen=True)
class RandAugment:
    """RandAugment, `rand-m9-n2-mstd1.0` by default; see the module's text. Takes bytes.

    Attributes:
        num_ops: Operations drawn a sample.
        magnitude: Mean of the level, 0 to 10.
        magnitude_std: Standard deviation of the level.
        probability: Of applying a drawn operation.
        fill: Value outside the image, 0 to 255, one for all channels or one each; timm takes the
            mean colour.
    """

    num_ops: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 1.0
    probability: float = 0.5
    fill: int | Sequence[int] = 128

    def __post_init__(self) -> None:
        check_count("num_ops", self.num_ops, 0)
        check_within("magnitude", self.magnitude, 0, 10)
        check_at_least("magnitude_std", self.magnitude_std, 0)
        check_within("probability", self.probability, 0, 1)
        for value in self._fill:
            check_within("fill", value, 0, 255)
        if len(self._fill) not in (1, 3):
            raise ValueError(
                "`fill` must be one value, or one for each of 1 or 3 channels, got "
                f"{len(self._fill)}."
            )

    @property
    def _fill(self) -> tuple[int, ...]:
        """Value outside the image, one for all channels or one each."""
        return tuple(self.fill) if isinstance(self.fill, Iterable) else (self.fill,)

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the augmented images, bytes `(n, c, h, w)`, and the labels as they are."""
        if x.dtype != torch.uint8 or x.shape[1] not in (1, 3):
            raise ValueError(
                "`x` must be bytes with 1 or 3 channels for RandAugment, got "
                f"{x.dtype} of shape {tuple(x.shape)}; put it before `Normalize`."
            )
        if len(self._fill) not in (1, x.shape[1]):
            raise ValueError(
                f"`fill` must have one value per channel of the images, {x.shape[1]}, got "
                f"{len(self._fill)}; one alone is for all."
            )
        shape, device = (self.num_ops, len(x)), generator.device
        drawn = torch.randint(NONE, shape, generator=generator, device=device)
        chance, sign = uniform(generator, 2, *shape)
        normal = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        ops = torch.where(chance < self.probability, drawn, NONE)
        level = (self.magnitude + self.magnitude_std * normal).clamp_(0, 10)
        strength = strengths(ops, level, sign < 0.5)
        order = ops.argsort(dim=1, stable=True)
        ops, strength = ops.gather(1, order), strength.gather(1, order)
        at = torch.arange(len(x), device=device)  # where each sample is now
        for layer, back in enumerate(order.argsort(dim=1)):
            x = x.index_select(0, at[order[layer]].to(x.device, non_blocking=True))
            apply_sorted(x, ops[layer], strength[layer], self._fill)
            at = back
        return x.index_select(0, at.to(x.device, non_blocking=True)), y


def strengths(ops: Tensor, level: Tensor, negative: Tensor) -> Tensor:
    """Return what a level means for an operation.

    Args:
        ops: Indices into `OPS`, or `NONE`.
        level: Levels from 0 to 10, of the same shape.
        negative: Booleans of the same shape: the sign where the operation has one.

    Returns:
        Strengths of the same shape: degrees, shares of the size, factors, bits, thresholds.
    """
    scale, offset, whole, signed = _SETTINGS.to(ops.device)[ops].unbind(-1)
    strength = offset + scale * level
    return (strength - whole * strength.frac()) * (1 - 2 * signed * negative)


def apply_sorted(images: Tensor, ops: Tensor, strength: Tensor, fill: int | Sequence[int]) -> None:
    """Apply one operation to each image, in place.

    Args:
        images: Bytes `(n, c, h, w)` with 1 or 3 channels, changed.
        ops: Index into `OPS`, or `NONE`, for each sample `(n,)`, in increasing order. Best on the
            CPU, because they are counted.
        strength: Strength for each sample `(n,)`, as `strengths` returns it.
        fill: Value outside the image, one for all channels or one each.
    """
    counts = torch.bincount(ops, minlength=NONE + 1).tolist()
    ends = list(accumulate(counts))
    start = {name: ends[index] - counts[index] for name, index in _INDEX.items()}
    start["none"] = ends[NONE - 1]

    def run(first: str, after: str) -> tuple[Tensor, Tensor]:
        span = slice(start[first], start[after])
        return images[span], strength[span].to(images.device, non_blocking=True).view(-1, 1, 1, 1)

    part, bits = run("posterize", "solarize")
    part &= (256 - torch.exp2(8 - bits)).to(torch.uint8)
    part, threshold = run("solarize", "solarize_add")
    part.copy_(_solarize(part.to(torch.int16), threshold.to(torch.int16)))
    part, amount = run("solarize_add", "equalize")
    part.copy_(_solarize_add(part.to(torch.int16), amount.to(torch.int16)))
    part, _ = run("equalize", "invert")
    if len(part):
        part.copy_(_equalize(part))
    part, factor = run("invert", "color")
    if len(part):
        edges = [start[name] - start["invert"] for name in ("auto_contrast", "brightness")]
        centre, factor, origin = _linear(
            part, factor, edges[0], edges[1], start["contrast"] - start["invert"]
        )
        part.copy_(_remap(part.float(), centre, factor, origin))
    part, factor = run("color", "rotate")
    if len(part):
        base = _base(part.float(), start["sharpness"] - start["color"])
        part.copy_(_remap(part.float(), base, factor, base))
    span = slice(start["rotate"], start["none"])
    if len(images[span]):
        matrices = _matrices(ops[span], strength[span], *images.shape[2:])
        matrices = matrices.to(images.device, non_blocking=True)
        images[span] = _warp(images[span], matrices, fill)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Return the images with values from the threshold up inverted; all int16."""
    above = (threshold - 1 - images) >> 15  # all bits from the threshold up, none below it
    return images ^ (above & 255)


def _solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    """Return the images with up to 127 added to values under 128; all int16."""
    return images + (((images - 128) >> 15) & amount)


def _equalize(images: Tensor) -> Tensor:
    """Return the images with the histogram of each channel flattened."""
    pixels = images.flatten(2).long()
    made: dict[str, Any] = {"dtype": torch.float32, "device": images.device}
    histogram = torch.zeros(*pixels.shape[:2], 256, **made)
    histogram.scatter_add_(2, pixels, torch.ones((), **made).expand(pixels.shape))
    last = histogram.gather(2, images.flatten(2).amax(2, keepdim=True).long())
    step = ((pixels.shape[2] - last) / 255).floor_()
    below = histogram.cumsum(2).sub_(histogram)
    flat = below.add_((step / 2).floor_()).div_(step.clamp(min=1)).floor_().clamp_(max=255)
    same = torch.arange(256, **made).expand_as(flat)
    table = torch.lerp(same, flat, step.clamp(max=1))  # few distinct pixels: step 0, left alone
    return table.to(torch.int16).to(torch.uint8).gather(2, pixels).view_as(images)


def _linear(
    images: Tensor, factor: Tensor, auto: int, bright: int, contrast: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return centre, factor and origin, each `(m, c, 1, 1)`.

    Samples are sorted: inverted ones, from `auto` on auto-contrast, from `bright` on brightness,
    which is a blend with black, from `contrast` on contrast, a blend with the mean grey.
    """
    centre = factor.new_zeros(*images.shape[:2], 1, 1)
    origin, factor = torch.zeros_like(centre), factor.expand_as(centre).clone()
    centre[:auto], factor[:auto] = 255, -1
    if auto < bright:
        low = images[auto:bright].amin((2, 3), keepdim=True).float()
        span = images[auto:bright].amax((2, 3), keepdim=True).float() - low
        flat = (span == 0).float()  # one value only: left alone
        centre[auto:bright], origin[auto:bright] = low, low * flat
        factor[auto:bright] = 255 / (span + 255 * flat)
    if contrast < len(images):
        grey = _grey(images[contrast:].float()).mean((1, 2, 3), keepdim=True)
        centre[contrast:] = origin[contrast:] = grey.add_(0.5).floor_()
    return centre, factor, origin


def _base(image: Tensor, sharp: int) -> Tensor:
    """Return what to blend with: the luminance, and from sample `sharp` on a blurred copy."""
    base = image.clone()
    if sharp:
        base[:sharp] = _grey(image[:sharp])
    if sharp < len(image):
        base[sharp:, :, 1:-1, 1:-1] = _smooth(image[sharp:])
    return base


def _remap(image: Tensor, centre: Tensor, factor: Tensor, origin: Tensor) -> Tensor:
    """Return `origin + factor · (image - centre)` as whole numbers from 0 to 255."""
    mapped = image.sub_(centre).mul_(factor).add_(origin).add_(_NUDGE)
    return mapped.clamp_(0, 255).to(torch.int16)


def _grey(image: Tensor) -> Tensor:
    """Return luminance, 0.299 red + 0.587 green + 0.114 blue, rounded, `(m, 1, h, w)`."""
    if image.shape[1] == 1:
        return image
    red, green, blue = (image[:, channel : channel + 1] for channel in range(3))
    # Pillow's integer weights over 2^16; every sum is under 2^24, so float32 is exact.
    return (red * 19595 + green * 38470 + blue * 7471 + 32768).div_(65536).floor_()


def _smooth(image: Tensor) -> Tensor:
    """Return, for inner pixels, the mean over 3×3 pixels with the centre counted five times."""
    rows = image[:, :, :-2] + image[:, :, 1:-1] + image[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    return total.add_(image[:, :, 1:-1, 1:-1], alpha=4).add_(6.5).div_(13).floor_()


def _matrices(ops: Tensor, strength: Tensor, h: int, w: int) -> Tensor:
    """Return `(m, 6)`: a, b, c, d, e, f of the map `(ax + by + c, dx + ey + f)`, in pixels."""
    angle = torch.deg2rad(strength * (ops == _INDEX["rotate"]))
    cos, sin = angle.cos(), angle.sin()
    x, y = w / 2, h / 2
    turn = torch.stack((cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), 1)
    moved = torch.zeros(NONE + 1, 6, dtype=strength.dtype, device="cpu")
    moved[_INDEX["shear_x"], 1] = moved[_INDEX["shear_y"], 3] = 1
    moved[_INDEX["translate_x"], 2], moved[_INDEX["translate_y"], 5] = w, h
    return turn + moved.to(ops.device)[ops] * strength.unsqueeze(1)


def _warp(images: Tensor, matrices: Tensor, fill: int | Sequence[int]) -> Tensor:
    """Return images whose pixel centre `(x, y)` shows the point `(ax + by + c, dx + ey + f)`."""
    h, w = images.shape[2:]
    # `grid_sample` counts from -1 to 1 between the outer edges of the outer pixels.
    across, down = 2 * matrices[:, :3] / w, 2 * matrices[:, 3:] / h
    slope_x, slope_y, origin = torch.stack((across, down), 1).view(-1, 2, 3, 1, 1).unbind(2)
    x = torch.arange(0.5, w, dtype=matrices.dtype, device=images.device)
    y = torch.arange(0.5, h, dtype=matrices.dtype, device=images.device).view(-1, 1)
    points = slope_x * x + (slope_y * y + (origin - 1))
    seen = F.grid_sample(
        images.float(),
        points.permute(0, 2, 3, 1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    across, down = points.abs_().unbind(1)
    outside = torch.maximum(across, down).floor_().clamp_(max=1).unsqueeze(1)  # 0 inside, 1 out
    # Made on the host and sent without waiting; made on a GPU, it would be waited for.
    colour = torch.tensor(fill, dtype=torch.float32, device="cpu").to(
        images.device, non_blocking=True
    )
    colour = colour.view(-1, 1, 1)
    return seen.add_(_NUDGE).lerp_(colour.expand_as(seen), outside).to(torch.int16)
