"""Convolution and linear layer with a cheap second derivative (`landscape.linalg.layers`).

Both are bilinear in input and weights, so the second derivatives are the layer itself and its two
adjoints, with the kernels of the first derivative.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from landscape.linalg.gpu import has_kernels

_convolution = torch.ops.aten.convolution
_convolution_backward = torch.ops.aten.convolution_backward


def apply(layer: Any, *args: Any) -> Any:
    """Call an autograd function; PyTorch does not annotate its `apply`."""
    return layer.apply(*args)


def check_last() -> None:
    """Refuse a third derivative, in which what a layer has kept would count as a constant.

    Raises:
        RuntimeError: If the second derivative that is computed is to be differentiated again.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "`model` must not take a gradient with `create_graph=True` in its forward pass through "
            "GELU, attention or a norm: that would need their third derivatives."
        )


def multiply(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Return a b + bias, the product of two matrices.

    Args:
        a: Shape `(m, k)`.
        b: Shape `(k, n)`.
        bias: Shape `(n,)`, or `None`.
        out: Where it is written.
        add: Add it to what `out` holds.
    """
    if has_kernels(a):
        from landscape.linalg.gpu import matmul

        if matmul.serves(a, b):
            return matmul.multiply(a, b, bias, out=out, add=add)
    if out is not None and add:
        return out.addmm_(a, b) if bias is None else out.addmm_(a, b).add_(bias)
    if bias is None:
        return torch.mm(a, b, out=out)
    return torch.addmm(bias, a, b, out=out)


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any, known: Any = None
) -> Tensor:
    """Return the convolution x ∗ w + bias.

    Args:
        x: Images, `(n, channels, h, w)`.
        weight: Kernels, `(out, channels / groups, kh, kw)`.
        bias: Shape `(out,)`, or `None`.
        settings: Stride, padding, dilation, transposed, output padding, groups, as ATen takes them.
        known: Where given, `(a, s, t)` such that the result is s a + t, channel by channel.
    """
    out: Tensor = apply(_Conv, x, weight, bias, settings, known)
    return out


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
            out = _convolved(x, weight, bias, settings)
        else:
            a, scale, shift = known
            out = (a * scale[:, None, None]).add_(shift[:, None, None])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        back = apply(_ConvBack, x, weight, grads[0], ctx.settings, ctx.needs_input_grad[:3])
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
            dg = _convolved(v, weight, shift, ctx.settings)
            if ctx.needs_input_grad[1]:
                dw = _adjoints(g, v, weight, ctx.settings, (False, True, False))[1]
        if u is not None:
            dg = _convolved(x, u, shift if dg is None else None, ctx.settings, onto=dg)
            if ctx.needs_input_grad[0]:
                dx = _adjoints(g, x, u, ctx.settings, (True, False, False))[0]
        if dg is None and shift is not None:
            dg = shift[:, None, None].expand_as(g)
        return dx, dw, dg, None, None


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any, onto: Tensor | None = None
) -> Tensor:
    """Return x ∗ w + bias, added to `onto` where it is given."""
    if has_kernels(x) and (onto is None or onto.is_contiguous()):
        from landscape.linalg.gpu import convolution

        if convolution.serves(x, weight, settings):
            return convolution.convolve(x, weight, bias, settings[2], onto=onto)
    out: Tensor = _convolution(x, weight, bias, *settings)
    return out if onto is None else onto.add_(out)


def _adjoints(
    g: Tensor, x: Tensor, weight: Tensor, settings: Any, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return g ⋆ w, g ⋆ x and Σ g, those that are needed."""
    found: list[Tensor | None] = [None, None, None]
    rest = list(needed)
    if has_kernels(g):
        from landscape.linalg.gpu import convolution

        if convolution.serves(g, weight, settings):
            if needed[0]:
                found[0] = convolution.convolve(g, weight, None, settings[2], back=True)
            if needed[1] and convolution.serves_weights(x, weight):
                found[1] = convolution.of_weight(g, x, weight)
            rest = [wanted and t is None for wanted, t in zip(needed, found, strict=True)]
    if any(rest):
        if rest[1] and breaks_channels_last(weight.shape, settings[0], weight.device):
            # `contiguous` would leave channels-last strides of kernels of one pixel.
            g, x, weight = (t.clone(memory_format=torch.contiguous_format) for t in (g, x, weight))
        made = _convolution_backward(g, x, weight, [weight.shape[0]], *settings, rest)
        found = [t if wanted else f for t, wanted, f in zip(made, rest, found, strict=True)]
    return tuple(found)


def breaks_channels_last(shape: Sequence[int], stride: Sequence[int], device: torch.device) -> bool:
    """Return whether PyTorch must not take the gradient in kernels in channels-last format.

    On a CPU that of strided 1x1 kernels is wrong, crashes or never ends where there are fewer
    channels than a block has (oneDNN's issue 6035, PyTorch 2.13 and 2.14): 8 with AVX2, 16 with
    AVX-512. Channels-last strides of the kernels alone are enough.

    Args:
        shape: That of the kernels, `(out, channels / groups, kh, kw)`.
        stride: Stride in each direction.
        device: Where they are.
    """
    small = shape[1] < 16 and tuple(shape[2:]) == (1, 1)
    return small and max(stride) > 1 and device.type == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x wᵀ + bias for x of shape `(n, in)`."""
    out: Tensor = apply(_Linear, x, weight, bias)
    return out


class _Linear(Function):
    """y = x wᵀ + bias, for x with one sample a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad  # what is not needed may be changed in place afterwards
        ctx.save_for_backward(x if needed[1] else None, weight if needed[0] else None)
        ctx.set_materialize_grads(False)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors
        if grads[0] is None:  # the first layer of an `mlp`, which takes the gradient itself
            return None, None, None
        return apply(_LinearBack, x, weight, grads[0], ctx.needs_input_grad)


class _LinearBack(Function):
    """b = (g w, gᵀx, Σ g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, g: Tensor, needed: tuple[bool, ...]) -> Any:
        ctx.save_for_backward(x, weight, g)
        ctx.set_materialize_grads(False)
        return (
            multiply(g, weight) if needed[0] else None,
            multiply(g.T, x) if needed[1] else None,
            g.sum(0) if needed[2] else None,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        v, u, shift = grads
        x, weight, g = ctx.saved_tensors
        dx = dw = dg = None
        if v is not None:
            dg = multiply(v, weight.T, shift)
            dw = multiply(g.T, v) if ctx.needs_input_grad[1] else None
        if u is not None:
            dg = multiply(x, u.T, shift if dg is None else None, out=dg, add=dg is not None)
            dx = multiply(g, u) if ctx.needs_input_grad[0] else None
        if dg is None and shift is not None:
            dg = shift.expand_as(g)
        return dx, dw, dg, None
