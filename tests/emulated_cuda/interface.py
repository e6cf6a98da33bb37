"""PyTorch's Python interface of a CUDA device, replaced by what works on the emulated one."""

from contextlib import nullcontext
from functools import wraps
from types import FunctionType

import pytest
import torch
from torch import Tensor

from tests.emulated_cuda import generators, streams
from tests.emulated_cuda.device import Callers, Launches, moves, run_backward
from tests.emulated_cuda.graphs import CUDAGraph
from tests.emulated_cuda.memory import CPU, CUDA, TOTAL, allocate, allocated, memory_of

_to, _numpy, _tolist, _device = Tensor.to, Tensor.numpy, Tensor.tolist, Tensor.device.__get__
_autocast, _is_autocast_enabled = torch.autocast, torch.is_autocast_enabled
_copy_of_storage = torch.UntypedStorage.clone
_grouped = torch._C._group_tensors_by_device_and_dtype


def install():
    """Give this process a CUDA device, for good."""
    for name, value in vars(torch.cuda).copy().items():
        if isinstance(value, FunctionType) and name in torch.cuda.__all__:
            setattr(torch.cuda, name, _not_emulated(name, value))
    for owner, replacements in REPLACEMENTS.items():
        for name, value in replacements.items():
            setattr(owner, name, value)
    torch.backends.cuda.enable_flash_sdp(False)  # the CPU's has no rule for `vmap`, unlike a GPU's
    Launches().__enter__()
    Callers().__enter__()


def _not_emulated(name, function):
    @wraps(function)
    def skip(*args, **kwargs):
        pytest.skip(f"`torch.cuda.{name}` is not emulated")

    return skip


def constant(value):
    return lambda *args, **kwargs: value


def _device_of(tensor):
    return _device(tensor) if memory_of(tensor) is None else CUDA


def _move(tensor, *args, copy=False, **kwargs):
    """`Tensor.to`, which itself takes all tensors for ones of the CPU."""
    if args and isinstance(args[0], Tensor):
        args = (_device_of(args[0]), args[0].dtype, *args[1:])
    device = torch._C._nn._parse_to(*args, **kwargs)[0]
    onto = tensor.is_cuda
    if device is not None and device.type in ("cpu", "cuda"):
        onto = device.type == "cuda"
        args, kwargs = ((CPU, *args[1:]), kwargs) if args else ((), kwargs | {"device": CPU})
    moves.append(onto)
    try:
        with torch._C.DisableTorchFunction():  # it would look this up, and call it again
            return _to(tensor, *args, copy=copy or onto != tensor.is_cuda, **kwargs)
    finally:
        moves.pop()


def _made_by(function):
    """What makes tensors on the CPU and moves them; a tensor stays where it is."""

    def make(data, *args, device=None, **options):
        if isinstance(data, Tensor):
            device = device or data.device
        made = function(data, *args, **options)
        if device is None or torch.device(device) == made.device:
            return made
        return made.detach().to(device).requires_grad_(made.requires_grad)

    return make


def _new_tensor(tensor, data, **options):
    return torch.tensor(data, **{"dtype": tensor.dtype, "device": tensor.device, **options})


def _as_array(tensor, **options):
    if tensor.is_cuda:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu().")
    return _numpy(tensor, **options)


def _clone_storage(storage):
    copy = _copy_of_storage(storage)
    if hasattr(storage, "_emulated"):
        allocate(copy)
    return copy


def _group(tensors, with_indices=False):
    """Groups of tensors as optimizers want them, which name the device of each."""
    groups = _grouped(tensors, with_indices).items()
    return {
        (next((t.device for t in lists[0] if t is not None), device), dtype): (lists, indices)
        for (device, dtype), (lists, indices) in groups
    }


class Autocast(_autocast):
    """Autocast of the device, which is that of the CPU."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


REPLACEMENTS = {
    torch.cuda: {
        "CUDAGraph": CUDAGraph,
        "Stream": streams.Stream,
        "_lazy_init": constant(None),
        "current_device": constant(0),
        "current_stream": streams.current,
        "device": constant(nullcontext()),
        "device_count": constant(1),
        "empty_cache": constant(None),
        "get_device_capability": constant((7, 0)),  # too old for Triton's kernels
        "get_device_name": constant("emulated"),
        "get_rng_state": generators.get_state,
        "get_rng_state_all": lambda: [generators.get_state()],
        "get_sync_debug_mode": lambda: streams.host.sync_debug_mode,
        "is_available": constant(True),
        "is_current_stream_capturing": lambda: streams.host.recording,
        "is_initialized": constant(True),
        "manual_seed": generators.manual_seed,
        "manual_seed_all": generators.manual_seed,
        "mem_get_info": lambda device=None: (TOTAL - allocated(), TOTAL),
        "memory_allocated": allocated,
        "memory_reserved": allocated,
        "set_rng_state": generators.set_state,
        "set_sync_debug_mode": streams.host.set_sync_debug_mode,
        "stream": streams.entered,
        "synchronize": streams.synchronize,
    },
    torch.accelerator: {"current_stream": streams.current},
    torch.amp: {"autocast": Autocast},
    torch.autograd: {"_engine_run_backward": run_backward},
    torch._C: {"_group_tensors_by_device_and_dtype": _group},
    torch.UntypedStorage: {"clone": _clone_storage},
    torch: {
        "Generator": generators.Generator,
        "as_tensor": _made_by(torch.as_tensor),
        "autocast": Autocast,
        "is_autocast_enabled": lambda device=None: _is_autocast_enabled("cpu"),
        "tensor": _made_by(torch.tensor),
    },
    Tensor: {
        "cpu": lambda tensor, memory_format=None: tensor.to(CPU),
        "cuda": lambda tensor, device=CUDA, non_blocking=False: tensor.to(CUDA, None, non_blocking),
        "device": property(_device_of),
        "is_cpu": property(lambda tensor: not tensor.is_cuda),
        "is_cuda": property(lambda tensor: memory_of(tensor) is not None),
        "new_tensor": _new_tensor,
        "numpy": _as_array,
        "to": _move,
        "tolist": lambda tensor: _tolist(tensor.cpu()),
    },
}
