"""Caches of a model: plain attributes that its first call fills, and later ones read."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from landscape.kept import NONE, are_identical, assign, kept_tensors, tensors_in
from landscape.restore import eval_mode
from landscape.switches import eagerly

Cache = tuple[nn.Module, str, Any]
"""A module, the name of an attribute of it, and what that is when empty: an empty container of its
type (`_EMPTY`), one with `None` in the place of tensors (`_BLANK`), `None`, or not there at all
(`NONE`)."""

_EMPTY = object()  # a dictionary or a list without entries
_BLANK = object()  # a container with `None` in the place of its tensors


@contextmanager
def emptied(caches: Sequence[Cache]) -> Iterator[None]:
    """Let a model fill caches again, and put back afterwards what it had kept there."""
    found = [(vars(module), name, vars(module).get(name, NONE)) for module, name, _ in caches]
    made: dict[tuple[int, object], Any] = {}  # modules that share a container share the empty one
    try:
        for (own, name, held), (_, _, empty) in zip(found, caches, strict=True):
            if (id(held), empty) not in made:
                made[id(held), empty] = _emptied(held, empty)
            assign(own, name, made[id(held), empty])
        yield
    finally:
        for own, name, held in found:
            assign(own, name, held)


def _emptied(held: Any, empty: object) -> Any:
    """Return what an attribute holds as long as it holds no tensor.

    Args:
        held: What it holds now.
        empty: `_EMPTY`, `_BLANK`, or what it holds.
    """
    if empty is _BLANK:
        return tree_map(lambda leaf: None if isinstance(leaf, Tensor) else leaf, held)
    if empty is not _EMPTY:
        return empty
    held = copy.copy(held)
    held.clear()
    return held


def caches_of(model: nn.Module, run: Callable[[], object], learned: bool = False) -> list[Cache]:
    """Return the plain attributes in which modules keep what they compute at the first call.

    A tensor, or a container of tensors, is such a cache where a second call leaves it as it is, and
    one after it was emptied fills it again; what is written anew at every call is kept for others.
    LeViT looks up its attention biases once in evaluation mode, for example: with other
    parameters in place they would be those of before, and without a gradient.

    Args:
        model: Any module.
        run: Calls it: once; where it then keeps tensors, once more, and up to four times for each
            name of a cache. Most models keep none.
        learned: Only those that are filled with something that requires a gradient.
    """
    caches: list[Cache] = []
    # The caller reports what is wrong.
    with eval_mode(model, lists=True), eagerly(), suppress(Exception):
        run()
        filled = [(module, name, list(held)) for module, name, held in kept_tensors(model)]
        if not filled:
            return []
        run()
        owners: dict[str, list[nn.Module]] = {}
        for module, name, before in filled:
            now = tensors_in(vars(module).get(name))
            if are_identical(now, before):
                owners.setdefault(name, []).append(module)
        for name, modules in owners.items():
            held = [vars(module)[name] for module in modules]
            clear = (_EMPTY,) if all(isinstance(value, dict | list) for value in held) else ()
            blank = (_BLANK,) if not any(isinstance(value, Tensor) for value in held) else ()
            for empty in (*clear, *blank, None, NONE):
                found = _filled_again(run, [(module, name, empty) for module in modules], learned)
                if found is not None:
                    caches += found
                    break
    return caches


def _filled_again(
    run: Callable[[], object], emptied_ones: Sequence[Cache], learned: bool
) -> list[Cache] | None:
    """Return which of some emptied attributes a call fills; `None` if it needs what was there."""
    with emptied(emptied_ones):
        if any(tensors_in(vars(module).get(name)) for module, name, _ in emptied_ones):
            return None  # a container that cannot be emptied so
        try:
            run()
        except Exception:
            return None
        return [
            cache
            for cache in emptied_ones
            if any(t.requires_grad or not learned for t in tensors_in(vars(cache[0]).get(cache[1])))
        ]
