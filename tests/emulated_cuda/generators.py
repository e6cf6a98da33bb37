"""Random numbers of the emulated device: drawn by the CPU, from streams of their own."""

from weakref import WeakValueDictionary

import torch

from tests.emulated_cuda.memory import CPU, CUDA
from tests.emulated_cuda.streams import host

_alive = WeakValueDictionary()
_state = torch._C.Generator().get_state()
_set, _get = torch.default_generator.set_state, torch.default_generator.get_state


class Generator(torch._C.Generator):
    """A generator of the CPU that says it is on a device."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator._place = CUDA if torch.device(device).type == "cuda" else CPU
        _alive[generator._cdata] = generator
        return generator

    @property
    def device(self):
        return self._place


def device_of(generator):
    """Where a generator says it is; operations get the one below ours."""
    return _alive[generator._cdata].device if generator._cdata in _alive else CPU


def get_state(device=CUDA):
    return _state.clone()


def set_state(state, device=CUDA):
    global _state
    host.refuse_in_recording("the random state of the device is set")
    _state = state.clone()


def manual_seed(seed):
    set_state(torch._C.Generator().manual_seed(seed).get_state())


def generator_in(args, kwargs):
    values = (*args, *kwargs.values())
    return next((value for value in values if isinstance(value, torch._C.Generator)), None)


def run(function, args, kwargs):
    """What an operation on the device returns, which may draw from the device's own stream."""
    global _state
    if torch.Tag.nondeterministic_seeded not in function.tags:
        return function(*args, **kwargs)
    if generator_in(args, kwargs) is not None:
        host.refuse_in_recording(f"{function} draws from a generator that the graph does not know")
        return function(*args, **kwargs)
    before = _get()
    _set(_state)
    try:
        return function(*args, **kwargs)
    finally:
        _state = _get()
        _set(before)
