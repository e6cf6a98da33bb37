"""Dropout of several models at once, drawn as each model alone would draw it.

Under `vmap` PyTorch draws for all members from one stream, so that no member would see the masks
that it sees when it is trained alone. Here the masks are drawn beforehand, for each member from its
own stream and in the order of the forward pass, and handed in. Which masks a forward pass needs is
recorded once for each shape of the inputs.

This covers everything that ends in `torch.nn.functional.dropout`: `nn.Dropout`, and the stochastic
depth of `landscape.models`. Other random functions are left to `vmap`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from landscape.batches import Inputs
from landscape.parameters import call_with
from landscape.training.surroundings import GlobalStream

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
        args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else ((inputs,), {})
        with torch.no_grad(), GlobalStream(device, 0).entered(), _Record() as record:
            call_with(self._model, buffers, *args, **kwargs)
            plan: _Plan = record.plan
        return plan


class Replay(TorchFunctionMode):
    """Inside, dropout takes the masks given, one after another."""

    def __init__(self, masks: Iterable[Tensor]) -> None:
        """Take the masks of one forward pass."""
        super().__init__()
        self._masks = iter(masks)

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, or multiply by the next mask where it is an active dropout."""
        kwargs = kwargs or {}
        if func is F.dropout:
            x, rate, inplace = _dropout(*args, **kwargs)
            if rate:
                mask = next(self._masks)
                return x.mul_(mask) if inplace else x * mask
        return func(*args, **kwargs)


class _Record(TorchFunctionMode):
    """Inside, dropout notes down which masks it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: _Plan = []

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            x, rate, _ = _dropout(*args, **kwargs)
            if rate:
                self.plan.append((torch.ones_like(x), rate))
        return func(*args, **kwargs)


def _dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, float, bool]:
    """Return what a dropout acts on, its rate and whether in place; called as `F.dropout` is.

    The rate is 0 where it does nothing.
    """
    return input, p if training else 0.0, inplace
