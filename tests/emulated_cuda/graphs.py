"""CUDA graphs: operations that are noted while they are captured, and done again at a replay.

What a graph allocates is its own; other memory it finds by its place, as a device does, and it is
reported where that was freed since.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from tests.emulated_cuda import generators, operations, streams
from tests.emulated_cuda.memory import memory_of, storage_of, tensors_in
from tests.emulated_cuda.problems import place, report


class Operand:
    """Where a tensor lies; does not keep its memory."""

    def __init__(self, tensor):
        self.storage, self.dtype = StorageWeakRef(storage_of(tensor)), tensor.dtype
        self.geometry = tensor.storage_offset(), tensor.size(), tensor.stride()
        self.conjugate = tensor.is_conj()


class Launch(NamedTuple):
    function: Any
    args: Any
    kwargs: Any
    outputs: list[Operand]
    place: str

    def find(self, operand):
        """The tensor that lies at a place."""
        storage = torch.UntypedStorage._new_with_weak_ptr(operand.storage.cdata)
        if storage is None:
            what = f"{self.function}, recorded at {self.place},"
            raise RuntimeError(report(f"a replay of {what} works on memory that was freed"))
        found = torch.empty(0, dtype=operand.dtype).set_(storage, *operand.geometry)
        return found.conj() if operand.conjugate else found


class CUDAGraph:
    recorded = None  # the one that is being captured

    def __init__(self):
        self._launches, self._own, self._overwritten = [], [], []

    def pool(self):
        return 0, 0

    def capture_begin(self, pool=None, capture_error_mode="global"):
        if streams.current() is streams.default or streams.host.recording:
            raise RuntimeError("a graph is captured on a stream of its own, one at a time")
        self._random_state = generators.get_state()
        CUDAGraph.recorded, streams.host.recording = self, True

    def capture_end(self):
        """Undo all that was computed, as a capture computes nothing."""
        CUDAGraph.recorded, streams.host.recording = None, False
        generators.set_state(self._random_state)
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            for tensor, before in reversed(self._overwritten):
                tensor.copy_(before)
            for storage in self._own:
                torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)  # NaN, or -1
        self._overwritten = []

    def save(self, tensors):
        """Keep what an operation is about to overwrite."""
        self._overwritten += [(t.detach(), t.detach().clone()) for t in tensors]

    def note(self, function, args, kwargs, fresh):
        """Note an operation, and the tensors that it has allocated."""
        self._own += [storage_of(t) for t in fresh]
        args, kwargs = tree_map_only(
            Tensor, lambda t: t if memory_of(t) is None else Operand(t), (args, kwargs)
        )
        self._launches.append(Launch(function, args, kwargs, [*map(Operand, fresh)], place()))

    def replay(self):
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            for launch in self._launches:
                args, kwargs = tree_map_only(Operand, launch.find, (launch.args, launch.kwargs))
                fresh = [launch.find(operand) for operand in launch.outputs]
                results = tensors_in(generators.run(launch.function, args, kwargs))
                results = [t for t in results if memory_of(t) is None]
                for output, result in zip(fresh, results, strict=True):
                    output.copy_(result)
                operations.touch(launch.function, args, kwargs, fresh)
