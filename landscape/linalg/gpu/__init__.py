"""Kernels for a GPU, in Triton, which comes with PyTorch there.

Between its matrix products a Hessian product is hundreds of small operations, each of which takes a
GPU longer to begin than to do; and in float32 the products themselves leave the tensor cores idle.
The modules here are imported where `has_kernels` says that they run.
"""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

LONGEST = 1 << 13
"""Entries of a row, of a map or for a layer norm, that a kernel holds at most: compiling those of
longer ones takes minutes."""


def has_kernels(tensor: Tensor) -> bool:
    """Whether there are kernels for a tensor: of float32, on a GPU of NVIDIA's since 2020."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return False  # Triton works on the current device
    return tensor.dtype == torch.float32 and _runs_kernels(tensor.device)


@cache
def _runs_kernels(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:  # Triton needs a C compiler, among others
        from landscape.linalg.gpu import pointwise

        pointwise.bend(*torch.zeros(4, 1, device=device))
    except torch.OutOfMemoryError:
        raise  # it tells nothing, and is not kept in the cache
    except Exception as error:
        warnings.warn(
            f"Hessian products run without this package's GPU kernels, as Triton fails: {error!r}.",
            stacklevel=2,
        )
        return False
    return True
