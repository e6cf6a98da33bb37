"""Layers whose gradient is cheap to differentiate again.

A Hessian product is v ↦ ∇⟨∇L, v⟩. For a layer y = f(x, w) with upstream gradient g, ∇L is built of
b(x, w, g) = ((∂f/∂x)ᵀg, (∂f/∂w)ᵀg), and the derivative of b that PyTorch brings is generic: at
every product it computes again what does not depend on v. Here f and b come with the derivatives of
⟨b(x, w, g), (v, u)⟩ in x, w and g, in few passes over memory. Values and derivatives are the same
up to rounding.

| layer | how its second derivative is made cheaper |
|---|---|
| convolution | derivatives in the weights by the kernel of the first derivative |
| batch norm in evaluation mode, after a convolution | as a factor of that one's weights |
| scale and shift of a layer norm, before a linear layer | as factors of that one's weights |
| linear | sums of products accumulate in place |
| GELU | first and second derivative are tables |
| layer norm, attention | closed forms, with what they share computed once |

`cheap_second_derivatives` puts them in the place of PyTorch's functions while a model runs. A call
that they do not cover (other precisions, autocast, dropout, `torch.func`) is left as it is.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

_convolution = torch.ops.aten.convolution
_convolution_backward = torch.ops.aten.convolution_backward
_CACHED = 1 << 17  # attention weights at a time: a dozen such tables stay in a CPU's cache


@contextmanager
def cheap_second_derivatives() -> Iterator[None]:
    """Run the covered functions of PyTorch as the layers of this module."""
    with _Replacing():
        yield


class _Replacing(TorchFunctionMode):
    """Calls the layers of this module instead of PyTorch's functions, where they are covered."""

    def __init__(self) -> None:
        super().__init__()
        self._convolved: _Made | None = None
        self._normed: _Made | None = None
        self._layers: dict[Any, Callable[..., Tensor | None]] = {
            torch.conv2d: self._conv,
            F.batch_norm: self._batch_norm,
            F.linear: self._linear,
            F.layer_norm: self._layer_norm,
            F.gelu: _gelu,
            F.scaled_dot_product_attention: _attention,
        }

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        layer = self._layers.get(func)
        if layer is not None and all(_covered(t) for t in (*args, *kwargs.values())):
            out = layer(*args, **kwargs)
            if out is not None:
                return out
        return func(*args, **kwargs)

    def _conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor | None:
        if x.dim() != 4 or isinstance(padding, str):
            return None
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
            weight = weight.contiguous(memory_format=torch.channels_last)
        settings = (_pair(stride), _pair(padding), _pair(dilation), False, [0, 0], groups)
        out: Tensor = _apply(_Conv, x, weight, bias, settings, None)
        self._convolved = _Made(out, x, weight, bias, settings)
        return out

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        last, self._convolved = self._convolved, None
        if training or last is None or not last.is_still(x) or last.weight is None:
            return None
        if running_mean is None or running_var is None:
            return None
        scale = torch.rsqrt(running_var + eps)
        scale = scale if weight is None else scale * weight
        shift = -running_mean * scale if bias is None else bias - running_mean * scale
        if last.bias is not None:
            shift = shift + last.bias * scale
        folded = last.weight * scale[:, None, None, None]
        known = (x, scale, shift if last.bias is None else shift - last.bias * scale)
        out: Tensor = _apply(
            _Conv, last.x, folded, shift, last.settings, tuple(t.detach() for t in known)
        )
        return out

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if x.dim() < 2 or weight.dim() != 2:
            return None
        last = self._normed
        if last is not None and last.is_still(x):
            # (z s + t) wᵀ + bias = z (w s)ᵀ + (w t + bias)
            x = last.x
            if last.bias is not None:
                bias = weight @ last.bias if bias is None else weight @ last.bias + bias
            if last.weight is not None:
                weight = weight * last.weight
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = _apply(_Linear, rows, weight, bias)
        return out.view(*x.shape[:-1], len(weight))

    def _layer_norm(
        self,
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor | None:
        if len(normalized_shape) != 1:
            return None
        z: Tensor = _apply(_Standardise, x, eps)
        # The layer keeps z; what is returned may be changed in place.
        out = z.clone() if weight is None else z * weight
        out = out if bias is None else out + bias
        self._normed = _Made(out, z, weight, bias)
        return out


class _Made:
    """The output of a layer with what it was made of, to be made in another way."""

    def __init__(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        settings: Any = None,
    ) -> None:
        self.x, self.weight, self.bias, self.settings = x, weight, bias, settings
        self._out, self._version = out, out._version

    def is_still(self, tensor: Tensor) -> bool:
        """Whether a tensor is the output, unchanged since."""
        return tensor is self._out and tensor._version == self._version


class _Conv(Function):
    """y = x ∗ w + bias; where `known` is given it is (a, s, t) with y = s a + t."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any, known: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        out: Tensor
        if known is None:
            out = _convolution(x, weight, bias, *settings)
        else:
            a, scale, shift = known
            out = (a * scale[:, None, None]).add_(shift[:, None, None])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        back = _apply(_ConvBack, x, weight, grads[0], ctx.settings, ctx.needs_input_grad[:3])
        return (*back, None, None)


class _ConvBack(Function):
    """b = (g ⋆ w, g ⋆ x, Σ g), bilinear in (x, w) and g; the first two are adjoints of ∗."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, g: Tensor, settings: Any, needed: tuple[bool, ...]
    ) -> Any:
        ctx.save_for_backward(x, weight, g)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return _adjoints(g, x, weight, settings, needed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        v, u, shift = grads
        x, weight, g = ctx.saved_tensors
        dx = dw = dg = None
        if v is not None:
            dg = _convolution(v, weight, shift, *ctx.settings)
            if ctx.needs_input_grad[1]:
                dw = _adjoints(g, v, weight, ctx.settings, (False, True, False))[1]
        if u is not None:
            other = _convolution(x, u, shift if dg is None else None, *ctx.settings)
            dg = other if dg is None else dg.add_(other)
            if ctx.needs_input_grad[0]:
                dx = _adjoints(g, x, u, ctx.settings, (True, False, False))[0]
        if dg is None and shift is not None:
            dg = shift[:, None, None].expand_as(g)
        return dx, dw, dg, None, None


def _adjoints(
    g: Tensor, x: Tensor, weight: Tensor, settings: Any, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    found = _convolution_backward(g, x, weight, [weight.shape[0]], *settings, list(needed))
    return tuple(t if wanted else None for t, wanted in zip(found, needed, strict=True))


class _Linear(Function):
    """y = x wᵀ + bias, for x with one sample a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return _apply(_LinearBack, x, weight, grads[0], ctx.needs_input_grad)


class _LinearBack(Function):
    """b = (g w, gᵀx, Σ g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, g: Tensor, needed: tuple[bool, ...]) -> Any:
        ctx.save_for_backward(x, weight, g)
        ctx.set_materialize_grads(False)
        return (
            g @ weight if needed[0] else None,
            g.T @ x if needed[1] else None,
            g.sum(0) if needed[2] else None,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        v, u, shift = grads
        x, weight, g = ctx.saved_tensors
        dx = dw = dg = None
        if v is not None:
            dg = F.linear(v, weight, shift)
            dw = g.T @ v if ctx.needs_input_grad[1] else None
        if u is not None:
            dg = F.linear(x, u, shift) if dg is None else dg.addmm_(x, u.T)
            dx = g @ u if ctx.needs_input_grad[0] else None
        if dg is None and shift is not None:
            dg = shift.expand_as(g)
        return dx, dw, dg, None


def _gelu(x: Tensor, approximate: str = "none") -> Tensor | None:
    if approximate != "none":
        return None
    out: Tensor = _apply(_Gelu, x)
    return out


class _Gelu(Function):
    """y = x Φ(x), with y' = Φ + x φ and y'' = (2 − x²) φ as tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        phi = torch.erf(x * math.sqrt(0.5)).add_(1).mul_(0.5)
        density = (x * x).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        first = torch.addcmul(phi, x, density)
        second = (x * x).neg_().add_(2).mul_(density)
        ctx.save_for_backward(x, first, second)
        return phi.mul_(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, first, second = ctx.saved_tensors
        return _apply(_GeluBack, x, g, first, second) if torch.is_grad_enabled() else g * first


class _GeluBack(Function):
    """b = y'(x) g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(g * second, first)
        return g * first

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (v,) = grads
        curved, first = ctx.saved_tensors
        return v * curved, v * first, None, None


class _Standardise(Function):
    """z = ρ (x − mean x), ρ = 1 / √(var x + ε), over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        z = x - x.mean(-1, keepdim=True)
        rho = (z * z).mean(-1, keepdim=True).add_(eps).rsqrt_()
        z.mul_(rho)
        ctx.save_for_backward(x, z, rho)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, z, rho = ctx.saved_tensors
        return _apply(_StandardiseBack, x, grads[0], z.detach(), rho), None


class _StandardiseBack(Function):
    """b = ρ P g, with P g = g − mean g − z mean(g z)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, z: Tensor, rho: Tensor) -> Tensor:
        along = (g * z).mean(-1, keepdim=True)
        out = _project(g, z, along).mul_(rho)
        ctx.save_for_backward(z, rho, out, along)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # With dz = ρ P dx and dρ = −ρ² mean(z dx):
        # ⟨v, db⟩ = −ρ mean(z dx) ⟨v, b⟩ − ρ [mean(g z) ⟨v, dz⟩ + mean(v z) ⟨g, dz⟩]
        (v,) = grads
        z, rho, out, along = ctx.saved_tensors
        also = (v * z).mean(-1, keepdim=True)
        dg = _project(v, z, also).mul_(rho)
        dx = z * ((v * out).mean(-1, keepdim=True) * -rho)
        dx.addcmul_(dg, along * rho, value=-1).addcmul_(out, also * rho, value=-1)
        return dx, dg, None, None


def _project(g: Tensor, z: Tensor, along: Tensor) -> Tensor:
    return torch.addcmul(g - g.mean(-1, keepdim=True), z, along, value=-1)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    mask = attn_mask
    if dropout_p or is_causal or enable_gqa:
        return None
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        return None
    if mask is not None and mask.requires_grad:
        return None
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # once, not at every product
    out: Tensor = _apply(_Attention, q, k, v, mask, scale or 1 / math.sqrt(q.shape[-1]))
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
        return (*_apply(_AttentionBack, q, k, v, grads[0].contiguous(), p, ctx.scale), None, None)


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
            size = max(1, _CACHED * size // p.numel())
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


def _covered(argument: Any) -> bool:
    """Whether an argument is no tensor, or a plain one that the layers are made for."""
    if not isinstance(argument, Tensor):
        return True
    return (
        type(argument) in (Tensor, nn.Parameter)
        and argument.dtype in (torch.float32, torch.float64, torch.bool)
        and not torch.is_autocast_enabled(argument.device.type)
        and not torch._C._functorch.is_functorch_wrapped_tensor(argument)
    )


def _apply(layer: Any, *args: Any) -> Any:
    return layer.apply(*args)  # PyTorch does not annotate it


def _pair(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
