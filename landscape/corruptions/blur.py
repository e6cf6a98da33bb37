"""Blur: defocus, glass, motion and zoom. Kernels as in `noise.py`."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from landscape.corruptions.linear import clipped_zoom, gaussian_matrix, separable
from landscape.corruptions.streams import Streams

_DOUBLINGS = 6


def defocus_blur(x: Tensor, radius: float, alias_blur: float, streams: Streams) -> Tensor:
    """Convolve with an antialiased disk, mirrored at the centres of the outermost pixels.

    The convolution is a product of Fourier transforms, whose cost does not grow with the disk.
    """
    disk = disk_kernel(radius, alias_blur).to(x)
    reach = len(disk) // 2
    padded = F.pad(x, [reach] * 4, mode="reflect")
    size = [-(-length // 16) * 16 for length in padded.shape[2:]]
    product = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(disk, s=size)
    blurred: Tensor = torch.fft.irfft2(product, s=size)
    h, w = x.shape[2:]
    return blurred[:, :, 2 * reach : 2 * reach + h, 2 * reach : 2 * reach + w]


@functools.lru_cache(maxsize=16)
def disk_kernel(radius: float, alias_blur: float) -> Tensor:
    """Return the point spread function of `defocus_blur`.

    The pixels with centres within `radius` share 1 equally; a Gaussian kernel of 3×3 (5×5 for radii
    above 8) pixels smooths them, mirrored at the border of the kernel's own array, so that the sum
    is not exactly 1 where the disk touches it.

    Args:
        radius: Radius in pixels.
        alias_blur: Standard deviation of the smoothing.

    Returns:
        Kernel `(k, k)`, k odd, float64, without its empty margin.
    """
    extent, taps = (8, 3) if radius <= 8 else (math.floor(radius), 5)
    line = torch.arange(-extent, extent + 1, dtype=torch.float64, device="cpu")
    disk = ((line[:, None] ** 2 + line**2) <= radius**2).double()
    disk /= disk.sum()
    around = torch.arange(taps, dtype=torch.float64, device="cpu") - taps // 2
    weight = (-(around**2) / (2 * alias_blur**2)).exp()
    weight /= weight.sum()
    padded = F.pad(disk[None, None], [taps // 2] * 4, mode="reflect")
    smooth = F.conv2d(padded, torch.outer(weight, weight)[None, None])[0, 0]
    margin = min(extent - math.floor(radius) - taps // 2, extent - 1)
    return smooth[margin:-margin, margin:-margin] if margin > 0 else smooth


def glass_blur(x: Tensor, sigma: float, reach: int, iterations: int, streams: Streams) -> Tensor:
    """Smooth, move pixels about locally, smooth again.

    As in the original, where the intended swap of two pixels assigns through a view and so only
    copies: pixel by pixel from the lower right, a pixel takes the present value of one displaced by
    `−reach … reach − 1` rows and columns.
    """
    h, w = x.shape[2:]
    rows, columns = (gaussian_matrix(size, sigma, 4.0, "nearest") for size in (h, w))
    pixels = (separable(x, rows, columns) + 1e-4).floor_().flatten(2)
    for _ in range(iterations):
        moves = streams.integers(-reach, reach, h - 2 * reach, w - 2 * reach, 2)
        source = copied_from(moves, h, w).unsqueeze(1).expand_as(pixels)
        pixels = pixels.gather(2, source)
    return separable(pixels.view_as(x), rows, columns)


def copied_from(moves: Tensor, h: int, w: int) -> Tensor:
    """Return where the values come from after one round of copying in `glass_blur`.

    A pixel whose source has been visited before it gets what its source then holds, so sources are
    followed until one that still held its own value. Chains double their reach six times: one of
    more than 64 links, each of probability about ½, does not occur.

    Args:
        moves: Displacement (column, row) of the source of every visited pixel, those
            `reach < row ≤ h − reach` and likewise columns, int64
            `(n, h − 2 reach, w − 2 reach, 2)`.
        h: Height.
        w: Width.

    Returns:
        Flat indices `(n, h · w)`, int64.
    """
    n, visited_rows, visited_columns = moves.shape[:3]
    start = (h - visited_rows) // 2 + 1, (w - visited_columns) // 2 + 1
    at = torch.arange(h * w, device=moves.device).view(h, w)
    inside = at[start[0] : start[0] + visited_rows, start[1] : start[1] + visited_columns]
    source = inside + moves[..., 1] * w + moves[..., 0]
    # Both maps are the identity at the margin, where no pixel is visited.
    own, link = at.repeat(n, 1, 1), at.repeat(n, 1, 1)
    for whole, part in ((own, source), (link, torch.maximum(source, inside))):
        whole[:, start[0] : start[0] + visited_rows, start[1] : start[1] + visited_columns] = part
    own, link = own.flatten(1), link.flatten(1)
    for _ in range(_DOUBLINGS):
        link = link.gather(1, link)
    return own.gather(1, link)


def motion_blur(
    x: Tensor, radius: int, sigma: float, streams: Streams, *, cifar: bool = False
) -> Tensor:
    """Average along a line at an angle that is uniform on (−45°, 45°).

    For CIFAR-C the result is rounded to bytes: ImageMagick made it.
    """
    blurred = blur_along(x, radius, sigma, streams.uniform().mul_(90).sub_(45), leave=not cifar)
    return blurred.round_() if cifar else blurred


def blur_along(x: Tensor, radius: int, sigma: float, angle: Tensor, *, leave: bool) -> Tensor:
    """Return Σ_i k_i · x(row + ⌈i sin θ − ½⌉, column + ⌈i cos θ − ½⌉), i = 0 … 2 radius.

    k_i ∝ exp(−i²/2σ²), their sum is 1, and pixels outside are the nearest ones inside.

    Args:
        x: Images `(n, c, h, w)`.
        radius: Half the number of steps.
        sigma: Standard deviation σ of the weights, in steps.
        angle: Angle θ of each image `(n,)`, in degrees.
        leave: Leave out steps by the whole image or more without making up for them, as
            `imagecorruptions` does (it gets darker).

    Returns:
        Tensor `(n, c, h, w)`.
    """
    n, c, h, w = x.shape
    step = torch.arange(2 * radius + 1, dtype=torch.float64, device=x.device)
    weight = (-(step**2) / (2 * sigma**2)).exp()
    weight = (weight / weight.sum()).expand(n, -1)
    radians = torch.deg2rad(angle.double())[:, None]
    down, right = ((step * f - 0.5).ceil().long() for f in (radians.sin(), radians.cos()))
    if leave:
        weight = weight * ((down.abs() < h) & (right.abs() < w))
    weight = weight.to(x)
    # Flat indices of int32, half as wide as those of `gather`: (n, steps, c, h, 1), (…, 1, 1, w).
    plane = torch.arange(n * c, dtype=torch.int32, device=x.device).view(n, 1, c, 1, 1) * (h * w)
    rows = (torch.arange(h, device=x.device) + down[..., None]).clamp(0, h - 1).int() * w
    columns = (torch.arange(w, device=x.device) + right[..., None]).clamp(0, w - 1).int()
    rows, columns = rows[:, :, None, :, None] + plane, columns[:, :, None, None, :]
    flat, out = x.flatten(), torch.zeros_like(x)
    for i in range(len(step)):
        source = rows[:, i] + columns[:, i]
        shifted = flat.index_select(0, source.flatten()).view_as(x)
        out.addcmul_(shifted, weight[:, i].view(n, 1, 1, 1))
    return out


def zoom_blur(
    x: Tensor, step: float, number: int, streams: Streams, *, cifar: bool = False
) -> Tensor:
    """Average the images and their magnifications by 1, 1 + step, …, `number` of them.

    Magnifications are cut to size at the upper left; for CIFAR-C about their centre.
    """
    h, w = x.shape[2:]
    step = (1 + step) - 1  # in float64, as `numpy.arange` makes its numbers
    total = x.clone()
    for i in range(number):
        total += clipped_zoom(x, 1 + i * step, centred=cifar)[:, :, :h, :w]
    return total / (number + 1)
