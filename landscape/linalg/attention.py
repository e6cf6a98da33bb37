"""Attention with a cheap second derivative (`landscape.linalg.layers` puts it in place)."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from landscape.linalg.bilinear import apply

CACHED = 1 << 17  # attention weights at a time: a dozen such tables stay in a CPU's cache


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
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        return p @ v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, p = ctx.saved_tensors
        return (*apply(_AttentionBack, q, k, v, grads[0].contiguous(), p, ctx.scale), None, None)


class _AttentionBack(Function):
    """b = (s D k, s Dᵀq, Pᵀg), with D = P ∘ (A − c), A = g vᵀ and c the row sums of P ∘ A."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, p: Tensor, scale: float
    ) -> Any:
        a = g @ v.mT
        centred = a - (a * p).sum(-1, keepdim=True)
        d = (centred * p).mul_(scale)
        ctx.save_for_backward(q, k, v, g, p, a, centred, d)
        ctx.scale = scale
        return d @ k, d.mT @ q, p.mT @ g

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # ⟨b, (x, y, w)⟩ = ⟨D, T⟩ + ⟨P, g wᵀ⟩ with T = s (x kᵀ + q yᵀ), the tangent of the scores.
        q, k, v, g = ctx.saved_tensors[:4]
        outs = [torch.empty_like(t) for t in (q, k, v, g)]
        for part in _parts([*grads, *ctx.saved_tensors, *outs]):
            _attention_curvature(ctx.scale, *part)
        return (*outs, None, None)


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
    a: Tensor,
    centred: Tensor,
    d: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dg: Tensor,
) -> None:
    """Write the derivatives of ⟨b, (x, y, w)⟩ in q, k, v and g."""
    t = torch.bmm(x, k.mT).baddbmm_(q, y.mT).mul_(scale)
    weighted = p * t
    mean = weighted.sum(-1, keepdim=True)
    dp = torch.bmm(g, w.mT).addcmul_(t, centred).addcmul_(a, mean, value=-1).mul_(p)
    ds = dp.addcmul_(p, dp.sum(-1, keepdim=True), value=-1).mul_(scale)
    tangent = weighted.addcmul_(p, mean, value=-1)  # of P: the derivative in A
    torch.bmm(ds, k, out=dq).baddbmm_(d, y)
    torch.bmm(ds.mT, q, out=dk).baddbmm_(d.mT, x)
    torch.bmm(tangent.mT, g, out=dv)
    torch.bmm(tangent, v, out=dg).baddbmm_(p, w)


def _parts(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors, their leading dimensions as one, in parts that stay in a CPU's cache."""
    flat = [t.contiguous().flatten(0, -3) if t.dim() > 2 else t[None] for t in tensors]
    size = len(flat[0])
    if flat[0].device.type == "cpu":
        size = max(1, CACHED * size // max(t.numel() for t in flat))
    parts: list[tuple[Tensor, ...]] = [torch.split(t, size) for t in flat]
    return zip(*parts, strict=True)
