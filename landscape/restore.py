"""Contexts that leave a model as it was found."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and each back in its own mode afterwards.

    Tensors that are plain attributes are put back too: the weight that pruning or the older
    `torch.nn.utils.weight_norm` computes from its parameters before each call, a kept feature.
    """
    modes = [(module, module.training, _plain_tensors(module)) for module in model.modules()]
    try:
        for module, _, _ in modes:
            module.training = False
        yield
    finally:
        for module, training, tensors in modes:
            module.training = training
            vars(module).update(tensors)


def _plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled modules as the Python they were made of.

    Compiled code can be differentiated once only, and hides the calls that it makes.
    """
    if "torch._dynamo" not in sys.modules:  # a costly import; without it nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of a model is compiled."""
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in model.modules()
    )


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluate a model in this context: its modes and buffers are put back afterwards."""
    modules = list(model.modules())
    buffers = [dict(module._buffers) for module in modules]
    values = [(b, b.clone()) for each in buffers for b in each.values() if b is not None]
    try:
        with eval_mode(model):
            yield
    finally:
        with torch.no_grad():
            for module, each in zip(modules, buffers, strict=True):
                for name, buffer in each.items():  # TorchScript's dictionary has no `update`
                    module._buffers[name] = buffer
            for buffer, value in values:
                if torch.is_inference_mode_enabled() or not buffer.is_inference():
                    buffer.copy_(value)  # one of inference mode has not changed outside of it
