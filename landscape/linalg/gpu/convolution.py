"""Convolutions in float32 on the tensor cores of a GPU, as in `landscape.linalg.gpu.matmul`.

A convolution is a sum of matrix products, one a position of the kernel ("tap"): images moved by the
tap, pixels by channels, times the weights of the tap. Where the stride is 1 and the maps keep their
size, the derivative in the images is such a sum as well, with the taps the other way round. Images
are read where they lie, channels first.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from landscape.linalg.gpu.matmul import gathered, parts_of

_BLOCK_K = 32  # of the tiles, as measured on an H200
_FEWEST = 64  # channels: of 32 there is nothing to gain (H200)
_ALIGNED = 16  # pixels, of which Triton loads several at a time


def serves(x: Tensor, weight: Tensor, settings: Any) -> bool:
    """Whether a convolution is made here: plain, not rounded, of maps that keep their size.

    Args:
        x: Images, or the derivative in what was made of them.
        weight: Kernels.
        settings: As in `landscape.linalg.bilinear.conv`.
    """
    cudnn: Any = torch.backends.cudnn
    stride, padding, dilation, transposed, _, groups = settings
    sizes = zip(padding, dilation, weight.shape[2:], strict=True)
    centred = all(k % 2 and p == d * (k // 2) for p, d, k in sizes)
    return (
        centred
        and x.numel() > 0
        and stride == [1, 1]
        and groups == 1
        and not transposed
        and x.is_contiguous()
        and min(weight.shape[:2]) >= _FEWEST
        and cudnn.conv.fp32_precision != "tf32"
    )


def serves_weights(x: Tensor, weight: Tensor) -> bool:
    """Whether the derivative in the weights of a convolution that `serves` is made here too.

    For larger kernels cuDNN has algorithms with fewer multiplications.

    Args:
        x: Images.
        weight: Kernels.
    """
    one = weight[0, 0].numel() == 1
    return one and x.is_contiguous() and x[0, 0].numel() % _ALIGNED == 0


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: list[int],
    *,
    back: bool = False,
    onto: Tensor | None = None,
) -> Tensor:
    """Return x ∗ w + bias, or the derivative in the images that x is one in the output of.

    Args:
        x: Images in one piece, `(n, channels, h, w)`.
        weight: Kernels, `(out, channels, kh, kw)`, or for the derivative `(channels, out, kh, kw)`.
        bias: Shape `(out,)`, or `None`.
        dilation: Distance of the taps.
        back: Whether it is the derivative.
        onto: To which the result is added; in one piece.
    """
    kernels = weight.permute(2, 3, 1, 0) if back else weight.permute(2, 3, 0, 1)
    kernels = kernels.contiguous()  # tensor cores take what is summed over in one piece
    (n, c, h, w), (kh, kw, o, _) = x.shape, kernels.shape
    out = torch.empty(n, o, h, w, dtype=x.dtype, device=x.device) if onto is None else onto
    block_m, block_n, warps = _tile(n * h * w, o)
    span = min(block_m, triton.next_power_of_2(h * w))
    tiles = triton.cdiv(n, block_m // span) * triton.cdiv(h * w, span) * triton.cdiv(o, block_n)
    steps = kh * kw * triton.cdiv(c, _BLOCK_K)
    parts = parts_of(tiles, steps)
    into = out if parts == 1 else torch.empty(parts, *out.shape, dtype=x.dtype, device=x.device)
    _convolve[(tiles, parts)](
        x, kernels, into, into if bias is None else bias.contiguous(),
        n, c, o, h, w, h * w, triton.cdiv(steps, parts), *(-d if back else d for d in dilation),
        int(onto is not None and parts == 1), int(bias is not None and parts == 1),
        KH=kh, KW=kw, SPAN=span,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=_BLOCK_K, num_warps=warps, num_stages=3,
    )  # fmt: skip
    shift = None if bias is None else bias[:, None, None]
    return gathered(into, out, shift, add=onto is not None)


def of_weight(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the derivative in the weights of a convolution whose kernels are one pixel.

    Args:
        g: Derivative in the output, in one piece, `(n, out, h, w)`.
        x: Images in one piece, `(n, channels, h, w)`.
        weight: Kernels, of whose shape the result is.
    """
    (n, c, h, w), o = x.shape, len(weight)
    block_m, block_n, warps = _tile(o, c)
    span = min(_BLOCK_K, triton.next_power_of_2(h * w))
    tiles = triton.cdiv(o, block_m) * triton.cdiv(c, block_n)
    steps = triton.cdiv(n, _BLOCK_K // span) * triton.cdiv(h * w, span)
    parts = parts_of(tiles, steps)
    out = torch.empty(parts, o, c, dtype=x.dtype, device=x.device)
    _of_weight[(tiles, parts)](
        g, x, out, n, c, o, h * w, triton.cdiv(steps, parts), SPAN=span,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=_BLOCK_K, num_warps=warps, num_stages=3,
    )  # fmt: skip
    return (out[0] if parts == 1 else out.sum(0)).view_as(weight)


def _tile(rows: int, columns: int) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and its warps."""
    block_m, block_n = 128 if rows > 64 else 64, 64 if columns > 32 else 32
    return block_m, block_n, 8 if block_m > 64 else 4


@triton.jit(do_not_specialize=["PART", "DH", "DW", "ADD", "BIAS"])
def _convolve(
    x_ptr, weight_ptr, out_ptr, bias_ptr,
    images, channels, outs, height, width, pixels, PART, DH, DW, ADD, BIAS,
    KH: tl.constexpr, KW: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Find one tile, of pixels by channels, for a part of the taps and channels."""
    across = tl.cdiv(outs, BLOCK_N)
    tile = tl.program_id(0) // across
    image, p = _pixels(tile, pixels, SPAN, BLOCK_M)
    there = (image < images) & (p < pixels)
    h, w = p // width, p % width
    j = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    row = image.to(tl.int64) * channels * pixels + p
    blocks = tl.cdiv(channels, BLOCK_K)
    part = tl.program_id(1)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(part * PART, min((part + 1) * PART, KH * KW * blocks)):
        tap = step // blocks
        c = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        at, inside = row, there
        if KH * KW > 1:
            down = DH * (tap // KW - KH // 2)
            right = DW * (tap % KW - KW // 2)
            at = row + (down * width + right)
            inside = there & _within(h + down, height) & _within(w + right, width)
        a = tl.load(
            x_ptr + at[:, None] + (c * pixels)[None, :],
            mask=inside[:, None] & (c < channels)[None, :],
            other=0.0,
        )
        b = tl.load(
            weight_ptr + tap * outs * channels + j[None, :] * channels + c[:, None],
            mask=(j < outs)[None, :] & (c < channels)[:, None],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="tf32x3")
    if BIAS:
        total += tl.load(bias_ptr + j, mask=j < outs, other=0.0)[None, :]
    row = (part.to(tl.int64) * images + image) * outs * pixels + p
    to = out_ptr + row[:, None] + (j * pixels)[None, :]
    inside = there[:, None] & (j < outs)[None, :]
    if ADD:
        total += tl.load(to, mask=inside, other=0.0)
    tl.store(to, total, mask=inside)


@triton.jit(do_not_specialize=["PART"])
def _of_weight(
    g_ptr, x_ptr, out_ptr, images, channels, outs, pixels, PART,
    SPAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Find one tile, of channels by channels, for a part of the pixels."""
    across = tl.cdiv(channels, BLOCK_N)
    i = (tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    j = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    steps = tl.cdiv(images, BLOCK_K // SPAN) * tl.cdiv(pixels, SPAN)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(part * PART, min((part + 1) * PART, steps)):
        image, p = _pixels(step, pixels, SPAN, BLOCK_K)
        there = (image < images) & (p < pixels)
        a = tl.load(
            g_ptr + (i * pixels)[:, None] + (image.to(tl.int64) * outs * pixels + p)[None, :],
            mask=(i < outs)[:, None] & there[None, :],
            other=0.0,
        )
        b = tl.load(
            x_ptr + (j * pixels)[None, :] + (image.to(tl.int64) * channels * pixels + p)[:, None],
            mask=(j < channels)[None, :] & there[:, None],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="tf32x3")
    to = out_ptr + part.to(tl.int64) * outs * channels + i[:, None] * channels + j[None, :]
    tl.store(to, total, mask=(i < outs)[:, None] & (j < channels)[None, :])


@triton.jit
def _pixels(tile, pixels, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Return image and pixel of the entries of a tile, which takes `SPAN` pixels of an image."""
    k = tl.arange(0, BLOCK)
    of_image = tl.cdiv(pixels, SPAN)
    return tile // of_image * (BLOCK // SPAN) + k // SPAN, tile % of_image * SPAN + k % SPAN


@triton.jit
def _within(at, size):
    return (at >= 0) & (at < size)
