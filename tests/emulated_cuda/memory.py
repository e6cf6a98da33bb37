"""Memory of the emulated device: storages of the CPU that carry a mark."""

from weakref import WeakSet

import pytest
import torch
from torch import Tensor

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
TOTAL = 1 << 36
LARGEST = 1 << 25  # bytes of one tensor; what makes larger ones takes a CPU too long


class Memory:
    """Mark of a storage on the device: its size, the last write, and reads since by stream."""

    alive = WeakSet()

    def __init__(self, num_bytes):
        if num_bytes > LARGEST:
            pytest.skip(f"a tensor of {num_bytes >> 20} MiB is work for a real GPU")
        self.num_bytes, self.written, self.read = num_bytes, None, {}
        Memory.alive.add(self)


def allocate(storage):
    storage._emulated = Memory(storage.nbytes())


def allocated(device=None):
    return sum(memory.num_bytes for memory in Memory.alive)


def storage_of(tensor):
    """The storage below wrappers of `torch.func`; a sparse tensor has none."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    try:
        return tensor.untyped_storage()
    except NotImplementedError:
        return None


def memory_of(tensor):
    """The mark of a tensor on the device, or `None`."""
    return getattr(storage_of(tensor), "_emulated", None)


def tensors_in(*values):
    """All tensors in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(*value)
