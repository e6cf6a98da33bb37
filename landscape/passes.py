"""A forward pass that is observed or changed at chosen calls, or begun in the middle.

Calls are counted as in `landscape.tracing`. A handler stands in for the call with its ordinal and
returns what the model goes on with. A pass that begins in the middle makes none of the calls that
depend on the input and come before: each returns an empty stand-in of the right shape, and the
handler at the beginning returns the value that is already known. What follows depends on that
value alone if it is a cut of the dataflow (`landscape.structure`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""`handler(function, args, kwargs)` returns what the call returns."""


@dataclass(frozen=True)
class StandIn:
    """Shape, precision and device of a tensor that is not computed.

    Attributes:
        shape: Its shape.
        dtype: Its precision.
        device: Its device.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def tensor(self) -> Tensor:
        """Return one number seen as a tensor of that shape."""
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)


class ControlledPass(TorchFunctionMode):
    """Hands chosen calls to handlers, and may skip the calls before the first of them.

    Args:
        handlers: Handler by ordinal.
        skipped: By ordinal, the outputs of calls to skip, tensors as `StandIn`.
    """

    def __init__(
        self, handlers: Mapping[int, Handler], skipped: Mapping[int, Any] | None = None
    ) -> None:
        super().__init__()
        self._handlers, self._skipped = handlers, skipped or {}
        self._ordinal = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make, replace or skip one call."""
        ordinal, kwargs = self._ordinal, kwargs or {}
        self._ordinal += 1
        if ordinal in self._handlers:
            return self._handlers[ordinal](func, args, kwargs)
        if ordinal in self._skipped:
            return tree_map(_unfold, self._skipped[ordinal])
        return func(*args, **kwargs)


class ShapesPass(TorchFunctionMode):
    """Makes every call and notes what the followed ones return.

    Args:
        follows: Ordinals of the calls whose outputs are noted.
        handlers: Handler by ordinal.

    Attributes:
        shapes: Output of each of these calls, tensors as `StandIn`.
    """

    def __init__(self, follows: frozenset[int], handlers: Mapping[int, Handler]) -> None:
        super().__init__()
        self.shapes: dict[int, Any] = {}
        self._follows, self._handlers, self._ordinal = follows, handlers, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make one call."""
        ordinal, kwargs = self._ordinal, kwargs or {}
        self._ordinal += 1
        handler = self._handlers.get(ordinal)
        out = func(*args, **kwargs) if handler is None else handler(func, args, kwargs)
        if ordinal in self._follows:
            self.shapes[ordinal] = tree_map(_fold, out)
        return out


def _fold(value: Any) -> Any:
    return StandIn(value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value


def _unfold(value: Any) -> Any:
    return value.tensor() if isinstance(value, StandIn) else value
