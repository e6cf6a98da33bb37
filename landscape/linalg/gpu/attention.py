"""What lies between the matrix products of attention, on a GPU in one pass over memory.

Notation as in `landscape.linalg.attention`. A program takes a few rows of the maps, whose sums it
holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES = 2048  # of a map at a time, a heuristic


def bend(t: Tensor, u: Tensor, p: Tensor, centred: Tensor, scale: float) -> Tensor:
    """Find the tangents of P and of the derivative in the scores.

    Args:
        t: T, which becomes P ∘ (T − m), with m the sums over a row of P ∘ T.
        u: g wᵀ, which becomes P ∘ (Y − r), Y = s (A − c) ∘ (T − m) + g wᵀ, r the sums of P ∘ Y.
        p: P; all of shape `(n, queries, keys)` and in one piece.
        centred: A − c.
        scale: The factor s.

    Returns:
        D = P ∘ (A − c).
    """
    d = torch.empty_like(p)
    (n, m, keys), width = p.shape, triton.next_power_of_2(p.shape[2])
    rows = _rows(width)
    _bend[(triton.cdiv(n * m, rows),)](
        t, u, p, centred, d, n * m, keys, scale, ROWS=rows, WIDTH=width
    )
    return d


def centre(a: Tensor, p: Tensor, g: Tensor, out: Tensor) -> None:
    """Write D = P ∘ (A − c), c = g·o, over A.

    Args:
        a: A, shape `(n, queries, keys)`; all in one piece.
        p: P, of that shape.
        g: Derivative in what attention returns, `(n, queries, e)`.
        out: What it returns, o.
    """
    (n, m, keys), e = p.shape, g.shape[2]
    width, block_e = triton.next_power_of_2(keys), triton.next_power_of_2(e)
    rows = _rows(max(width, block_e))
    _centre[(triton.cdiv(n * m, rows),)](
        a, p, g, out, n * m, keys, E=e, BLOCK_E=block_e, ROWS=rows, WIDTH=width
    )


def _rows(width: int) -> int:
    """Return the rows of this width that a program takes."""
    return max(1, _ENTRIES // width)


@triton.jit
def _bend(
    t_ptr, u_ptr, p_ptr, centred_ptr, d_ptr, count, keys, scale,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)
    at = i.to(tl.int64)[:, None] * keys + j[None, :]
    inside = (i < count)[:, None] & (j < keys)[None, :]
    p = tl.load(p_ptr + at, mask=inside, other=0.0)
    t = p * tl.load(t_ptr + at, mask=inside, other=0.0)
    t -= p * tl.sum(t, 1)[:, None]
    tl.store(t_ptr + at, t, mask=inside)
    centred = tl.load(centred_ptr + at, mask=inside, other=0.0)
    tl.store(d_ptr + at, p * centred, mask=inside)
    u = p * tl.load(u_ptr + at, mask=inside, other=0.0) + scale * centred * t
    tl.store(u_ptr + at, u - p * tl.sum(u, 1)[:, None], mask=inside)


@triton.jit
def _centre(
    a_ptr, p_ptr, g_ptr, out_ptr, count, keys,
    E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j, e = tl.arange(0, WIDTH), tl.arange(0, BLOCK_E)
    at = i.to(tl.int64)[:, None] * E + e[None, :]
    inside = (i < count)[:, None] & (e < E)[None, :]
    g = tl.load(g_ptr + at, mask=inside, other=0.0)
    c = tl.sum(g * tl.load(out_ptr + at, mask=inside, other=0.0), 1)
    at = i.to(tl.int64)[:, None] * keys + j[None, :]
    inside = (i < count)[:, None] & (j < keys)[None, :]
    p = tl.load(p_ptr + at, mask=inside, other=0.0)
    a = tl.load(a_ptr + at, mask=inside, other=0.0)
    tl.store(a_ptr + at, p * (a - c[:, None]), mask=inside)
