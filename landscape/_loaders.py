"""Passes over the data of a caller, which are the same each time and leave no trace."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from landscape._locks import locked
from landscape._streams import OwnStreams


def one_pass(data: Iterable[Any], generators: Sequence[Tensor] | None = None) -> Iterator[Any]:
    """Yield the batches of one pass over the data, whatever the global random streams.

    A DataLoader takes a seed from PyTorch's stream at every pass, shuffled or not, and a data set
    may draw from that, from NumPy's or from Python's. Data see these streams (the CPU's) from the
    same seed on at every pass, a generator of the loader's own from where it is, and the caller
    finds all of them as they were.

    Args:
        data: Any iterable.
        generators: States of the loader's own to begin with instead.
    """
    streams, own = OwnStreams(), OwnGenerators(data, generators)
    data = with_own_workers(data)
    batches: Iterator[Any] | None = None
    while True:
        with streams.entered(), own.entered():
            batches = iter(data) if batches is None else batches
            try:
                raw = next(batches)
            except StopIteration:
                return
        yield raw


def with_own_workers(data: Iterable[Any], depth: int = 8) -> Iterable[Any]:
    """Return a loader with workers of its own in place of one whose workers outlive a pass.

    These would draw on at the next pass, the order would be another one after the first, and a pass
    that the caller is in would begin anew.

    Args:
        data: Any iterable; one that wraps a loader has it as `loader`, as timm's.
        depth: How many wrap each other at most.
    """
    if isinstance(data, DataLoader):
        if not (data.persistent_workers and data.num_workers):
            return data
        changes: dict[str, Any] = {"persistent_workers": False, "_iterator": None}
    else:
        inner = _part(data, "loader")
        if inner is None or not depth or (own := with_own_workers(inner, depth - 1)) is inner:
            return data
        changes = {"loader": own}
    other = copy.copy(data)
    vars(other).update(changes)
    return other


class OwnGenerators:
    """The generators that data draw from as one pass sees them, from where they are found on.

    Threads that use the same generator wait for each other.
    """

    def __init__(self, data: Any, states: Sequence[Tensor] | None = None) -> None:
        """Take them as they are, or begin with states of theirs."""
        self._generators = generators_of(data)
        self._inside = states

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Go on where they were left, and put them back as found afterwards."""
        with ExitStack() as held:
            for generator in sorted(self._generators, key=id):  # one order for all threads
                held.enter_context(locked(generator))
            found = [generator.get_state() for generator in self._generators]
            for generator, state in zip(self._generators, self._inside or found, strict=True):
                generator.set_state(state)
            try:
                yield
            finally:
                self._inside = [generator.get_state() for generator in self._generators]
                for generator, state in zip(self._generators, found, strict=True):
                    generator.set_state(state)

    def keep(self) -> None:
        """Leave them where the pass has got to, instead of where they were found."""
        if self._inside is not None:
            for generator, state in zip(self._generators, self._inside, strict=True):
                generator.set_state(state)


def generators_of(data: Any) -> list[torch.Generator]:
    """Return what data draw from: the attributes `generator` of a loader and of its parts.

    Parts are what it wraps, its samplers and its data set, and theirs in turn.
    """
    found: dict[int, torch.Generator] = {}
    parts, seen = [data], {id(data)}
    for part in parts:  # grows
        generator = _part(part, "generator")
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
        for name in _PARTS:
            below = _part(part, name)
            for other in below if isinstance(below, list | tuple) else [below]:
                if other is not None and id(other) not in seen and len(parts) < _MOST:
                    seen.add(id(other))
                    parts.append(other)
    return list(found.values())


def _part(data: Any, name: str) -> Any:
    """Return an attribute, `None` where there is none or a property raises."""
    with suppress(Exception):
        return getattr(data, name, None)
    return None


_MOST = 10_000  # an object may make new parts for ever
_PARTS = ("loader", "dataset", "batch_sampler", "sampler", "datasets")
