"""Statistics of batch normalisation, estimated again for weights that were moved."""

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from landscape._checks import check_python
from landscape.batches import call_on
from landscape.objective import FrozenObjective
from landscape.parameters import call_with


def recalibrated_buffers(
    frozen: FrozenObjective, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return running means and variances of every batch norm for the given parameters.

    One pass over the data with the batch norms normalising by batch, as in training, everything
    else in evaluation mode. The mean and the (unbiased) variance of each channel are those over
    all samples of batches with a label that counts; below the first layer they rest on inputs that
    were normalised batch by batch, so they depend on the batch size as training itself does.
    Neither the modules nor their buffers are changed.

    Args:
        frozen: Objective on its model and data.
        parameters: Values of the parameters by name.

    Returns:
        Buffer name to value; empty where the model has no batch norm with running statistics.

    Raises:
        TypeError: If a part of the model is in TorchScript.
        ValueError: If a batch has one value per channel, which has no variance.
    """
    check_python(frozen.model)
    model, space = frozen.model, frozen.space
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        return {}
    sums: dict[str, Tensor] = {}
    with ExitStack() as hooks, torch.no_grad(), frozen.evaluating():
        for name, module in norms.items():
            hooks.enter_context(module.register_forward_pre_hook(_summer(sums, name)))
            module.training = True
        for batch in frozen.batches:
            state = space.state(parameters)
            call_on(functools.partial(call_with, model, state), batch.inputs)
    buffers = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        variance = (squares / count - mean**2).clamp_min(0) * count / (count - 1)
        prefix = f"{name}." if name else ""
        old = space.buffers[f"{prefix}running_mean"]
        buffers[f"{prefix}running_mean"] = mean.to(old)
        buffers[f"{prefix}running_var"] = variance.to(old)
    return buffers


def _summer(sums: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def add(module: nn.Module, args: Any) -> None:
        x = args[0].detach().double().transpose(0, 1).flatten(1)  # (channels, samples and places)
        if x.shape[1] == 1:
            raise ValueError(
                "`batch_norm='recalibrate'` needs at least 2 values per channel in every batch, "
                f"got 1 in {name!r}; choose a batch size that leaves no single sample over."
            )
        count = torch.full_like(x[:, 0], x.shape[1])
        batch = torch.stack([count, x.sum(1), x.square().sum(1)])
        sums[name] = sums[name] + batch if name in sums else batch

    return add
