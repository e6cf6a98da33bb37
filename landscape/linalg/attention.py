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
        tensors = [t.contiguous() for t in grads] + list(ctx.saved_tensors)
        p = ctx.saved_tensors[4]
        size = len(p)
        if p.dim() > 2 and p.device.type == "cpu":
            size = max(1, CACHED * size // p.numel())
        parts = [_attention_curvature(part, ctx.scale) for part in _split(tensors, size)]
        return (*(torch.cat(each) for each in zip(*parts, strict=True)), None, None)


def _attention_curvature(tensors: Sequence[Tensor], scale: float) -> tuple[Tensor, ...]:
    """Return the derivatives of ⟨b, (x, y, w)⟩ in q, k, v and g.

    ⟨b, (x, y, w)⟩ = ⟨D, T⟩ + ⟨P, g wᵀ⟩ with T = s (x kᵀ + q yᵀ), the tangent of the scores.
    """
    x, y, w, q, k, v, g, p, a, centred, d = tensors
    t = x @ k.mT
    t += q @ y.mT
    t *= scale
    mean = (p * t).sum(-1, keepdim=True)
    tangent = (t - mean).mul_(p)  # of P: the derivative in A
    dp = torch.addcmul(g @ w.mT, t, centred).addcmul_(a, mean, value=-1)
    dp -= (dp * p).sum(-1, keepdim=True)
    ds = dp.mul_(p).mul_(scale)
    dq, dk, dv = ds @ k, ds.mT @ q, tangent.mT @ g
    dq += d @ y
    dk += d.mT @ x
    dg = tangent @ v
    dg += p @ w
    return dq, dk, dv, dg


def _split(tensors: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors in parts of `size` along their first dimension."""
    parts: list[tuple[Tensor, ...]] = [torch.split(t, size) for t in tensors]
    return zip(*parts, strict=True)
