"""What training happens in: random streams, flags and memory format, all put back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from landscape._streams import read_streams, write_streams
from landscape.linalg.bilinear import breaks_channels_last
from landscape.restore import cuda_devices_of, same_modes


@contextmanager
def same_random_state(model: nn.Module) -> Iterator[None]:
    """Put back the global random states of PyTorch, NumPy and Python that are found.

    Of PyTorch those of the CPU and of the CUDA devices that the model is on.
    """
    states = read_streams(cuda_devices_of(model))
    try:
        yield
    finally:
        write_streams(states)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in training mode, and each module back in its own mode afterwards.

    Parts in evaluation mode of a model in training mode stay so: norms that are frozen, mostly.
    """
    with same_modes(model):
        if not model.training:
            model.train()
        yield


@contextmanager
def back_in_training(model: nn.Module) -> Iterator[None]:
    """Put a model back in training mode that has been put in evaluation mode as a whole.

    A callback that measures calls `eval`; one that freezes some norms leaves the model itself.
    """
    modes = [(module, module.training) for module in model.modules()]
    yield
    if modes[0][1] and not model.training:
        for module, training in modes:
            module.training = training


@contextmanager
def channels_last_format(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Keep contiguous 4-D parameters in channels-last memory format meanwhile.

    Their values do not change, and each gets back the memory that it had.

    Raises:
        ValueError: If `model` reads gradients in the format that it found at first.
    """
    if wanted and _is_distributed(model):
        raise ValueError(
            "`channels_last` must be False for DistributedDataParallel, which takes gradients to "
            "be in the format that the weights had; call "
            "`model.to(memory_format=torch.channels_last)` before it is wrapped."
        )
    weights = [p for p in model.parameters() if wanted and p.ndim == 4 and p.is_contiguous()]
    own = [(weight, weight.data) for weight in weights]
    try:
        for weight, data in own:
            weight.data = data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight, data in own:
            weight.data = data.copy_(weight.data)


def prefers_channels_last(model: nn.Module) -> bool:
    """Return whether a convolution has overlapping windows, and none a gradient that may break.

    A ViT's patch embedding has windows side by side.
    """
    if _is_distributed(model):
        return False
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    overlap = any(k > s for m in convs for k, s in zip(m.kernel_size, m.stride, strict=True))
    device = next(model.parameters()).device
    return overlap and not any(
        # No look at the weight: that of a spectral norm takes a step of its iteration when read.
        breaks_channels_last(
            (m.out_channels, m.in_channels // m.groups, *m.kernel_size), m.stride, device
        )
        for m in convs
    )


def _is_distributed(model: nn.Module) -> bool:
    return any(isinstance(module, DistributedDataParallel) for module in model.modules())
