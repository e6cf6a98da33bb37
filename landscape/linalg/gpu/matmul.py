"""Matrix products in float32 on the tensor cores of a GPU.

A float32 factor is a sum a = a₁ + a₂ of two numbers that tensor cores take (TF32, 11 bits each),
and a b = a₁ b₁ + a₁ b₂ + a₂ b₁ up to 2⁻²² |a b|, the rounding of float32. Three such products take
less time than one by the units for float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 64, 32  # of the tiles, as measured on an H200
_FEWEST = 32  # rows and columns, a heuristic
_PROGRAMS = 264  # that a product should have at least, a heuristic: two a multiprocessor
_SHORTEST = 8  # steps of a part of a sum, a heuristic


def serves(a: Tensor, b: Tensor) -> bool:
    """Whether a product is made here: not in TF32, and long enough in every direction."""
    backend: Any = torch.backends.cuda.matmul
    rounded: bool = backend.fp32_precision == "tf32"
    return not rounded and min(*a.shape, b.shape[1]) >= _FEWEST


def multiply(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Return what `landscape.linalg.bilinear.multiply` does, of matrices of any strides."""
    (m, k), n = a.shape, b.shape[1]
    if out is None:
        out = torch.empty(m, n, dtype=a.dtype, device=a.device)
    tiles = triton.cdiv(m, _BLOCK_M) * triton.cdiv(n, _BLOCK_N)
    parts = parts_of(tiles, k // _BLOCK_K)
    if b.stride(0) != 1 and n < m:
        b = b.T.contiguous().T  # tensor cores take columns in one piece
    into = out if parts == 1 else torch.empty(parts, m, n, dtype=out.dtype, device=out.device)
    _multiply[(tiles, parts)](
        a, b, into, None if bias is None else bias.contiguous(),
        m, n, k, triton.cdiv(triton.cdiv(k, parts), _BLOCK_K) * _BLOCK_K,
        *a.stride(), *b.stride(), *into.stride()[-2:],
        ADD=add and parts == 1, BIAS=bias is not None and parts == 1,
        BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, num_warps=8, num_stages=3,
    )  # fmt: skip
    return gathered(into, out, bias, add)


def parts_of(tiles: int, steps: int) -> int:
    """Return in how many parts sums of so many steps go, where they would make few programs."""
    return max(1, min(_PROGRAMS // tiles, steps // _SHORTEST))


def gathered(into: Tensor, out: Tensor, bias: Tensor | None, add: bool) -> Tensor:
    """Return `out` with the sum of parts, added in an order that is always the same.

    Args:
        into: The parts, or `out` itself where there is one, which has all in it.
        out: Where the sum goes.
        bias: What is added besides, or `None`.
        add: Whether the sum is added to what `out` holds.
    """
    if into is out:
        return out
    if add:
        out += into.sum(0)
    else:
        torch.sum(into, 0, out=out)
    return out if bias is None else out.add_(bias)


@triton.jit
def _multiply(
    a_ptr, b_ptr, out_ptr, bias_ptr, M, N, K, PART,
    a_row, a_column, b_row, b_column, out_row, out_column,
    ADD: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply one tile, for a part of the sum."""
    across = tl.cdiv(N, BLOCK_N)
    i = (tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    j = (tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    part = tl.program_id(1)
    end = min(K, (part + 1) * PART)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(part * PART, end, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        a = tl.load(
            a_ptr + i[:, None] * a_row + k[None, :] * a_column,
            mask=(i < M)[:, None] & (k < end)[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + k[:, None] * b_row + j[None, :] * b_column,
            mask=(k < end)[:, None] & (j < N)[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="tf32x3")
    inside = (i < M)[:, None] & (j < N)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + j, mask=j < N, other=0.0)[None, :]
    at = out_ptr + part.to(tl.int64) * M * N + i[:, None] * out_row + j[None, :] * out_column
    if ADD:
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)
