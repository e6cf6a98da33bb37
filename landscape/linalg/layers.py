"""Layers whose gradient is cheap to differentiate again.

A Hessian product is v ↦ ∇⟨∇L, v⟩. For a layer y = f(x, w) with upstream gradient g, ∇L is built of
b(x, w, g) = ((∂f/∂x)ᵀg, (∂f/∂w)ᵀg), and the derivative of b that PyTorch brings is generic: at
every product it computes again what does not depend on v. Here f and b come with the derivatives of
⟨b(x, w, g), (v, u)⟩ in x, w and g, in few passes over memory. Values and derivatives are the same
up to rounding.

| layer | how its second derivative is made cheaper |
|---|---|
| convolution | derivatives in the weights by the kernel of the first derivative |
| batch norm in evaluation mode | factors of channels; after a convolution, of its weights * |
| scale and shift of a layer norm, before a linear layer | as factors of that one's weights * |
| linear | sums of products accumulate in place |
| ReLU | known to be zero |
| GELU | first and second derivative are tables |
| linear, GELU, linear | row by row, in cache |
| layer norm, attention | closed forms, with what they share computed once |
| hard sigmoid | PyTorch has no second derivative of it |
| batch norm of a batch, where a size is 1 | PyTorch may mistake the memory format of a gradient |
| group norm | PyTorch's second derivative in the bias alone crashes in channels-last format |
| weight norm | PyTorch's second derivative (2.13, 2.14) is wrong |
| `normalize` | PyTorch's second derivative is NaN at a vector of zeros, as in padded windows |

* where these are fewer than the activations; of a layer norm on a CPU only.

In float32 on a GPU, what lies between the matrix products of a layer is one kernel, and matrix
products run on the tensor cores without loss of precision (`landscape.linalg.gpu`).

`cheap_second_derivatives` puts them in the place of PyTorch's functions while a model runs. A call
that they do not cover (other precisions, autocast, dropout, `torch.func`) is left as it is.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from landscape.linalg.attention import attention
from landscape.linalg.bilinear import conv, linear
from landscape.linalg.gpu import has_kernels
from landscape.linalg.layer_norm import layer_norm
from landscape.linalg.mlp import mlp
from landscape.linalg.pointwise import gelu, normalise, relu, standardise

_BY_POSITION = ("input", "query", "key", "value")  # names of what the layers take first


@contextmanager
def cheap_second_derivatives(
    *, of_outputs: bool = False, channels_last: bool = True
) -> Iterator[None]:
    """Run the covered functions of PyTorch as the layers of this module.

    Args:
        of_outputs: Only derivatives of outputs along a vector are to come. Layers that would take
            the whole second derivative for these are left as they are.
        channels_last: Convolutions on a CPU may bring their outputs in this memory format.
    """
    mode = _Replacing(channels_last)
    if of_outputs:
        mode.leave(F.linear, F.gelu, F.layer_norm, F.scaled_dot_product_attention)
    try:
        with mode:
            yield
    finally:
        mode.forget()


def with_cheap_second_derivatives(
    function: Callable[[], Tensor], *, of_outputs: bool = False
) -> Tensor:
    """Call a function that runs a model under `cheap_second_derivatives`.

    Args:
        function: Called again where the model makes a view of activations that wants their channels
            first in memory, as `x.view(len(x), -1)` does.
        of_outputs: See there.
    """
    try:
        with cheap_second_derivatives(of_outputs=of_outputs):
            return function()
    except RuntimeError as error:
        if not re.search("view size is not compatible|last dimension with stride 1", str(error)):
            raise
    with cheap_second_derivatives(of_outputs=of_outputs, channels_last=False):
        return function()


class _Replacing(TorchFunctionMode):
    """Calls the layers of this module instead of PyTorch's functions, where they are covered."""

    def __init__(self, channels_last: bool = True) -> None:
        super().__init__()
        self._channels_last = channels_last
        self._convolved: _Made | None = None
        self._normed: _Made | None = None
        self._widened: _Made | None = None  # the output of a linear layer ...
        self._activated: _Made | None = None  # ... and its GELU
        self._layers: dict[Any, Callable[..., Tensor | None]] = {
            torch.conv2d: self._conv,
            F.batch_norm: self._batch_norm,
            F.linear: self._linear,
            F.layer_norm: self._layer_norm,
            F.group_norm: _group_norm,
            F.relu: _relu,
            torch.relu: _relu,
            F.gelu: self._gelu,
            F.scaled_dot_product_attention: _attention,
            F.hardsigmoid: _hardsigmoid,
            torch._weight_norm: _weight_norm,
            F.normalize: _normalize,
        }

    def leave(self, *functions: Any) -> None:
        """Leave some functions as they are."""
        for function in functions:
            del self._layers[function]

    def forget(self) -> None:
        """Let go of the last layers, and of the graph that they hold."""
        self._convolved = self._normed = self._widened = self._activated = None
        self._layers.clear()  # methods of this, which would live until the next collection

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        layer = None if torch.is_inference_mode_enabled() else self._layers.get(func)
        if layer is not None and all(_covered(t) for t in (*args, *kwargs.values())):
            named = [kwargs[name] for name in _BY_POSITION if name in kwargs]
            others = {name: t for name, t in kwargs.items() if name not in _BY_POSITION}
            out = layer(*args, *named, **others)
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
        padding = 0 if padding == "valid" else padding
        if x.dim() != 4 or isinstance(padding, str):
            return None
        if x.device.type == "cpu":
            # To rearrange more weights than activations, three times a product, costs more. Of one
            # image there is nothing to gain, and PyTorch's instance norm takes a gradient with the
            # channels last for one with the channels first (2.13).
            last = self._channels_last and len(x) > 1 and x.numel() >= weight.numel()
            form = torch.channels_last if last else torch.contiguous_format
            x, weight = x.contiguous(memory_format=form), weight.contiguous(memory_format=form)
        settings = (_pair(stride), _pair(padding), _pair(dilation), False, [0, 0], groups)
        out = conv(x, weight, bias, settings)
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
        if x.dim() < 2:
            return None
        if training or running_mean is None or running_var is None:
            if x.dim() != 4 or 1 not in x.shape:
                return None
            # PyTorch may take a gradient of this shape for one of another memory format (2.13).
            rest = running_mean, running_var, weight, bias, training, momentum, eps
            return F.batch_norm(x.flatten(2), *rest).reshape(x.shape)
        if running_mean.requires_grad or running_var.requires_grad:
            return None
        scale = torch.rsqrt(running_var + eps)
        kernels = None if last is None or not last.is_still(x) else last.weight
        if last is None or kernels is None or x.numel() < kernels.numel():
            return normalise(x, weight, bias, running_mean, scale)
        scale = scale if weight is None else scale * weight
        shift = -running_mean * scale if bias is None else bias - running_mean * scale
        if last.bias is not None:
            shift = shift + last.bias * scale
        folded = kernels * scale[:, None, None, None]
        known = (x, scale, shift if last.bias is None else shift - last.bias * scale)
        return conv(last.x, folded, shift, last.more, tuple(t.detach() for t in known))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if x.dim() < 2 or weight.dim() != 2 or not weight.numel():
            return None
        if bias is not None and bias.dim() != 1:
            return None
        last = self._activated
        if last is not None and last.is_still(x) and weight.requires_grad:
            before, h, *slopes = last.more
            tables = [_rows(t) for t in (x.detach(), *slopes)]
            out = mlp(before.x, before.weight, before.bias, _rows(h), weight, bias, tables)
            return _like_rows(out, x)
        last = self._normed
        if last is not None and last.is_still(x) and x.numel() >= weight.numel():
            # (z s + t) wᵀ + bias = z (w s)ᵀ + (w t + bias)
            x = last.x
            if last.bias is not None:
                bias = weight @ last.bias if bias is None else weight @ last.bias + bias
            if last.weight is not None:
                weight = weight * last.weight
        rows = _rows(x)
        out = _like_rows(linear(rows, weight, bias), x)
        self._widened = _Made(out, rows, weight, bias)
        return out

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
        if weight is not None and has_kernels(x):
            return layer_norm(x, weight, bias, eps)
        z = standardise(x, eps)
        # The layer keeps z; what is returned may be changed in place.
        out = z.clone() if weight is None else z * weight
        out = out if bias is None else out + bias
        self._normed = _Made(out, z, weight, bias)
        return out

    def _gelu(self, x: Tensor, approximate: str = "none") -> Tensor | None:
        if approximate != "none":
            return None
        out, first, second = gelu(x)
        last = self._widened
        if last is not None and last.is_still(x) and last.is_learned():
            self._activated = _Made(out, x, None, None, (last, x, first, second))
        return out


class _Made:
    """The output of a layer with what it was made of, to be made in another way."""

    def __init__(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        more: Any = None,
    ) -> None:
        self.x, self.weight, self.bias, self.more = x, weight, bias, more
        self._out, self._versions = out, (out._version, x._version)
        self._node = out.grad_fn
        learned = any(t is not None and t.requires_grad for t in (x, weight, bias))
        self._cut = learned and out.grad_fn is None  # made under `no_grad`

    def is_still(self, tensor: Tensor) -> bool:
        """Whether a tensor is the output, and neither it, its graph nor the input has changed."""
        if tensor is not self._out or self._cut or tensor._backward_hooks:
            return False
        unchanged = (tensor._version, self.x._version) == self._versions
        return unchanged and tensor.grad_fn is self._node

    def is_learned(self) -> bool:
        """Whether input and weights both require a gradient."""
        return self.x.requires_grad and self.weight is not None and self.weight.requires_grad


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if x.requires_grad or (weight is not None and weight.requires_grad):
        return None
    # In channels-last format PyTorch's second derivative in the bias alone reads what is not there,
    # and crashes (2.13).
    return F.group_norm(x.contiguous(), num_groups, weight, bias, eps)


def _relu(x: Tensor, inplace: bool = False) -> Tensor | None:
    return None if inplace else relu(x)


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    out = F.relu6(x + 3) / 6
    return x.copy_(out) if inplace else out


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [d for d in range(v.dim()) if dim == -1 or d != dim % v.dim()]
    return v * (g / v.square().sum(others, keepdim=True).sqrt())


def _normalize(
    x: Tensor, p: float = 2.0, dim: int | list[int] = 1, eps: float = 1e-12, out: Any = None
) -> Tensor | None:
    if p != 2 or out is not None or eps**2 < torch.finfo(x.dtype).tiny:
        return None
    # Below ε the norm is a constant, and what its derivative is there does not matter.
    return x * x.square().sum(dim, keepdim=True).clamp_min(eps**2).rsqrt()


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
    if dropout_p or is_causal or enable_gqa or not (q.numel() and k.numel() and v.numel()):
        return None
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        return None
    if mask is not None and mask.requires_grad:
        return None
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    return attention(q, k, v, mask, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)


def _covered(argument: Any) -> bool:
    """Whether an argument is no tensor, or a plain one that the layers are made for."""
    if not isinstance(argument, Tensor):
        return True
    return (
        is_plain(argument)
        and argument.dtype in (torch.float32, torch.float64, torch.bool)
        and not torch.is_autocast_enabled(argument.device.type)
    )


def is_plain(argument: Any) -> bool:
    """Whether an argument is a tensor of no other kind."""
    plain = type(argument) in (Tensor, nn.Parameter)
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(argument)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _like_rows(out: Tensor, x: Tensor) -> Tensor:
    """Return what was made of the rows of `x` in its shape; as a view only where that differs."""
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])


def _pair(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size) * (2 // len(size))
