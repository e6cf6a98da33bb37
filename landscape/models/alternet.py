"""AlterNet: a pre-activation ResNet whose stages end with MSAs (Park & Kim, 2022, Fig. 3, 11).

Pre-activation blocks (He et al., 2016, arXiv 1603.05027) put norm and ReLU first, and end with the
sum: `shortcut + branch(preact(x))`. The shortcut is `x` itself or, where the shape changes, a 1x1
projection of `preact(x)` without norm. An MSA block is the same block with windowed attention in
place of the 3x3 convolution(s).

Build-up rule (sec. 4): convolution blocks are replaced by MSA blocks alternately, from the end of
each stage. A stage of `n` blocks with `m` MSAs is `[C] * (n - 2 m) + [C, A] * m`: a stage never
starts with an MSA, and no MSA follows another. Heads double with the channels.

| constructor | block | blocks per stage | MSAs per stage | heads |
|---|---|---|---|---|
| `alternet18` | basic | 2, 2, 2, 2 | 0, 1, 1, 1 | 3, 6, 12, 24 |
| `alternet34` | basic | 3, 4, 6, 4 | 0, 1, 3, 2 | 3, 6, 12, 24 |
| `alternet50` | bottleneck | 3, 4, 6, 4 | 0, 1, 3, 2 | 3, 6, 12, 24 |

All counts are those of the networks that the authors released; heads have 64 channels each. The
first stage has no MSA, and the last has four blocks instead of a ResNet's three, which makes two
pairs `[C, A]`.
"""

import math
from typing import TypedDict, Unpack

from torch import Tensor, nn

from landscape.models.layers import (
    DropPath,
    WindowAttention,
    chain,
    check_side,
    check_sizes,
    drop_path_rates,
    init_with_attention,
    split_by_stage,
)
from landscape.models.resnet import Stem, conv1x1, conv3x3, make_stem


class _PreActBlock(nn.Module):
    """`shortcut + drop_path(branch(preact(x)))`; the shortcut is `x` or projects `preact(x)`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        branch: nn.Sequential,
        *,
        stride: int = 1,
        act: nn.Module,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.preact = chain(norm=nn.BatchNorm2d(in_channels), act=act)
        self.branch = branch
        same = stride == 1 and in_channels == out_channels
        self.projection = None if same else conv1x1(in_channels, out_channels, stride)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, in_channels, h, w)` to `(n, out_channels, h / stride, w / stride)`."""
        active = self.preact(x)
        skip = x if self.projection is None else self.projection(active)
        out: Tensor = skip + self.drop_path(self.branch(active))
        return out


class PreActBasicBlock(_PreActBlock):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, drop_path: float) -> None:
        branch = chain(
            conv1=conv3x3(in_channels, channels, stride),
            norm1=nn.BatchNorm2d(channels),
            act1=nn.ReLU(),
            conv2=conv3x3(channels, channels),
        )
        super().__init__(
            in_channels, channels, branch, stride=stride, act=nn.ReLU(), drop_path=drop_path
        )


class PreActBottleneck(_PreActBlock):
    """1x1, 3x3 and 1x1 convolutions, the last to four times the channels."""

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
        )
        super().__init__(
            in_channels, 4 * channels, branch, stride=stride, act=nn.ReLU(), drop_path=drop_path
        )


class MSABlock(_PreActBlock):
    """1x1 convolution to the block's inner channels, then windowed attention back to its width."""

    def __init__(
        self, channels: int, inner: int, attention: WindowAttention, drop_path: float
    ) -> None:
        branch = chain(
            conv=conv1x1(channels, inner), norm=nn.BatchNorm2d(inner), attention=attention
        )
        super().__init__(channels, channels, branch, act=nn.GELU(), drop_path=drop_path)


class AlterNet(nn.Module):
    """Pre-activation ResNet with MSAs at the end of its stages: `stem stages norm head`.

    Without any MSA (`msas=(0, 0, 0, 0)`) it is the pre-activation ResNet itself.

    Args:
        block: `PreActBasicBlock` or `PreActBottleneck`.
        depths: Blocks per stage, MSA blocks included.
        msas: MSA blocks per stage, at most half of its depth.
        heads: Attention heads of each stage's MSAs.
        head_dim: Channels per head.
        window: Side of the attention windows.
        width: Channels of the stem and the first stage; each later stage has twice as many.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        stem: `"cifar"`, 3x3 with no pooling, or `"imagenet"`, 7x7 with stride 2 and max pooling.
        drop_path: Stochastic depth rate of the last block; rates rise linearly from 0.

    Raises:
        ValueError: If a size is below 1, the three tuples differ in length, a stage has too many
            MSAs, `stem` is unknown or `drop_path` is outside [0, 1).
    """

    def __init__(
        self,
        block: type[PreActBasicBlock] | type[PreActBottleneck],
        *,
        depths: tuple[int, ...],
        msas: tuple[int, ...],
        heads: tuple[int, ...] = (3, 6, 12, 24),
        head_dim: int = 64,
        window: int = 4,
        width: int = 64,
        num_classes: int = 10,
        in_channels: int = 3,
        stem: Stem = "cifar",
        drop_path: float = 0.0,
    ) -> None:
        check_sizes(
            depths=min(depths, default=0),
            heads=min(heads, default=0),
            head_dim=head_dim,
            window=window,
        )
        check_sizes(width=width, num_classes=num_classes)
        if not len(depths) == len(msas) == len(heads):
            raise ValueError(
                "`depths`, `msas` and `heads` must have one entry per stage, got "
                f"{len(depths)}, {len(msas)} and {len(heads)} entries."
            )
        for depth, num_msas in zip(depths, msas, strict=True):
            if not 0 <= 2 * num_msas <= depth:
                raise ValueError(
                    f"`msas` must be 0 to {depth // 2} in a stage of {depth} blocks "
                    f"(each MSA follows a convolution block), got {num_msas}."
                )
        super().__init__()
        self.stem = make_stem(in_channels, width, stem, norm=False)
        stages: list[nn.Module] = []
        channels = width
        rates = split_by_stage(drop_path_rates(drop_path, sum(depths)), depths)
        for i, stage_rates in enumerate(rates):
            inner = width * 2**i
            positions = msa_positions(depths[i], msas[i])
            blocks: list[nn.Module] = []
            for j, rate in enumerate(stage_rates):
                if j in positions:
                    attention = WindowAttention(
                        inner, channels, heads=heads[i], head_dim=head_dim, window=window
                    )
                    blocks.append(MSABlock(channels, inner, attention, rate))
                else:
                    blocks.append(block(channels, inner, 2 if i > 0 and j == 0 else 1, rate))
                    channels = inner * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.head = nn.Linear(channels, num_classes)

        self.image_multiple = image_multiple(self.stem, self.stages)
        init_with_attention(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(n, num_classes)` of images `(n, in_channels, h, w)`.

        Raises:
            ValueError: If the windows do not tile the maps of a stage with MSAs.
        """
        check_side("image height", x.shape[2], self.image_multiple)
        check_side("image width", x.shape[3], self.image_multiple)
        x = self.act(self.norm(self.stages(self.stem(x))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def msa_positions(depth: int, count: int) -> list[int]:
    """Return which blocks of a stage are MSAs: every second one, `count` of them, from the end.

    Args:
        depth: Blocks of the stage.
        count: Its MSAs.
    """
    return [depth - 1 - 2 * i for i in range(count)]


def image_multiple(stem: nn.Sequential, stages: nn.Sequential) -> int:
    """Return what the sides of the images must be multiples of for every window to fit.

    Args:
        stem: Stem of an `AlterNet`.
        stages: Its stages; each but the first halves the map.
    """
    stem_stride = 4 if hasattr(stem, "pool") else 1
    multiples = [
        stem_stride * 2**i * module.window
        for i, stage in enumerate(stages)
        for module in stage.modules()
        if isinstance(module, WindowAttention)
    ]
    return math.lcm(*multiples)


class AlterNetSizes(TypedDict, total=False):
    """What an AlterNet constructor accepts; see `AlterNet`."""

    depths: tuple[int, ...]
    msas: tuple[int, ...]
    heads: tuple[int, ...]
    head_dim: int
    window: int
    width: int
    num_classes: int
    in_channels: int
    stem: Stem
    drop_path: float


def alternet18(**sizes: Unpack[AlterNetSizes]) -> AlterNet:
    """Return Alter-ResNet-18.

    Args:
        **sizes: Arguments of `AlterNet` but `block`.
    """
    defaults = AlterNetSizes(depths=(2, 2, 2, 2), msas=(0, 1, 1, 1))
    return AlterNet(PreActBasicBlock, **(defaults | sizes))


def alternet34(**sizes: Unpack[AlterNetSizes]) -> AlterNet:
    """Return Alter-ResNet-34.

    Args:
        **sizes: Arguments of `AlterNet` but `block`.
    """
    defaults = AlterNetSizes(depths=(3, 4, 6, 4), msas=(0, 1, 3, 2))
    return AlterNet(PreActBasicBlock, **(defaults | sizes))


def alternet50(**sizes: Unpack[AlterNetSizes]) -> AlterNet:
    """Return Alter-ResNet-50 (Park & Kim, 2022, Fig. 11).

    Args:
        **sizes: Arguments of `AlterNet` but `block`.
    """
    defaults = AlterNetSizes(depths=(3, 4, 6, 4), msas=(0, 1, 3, 2))
    return AlterNet(PreActBottleneck, **(defaults | sizes))
