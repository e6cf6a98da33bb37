"""Linear, GELU, linear, with a cheap second derivative (`landscape.linalg.layers`).

h = x W₁ᵀ + b₁, a = φ(h), y = a W₂ᵀ + b₂. What lies between the layers is several times as wide as
x and y, and a product would take it through memory a dozen times; here rows go through all steps in
parts that stay in a CPU's cache.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from landscape.linalg.bilinear import apply, check_last, multiply
from landscape.linalg.gpu import has_kernels

CACHED = 1 << 18
"""Entries of h at a time, a heuristic: a few such tables stay in the cache."""

FEWEST = 256
"""Rows at a time at least, a heuristic: fewer read the weights too often."""


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    h: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    tables: Sequence[Tensor],
) -> Tensor:
    """Return φ(h) W₂ᵀ + b₂ for h = x W₁ᵀ + b₁.

    Args:
        x: Shape `(n, in)`.
        weight1: W₁, shape `(hidden, in)`.
        bias1: b₁, shape `(hidden,)`, or `None`.
        h: The output of the first layer, shape `(n, hidden)`.
        weight2: W₂, shape `(out, hidden)`.
        bias2: b₂, shape `(out,)`, or `None`.
        tables: φ(h), φ'(h) and φ''(h), without their graphs.
    """
    out: Tensor = apply(_Mlp, x, weight1, bias1, h, weight2, bias2, *tables)
    return out


class _Mlp(Function):
    """y = φ(h) W₂ᵀ + b₂, a function of x, W₁ and b₁, or of h.

    A gradient that will be differentiated again is taken in x, W₁ and b₁, so that `_MlpBack` sees
    both layers; another one in h, where it joins the derivative of `_MlpBack` on the way back
    through the first layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        h: Tensor,
        weight2: Tensor,
        bias2: Tensor | None,
        *tables: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight1, h, weight2, *tables)
        ctx.biased = bias1 is not None, bias2 is not None
        return F.linear(tables[0], weight2, bias2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight1, h, weight2, a, first, second = ctx.saved_tensors
        (g,) = grads
        if torch.is_grad_enabled():
            back = apply(_MlpBack, x, weight1, h, weight2, g, a, first, second, ctx.biased)
            return (*back[:3], None, *back[3:], None, None, None)
        dh, dw = torch.empty_like(a), torch.empty_like(weight2)
        for turn, (g_, a_, first_, dh_) in enumerate(_parts(g, a, first, dh)):
            multiply(g_, weight2, out=dh_).mul_(first_)
            multiply(g_.T, a_, out=dw, add=turn > 0)
        return None, None, None, dh, dw, g.sum(0) if ctx.biased[1] else None, None, None, None


class _MlpBack(Function):
    """b = (e W₁, eᵀx, Σ e, gᵀa, Σ g), with e = (g W₂) ∘ φ'(h)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        h: Tensor,
        weight2: Tensor,
        g: Tensor,
        a: Tensor,
        first: Tensor,
        second: Tensor,
        biased: tuple[bool, bool],
    ) -> Any:
        e = g @ weight2
        curved = e * second
        e *= first
        ctx.save_for_backward(x, weight1, weight2, g, a, first, curved, e)
        return (
            e @ weight1,
            e.T @ x,
            e.sum(0) if biased[0] else None,
            g.T @ a,
            g.sum(0) if biased[1] else None,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        check_last()
        # With t = v W₁ᵀ + x U₁ᵀ + u₁, the tangent of h:
        # ⟨b, (v, U₁, u₁, U₂, u₂)⟩ = ⟨(g W₂) ∘ φ'(h), t⟩ + ⟨g, φ(h) U₂ᵀ + u₂⟩
        v, to1, shift1, to2, shift2 = grads
        x, weight1, weight2, g, a, first, curved, e = ctx.saved_tensors
        dx, dh, dg = torch.empty_like(x), torch.empty_like(a), torch.empty_like(g)
        dw1, dw2 = torch.empty_like(weight1), torch.empty_like(weight2)
        for turn, (v_, x_, g_, a_, first_, curved_, e_, dx_, dh_, dg_) in enumerate(
            _parts(v, x, g, a, first, curved, e, dx, dh, dg)
        ):
            multiply(e_, to1, out=dx_)
            multiply(e_.T, v_, out=dw1, add=turn > 0)
            t = multiply(v_, weight1.T, shift1)
            multiply(x_, to1.T, out=t, add=True)
            multiply(g_, to2, out=dh_)
            _bend(dh_, t, first_, curved_)
            multiply(g_.T, t, out=dw2, add=turn > 0)
            multiply(t, weight2.T, shift2, out=dg_)
            multiply(a_, to2.T, out=dg_, add=True)
        return dx, dw1, dh, dw2, dg, None, None, None, None


def _bend(h: Tensor, t: Tensor, first: Tensor, curved: Tensor) -> None:
    """Write h φ' + t c into `h` and t φ' into `t`, entry by entry."""
    if has_kernels(h) and all(x.is_contiguous() for x in (h, t, first, curved)):
        from landscape.linalg.gpu import pointwise

        pointwise.bend(h, t, first, curved)
    else:
        h.mul_(first).addcmul_(t, curved)
        t.mul_(first)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield all tensors in parts of the same rows, on a CPU."""
    rows = len(tensors[0])
    if tensors[0].device.type == "cpu":
        rows = max(FEWEST, CACHED // max(t.shape[1] for t in tensors))
    parts: list[tuple[Tensor, ...]] = [torch.split(t, rows) for t in tensors]
    return zip(*parts, strict=True)
