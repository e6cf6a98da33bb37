"""Batches of inputs: how many samples, of what shape, and likely ones where nobody gave any."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from landscape.batches import argument_names, rows_of

_SIDES = (224, 32, 64, 256, 384, 28)


def main_input(model: nn.Module, inputs: Any, name: str = "inputs") -> Tensor:
    """Return what a batch is about: of a mapping the first argument of the model's `forward`.

    Args:
        model: The model.
        inputs: A tensor, or keyword arguments.
        name: What the user calls them.

    Raises:
        TypeError: If a batch holds no tensor.
    """
    named = dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}
    tensors = {key: v for key, v in named.items() if isinstance(v, Tensor) and v.dim()}
    if not tensors:
        raise TypeError(
            f"`{name}` must be a tensor or a mapping of tensors, got a {type(inputs).__name__}."
        )
    largest = max(tensors.values(), key=lambda t: (t.is_floating_point(), t.dim()))
    return next((tensors[key] for key in argument_names(model) if key in tensors), largest)


def likely_images(model: nn.Module) -> Iterator[Tensor]:
    """Yield batches of two random images, of the size that the model states, then common sizes."""
    generator = torch.Generator().manual_seed(0)
    channels = _num_channels(model)
    stated = [size for size in map(_pair, _stated_sizes(model)) if size is not None]
    for height, width in dict.fromkeys([*stated, *((side, side) for side in _SIDES)]):
        yield torch.randn(2, channels, height, width, generator=generator, device="cpu")


def _num_channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return int(getattr(getattr(model, "config", None), "num_channels", 3))


def _stated_sizes(model: nn.Module) -> Iterator[Any]:
    """Yield what models call their image size: ours and torchvision, timm, Hugging Face."""
    yield getattr(model, "image_size", None)
    yield getattr(getattr(model, "patch_embed", None), "img_size", None)
    yield getattr(getattr(model, "config", None), "image_size", None)
    for name in ("pretrained_cfg", "default_cfg"):
        settings = getattr(model, name, None)
        if isinstance(settings, Mapping) and settings.get("input_size"):
            yield settings["input_size"][1:]


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(s, int) for s in size):
        return size[0], size[1]
    return None


def num_samples(model: nn.Module, inputs: Any) -> int:
    """Return the number of samples of a batch."""
    return len(main_input(model, inputs))


def shape_key(inputs: Any) -> tuple[Any, ...]:
    """Return what the sequence of calls may depend on: shapes without the number of samples."""
    named = inputs.items() if isinstance(inputs, Mapping) else [("", inputs)]
    return tuple((k, tuple(t.shape[1:])) for k, t in named if isinstance(t, Tensor))


def resized(model: nn.Module, inputs: Any, count: int) -> Any:
    """Return `count` samples of a batch, repeated where it has fewer."""
    size = num_samples(model, inputs)
    return rows_of(inputs, size, torch.arange(count, device="cpu") % size)
