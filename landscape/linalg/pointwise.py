"""ReLU, GELU, batch norm and the core of a layer norm, each with a cheap second derivative.

`landscape.linalg.layers` puts them in place.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from landscape.linalg.bilinear import apply, check_last

_threshold_backward: Any = torch.ops.aten.threshold_backward
_layer_norm: Any = torch.ops.aten.native_layer_norm
_layer_norm_backward: Any = torch.ops.aten.native_layer_norm_backward


def relu(x: Tensor) -> Tensor:
    """Return max(x, 0), element by element."""
    out: Tensor = apply(_Relu, x)
    return out


def gelu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y = x Φ(x), element by element, and without a graph y' = Φ + x φ, y'' = (2 − x²) φ."""
    phi, first, second = _gelu_tables(x.detach())
    return apply(_Gelu, x, phi, first, second), first, second


def _gelu_tables(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    phi = torch.erf(x * math.sqrt(0.5)).add_(1).mul_(0.5)
    density = (x * x).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    first = torch.addcmul(phi, x, density)
    second = (x * x).neg_().add_(2).mul_(density)
    return phi, first, second


def standardise(x: Tensor, eps: float) -> Tensor:
    """Return (x − mean x) / √(var x + ε) over the last dimension."""
    out: Tensor = apply(_Standardise, x, eps)
    return out


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rho: Tensor
) -> Tensor:
    """Return γ ∘ ρ ∘ (x − μ) + β, channel by channel: a batch norm in evaluation mode.

    Args:
        x: Channels in the second dimension.
        weight: γ, shape `(channels,)`, or `None`.
        bias: β, or `None`.
        mean: μ, a constant.
        rho: ρ, a constant.
    """
    out: Tensor = apply(_Normalise, x, weight, bias, mean, rho)
    return out


class _Relu(Function):
    """y = max(x, 0), of which y'' = 0 is known, and so takes no pass over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clamp_min(0)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        return apply(_ReluBack, grads[0], out.detach())


class _ReluBack(Function):
    """b = g where y > 0, else 0."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(out)
        masked: Tensor = _threshold_backward(g, out, 0)
        return masked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        return _threshold_backward(grads[0], out, 0), None


class _Gelu(Function):
    """y = x Φ(x), of which Φ, y' and y'' are tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, phi: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(x, first, second)
        return phi * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, first, second = ctx.saved_tensors
        back = apply(_GeluBack, x, g, first, second) if torch.is_grad_enabled() else g * first
        return back, None, None, None


class _GeluBack(Function):
    """b = y'(x) g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(g * second, first)
        return g * first

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        check_last()
        (v,) = grads
        curved, first = ctx.saved_tensors
        return v * curved, v * first, None, None


class _Normalise(Function):
    """y = s ∘ (x − μ) + β, s = γ ∘ ρ, channel by channel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rho: Tensor,
    ) -> Tensor:
        s = rho if weight is None else rho * weight
        shift = -mean * s if bias is None else torch.addcmul(bias, mean, s, value=-1)
        ctx.save_for_backward(x, weight, s, mean, rho)
        return torch.addcmul(_along(shift, x), x, _along(s, x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, *known = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        return (*apply(_NormaliseBack, x, weight, grads[0], *known, needed), None, None)


class _NormaliseBack(Function):
    """b = (s ∘ g, ρ ∘ (Σ g ∘ x − μ Σ g), Σ g)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        g: Tensor,
        s: Tensor,
        mean: Tensor,
        rho: Tensor,
        needed: tuple[bool, ...],
    ) -> Any:
        ctx.save_for_backward(x, g, s, mean, rho)
        ctx.set_materialize_grads(False)
        of_x, of_weight, of_bias = needed
        total = _total(g) if of_weight or of_bias else None
        slope = None
        if of_weight and total is not None:
            slope = torch.addcmul(_total(g * x), mean, total, value=-1).mul_(rho)
        return g * _along(s, g) if of_x else None, slope, total if of_bias else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        check_last()
        # ⟨b, (v, u, w)⟩ = ⟨g, s ∘ v + ρ ∘ u ∘ (x − μ) + w⟩
        v, u, shift = grads
        x, g, s, mean, rho = ctx.saved_tensors
        dx = dweight = dg = None
        if u is not None:
            slope = rho * u
            offset = -slope * mean
            dg = torch.addcmul(
                _along(offset if shift is None else offset + shift, x), x, _along(slope, x)
            )
            dx = g * _along(slope, g) if ctx.needs_input_grad[0] else None
        elif shift is not None:
            dg = _along(shift, g).expand_as(g)
        if v is not None:
            dg = v * _along(s, v) if dg is None else torch.addcmul(dg, v, _along(s, v))
            dweight = _total(g * v).mul_(rho) if ctx.needs_input_grad[1] else None
        return dx, dweight, dg, None, None, None, None


def _along(channels: Tensor, x: Tensor) -> Tensor:
    """Return numbers of channels as factors of what has these in its second dimension."""
    return channels.view(-1, *[1] * (x.dim() - 2))


def _total(x: Tensor) -> Tensor:
    """Return sums over all dimensions but the second."""
    return x.sum([0, *range(2, x.dim())])


class _Standardise(Function):
    """z = ρ (x − mean x), ρ = 1 / √(var x + ε), over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        z, mean, rho = _layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, z, mean, rho)
        out: Tensor = z
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, z, mean, rho = ctx.saved_tensors
        (g,) = grads
        if torch.is_grad_enabled():
            return apply(_StandardiseBack, x, g, z.detach(), mean, rho), None
        return _projected(x, g, mean, rho), None


class _StandardiseBack(Function):
    """b = ρ P g, with P g = g − mean g − z mean(g z)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, z: Tensor, mean: Tensor, rho: Tensor) -> Tensor:
        out = _projected(x, g, mean, rho)
        ctx.save_for_backward(x, z, mean, rho, out, _mean(g, z).mul_(rho))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        check_last()
        # With dz = ρ P dx and dρ = −ρ² mean(z dx):
        # ⟨v, db⟩ = −ρ mean(z dx) ⟨v, b⟩ − ρ [mean(g z) ⟨v, dz⟩ + mean(v z) ⟨g, dz⟩]
        (v,) = grads
        x, z, mean, rho, out, along = ctx.saved_tensors
        dg = _projected(x, v, mean, rho)
        dx = z * _mean(v, out).mul_(-rho)
        dx.addcmul_(dg, along, value=-1).addcmul_(out, _mean(v, z).mul_(rho), value=-1)
        return dx, dg, None, None, None


def _projected(x: Tensor, g: Tensor, mean: Tensor, rho: Tensor) -> Tensor:
    """Return ρ P g, in one pass over memory."""
    needed = [True, False, False]
    out: Tensor = _layer_norm_backward(g, x, x.shape[-1:], mean, rho, None, None, needed)[0]
    return out


def _mean(a: Tensor, b: Tensor) -> Tensor:
    rows, d = a.shape[:-1].numel(), a.shape[-1]
    return torch.bmm(a.reshape(rows, 1, d), b.reshape(rows, d, 1)).view(*a.shape[:-1], 1).div_(d)
