"""The modes that see every operation: one tells where it is to work, one lets it work there."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.emulated_cuda import generators, operations, streams
from tests.emulated_cuda.graphs import CUDAGraph
from tests.emulated_cuda.memory import CPU, allocate, memory_of, storage_of, tensors_in

moves = []  # of `Tensor.to` at present: whether onto the device
_run_backward = torch.autograd._engine_run_backward


class Callers(TorchFunctionMode):
    """Sees functions as they are called, before PyTorch fills in the device of their tensors.

    It takes it for the CPU; so `on_device` says of each function that runs whether it was the
    emulated one.
    """

    on_device = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = tensors_in(*args, *kwargs.values()) if kwargs.get("device") is None else ()
        self.on_device.append(any(memory_of(t) is not None for t in tensors))
        try:
            return function(*args, **kwargs)
        finally:
            self.on_device.pop()


def run_backward(*args, **kwargs):
    """Let functions that are called in a backward pass be seen too."""
    with Callers():
        return _run_backward(*args, **kwargs)


class Launches(TorchDispatchMode):
    """Lets operations on the device be computed by the CPU, with all that a device would mind."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return _launch(function, args, dict(kwargs or {}))


def _launch(function, args, kwargs):
    operands = list(tensors_in(*args, *kwargs.values()))
    here = any(memory_of(t) is not None for t in operands)
    onto = _goes_onto_the_device(function, args, kwargs.get("device"), here)
    if not here and not onto:
        return function(*args, **kwargs)
    if onto and kwargs.get("device") is not None:
        kwargs["device"] = CPU
    waits = operations.check(function, args, kwargs, onto)
    written = operations.overwritten(function, args, kwargs)
    graph = CUDAGraph.recorded
    if graph is not None:
        graph.save(written)
    found = generators.run(function, args, kwargs) if onto else function(*args, **kwargs)
    known = [storage_of(t) for t in operands]
    results = list(tensors_in(found))
    others = [t for t in results if not any(storage_of(t) is storage for storage in known)]
    if results and not others and not written:
        return found  # a view
    fresh = others if onto else []
    for tensor in fresh:
        allocate(storage_of(tensor))
    if graph is None:
        operations.touch(function, args, kwargs, fresh)
    else:
        graph.note(function, args, kwargs, fresh)
    if waits:
        streams.current().synchronize()
    return found


def _goes_onto_the_device(function, args, device, here):
    """Whether tensors on the device come back; `here` tells of those that are given."""
    named = device is not None and torch.device(device).type == "cuda"
    if function._schema.name == "aten::_to_copy":
        return moves[-1] if moves else named or memory_of(args[0]) is not None
    if device is None:
        return here
    return named or (torch.device(device).type == "cpu" and any(Callers.on_device[-1:]))
