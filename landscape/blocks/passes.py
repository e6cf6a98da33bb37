"""A forward pass that is observed or changed at chosen calls, or begun in the middle.

Calls are counted as in `tracing`. A handler stands in for the call with its ordinal and returns
what the model goes on with. A pass that begins in the middle makes none of the calls that
depend on the input and come before: each returns an empty stand-in of the right shape, and the
handler at the beginning returns the value that is already known. What follows depends on that
value alone if it is a cut of the dataflow (`structure`).

Passes may be nested, as where a lesioned model is observed: what a handler calls is not counted by
those around it, which see one call, under its old name, and what stands in for its output.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils._pytree import tree_leaves, tree_map

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""`handler(function, args, kwargs)` returns what the call returns."""


class _State(threading.local):
    is_paused = False


_state = _State()


def is_paused() -> bool:
    """Whether calls of this thread are not counted."""
    return _state.is_paused


@contextmanager
def paused() -> Iterator[None]:
    """Let calls be made that are none of the passes under way."""
    before = _state.is_paused
    _state.is_paused = True
    try:
        yield
    finally:
        _state.is_paused = before


class ControlledPass(TorchFunctionMode):
    """Hands chosen calls to handlers, and may make none of the calls before the first of them.

    Args:
        handlers: Handler by ordinal.
        skipped: By ordinal, what the calls return that are not made.
        begin: Calls from this ordinal on are made.
    """

    def __init__(
        self,
        handlers: Mapping[int, Handler],
        skipped: Mapping[int, Any] | None = None,
        begin: int = 0,
    ) -> None:
        super().__init__()
        self._handlers, self._skipped, self._begin = handlers, skipped or {}, begin
        self._ordinal = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make one call, or what stands in for it."""
        kwargs = kwargs or {}
        if is_paused():
            return func(*args, **kwargs)
        ordinal = self._ordinal
        self._ordinal += 1
        if ordinal in self._handlers:
            return _instead(self._handlers[ordinal], func, args, kwargs)
        if ordinal < self._begin and ordinal in self._skipped:
            return self._skipped[ordinal]
        return func(*args, **kwargs)


def _instead(handler: Handler, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let a handler make a call; the passes around this one see one call of the same name."""

    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if has_torch_function(tensors):  # of a pass around this one
            return handle_torch_function(call, tensors, *args, **kwargs)
        return handler(func, args, kwargs)

    return call(*args, **kwargs)


class _Reached(Exception):
    """Ends a pass at the value that was asked for."""


class PartialPasses:
    """Passes of one batch through a model that begin or end at chosen calls.

    Args:
        run: Makes a pass and returns its logits.
        follows: Ordinals of the calls that depend on the input.

    Attributes:
        logits: Logits of the whole pass that was made first.
    """

    def __init__(self, run: Callable[[], Tensor], follows: frozenset[int]) -> None:
        self._run = run
        self._skipped: dict[int, Any] = {}
        with ControlledPass(
            {ordinal: functools.partial(self._note, ordinal) for ordinal in follows}
        ):
            self.logits = run()

    def logits_from(
        self, start: int | None, value: Tensor | None, changes: Mapping[int, Handler]
    ) -> Tensor:
        """Return the logits of a pass that goes on from `value` at the call `start`.

        Args:
            start: Ordinal of a call whose output is a cut; `None` for a whole pass.
            value: What that call returned.
            changes: Handlers of later calls.
        """
        with self._from(start, value, changes):
            return self._run()

    def value_at(self, end: int, start: int | None, value: Tensor | None) -> Tensor:
        """Return what the call `end` returns in a pass that goes on from `value` at `start`.

        Raises:
            ValueError: If the pass ends before that call.
        """
        found: list[Tensor] = []

        def stop(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = func(*args, **kwargs)
            found.append(next(t for t in tree_leaves(out) if isinstance(t, Tensor)))
            raise _Reached

        with self._from(start, value, {end: stop}), suppress(_Reached):
            self._run()
        if not found:
            raise ValueError(
                f"`model` must make the same calls in every pass, got a pass that ends before call "
                f"{end}; does its control flow depend on the data?"
            )
        return found[0]

    def _from(
        self, start: int | None, value: Tensor | None, changes: Mapping[int, Handler]
    ) -> ControlledPass:
        if start is None or value is None:
            return ControlledPass(changes)

        def resume(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return value.clone()  # a copy: what follows may write in place

        return ControlledPass({start: resume, **changes}, self._skipped, start)

    def _note(self, ordinal: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call, and keep what stands in for its output: a handler."""
        out = func(*args, **kwargs)
        self._skipped[ordinal] = tree_map(_stand_in, out)
        return out


def _stand_in(value: Any) -> Any:
    """Return one number, NaN where there is such, seen as a tensor of the shape of `value`."""
    if not isinstance(value, Tensor):
        return value
    number = torch.nan if value.is_floating_point() or value.is_complex() else 0
    return torch.full((), number, dtype=value.dtype, device=value.device).expand(value.shape)
