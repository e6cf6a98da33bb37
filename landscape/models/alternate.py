"""The build-up rule on a network that is there: convolution blocks become MSA blocks.

Park & Kim (2022, sec. 4.1): convolution blocks are replaced by MSA blocks alternately, from the end
of a stage. A stage of `n` blocks with `m` MSAs is `[C] * (n - 2 m) + [C, A] * m`, so that a stage
never begins with an MSA and no MSA follows another.

The MSA block has the form of the blocks around it:

| network | convolution block | MSA block |
|---|---|---|
| pre-activation (`AlterNet`) | `x + branch(preact(x))` | `MSABlock`, that of the paper |
| post-activation (`ResNet`, timm, torchvision) | `relu(x + branch(x))` | `PostActMSABlock` |

The paper's networks are pre-activation ones. `PostActMSABlock` is its block in the other order: the
norm that came first comes last, and the activation follows the sum.

Heads and channels follow the paper's network, which is 64 channels wide: stage `i` has `3 * 2**i`
heads, each of as many channels as the 3x3 convolutions of the first stage.
"""

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from landscape._checks import check_count
from landscape.models.alternet import AlterNet, MSABlock, image_multiple, msa_positions
from landscape.models.layers import WindowAttention, check_sizes, init_with_attention
from landscape.models.residual_stages import (
    PostActMSABlock,
    block_shape,
    count_msas,
    is_msa,
    resnet_stages,
)


def alternate(
    model: nn.Module,
    stages: Sequence[int],
    *,
    heads: Sequence[int] | None = None,
    head_dim: int | None = None,
    window: int | Sequence[int] | None = None,
    image_size: int = 32,
) -> nn.Module:
    """Return a copy of a ResNet with MSA blocks at the end of its stages (Park & Kim, 2022).

    With `stages = (0, 1, 3, 2)` the last block of stage 2, the last, third and fifth last of stage
    3, and the last and third last of stage 4 are MSAs. All other blocks keep their weights, and so
    does an MSA that is there already: a network can be built up step by step. New blocks are
    initialised as in `AlterNet`, from PyTorch's global generator, on the device and in the
    precision of what they replace, and take over its stochastic depth rate.

    Args:
        model: A `ResNet`, an `AlterNet`, or a ResNet of timm or torchvision: children `layer1`,
            `layer2`, … that are `nn.Sequential` of blocks with `conv1`, `bn1`, `conv2`, `bn2`. It
            is left as it was.
        stages: MSAs per stage in all, one number for each stage of `model`, each at most half of
            the blocks of that stage.
        heads: Attention heads per stage; by default 3, 6, 12, … as in the paper.
        head_dim: Channels per head; by default as many as the inner channels of the first stage.
        window: Side of the attention windows, for all stages or for each. By default the side of
            the last stage's map, which tiles the earlier ones where each is twice as large: 4 for
            CIFAR as the authors released it, 7 for ImageNet.
        image_size: Side of the images, from which the side of every map is found by one forward
            pass of one image.

    Returns:
        The alternating network, of the class of `model`.

    Raises:
        ValueError: If `model` is no ResNet that is known, `stages` asks for more MSAs than fit or
            fewer than there are, a size is below 1, or windows, new or there already, do not tile
            the maps.
    """
    model = copy.deepcopy(model)
    parts = resnet_stages(model)
    _check_counts(parts, stages)
    if not any(stages):
        return model
    heads = [3 * 2**i for i in range(len(parts))] if heads is None else list(heads)
    first = block_shape(parts[0][0])
    head_dim = (first.inner if first else 0) if head_dim is None else head_dim
    if len(heads) != len(parts):
        raise ValueError(f"`heads` must have one entry per stage ({len(parts)}), got {len(heads)}.")
    check_sizes(heads=min(heads), head_dim=head_dim, image_size=image_size)
    windows = _windows(model, parts, stages, window, image_size)
    for i, (stage, count) in enumerate(zip(parts, stages, strict=True)):
        for position in msa_positions(len(stage), count):
            block = stage[position]
            if not is_msa(block):
                stage[position] = _msa_block(block, heads[i], head_dim, windows[i])
    if isinstance(model, AlterNet):
        model.image_multiple = image_multiple(model.stem, model.stages)
    return model


def _check_counts(parts: list[nn.Sequential], stages: Sequence[int]) -> None:
    if len(stages) != len(parts):
        raise ValueError(
            f"`stages` must have one number of MSAs per stage, {len(parts)} in all, got "
            f"{len(stages)}."
        )
    for i, (stage, count) in enumerate(zip(parts, stages, strict=True), start=1):
        if not 0 <= 2 * count <= len(stage):
            raise ValueError(
                f"`stages` must be 0 to {len(stage) // 2} in stage {i}, which has {len(stage)} "
                f"blocks (each MSA follows a convolution block), got {count}."
            )
        if count_msas(stage) > count:
            raise ValueError(
                f"`stages` must keep the MSAs that are there, {count_msas(stage)} in stage {i}, "
                f"got {count}; begin with the network without them."
            )


def _windows(
    model: nn.Module,
    parts: list[nn.Sequential],
    stages: Sequence[int],
    window: int | Sequence[int] | None,
    image_size: int,
) -> list[int]:
    """Return the window of each stage, checked against the maps of those that have MSAs."""
    sides = _sides(model, image_size)
    if window is None and sides[-1] < 2:
        raise ValueError(
            f"`image_size` must leave the last stage a map of at least 2x2, got {image_size}, "
            f"which leaves {sides[-1]}x{sides[-1]}; pass the size of your images, or a `window`."
        )
    chosen = sides[-1] if window is None else window
    windows = list(chosen) if isinstance(chosen, Iterable) else [chosen] * len(parts)
    if len(windows) != len(parts):
        raise ValueError(
            f"`window` must be one number or one per stage ({len(parts)}), got {len(windows)}."
        )
    for size in windows:
        check_count("window", size, 1)
    for i, (side, size, count) in enumerate(zip(sides, windows, stages, strict=True), start=1):
        if count and side % size:
            fits = [k for k in range(2, side + 1) if side % k == 0]
            raise ValueError(
                f"`window` must divide the side of the maps, got {size} for the {side}x{side} maps "
                f"of stage {i} at `image_size` {image_size}; {fits} would fit there."
            )
    return windows


def _sides(model: nn.Module, image_size: int) -> list[int]:
    """Return the side of the map of each stage, from one forward pass of a copy."""
    twin = copy.deepcopy(model).eval()
    found: list[int] = []
    switch: Callable[[bool], object] | None = getattr(twin, "set_grad_checkpointing", None)
    if switch is not None:  # timm's calls the blocks of a stage then, not the stage
        switch(False)
    for stage in resnet_stages(twin):
        stage.register_forward_hook(lambda _, __, out: found.append(out.shape[-1]))
    weight = next(module for module in twin.modules() if isinstance(module, nn.Conv2d)).weight
    with torch.no_grad():
        twin(weight.new_zeros(1, weight.shape[1], image_size, image_size))
    return found


def _msa_block(block: nn.Module, heads: int, head_dim: int, window: int) -> nn.Module:
    """Return the MSA block that takes the place of a convolution block."""
    shape = block_shape(block)
    if shape is None or not shape.keeps_shape:
        raise ValueError(
            "`model` must keep the shape of the map in the blocks to replace, but a "
            f"{type(block).__name__} there changes it."
        )
    attention = WindowAttention(
        shape.inner, shape.channels, heads=heads, head_dim=head_dim, window=window
    )
    kind = MSABlock if shape.is_preact else PostActMSABlock
    new = kind(shape.channels, shape.inner, attention, shape.drop_path)
    init_with_attention(new)
    old = next(block.parameters())
    return new.to(device=old.device, dtype=old.dtype).train(block.training)
