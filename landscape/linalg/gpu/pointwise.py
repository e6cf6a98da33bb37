"""What lies between the matrix products of a layer, on a GPU in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_PROGRAMS = 528
"""Programs that go over the rows of a layer norm at most, a heuristic: 4 a multiprocessor."""


def bend(h: Tensor, t: Tensor, first: Tensor, curved: Tensor) -> None:
    """Write h φ' + t c into `h` and t φ' into `t`, entry by entry; all in one piece."""
    _bend[(triton.cdiv(h.numel(), _BLOCK),)](h, t, first, curved, h.numel(), BLOCK=_BLOCK)


def norm_curvature(
    x: Tensor,
    weight: Tensor,
    g: Tensor,
    mean: Tensor,
    rho: Tensor,
    v: Tensor,
    u: Tensor,
    s: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `landscape.linalg.layer_norm.curvature` does."""
    rows, d = x.shape
    dx, dg = torch.empty_like(x), torch.empty_like(x)
    block_d = triton.next_power_of_2(d)
    at_once = max(1, 1024 // block_d)
    programs = min(_PROGRAMS, triton.cdiv(rows, at_once))
    dweight = torch.empty(programs, d, dtype=x.dtype, device=x.device)
    _curve_norm[(programs,)](
        x, weight.contiguous(), g, mean, rho, v, u, s, dx, dweight, dg, rows,
        triton.cdiv(triton.cdiv(rows, at_once), programs),
        D=d, BLOCK_D=block_d, ROWS=at_once,
    )  # fmt: skip
    return dx, dweight.sum(0), dg


@triton.jit
def _bend(h_ptr, t_ptr, first_ptr, curved_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    h = tl.load(h_ptr + at, mask=inside)
    t = tl.load(t_ptr + at, mask=inside)
    first = tl.load(first_ptr + at, mask=inside)
    curved = tl.load(curved_ptr + at, mask=inside)
    tl.store(h_ptr + at, h * first + t * curved, mask=inside)
    tl.store(t_ptr + at, t * first, mask=inside)


@triton.jit
def _curve_norm(
    x_ptr, weight_ptr, g_ptr, mean_ptr, rho_ptr, v_ptr, u_ptr, s_ptr,
    dx_ptr, dweight_ptr, dg_ptr, count, turns,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Go over some rows, a few at a time."""
    d = tl.arange(0, BLOCK_D)
    columns = d < D
    weight = tl.load(weight_ptr + d, mask=columns, other=0.0)[None, :]
    u = tl.load(u_ptr + d, mask=columns, other=0.0)[None, :]
    s = tl.load(s_ptr + d, mask=columns, other=0.0)[None, :]
    dweight = tl.zeros([BLOCK_D], tl.float32)
    for turn in range(turns):
        i = (tl.program_id(0) * turns + turn) * ROWS + tl.arange(0, ROWS)
        at = i.to(tl.int64)[:, None] * D + d[None, :]
        inside = (i < count)[:, None] & columns[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        g = tl.load(g_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        rho = tl.load(rho_ptr + i, mask=i < count, other=0.0)[:, None]
        mean = tl.load(mean_ptr + i, mask=i < count, other=0.0)[:, None]
        z = tl.where(inside, (x - mean) * rho, 0.0)
        along = tl.sum(v * z, 1)[:, None] / D
        tangent = tl.where(inside, rho * (v - tl.sum(v, 1)[:, None] / D - z * along), 0.0)
        tl.store(dg_ptr + at, weight * tangent + u * z + s, mask=inside)
        dweight += tl.sum(g * tangent, 0)
        h = weight * g
        slope = tl.sum(h * z, 1)[:, None] / D
        b = tl.where(inside, rho * (h - tl.sum(h, 1)[:, None] / D - z * slope), 0.0)
        w = u * g
        dx = w - tl.sum(w, 1)[:, None] / D - z * (tl.sum(w * z, 1)[:, None] / D)
        dx -= z * (tl.sum(v * b, 1)[:, None] / D) + slope * tangent + along * b
        tl.store(dx_ptr + at, rho * dx, mask=inside)
    tl.store(dweight_ptr + tl.program_id(0) * D + d, dweight, mask=columns)
