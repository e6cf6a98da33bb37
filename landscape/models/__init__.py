"""Reference models, written to be read: ResNets, vision transformers and AlterNets."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from landscape._checks import nearest
from landscape.models.alternate import alternate
from landscape.models.alternet import AlterNet, alternet18, alternet34, alternet50
from landscape.models.reference import load_reference_checkpoint
from landscape.models.resnet import ResNet, resnet18, resnet20, resnet34, resnet50, resnet101
from landscape.models.vit import VisionTransformer, vit_micro, vit_nano, vit_small, vit_tiny

__all__ = [
    # families
    "AlterNet",
    "ResNet",
    "VisionTransformer",
    # published weights
    "load_reference_checkpoint",
    # the build-up rule
    "alternate",
    # constructors
    "create_model",
    "alternet18",
    "alternet34",
    "alternet50",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "resnet101",
    "vit_micro",
    "vit_nano",
    "vit_small",
    "vit_tiny",
]

_Constructor = Callable[..., nn.Module]
_FAMILIES: dict[type[nn.Module], tuple[_Constructor, ...]] = {
    AlterNet: (alternet18, alternet34, alternet50),
    ResNet: (resnet18, resnet20, resnet34, resnet50, resnet101),
    VisionTransformer: (vit_micro, vit_nano, vit_small, vit_tiny),
}
_MODELS: dict[str, tuple[_Constructor, type[nn.Module]]] = {
    constructor.__name__: (constructor, family)
    for family, constructors in _FAMILIES.items()
    for constructor in constructors
}


def create_model(name: str, **sizes: Any) -> nn.Module:
    """Return a model by the name of its constructor, e.g. `create_model("resnet20", width=8)`.

    Args:
        name: Name of one of this package's constructors.
        **sizes: Passed to it: `num_classes`, `in_channels` and what its family accepts.

    Raises:
        ValueError: If `name` or one of `sizes` is unknown, naming the nearest that are known.
    """
    if name not in _MODELS:
        raise ValueError(
            f"`name` must be a known model, got {name!r}; the nearest are {nearest(name, _MODELS)}."
        )
    constructor, family = _MODELS[name]
    accepted = inspect.signature(family).parameters.keys() - {"block"}
    for size in sizes.keys() - accepted:
        raise ValueError(
            f"`{size}` must be a size that {name!r} accepts; "
            f"the nearest are {nearest(size, sorted(accepted))}."
        )
    return constructor(**sizes)
