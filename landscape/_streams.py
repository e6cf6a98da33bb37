"""The global random streams of the CPU: PyTorch's, NumPy's and Python's, set and put back."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

States = tuple[Tensor, Any, Any]


class OwnStreams:
    """The global random streams as one user sees them, from a fixed seed on.

    Contexts of several threads may overlap: what was there before the first is put back after the
    last. Nobody waits, so other threads that draw meanwhile draw from the streams as they are set.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._inside: States | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Go on with the streams where they were left, and put back those found afterwards."""
        with _guard:
            before = read_streams()
            if not _open:
                _outside[:] = [before]
            _open.append(self)
            if self._inside is None:
                seed_streams(self._seed)
            else:
                write_streams(self._inside)
        try:
            yield
        finally:
            with _guard:
                self._inside = read_streams()
                _open.remove(self)
                write_streams(before if _open else _outside[0])


_guard = threading.Lock()
_open: list[OwnStreams] = []
_outside: list[States] = []


def seed_streams(seed: int) -> None:
    """Seed all three."""
    # `torch.manual_seed` would also seed the devices.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002, the global stream is what data draw from
    random.seed(seed)


def read_streams() -> States:
    """Return the states of all three."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def write_streams(states: States) -> None:
    """Set all three.

    Args:
        states: What `read_streams` returned.
    """
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])


def same_streams(states: States, others: States) -> bool:
    """Whether nothing was drawn between two calls of `read_streams`."""
    (torch_, numpy_, python), (other_torch, other_numpy, other_python) = states, others
    numpy_alike = all(np.array_equal(a, b) for a, b in zip(numpy_, other_numpy, strict=True))
    return torch.equal(torch_, other_torch) and numpy_alike and python == other_python
