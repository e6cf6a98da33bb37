"""Dropout of several models at once, drawn as each model alone would draw it.

Under `vmap` PyTorch draws for all members from one stream, so that no member would see the masks
that it sees when it is trained alone. Here the masks are drawn beforehand, for each member from its
own stream and in the order of the forward pass, and handed in. Which masks a forward pass needs is
recorded once for each shape of the inputs, of each model and in every epoch, as rates may change.

This covers everything that ends in `torch.nn.functional.dropout`: `nn.Dropout`, and the stochastic
depth of `landscape.models`. Other random functions are left to `vmap`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from landscape._streams import OwnStreams
from landscape.batches import Inputs, call_on
from landscape.parameters import call_with

_Plan = list[tuple[Tensor, float]]  # ones of the shape and layout of a mask, and the rate


class Draws:
    """The dropout masks that a forward pass of a model in training mode needs."""

    def __init__(self, model: nn.Module) -> None:
        """Keep the model whose forward pass is meant; its buffers are not touched."""
        self._model = model
        self._plans: dict[tuple[torch.Size, ...], _Plan] = {}

    def draw(self, inputs: Inputs) -> list[Tensor]:
        """Return masks for one forward pass, drawn from PyTorch's global stream.

        Args:
            inputs: What the model will be called with.

        Returns:
            Masks in the order in which the forward pass needs them: 0, or 1 / (1 - rate).
        """
        tensors = inputs.values() if isinstance(inputs, Mapping) else (inputs,)
        shapes = tuple(value.shape for value in tensors if isinstance(value, Tensor))
        if shapes not in self._plans:
            self._plans[shapes] = self._record(inputs)
        return [F.dropout(ones, rate) for ones, rate in self._plans[shapes]]

    def _record(self, inputs: Inputs) -> _Plan:
        device = next(self._model.parameters()).device
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        plan: _Plan = []

        def noted(x: Tensor, rate: float, inplace: bool) -> Tensor:
            plan.append((torch.ones_like(x), rate))
            return F.dropout(x, rate, inplace=inplace)

        with torch.no_grad(), OwnStreams(devices=[device]).entered(), _Dropout(noted):
            call_on(partial(call_with, self._model, buffers), inputs)
        return plan


def replayed(masks: Iterable[Tensor]) -> TorchFunctionMode:
    """Return a context in which dropout takes the masks of one forward pass, one after another."""
    remaining = iter(masks)

    def multiplied(x: Tensor, rate: float, inplace: bool) -> Tensor:
        mask = next(remaining)
        return x.mul_(mask) if inplace else x * mask

    return _Dropout(multiplied)


class _Dropout(TorchFunctionMode):
    """Inside, active dropout is a function of its input, its rate and whether it is in place."""

    def __init__(self, function: Callable[[Tensor, float, bool], Tensor]) -> None:
        super().__init__()
        self._function = function

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            x, rate, inplace = _arguments(*args, **kwargs)
            if rate:
                return self._function(x, rate, inplace)
        return func(*args, **kwargs)


def _arguments(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, float, bool]:
    """Return what a dropout acts on, its rate and whether in place; called as `F.dropout` is.

    The rate is 0 where it does nothing.
    """
    return input, p if training else 0.0, inplace
