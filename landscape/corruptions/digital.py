"""Digital: contrast, elastic transform and pixelation; JPEG is in `jpeg.py`.

Kernels as in `noise.py`.
"""

import itertools

import torch
from torch import Tensor

from landscape.corruptions.linear import (
    along_columns,
    along_rows,
    box_matrix,
    gaussian_matrix,
    reflected,
    separable,
)
from landscape.corruptions.streams import Streams


def contrast(x: Tensor, factor: float, streams: Streams) -> Tensor:
    """Shrink the deviations from the mean of each channel."""
    mean = x.mean((2, 3), keepdim=True)
    return torch.lerp(mean, x, factor)


def elastic_transform(x: Tensor, amplitude: float, streams: Streams) -> Tensor:
    """Displace every pixel on its own: smoothed noise, as in `imagecorruptions`.

    Displacements are uniform on ±`amplitude` heights, smoothed by σ = 1 % of the height and of the
    width; at 32×32 pixels that hardly smooths at all.
    """
    h, w = x.shape[2:]
    shifts = streams.uniform(2, h, w).mul_(2).sub_(1) * (amplitude * h)
    shifts = _smoothed(shifts, 0.01 * h, 0.01 * w)
    return _displaced(x, shifts)


def elastic_transform_affine(
    x: Tensor, amplitude: float, sigma: float, shift: float, streams: Streams
) -> Tensor:
    """Move by a random affine map, then displace by smoothed noise, as for CIFAR-C.

    The map moves three corners of a square about the centre, each coordinate uniform on ±`shift`
    heights; it is sampled bilinearly and mirrored at the centres of the outermost pixels.
    """
    h, w = x.shape[2:]
    moves = streams.uniform(3, 2).mul_(2).sub_(1) * (shift * h)
    x = reflected(x, *affine_points(moves, h, w), edges=False)
    shifts = streams.uniform(2, h, w).mul_(2).sub_(1)
    shifts = _smoothed(shifts, sigma * h, sigma * h) * (amplitude * h)
    return _displaced(x, shifts)


def affine_points(moves: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Return where the pixels of the moved image come from.

    Args:
        moves: By how much (x, y) each of three corners moves `(n, 3, 2)`, in pixels: the corners
            (s, s), (s, −s) and (−s, −s) from (⌊h/2⌋, ⌊w/2⌋), with s = ⌊min(h, w) / 3⌋.
        h: Height.
        w: Width.

    Returns:
        Columns and rows, each `(n, h, w)`.
    """
    side = min(h, w) // 3
    corners = moves.new_tensor([[side, side], [side, -side], [-side, -side]])
    corners = corners + moves.new_tensor([h // 2, w // 2])
    moved = corners + moves
    # Edges of the moved triangle as columns; its inverse turns a point into edge coordinates.
    (a, c), (b, d) = ((moved[:, i] - moved[:, 1]).unbind(1) for i in (0, 2))
    inverse = torch.stack([d, -b, -c, a], dim=1).view(-1, 2, 2) / (a * d - b * c).view(-1, 1, 1)
    edges = torch.stack([corners[0] - corners[1], corners[2] - corners[1]], dim=1)
    matrix = edges @ inverse
    origin = corners[1] - (matrix @ moved[:, 1, :, None]).squeeze(2)
    rows = torch.arange(h, device=moves.device, dtype=moves.dtype).view(1, h, 1)
    columns = torch.arange(w, device=moves.device, dtype=moves.dtype)
    x, y = (
        matrix[:, i, 0].view(-1, 1, 1) * columns
        + matrix[:, i, 1].view(-1, 1, 1) * rows
        + origin[:, i].view(-1, 1, 1)
        for i in (0, 1)
    )
    return x, y


def _smoothed(shifts: Tensor, sigma_rows: float, sigma_columns: float) -> Tensor:
    h, w = shifts.shape[2:]
    rows = gaussian_matrix(h, sigma_rows, 3.0, "reflect")
    columns = gaussian_matrix(w, sigma_columns, 3.0, "reflect")
    return separable(shifts, rows, columns)


def _displaced(x: Tensor, shifts: Tensor) -> Tensor:
    """Return the images sampled at every pixel plus its shift (dx, dy)."""
    h, w = x.shape[2:]
    columns = torch.arange(w, device=x.device) + shifts[:, 0]
    rows = torch.arange(h, device=x.device).view(h, 1) + shifts[:, 1]
    return reflected(x, columns, rows, edges=True)


def pixelate(x: Tensor, factor: float, streams: Streams, *, cifar: bool = False) -> Tensor:
    """Shrink to boxes of pixels, whose means are rounded, and enlarge by the nearest pixel.

    For CIFAR-C Pillow's `BOX` enlarges as well, which differs from `NEAREST` on ties alone.
    """
    h, w = x.shape[2:]
    small = _box(x, int(h * factor), int(w * factor))
    if cifar:
        return _box(small, h, w)
    rows, columns = (
        nearest(few, size).to(x.device) for few, size in zip(small.shape[2:], (h, w), strict=True)
    )
    return small.index_select(2, rows).index_select(3, columns)


def nearest(size: int, new: int) -> Tensor:
    """Return which of `size` values Pillow's `NEAREST` repeats at each of `new` places.

    Args:
        size: Length of the axis.
        new: Length that it gets.

    Returns:
        Indices `(new,)`, int64.
    """
    step = size / new  # added up, as there: it decides where a centre falls between two values
    centres = itertools.accumulate(itertools.repeat(step, new - 1), initial=step / 2)
    return torch.tensor([int(centre) for centre in centres], device="cpu")


def _box(x: Tensor, height: int, width: int) -> Tensor:
    """Resize as Pillow does: columns, then rows, each rounded to bytes."""
    x = _rounded(along_columns(x, box_matrix(x.shape[3], width)))
    return _rounded(along_rows(x, box_matrix(x.shape[2], height)))


def _rounded(x: Tensor) -> Tensor:
    return x.add_(0.5 + 1e-4).floor_()  # a half goes up, also where the float32 product falls short
