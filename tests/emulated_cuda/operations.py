"""What operations ask of a device: where tensors lie, when the host waits, what is changed."""

from functools import cache

import torch

from tests.emulated_cuda import generators, streams
from tests.emulated_cuda.memory import CPU, CUDA, memory_of, tensors_in
from tests.emulated_cuda.problems import report

MOVING = {"aten::copy_", "aten::_to_copy", "aten::set_"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
TAKING_SCALARS = {*INDEXING, "aten::fill", "aten::fill_", "aten::lerp"}  # besides pointwise ones
LOOKED_AT = {"aten::_linalg_check_errors", "aten::_linalg_eigh", "aten::_linalg_svd"}


def check(function, args, kwargs, onto):
    """Refuse what a device would; whether the host waits for it.

    `onto` says whether tensors on the device come back.
    """
    name = function._schema.name
    indices = list(tensors_in(args[1])) if name in INDEXING else []
    tensors = list(tensors_in(*args, *kwargs.values()))
    if name not in MOVING and any(memory_of(tensor) for tensor in tensors):
        scalars = torch.Tag.pointwise in function.tags or name in TAKING_SCALARS
        for tensor in tensors:
            alien = memory_of(tensor) is None and not (scalars and tensor.dim() == 0)
            if alien and not any(tensor is index for index in indices):
                what = f"{function} on the device gets a tensor of the CPU"
                raise RuntimeError(report(f"mixed devices: {what}, shape {tuple(tensor.shape)}"))
    generator = generators.generator_in(args, kwargs)
    if generator is not None and generators.device_of(generator) != (CUDA if onto else CPU):
        raise RuntimeError(report(f"mixed devices: {function} gets a generator of another one"))
    waits = _waits(function, args, kwargs, onto, indices)
    if waits:
        streams.host.refuse_waiting(str(function))
    return waits


def _waits(function, args, kwargs, onto, indices):
    name = function._schema.name
    if name == "aten::_to_copy":
        return (memory_of(args[0]) is not None) != onto and not kwargs.get("non_blocking")
    if name == "aten::copy_":
        here, there = (memory_of(tensor) is not None for tensor in args[:2])
        number = args[1].dim() == 0 and not there  # `x[0] = 1.0` comes as one
        return here != there and not number and not any((*args[2:], *kwargs.values()))
    if name in INDEXING:
        return any(memory_of(t) is None or t.dtype in (torch.bool, torch.uint8) for t in indices)
    shaped = torch.Tag.dynamic_output_shape in function.tags and not kwargs.get("output_size")
    return shaped or torch.Tag.data_dependent_output in function.tags or name in LOOKED_AT


def overwritten(function, args, kwargs):
    """The tensors on the device that an operation writes to."""
    if function._schema.name == "aten::native_batch_norm" and args[5]:
        return list(tensors_in(args[3:5]))  # the schema does not tell
    written = [kwargs.get(name, *args[i : i + 1]) for i, name in _written(function)]
    return [tensor for tensor in tensors_in(written) if memory_of(tensor)]


@cache
def _written(function):
    arguments = enumerate(function._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write]


def touch(function, args, kwargs, fresh):
    """Launch an operation on the current stream; `fresh` is what it has allocated."""
    reads = map(memory_of, tensors_in(*args, *kwargs.values()))
    writes = map(memory_of, [*overwritten(function, args, kwargs), *fresh])
    streams.touch(str(function), filter(None, reads), filter(None, writes))
