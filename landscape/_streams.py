"""The global random streams: PyTorch's, NumPy's and Python's, set and put back."""

import random
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

States = tuple[Tensor, Any, Any, dict[torch.device, Tensor]]
"""PyTorch's of the CPU, NumPy's, Python's, and PyTorch's of some CUDA devices."""


class OwnStreams:
    """The global random streams as one user sees them, from a fixed seed on.

    Contexts of several threads may overlap: what was there before the first is put back after the
    last. Nobody waits, so other threads that draw meanwhile draw from the streams as they are set.

    Args:
        seed: Where all streams begin.
        devices: Streams of the CUDA devices among these are meant, besides those of the CPU.
    """

    def __init__(self, seed: int = 0, devices: Iterable[torch.device] = ()) -> None:
        self._seed = seed
        self._devices = [device for device in devices if device.type == "cuda"]
        self._inside: States | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Go on with the streams where they were left, and put back those found afterwards."""
        with _guard:
            before = read_streams(self._devices)
            if not _open:
                _outside[:] = [before]
            _open.append(self)
            if self._inside is None:
                seed_streams(self._seed, self._devices)
            else:
                write_streams(self._inside)
        try:
            yield
        finally:
            with _guard:
                _open.remove(self)
                self._inside = read_streams(self._devices)
                write_device_streams(before[3])  # the first to enter may not have had them
                write_streams(before if _open else _outside[0])


_guard = threading.Lock()
_open: list[OwnStreams] = []
_outside: list[States] = []


def seed_streams(seed: int, devices: Iterable[torch.device] = ()) -> None:
    """Seed those of the CPU and of some CUDA devices."""
    # `torch.manual_seed` would also seed the devices.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002, the global stream is what data draw from
    random.seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def read_streams(devices: Iterable[torch.device] = ()) -> States:
    """Return the states of those of the CPU and of some CUDA devices."""
    on_devices = {device: torch.cuda.get_rng_state(device) for device in devices}
    return torch.get_rng_state(), np.random.get_state(), random.getstate(), on_devices  # noqa: NPY002


def write_streams(states: States) -> None:
    """Set what `read_streams` returned."""
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])
    write_device_streams(states[3])


def write_device_streams(states: Mapping[torch.device, Tensor]) -> None:
    """Set the streams of CUDA devices."""
    for device, state in states.items():
        torch.cuda.set_rng_state(state, device)


def same_streams(states: States, others: States) -> bool:
    """Whether nothing was drawn between two calls of `read_streams` with the same devices."""
    numpy_alike = all(np.array_equal(a, b) for a, b in zip(states[1], others[1], strict=True))
    on_devices = all(torch.equal(state, others[3][device]) for device, state in states[3].items())
    return (
        torch.equal(states[0], others[0]) and numpy_alike and states[2] == others[2] and on_devices
    )
