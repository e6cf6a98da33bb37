"""The stages of a ResNet of any origin, and what an MSA takes over from a block of them."""

import re
from dataclasses import dataclass

from torch import Tensor, nn

from landscape.models.alternet import MSABlock, PreActBasicBlock, PreActBottleneck
from landscape.models.layers import DropPath, WindowAttention, chain
from landscape.models.resnet import BasicBlock, Bottleneck, conv1x1


class PostActMSABlock(nn.Module):
    """`relu(x + drop_path(norm(attention(norm(conv(x))))))`, with windowed attention."""

    def __init__(
        self, channels: int, inner: int, attention: WindowAttention, drop_path: float
    ) -> None:
        super().__init__()
        self.branch = chain(
            conv=conv1x1(channels, inner),
            norm1=nn.BatchNorm2d(inner),
            attention=attention,
            norm2=nn.BatchNorm2d(channels),
        )
        self.window = attention.window
        self.drop_path = DropPath(drop_path)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, channels, h, w)` to the same shape.

        Raises:
            ValueError: If the windows do not tile the map.
        """
        h, w = x.shape[2:]
        if h % self.window or w % self.window:
            raise ValueError(
                f"`window` must divide the maps of its stage, got {self.window} for a map of "
                f"{h}x{w}; resize the images, or pass their `image_size` to `alternate`."
            )
        out: Tensor = self.act(x + self.drop_path(self.branch(x)))
        return out


@dataclass(frozen=True)
class BlockShape:
    """What an MSA block takes over from the convolution block in its place."""

    channels: int
    inner: int
    drop_path: float
    keeps_shape: bool
    is_preact: bool


def resnet_stages(model: nn.Module) -> list[nn.Sequential]:
    """Return the stages of a ResNet, each a sequence of residual blocks.

    Args:
        model: As in `alternate`.

    Raises:
        ValueError: If the stages or their blocks are not of a kind that is known.
    """
    stages = getattr(model, "stages", None)
    found = (
        list(stages.children())
        if isinstance(stages, nn.Sequential)
        else [part for name, part in model.named_children() if re.fullmatch(r"layer\d+", name)]
    )
    parts = [part for part in found if isinstance(part, nn.Sequential) and len(part)]
    if not parts or len(parts) < len(found):
        raise ValueError(
            "`model` must be a ResNet, an AlterNet, or have stages `layer1`, `layer2`, … as those "
            f"of timm and torchvision, got a {type(model).__name__}."
        )
    for block in (block for part in parts for block in part):
        if not is_msa(block) and block_shape(block) is None:
            raise ValueError(
                "`model` must consist of residual blocks with `conv1`, `bn1`, `conv2`, `bn2`, in "
                f"that order, got a {type(block).__name__} in a {type(model).__name__}."
            )
    return parts


def is_msa(block: nn.Module) -> bool:
    """Return whether a block of a stage is an MSA block."""
    return isinstance(block, MSABlock | PostActMSABlock)


def count_msas(stage: nn.Sequential) -> int:
    """Return how many blocks of a stage are MSAs."""
    return sum(is_msa(block) for block in stage)


def block_shape(block: nn.Module) -> BlockShape | None:
    """Return what is to be known of a convolution block, `None` where it is of no known form."""
    is_preact = isinstance(block, PreActBasicBlock | PreActBottleneck)
    if is_preact or isinstance(block, BasicBlock | Bottleneck):
        layers = dict(block.branch.named_children())  # type: ignore[union-attr]
    else:
        layers = dict(block.named_children())
        names = [name for name in layers if name in {"conv1", "bn1", "conv2", "bn2"}]
        if names != ["conv1", "bn1", "conv2", "bn2"]:  # a pre-activation block has `bn1` first
            return None
    convs = [layers[name] for name in ("conv1", "conv2", "conv3") if name in layers]
    if not all(isinstance(conv, nn.Conv2d) for conv in convs):
        return None
    entry, last = convs[0], convs[-1]
    strides = [conv.stride for conv in convs]
    drop = getattr(block, "drop_path", None)
    return BlockShape(
        channels=int(last.out_channels),
        inner=int(entry.out_channels),
        drop_path=float(getattr(drop, "rate", getattr(drop, "drop_prob", None)) or 0.0),
        keeps_shape=entry.in_channels == last.out_channels and set(strides) == {(1, 1)},
        is_preact=is_preact,
    )
