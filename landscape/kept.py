"""Tensors that modules keep as plain attributes, beside parameters and buffers."""

import copy
import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

NONE = object()
"""In the place of an attribute that is not there."""

_OF_MODULES = frozenset(vars(nn.Module()))


def keeps_tensors(model: nn.Module) -> bool:
    """Whether a plain attribute of a module is a tensor now, or holds one."""
    return any(True for _ in kept_tensors(model))


def kept_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, list[Tensor]]]:
    """Yield the plain attributes of modules that are tensors, or containers of some."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _OF_MODULES and (held := tensors_in(value)):
                yield module, name, held


class Attributes:
    """The plain attributes of a module that are tensors or containers, to be put back."""

    def __init__(self, module: nn.Module, lists: bool = False) -> None:
        self._own = vars(module)
        self._before = dict(self._own)
        self._contents = [
            (container, copy.copy(container))
            for name, value in self._own.items()
            if isinstance(value, dict | list | tuple) and name not in _OF_MODULES
            for container in _below(value)
            if isinstance(container, dict) or (lists and isinstance(container, list))
        ]
        self._buffers = module._buffers, dict(module._buffers)

    def are_same(self) -> bool:
        """Whether none was replaced, whatever the values of the tensors."""
        return not self._replaced() and not self._changed() and not self._made()

    def put_back(self) -> None:
        """Put back what was replaced or changed, and take away what was not there."""
        for name in self._replaced():
            assign(self._own, name, self._before.get(name, NONE))
        buffers, before = self._buffers
        for name in self._made():
            assign(buffers, name, before.get(name, NONE))
        for container, content in self._changed():
            container.clear()
            container.update(content) if isinstance(container, dict) else container.extend(content)

    def _replaced(self) -> list[str]:
        """Return the names of attributes that are others than before, or new, or gone.

        None where no tensor is among them: with one go the size or the flag that are kept beside.
        """
        own, was = self._own, self._before
        if are_identical(_entries(own), _entries(was)):
            return []  # as nearly always
        names = (own.keys() | was.keys()) - _OF_MODULES
        found = [name for name in names if own.get(name, NONE) is not was.get(name, NONE)]
        kept = any(_is_kept(values.get(name)) for name in found for values in (own, was))
        return found if kept else []

    def _made(self) -> list[str]:
        """Return the names of buffers that are there, where none was."""
        buffers, before = self._buffers
        return [n for n, b in buffers.items() if b is not None and before.get(n) is None]

    def _changed(self) -> list[tuple[Any, Any]]:
        """Return dictionaries, and lists of tensors, that hold others now, with what they held."""
        return [
            (container, content)
            for container, content in self._contents
            if not are_identical(_entries(container), _entries(content))
            and (isinstance(container, dict) or tensors_in(container) or tensors_in(content))
        ]


def assign(attributes: dict[str, Any], name: str, value: Any) -> None:
    """Set an attribute, or take it away where the value is `NONE`."""
    if value is NONE:
        attributes.pop(name, None)
    else:
        attributes[name] = value


def _entries(container: dict[Any, Any] | list[Any]) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else container


def are_identical(one: list[Any], other: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _is_kept(value: Any) -> bool:
    return isinstance(value, dict) or bool(tensors_in(value))


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of an attribute that is one, or a container of some."""
    return [one for one in _below(value) if isinstance(one, Tensor)]


def _below(value: Any) -> Iterator[Any]:
    """Yield a value and all that is in it: entries of dictionaries, lists and tuples."""
    waiting, seen = [value], set[int]()
    while waiting:
        yield (one := waiting.pop())
        if isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            waiting.extend(reversed(one.values() if isinstance(one, dict) else one))
