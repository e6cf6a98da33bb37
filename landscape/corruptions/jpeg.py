"""JPEG as libjpeg codes and decodes it (baseline, ITU-T T.81, with JFIF colours), without the bits.

Coding and decoding lose information in four places, all of them here: rounding to YCbCr, halving of
the chroma in both directions (4:2:0), rounding of the DCT coefficients to multiples of the
quantisation tables of annex K scaled by the quality, and rounding of what comes back. Entropy
coding is lossless and left out. Chroma is enlarged by libjpeg's triangle filter ("fancy
upsampling"). All arithmetic is on whole numbers and rounds as libjpeg's accurate integer DCT does,
so that the result is the one that Pillow gives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from landscape.corruptions.streams import Streams

# Annex K.1 and K.2: quantisation steps of luminance and chrominance, row by row.
# fmt: off
_LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)
_CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99,
    *(99,) * 32,
)
# The DCT in libjpeg's accurate integer arithmetic, 2¹³ · √8 times the orthonormal one: the matrix
# that its flow graph of 13-bit constants (Loeffler, Ligtenberg & Moschytz, 1989) multiplies out to.
_DCT = (
    (8192, 8192, 8192, 8192, 8192, 8192, 8192, 8192),
    (11363, 9633, 6437, 2260, -2260, -6437, -9633, -11363),
    (10703, 4433, -4433, -10703, -10703, -4433, 4433, 10703),
    (9633, -2259, -11362, -6436, 6436, 11362, 2259, -9633),
    (8192, -8192, -8192, 8192, 8192, -8192, -8192, 8192),
    (6437, -11362, 2261, 9633, -9633, -2261, 11362, -6437),
    (4433, -10704, 10704, -4433, -4433, 10704, -10704, 4433),
    (2260, -6436, 9633, -11363, 11363, -9633, 6436, -2260),
)
# fmt: on


def jpeg_compression(x: Tensor, quality: int, streams: Streams) -> Tensor:
    """Code and decode as JPEG with chroma subsampling 4:2:0; grey images have luminance alone."""
    h, w = x.shape[2:]
    if x.shape[1] == 1:
        return _coded(x, quality, _LUMA)[:, :, :h, :w]
    # The last column is repeated before chroma is halved, the last row after it.
    padded = F.pad(x, (0, -w % 16, 0, h % 2), mode="replicate")
    luma, chroma = to_ycc(padded)
    luma = _coded(luma, quality, _LUMA)[:, :, :h, :w]
    chroma = _coded(halved(chroma), quality, _CHROMA)[:, :, : (h + 1) // 2, : (w + 1) // 2]
    return to_rgb(luma, doubled(chroma)[:, :, :h, :w])


def quantisation(table: tuple[int, ...], quality: int) -> Tensor:
    """Return the quantisation steps `(64,)` of a table of annex K at a quality from 1 to 100."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = [min(max((step * percent + 50) // 100, 1), 255) for step in table]
    return torch.tensor(steps, device="cpu")


def to_ycc(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return luminance `(n, 1, h, w)` and chroma `(n, 2, h, w)` of RGB bytes, rounded.

    The weights are libjpeg's, in units of 2⁻¹⁶; all sums are below 2²⁴, so float32 is exact.
    """
    r, g, b = x.unbind(1)
    centre = 128 * 65536 + 32767
    y = 19595 * r + 38470 * g + 7471 * b + 32768
    cb = 32768 * b - 11059 * r - 21709 * g + centre
    cr = 32768 * r - 27439 * g - 5329 * b + centre
    shift = 1 / 65536
    return (y * shift).floor_().unsqueeze(1), (torch.stack([cb, cr], 1) * shift).floor_()


def to_rgb(luma: Tensor, chroma: Tensor) -> Tensor:
    """Return RGB bytes `(n, 3, h, w)`, rounded as libjpeg does."""
    cb, cr = (chroma - 128).unbind(1)
    shift = 1 / 65536
    red = ((91881 * cr + 32768) * shift).floor_()
    green = ((32768 - 22554 * cb - 46802 * cr) * shift).floor_()
    blue = ((116130 * cb + 32768) * shift).floor_()
    return (luma + torch.stack([red, green, blue], 1)).clamp_(0, 255)


def halved(x: Tensor) -> Tensor:
    """Return means over 2×2 pixels; .25 and .5 are rounded down in even, .5 up in odd columns."""
    total = F.avg_pool2d(x, 2).mul_(4)
    bias = 1 + torch.arange(total.shape[3], device=x.device) % 2
    return ((total + bias) / 4).floor_()


def doubled(x: Tensor) -> Tensor:
    """Return the images at twice the size: weights 9, 3, 3, 1 of the four nearest, over 16."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    near = 3 * padded[:, :, 1:-1]
    rows = torch.stack([near + padded[:, :, :-2], near + padded[:, :, 2:]], 3).flatten(2, 3)
    near = 3 * rows[..., 1:-1]
    left, right = near + rows[..., :-2] + 8, near + rows[..., 2:] + 7
    return (torch.stack([left, right], 4).flatten(3, 4) / 16).floor_()


def _coded(x: Tensor, quality: int, table: tuple[int, ...]) -> Tensor:
    """Return the planes with their DCT coefficients quantised, 8×8 pixels at a time.

    Args:
        x: Bytes `(n, c, h, w)`; the result is padded to multiples of 8 by repeating the edges.
        quality: Quality from 1 to 100.
        table: Quantisation steps at quality 50.
    """
    x = F.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8), mode="replicate")
    n, c, h, w = x.shape
    steps = quantisation(table, quality).to(x.device, torch.float64).view(8, 8).T
    dct = torch.tensor(_DCT, dtype=torch.float64, device=x.device)
    blocks = x.view(n, c, h // 8, 8, w // 8, 8).transpose(3, 4).reshape(-1, 8, 8).double() - 128
    # Rows, then columns; in between the blocks are transposed, the steps as well.
    eighths = _pass(_pass(blocks, dct, 11).transpose(1, 2), dct, 15)
    level = ((eighths.abs() + (4 * steps).floor()) / (8 * steps)).floor_().copysign_(eighths)
    blocks = _pass(_pass(level * steps, dct.T, 11).transpose(1, 2), dct.T, 18)
    blocks = blocks.add_(128).clamp_(0, 255).to(x.dtype)
    return blocks.view(n, c, h // 8, w // 8, 8, 8).transpose(3, 4).reshape(n, c, h, w)


def _pass(blocks: Tensor, matrix: Tensor, bits: int) -> Tensor:
    """Return `matrix` times every row, over 2^bits, rounded with a half up.

    Args:
        blocks: Whole numbers `(b, 8, 8)`, float64, which holds all sums exactly.
        matrix: Whole numbers `(8, 8)`, float64.
        bits: Binary places to drop.
    """
    return (blocks @ matrix.T).add_(1 << (bits - 1)).mul_(2.0**-bits).floor_()
