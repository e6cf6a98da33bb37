"""Residual networks (He et al., 2016, arXiv 1512.03385).

A network is a stem, stages of residual blocks and a linear head on the spatial mean. Each block is
`relu(shortcut(x) + branch(x))`; the first block of every stage after the first halves the map and
doubles the channels, with a 1x1 projection as its shortcut (option B of the paper). Bottlenecks
stride in their 3x3 convolution, as all current implementations do.

| constructor | block | blocks per stage | channels of the first stage |
|---|---|---|---|
| `resnet20` (CIFAR, sec. 4.2) | basic | 3, 3, 3 | 16 |
| `resnet18` / `resnet34` | basic | 2, 2, 2, 2 / 3, 4, 6, 3 | 64 |
| `resnet50` / `resnet101` | bottleneck | 3, 4, 6, 3 / 3, 4, 23, 3 | 64 (out: 256) |

By default the stem is the CIFAR one, a 3x3 convolution with no pooling.
"""

from typing import Literal, TypedDict, Unpack, get_args

from torch import Tensor, nn

from landscape._checks import check_choice
from landscape.models.layers import (
    DropPath,
    chain,
    check_sizes,
    drop_path_rates,
    init_conv_net,
    split_by_stage,
)

Stem = Literal["cifar", "imagenet"]


class _Block(nn.Module):
    """`relu(shortcut(x) + drop_path(branch(x)))`; subclasses say what the branch is."""

    expansion: int

    def __init__(self, branch: nn.Sequential, shortcut: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.drop_path = DropPath(drop_path)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, in_channels, h, w)` to `(n, expansion * channels, h / stride, w / stride)`."""
        out: Tensor = self.act(self.shortcut(x) + self.drop_path(self.branch(x)))
        return out


class BasicBlock(_Block):
    """Two 3x3 convolutions (He et al., 2016, Fig. 5 left)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, drop_path: float) -> None:
        branch = chain(
            conv1=conv3x3(in_channels, channels, stride),
            norm1=nn.BatchNorm2d(channels),
            act1=nn.ReLU(),
            conv2=conv3x3(channels, channels),
            norm2=nn.BatchNorm2d(channels),
        )
        super().__init__(branch, _shortcut(in_channels, channels, stride), drop_path)


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions, the last to four times the channels (Fig. 5 right)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, drop_path: float) -> None:
        branch = chain(
            conv1=conv1x1(in_channels, channels),
            norm1=nn.BatchNorm2d(channels),
            act1=nn.ReLU(),
            conv2=conv3x3(channels, channels, stride),
            norm2=nn.BatchNorm2d(channels),
            act2=nn.ReLU(),
            conv3=conv1x1(channels, 4 * channels),
            norm3=nn.BatchNorm2d(4 * channels),
        )
        super().__init__(branch, _shortcut(in_channels, 4 * channels, stride), drop_path)


class ResNet(nn.Module):
    """Residual network of one block type: `stem`, `stages`, `head`.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: Blocks per stage.
        width: Channels of the stem and the first stage; each later stage has twice as many.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        stem: `"cifar"`, 3x3 with no pooling, or `"imagenet"`, 7x7 with stride 2 and max pooling.
        drop_path: Stochastic depth rate of the last block; rates rise linearly from 0.

    Raises:
        ValueError: If a size is below 1, `stem` is unknown or `drop_path` is outside [0, 1).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        *,
        depths: tuple[int, ...],
        width: int = 64,
        num_classes: int = 10,
        in_channels: int = 3,
        stem: Stem = "cifar",
        drop_path: float = 0.0,
    ) -> None:
        check_sizes(depths=min(depths, default=0), width=width, num_classes=num_classes)
        super().__init__()
        self.stem = make_stem(in_channels, width, stem, norm=True)
        stages: list[nn.Module] = []
        channels = width
        rates = split_by_stage(drop_path_rates(drop_path, sum(depths)), depths)
        for i, stage_rates in enumerate(rates):
            blocks: list[nn.Module] = []
            for j, rate in enumerate(stage_rates):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, width * 2**i, stride, rate))
                channels = width * 2**i * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        init_conv_net(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(n, num_classes)` of images `(n, in_channels, h, w)`, any `h` and `w`."""
        x = self.stages(self.stem(x))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class ResNetSizes(TypedDict, total=False):
    """What a ResNet constructor accepts; see `ResNet`."""

    depths: tuple[int, ...]
    width: int
    num_classes: int
    in_channels: int
    stem: Stem
    drop_path: float


def resnet18(**sizes: Unpack[ResNetSizes]) -> ResNet:
    """Return a ResNet-18 (He et al., 2016, Table 1).

    Args:
        **sizes: Arguments of `ResNet` but `block`.
    """
    return ResNet(BasicBlock, **(ResNetSizes(depths=(2, 2, 2, 2)) | sizes))


def resnet34(**sizes: Unpack[ResNetSizes]) -> ResNet:
    """Return a ResNet-34 (He et al., 2016, Table 1).

    Args:
        **sizes: Arguments of `ResNet` but `block`.
    """
    return ResNet(BasicBlock, **(ResNetSizes(depths=(3, 4, 6, 3)) | sizes))


def resnet50(**sizes: Unpack[ResNetSizes]) -> ResNet:
    """Return a ResNet-50 (He et al., 2016, Table 1).

    Args:
        **sizes: Arguments of `ResNet` but `block`.
    """
    return ResNet(Bottleneck, **(ResNetSizes(depths=(3, 4, 6, 3)) | sizes))


def resnet101(**sizes: Unpack[ResNetSizes]) -> ResNet:
    """Return a ResNet-101 (He et al., 2016, Table 1).

    Args:
        **sizes: Arguments of `ResNet` but `block`.
    """
    return ResNet(Bottleneck, **(ResNetSizes(depths=(3, 4, 23, 3)) | sizes))


def resnet20(**sizes: Unpack[ResNetSizes]) -> ResNet:
    """Return the CIFAR ResNet-20 of 16, 32 and 64 channels.

    Sec. 4.2 of He et al. (2016), but with projections where the channels change (option B), as
    in the networks of Table 1: 272,474 parameters for 10 classes instead of 269,722.

    Args:
        **sizes: Arguments of `ResNet` but `block`.
    """
    return ResNet(BasicBlock, **(ResNetSizes(depths=(3, 3, 3), width=16) | sizes))


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a padded 3x3 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


def make_stem(in_channels: int, width: int, stem: Stem, *, norm: bool) -> nn.Sequential:
    """Return the first layers of a network.

    Args:
        in_channels: Channels of the images.
        width: Channels of its output.
        stem: `"cifar"` (3x3) or `"imagenet"` (7x7 with stride 2, then max pooling with stride 2).
        norm: Whether norm and ReLU follow the convolution; pre-activation networks have neither.

    Raises:
        ValueError: If `in_channels` is below 1 or `stem` is unknown.
    """
    check_sizes(in_channels=in_channels)
    check_choice("stem", stem, get_args(Stem))
    large = stem == "imagenet"
    conv = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
    steps: dict[str, nn.Module] = {"conv": conv if large else conv3x3(in_channels, width)}
    if norm:
        steps |= {"norm": nn.BatchNorm2d(width), "act": nn.ReLU()}
    if large:
        steps["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    return chain(**steps)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the identity, or a 1x1 projection where the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return chain(conv=conv1x1(in_channels, out_channels, stride), norm=nn.BatchNorm2d(out_channels))
