"""Linear maps along rows and columns that the corruptions share: smoothing, box resizing, zoom.

They are matrices `(out, in)`, one for each axis, which hold the boundary rule as well, made in
float64 and used in float32.
"""

import functools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Boundary = Literal["nearest", "reflect"]


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return `rows @ image @ columnsᵀ` for every image.

    Args:
        images: Tensor `(n, c, h, w)`.
        rows: Matrix `(h', h)`.
        columns: Matrix `(w', w)`.

    Returns:
        Tensor `(n, c, h', w')`.
    """
    return along_rows(along_columns(images, columns), rows)


def along_columns(images: Tensor, matrix: Tensor) -> Tensor:
    """Return `image @ matrixᵀ` for every image, `(n, c, h, w')`."""
    return images @ matrix.T.to(images)


def along_rows(images: Tensor, matrix: Tensor) -> Tensor:
    """Return `matrix @ image` for every image, `(n, c, h', w)`."""
    n, c, h, w = images.shape
    flat = images.reshape(n * c, h, w)
    return torch.bmm(matrix.to(images).expand(n * c, -1, -1), flat).view(n, c, -1, w)


@functools.lru_cache(maxsize=64)
def gaussian_matrix(size: int, sigma: float, truncate: float, boundary: Boundary) -> Tensor:
    """Return the matrix of SciPy's `gaussian_filter1d`.

    The kernel ∝ exp(−k²/2σ²) is cut off at the radius ⌊truncate · σ + ½⌋. Boundaries: `"nearest"`
    repeats the outermost value, `"reflect"` mirrors the values at the outer edges of the outermost.

    Args:
        size: Length of the axis.
        sigma: Standard deviation σ; the identity for 0.
        truncate: Radius of the kernel in σ.
        boundary: What lies outside.

    Returns:
        Matrix `(size, size)`, float64.
    """
    if sigma <= 0:
        return torch.eye(size, dtype=torch.float64, device="cpu")
    radius = int(truncate * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1, device="cpu")
    weight = (-0.5 * (offset.double() / sigma) ** 2).exp()
    weight /= weight.sum()
    source = torch.arange(size, device="cpu")[:, None] + offset
    if boundary == "nearest":
        source = source.clamp(0, size - 1)
    else:
        source = source.remainder(2 * size)
        source = torch.minimum(source, 2 * size - 1 - source)
    matrix = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    return matrix.scatter_add_(1, source, weight.expand(size, -1))


@functools.lru_cache(maxsize=64)
def box_matrix(size: int, new: int) -> Tensor:
    """Return the matrix of Pillow's `BOX` resampling.

    An output value is the plain mean of the inputs whose centres lie within its half-open box, not
    weighted by the areas they share.

    Args:
        size: Length of the axis.
        new: Length that it gets.

    Returns:
        Matrix `(new, size)`, float64.
    """
    scale = size / new
    wide = max(scale, 1.0)
    centre = (torch.arange(new, dtype=torch.float64, device="cpu")[:, None] + 0.5) * scale
    at = torch.arange(size, dtype=torch.float64, device="cpu")
    # Evaluated in Pillow's order, because rounding decides where a centre lies on the edge.
    first, last = ((centre + edge * wide + 0.5).floor() for edge in (-0.5, 0.5))
    away = (at - centre + 0.5) * (1 / wide)
    inside = (at >= first) & (at < last) & (away > -0.5) & (away <= 0.5)
    return inside / inside.sum(1, keepdim=True, dtype=torch.float64)


@functools.lru_cache(maxsize=256)
def zoom_matrix(size: int, factor: float, centred: bool) -> Tensor:
    """Return the matrix of SciPy's `zoom(order=1)` of the middle of an axis.

    The middle ⌈size / factor⌉ values become round(⌈size / factor⌉ · factor) on the grid that maps
    the first to the first and the last to the last, with linear interpolation. A value that
    rounding carries beyond the last one is 0, as there.

    Args:
        size: Length of the axis.
        factor: Magnification, at least 1.
        centred: Whether to cut the result to `size` about its centre (CIFAR-C) or to return all of
            it (`imagecorruptions`, which later keeps the upper left).

    Returns:
        Matrix `(out, ⌈size / factor⌉)` with `out ≥ size`, float64.
    """
    number = zoom_source(size, factor)[1]
    new = round(number * factor)
    at = torch.arange(new, dtype=torch.float64, device="cpu") * ((number - 1) / (new - 1))
    if centred:
        trim = (new - size) // 2
        at = at[trim : trim + size]
    tent = 1 - (at[:, None] - torch.arange(number, device="cpu")).abs()
    return tent.clamp_(min=0) * (at[:, None] <= number - 1)


def zoom_source(size: int, factor: float) -> tuple[int, int]:
    """Return (first, number) of the values in the middle of an axis that are magnified."""
    number = math.ceil(size / factor)
    return (size - number) // 2, number


def clipped_zoom(images: Tensor, factor: float, centred: bool) -> Tensor:
    """Return the middle of the images magnified, see `zoom_matrix`, `(n, c, h', w')`."""
    h, w = images.shape[2:]
    (top, height), (left, width) = zoom_source(h, factor), zoom_source(w, factor)
    part = images[:, :, top : top + height, left : left + width]
    return separable(part, zoom_matrix(h, factor, centred), zoom_matrix(w, factor, centred))


def reflected(images: Tensor, x: Tensor, y: Tensor, *, edges: bool) -> Tensor:
    """Return the images sampled bilinearly, mirrored outside.

    Args:
        images: Tensor `(n, c, h, w)`.
        x: Columns to sample at `(n, h, w)`, in pixels, 0 being the centre of the first.
        y: Rows to sample at `(n, h, w)`.
        edges: Mirror at the outer edges of the outermost pixels (SciPy's `"reflect"`), else at
            their centres (OpenCV's `BORDER_REFLECT_101`).

    Returns:
        Tensor `(n, c, h, w)`.
    """
    h, w = images.shape[2:]
    points = torch.empty(*x.shape, 2, dtype=images.dtype, device=images.device)
    if edges:
        points[..., 0], points[..., 1] = (2 * x + 1) / w - 1, (2 * y + 1) / h - 1
    else:
        points[..., 0], points[..., 1] = 2 * x / (w - 1) - 1, 2 * y / (h - 1) - 1
    return F.grid_sample(
        images, points, mode="bilinear", padding_mode="reflection", align_corners=not edges
    )
