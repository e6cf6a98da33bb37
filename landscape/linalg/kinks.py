"""Kinks of a loss, held where they are while its weights move.

A network of convolutions, ReLUs and max pooling is a smooth function of its weights as long as no
ReLU opens or closes and every pool takes its maximum from the same place. Where these choices are
held, the loss has no kinks, and at the weights that they were made for its value, gradient and
Hessian are those of the loss itself. A difference of gradients is then one of a smooth function.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from landscape.linalg.bilinear import breaks_channels_last
from landscape.linalg.layers import is_plain

Kinks = Literal["none", "held", "free"]
"""Whether a loss has kinks, and whether all of them can be held."""

Choice = Tensor | torch.memory_format
"""The output of a ReLU, where a pool has its maxima, or the memory format of a convolution."""

_RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_POOLS = (F.max_pool2d, torch.max_pool2d)
_IN_PLACE = (torch.relu_, Tensor.relu_)

# the usual ones: others show in the products
_KINKED = re.compile("relu|hardtanh|hardswish|max_?pool", re.IGNORECASE)
_HELD = re.compile("_?Relu_?Backward|MaxPool2DWithIndicesBackward")

_threshold_backward: Any = torch.ops.aten.threshold_backward


def kinks_of(names: Iterable[str], choices: list[Choice]) -> Kinks:
    """Return what kinks a loss has.

    Args:
        names: Of the functions in its graph, each as often as it is there.
        choices: What was noted of it.
    """
    kinked = Counter(name for name in names if _KINKED.search(name))
    if not kinked:
        return "none"
    noted = sum(isinstance(choice, Tensor) for choice in choices)
    every = all(_HELD.match(name) for name in kinked) and kinked.total() == noted
    return "held" if every else "free"


class Noting(TorchFunctionMode):
    """Notes what a model chooses, in the order of its calls."""

    def __init__(self, choices: list[Choice]) -> None:
        """Begin anew.

        Args:
            choices: Where it is noted.
        """
        super().__init__()
        self._choices = choices
        choices.clear()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _is_pool(func, args):
            out, places = F.max_pool2d_with_indices(*args, **kwargs)
            if out.requires_grad:
                self._choices.append(places)
            return out
        out = func(*args, **kwargs)
        if _is_relu(func, args) and out.requires_grad:
            self._choices.append(out.detach())
        elif _is_conv(func, args):
            self._choices.append(_format_of(out, *args, **kwargs))
        return out


class Holding(TorchFunctionMode):
    """Lets a model choose as it was noted, whatever its weights.

    Where it makes other calls than then, its kinks are no longer held.
    """

    def __init__(self, choices: list[Choice]) -> None:
        """Hold what was noted.

        Args:
            choices: As `Noting` has left them.
        """
        super().__init__()
        self._choices = iter(choices)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _is_conv(func, args):
            form = next(self._choices, None)
            if isinstance(form, torch.memory_format):
                x, weight = (t.contiguous(memory_format=form) for t in args[:2])
                args = (x, weight, *args[2:])
        elif torch.is_grad_enabled() and args and is_plain(args[0]) and args[0].requires_grad:
            x = args[0]
            if _is_relu(func, args):
                kept = next(self._choices, None)
                if isinstance(kept, Tensor) and kept.shape == x.shape:
                    out = _threshold_backward(x, kept, 0)
                    in_place = func in _IN_PLACE or kwargs.get("inplace")
                    return x.copy_(out) if in_place else out
            elif _is_pool(func, args):
                places = next(self._choices, None)
                if isinstance(places, Tensor) and places.shape[:-2] == x.shape[:-2]:
                    return x.flatten(-2).gather(-1, places.flatten(-2)).view(places.shape)
        return func(*args, **kwargs)


def _is_relu(func: Any, args: tuple[Any, ...]) -> bool:
    return func in _RELUS and bool(args) and is_plain(args[0])


def _is_pool(func: Any, args: tuple[Any, ...]) -> bool:
    return func in _POOLS and bool(args) and is_plain(args[0])


def _is_conv(func: Any, args: tuple[Any, ...]) -> bool:
    batch = func is torch.conv2d and len(args) > 1 and args[0].dim() == 4
    return batch and all(map(is_plain, args[:2]))


def _format_of(
    out: Tensor, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, *_: Any, **__: Any
) -> torch.memory_format:
    """Return the memory format for a convolution that had this output."""
    strides = (stride,) if isinstance(stride, int) else stride
    if out.is_contiguous() or breaks_channels_last(weight.shape, strides, x.device):
        return torch.contiguous_format
    return torch.channels_last
