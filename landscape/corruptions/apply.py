"""`corrupt`: one corruption of a batch of images."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from landscape._checks import check_choice, check_count, check_generator
from landscape.corruptions import blur, digital, jpeg, noise, weather
from landscape.corruptions.severities import (
    CIFAR,
    CORRUPTIONS,
    IMAGENET,
    PROFILES,
    SEVERITIES,
    Profile,
)
from landscape.corruptions.streams import Streams, mix64
from landscape.switches import rounding

MIN_SIZE = 32

Kernel = Callable[..., Tensor]

_IMAGENET: dict[str, Kernel] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": weather.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": jpeg.jpeg_compression,
}
_CIFAR: dict[str, Kernel] = _IMAGENET | {
    "motion_blur": partial(blur.motion_blur, cifar=True),
    "zoom_blur": partial(blur.zoom_blur, cifar=True),
    "snow": partial(weather.snow, cifar=True),
    "frost": partial(weather.frost, cifar=True),
    "elastic_transform": digital.elastic_transform_affine,
    "pixelate": partial(digital.pixelate, cifar=True),
}
_PROFILES: Mapping[str, tuple[dict[str, Kernel], dict[str, tuple[Any, ...]]]] = {
    "imagenet": (_IMAGENET, IMAGENET),
    "cifar": (_CIFAR, CIFAR),
}
# Values a kernel takes at a time: a chunk fits into a CPU's cache; a GPU wants many at once.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}
# A value that float64 leaves at 200 must not become 199 because float32 leaves it at 199.99999.
_NUDGE = 1e-4


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    profile: Profile = "imagenet",
    generator: torch.Generator | None = None,
    start: int = 0,
) -> Tensor:
    """Return the images with one of the 15 corruptions of Hendrycks & Dietterich (2019).

    All images are treated at once on their device. Random numbers are a function of one number
    drawn from `generator`, of the corruption, the severity and the index of the sample, so that
    `corrupt(x)[5:]` equals `corrupt(x[5:], start=5)` with equal generators, and a CPU and a GPU
    draw the same.

    `profile="imagenet"` follows `imagecorruptions` (the ImageNet-C corruptions at any size), and
    `"cifar"` the code that made CIFAR-C, whose strengths are those for 32×32 pixels; what that code
    states in pixels of a 32×32 image scales with the height here. Frost is matched in kind only:
    its textures are procedural. Grey images get what RGB images with three equal channels would
    get: the luminance of frost, the luminance plane of JPEG, one of three channels of noise.

    Args:
        images: Bytes `(n, c, h, w)` with 1 or 3 channels, height and width at least 32.
        name: One of `CORRUPTIONS`.
        severity: 1 to 5.
        profile: Whose kernels and strengths.
        generator: Source of the draw; `None` is a fresh one with seed 0.
        start: Index of the first sample, for a batch cut out of more samples.

    Returns:
        Bytes `(n, c, h, w)`, rounded down as the original does.

    Raises:
        ValueError: If the images are no such bytes, or name, severity or profile is unknown.
        TypeError: If `generator` is no generator.
    """
    check_corruption(name, severity, profile)
    check_images(images)
    check_count("start", start, 0)
    generator = check_generator(generator)
    drawn = torch.randint(1 << 62, (1,), generator=generator, device=generator.device)
    place = CORRUPTIONS.index(name) * len(SEVERITIES) + severity
    key = mix64(drawn.to(images.device, non_blocking=True) + place)[0]
    kernels, levels = _PROFILES[profile]
    kernel, level = kernels[name], levels[name][SEVERITIES.index(severity)]
    values = _CHUNK.get(images.device.type, _CHUNK["cuda"])
    chunk = max(1, values // max(images[:1].numel(), 1))
    parts = []
    uncast = torch.autocast(images.device.type, enabled=False)
    with torch.no_grad(), uncast, rounding("full"):
        for first in range(0, len(images), chunk):
            part = images[first : first + chunk]
            streams = Streams(key, start + first, len(part))
            out = kernel(part.float().contiguous(), *level, streams)
            parts.append(out.clamp(0, 255).add_(_NUDGE).to(torch.uint8))
    return torch.cat(parts) if parts else images.clone()


def check_corruption(name: str, severity: int, profile: str) -> None:
    """Refuse an unknown corruption."""
    check_choice("name", name, CORRUPTIONS)
    check_choice("severity", severity, SEVERITIES)
    check_count("severity", severity, 1)  # 1.0 is among them
    check_choice("profile", profile, PROFILES)


def check_images(images: Tensor, name: str = "images") -> None:
    """Refuse what cannot be corrupted.

    Args:
        images: Anything.
        name: What the caller's argument is called.

    Raises:
        ValueError: If the images are not bytes with 1 or 3 channels and at least 32×32 pixels.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(
            f"`{name}` must be bytes (n, c, h, w), got {images.dtype} of shape "
            f"{tuple(images.shape)}; scale floats to 0 … 255 and round them."
        )
    if images.shape[1] not in (1, 3) or min(images.shape[2:]) < MIN_SIZE:
        raise ValueError(
            f"`{name}` must hold images of 1 or 3 channels and at least {MIN_SIZE} pixels a side, "
            f"got shape {tuple(images.shape)}; pad smaller images."
        )
