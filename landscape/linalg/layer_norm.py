"""Layer norm, scale and shift included, with a cheap second derivative.

`landscape.linalg.layers` puts it in place on a GPU; a CPU folds scale and shift into the layer that
follows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from landscape.linalg.bilinear import apply, check_last
from landscape.linalg.gpu import LONGEST, has_kernels

_layer_norm: Any = torch.ops.aten.native_layer_norm
_layer_norm_backward: Any = torch.ops.aten.native_layer_norm_backward


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return γ ∘ z + β, z = (x − mean x) / √(var x + ε) over the last dimension.

    Args:
        x: Any shape; what is not in one piece is copied.
        weight: γ, shape `(d,)`.
        bias: β, shape `(d,)`, or `None`.
        eps: ε.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    shift = torch.zeros_like(weight) if bias is None else bias
    out: Tensor = apply(_LayerNorm, rows, weight, shift, eps)
    return out.view(x.shape)


class _LayerNorm(Function):
    """y = γ ∘ z + β, z = ρ (x − mean x), ρ = 1 / √(var x + ε), row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, mean, rho = _layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rho)
        found: Tensor = out
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, rho = ctx.saved_tensors
        return (*apply(_LayerNormBack, x, weight, grads[0].contiguous(), mean, rho), None)


class _LayerNormBack(Function):
    """b = (ρ P (γ ∘ g), Σ g ∘ z, Σ g), with P h = h − mean h − z mean(h z)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, g: Tensor, mean: Tensor, rho: Tensor) -> Any:
        ctx.save_for_backward(x, weight, g, mean, rho)
        # Of β it reads the shape alone, which is that of γ.
        return _layer_norm_backward(g, x, x.shape[-1:], mean, rho, weight, weight, [True] * 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        check_last()
        tangents = [grad.contiguous() for grad in grads]
        return (*curvature(*ctx.saved_tensors, *tangents), None, None)


def curvature(
    x: Tensor,
    weight: Tensor,
    g: Tensor,
    mean: Tensor,
    rho: Tensor,
    v: Tensor,
    u: Tensor,
    s: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives of ⟨b, (v, u, s)⟩ in x, γ and g.

    Of an entry c of b, ρ P c is self-adjoint, and with h = γ ∘ g its derivative in x is

        −ρ [z mean(v ∘ ρ P h) + mean(h z) ρ P v + mean(v z) ρ P h]

    Args:
        x: Rows, shape `(n, d)`, as are `g` and `v`.
        weight: γ, shape `(d,)`, as are `u` and `s`.
        g: Derivative in y.
        mean: Mean of every row, shape `(n, 1)`.
        rho: ρ of every row, shape `(n, 1)`.
        v: Tangent of the derivative in x.
        u: Tangent of the derivative in γ.
        s: Tangent of the derivative in β.
    """
    if has_kernels(x) and x.numel() > 0 and x.shape[1] <= LONGEST:
        from landscape.linalg.gpu.pointwise import norm_curvature

        return norm_curvature(x, weight, g, mean, rho, v, u, s)
    z = (x - mean) * rho

    def projected(h: Tensor) -> Tensor:
        return rho * (h - h.mean(1, keepdim=True) - z * _mean(h, z))

    tangent, h = projected(v), weight * g
    b = projected(h)
    dx = z * _mean(v, b) + _mean(h, z) * tangent + _mean(v, z) * b
    return projected(u * g) - rho * dx, (g * tangent).sum(0), weight * tangent + u * z + s


def _mean(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).mean(1, keepdim=True)
