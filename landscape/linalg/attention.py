"""Attention with a cheap second derivative (`landscape.linalg.layers` puts it in place)."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from landscape.linalg.bilinear import apply, check_last
from landscape.linalg.gpu import LONGEST, has_kernels

CACHED = 1 << 18  # attention weights at a time, a heuristic: a few such tables stay in the cache


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return softmax(s q kᵀ + mask) v.

    Args:
        q: Queries, `(…, queries, d)`, with the leading dimensions of the others.
        k: Keys, `(…, keys, d)`.
        v: Values, `(…, keys, e)`.
        mask: Added to the scores, of a shape that broadcasts; a constant, or `None`.
        scale: The factor s.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # once, not at every product
    out: Tensor = apply(_Attention, q, k, v, mask, scale)
    return out


class _Attention(Function):
    """o = P v, P = softmax(s q kᵀ + mask), over any leading dimensions."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        scores = (q * scale) @ k.mT
        if mask is not None:
            scores = scores + mask
        p = scores.softmax(-1)
        if mask is not None:  # a query that may attend to nothing yields 0, not NaN
            p = p.masked_fill((mask == -math.inf).all(-1, keepdim=True), 0.0)
        out = p @ v
        ctx.save_for_backward(q, k, v, p, out)
        ctx.scale = scale
        return out.clone()  # what is returned may be changed in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, p, out = ctx.saved_tensors
        (g,) = grads
        if torch.is_grad_enabled():
            back = apply(_AttentionBack, q, k, v, g, p, out, ctx.scale)
        else:
            back = _derivatives(_scores_back(g, v, p, out), q, k, g, p, ctx.scale)
        return (*back, None, None)


class _AttentionBack(Function):
    """b = (s D k, s Dᵀq, Pᵀg), with D = P ∘ (A − c), A = g vᵀ and c = Σ P ∘ A = g·o, row by row."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, p: Tensor, out: Tensor, scale: float
    ) -> Any:
        centred = _centred(g, v, out)
        ctx.save_for_backward(q, k, v, g, p, centred)
        ctx.scale = scale
        return _derivatives(centred * p, q, k, g, p, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        check_last()
        q, k, v, g = ctx.saved_tensors[:4]
        outs = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v, g)]
        for part in _parts([*grads, *ctx.saved_tensors, *outs]):
            _attention_curvature(ctx.scale, *part)
        return (*outs, None, None, None)


def _centred(g: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """Return A − c."""
    return (g @ v.mT).sub_((g * out).sum(-1, keepdim=True))


def _scores_back(g: Tensor, v: Tensor, p: Tensor, out: Tensor) -> Tensor:
    """Return D."""
    if not _has_kernels(p):
        return _centred(g, v, out).mul_(p)
    from landscape.linalg.gpu.attention import centre

    a = g @ v.mT
    rows = _deep(a)
    centre(rows, *map(_deep, (p, g, out)))
    return rows.view(a.shape)


def _derivatives(
    d: Tensor, q: Tensor, k: Tensor, g: Tensor, p: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (d @ k).mul_(scale), (d.mT @ q).mul_(scale), p.mT @ g


def _attention_curvature(
    scale: float,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    p: Tensor,
    centred: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dg: Tensor,
) -> None:
    """Write the derivatives of ⟨b, (x, y, w)⟩ in q, k, v and g.

    ⟨b, (x, y, w)⟩ = s ⟨D, T⟩ + ⟨P, g wᵀ⟩ with s T = s (x kᵀ + q yᵀ), the tangent of the scores. P's
    is s P ∘ (T − m), with m the sums over a row of P ∘ T, and so is the derivative in A; the one in
    the scores is P ∘ (Y − r), with Y = s (A − c) ∘ (T − m) + g wᵀ and r the sums of P ∘ Y.
    """
    tangent, ds = torch.bmm(x, k.mT).baddbmm_(q, y.mT), torch.bmm(g, w.mT)
    d = _bend(tangent, ds, p, centred, scale)
    for out, a, b, c, e in (
        (dq, ds, k, d, y),
        (dk, ds.mT, q, d.mT, x),
    ):
        torch.bmm(a, b, out=out)
        torch.baddbmm(out, c, e, beta=scale, alpha=scale, out=out)
    torch.bmm(p, w, out=dg)
    torch.baddbmm(dg, tangent, v, alpha=scale, out=dg)
    torch.baddbmm(dv, tangent.mT, g, beta=0, alpha=scale, out=dv)


def _bend(t: Tensor, u: Tensor, p: Tensor, centred: Tensor, scale: float) -> Tensor:
    """Make T into P ∘ (T − m) and g wᵀ into P ∘ (Y − r), and return D."""
    if _has_kernels(p):
        from landscape.linalg.gpu.attention import bend

        return bend(t, u, p, centred, scale)
    t.mul_(p)
    t.addcmul_(p, t.sum(-1, keepdim=True), value=-1)
    u.mul_(p).addcmul_(centred, t, value=scale)
    u.addcmul_(p, u.sum(-1, keepdim=True), value=-1)
    return p * centred


def _has_kernels(p: Tensor) -> bool:
    return has_kernels(p) and p.shape[-1] <= LONGEST


def _deep(t: Tensor) -> Tensor:
    """Return a tensor in one piece, with its leading dimensions as one."""
    return t.reshape(-1, *t.shape[-2:]).contiguous()


def _parts(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors with their leading dimensions as one, in parts that stay in a CPU's cache."""
    deep = [t if t.dim() > 2 else t[None] for t in tensors]
    first = len(deep[0])
    size = first
    if deep[0].device.type == "cpu":
        size = max(1, CACHED * first // max(t.numel() for t in deep))
    for part in zip(*[torch.split(t, size) for t in deep], strict=True):
        yield tuple(t.reshape(-1, *t.shape[-2:]) for t in part)
