"""Vision transformers (Dosovitskiy et al., 2021, arXiv 2010.11929), for small images by default.

An image is cut into patches, each a token; a class token may be put in front; positions are
learned and added. Every block is two residual modules, each with its norm first:

    x = x + MSA(norm(x))          `blocks.i.msa`
    x = x + MLP(norm(x))          `blocks.i.mlp`

and the head reads the class token (`pool="cls"`) or the mean over the patches (`pool="gap"`).

With `window=k` a patch attends only to the k x k patches around it: the convolutional MSA with
which Park & Kim (2022, arXiv 2202.06709) study what locality does. The class token still
sees, and is seen by, every token. At the border there are fewer neighbours, not zero tokens.

| constructor | patch | dim | depth | heads | parameters (32x32, 10 classes) |
|---|---|---|---|---|---|
| `vit_small` | 2 | 384 | 12 | 6 | 21.4 M |
| `vit_tiny` (Park & Kim's ViT-Ti for CIFAR) | 2 | 192 | 12 | 3 | 5.4 M |
| `vit_micro` | 4 | 96 | 6 | 3 | 0.68 M |
| `vit_nano` | 4 | 48 | 4 | 3 | 0.12 M |
"""

from typing import Literal, TypedDict, Unpack, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape._checks import check_at_least, check_choice, check_count
from landscape.models.layers import (
    Residual,
    chain,
    check_side,
    check_sizes,
    drop_path_rates,
    init_transformer,
)

Pool = Literal["cls", "gap"]


class Attention(nn.Module):
    """Multi-head self-attention, `softmax(q kᵀ / √d) v` per head, over tokens `(n, tokens, dim)`.

    `mask (tokens, tokens)` is true where a token (row) may attend to another (column).
    """

    mask: Tensor | None

    def __init__(
        self, dim: int, heads: int, *, qkv_bias: bool, dropout: float, mask: Tensor | None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.project = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended tokens, `(n, tokens, dim)`."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (n, tokens, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)  # (n, heads, tokens, d)
        out: Tensor = self.dropout(self.project(x.transpose(1, 2).flatten(2)))
        return out


class ResidualMSA(Residual):
    """`x + attention(norm(x))`."""

    def __init__(self, norm: nn.LayerNorm, attention: Attention, drop_path: float) -> None:
        super().__init__(chain(norm=norm, attention=attention), drop_path)


class ResidualMLP(Residual):
    """`x + W₂ gelu(W₁ norm(x))`, with biases."""

    def __init__(self, norm: nn.LayerNorm, hidden: int, dropout: float, drop_path: float) -> None:
        (dim,) = norm.normalized_shape
        branch = chain(
            norm=norm,
            fc1=nn.Linear(dim, hidden),
            act=nn.GELU(),
            dropout1=nn.Dropout(dropout),
            fc2=nn.Linear(hidden, dim),
            dropout2=nn.Dropout(dropout),
        )
        super().__init__(branch, drop_path)


class VisionTransformer(nn.Module):
    """Vision transformer: `patch_embed`, `blocks` (each an `msa` and an `mlp`), `norm`, `head`.

    Args:
        image_size: Side of the square images, a multiple of `patch_size`.
        patch_size: Side of a patch.
        dim: Width of the tokens, a multiple of `heads`.
        depth: Number of blocks.
        heads: Attention heads per block.
        mlp_ratio: Hidden width of the MLPs, in units of `dim`.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        pool: What the head reads: the class token or, without one, the mean over patches.
        window: Side of the neighbourhood a patch attends to, odd; None for all patches.
        qkv_bias: Whether queries, keys and values have biases (Park & Kim: no).
        dropout: Rate after the embedding, the attention and in the MLPs.
        drop_path: Stochastic depth rate of the last block; rates rise linearly from 0.
        norm_eps: Constant inside the layer norms (timm 1e-6, Park & Kim 1e-5).

    Raises:
        ValueError: If a size is below 1 or does not divide its whole, `window` is even, `pool` is
            unknown, `norm_eps` is negative, or `drop_path` is outside [0, 1).
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        patch_size: int = 2,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: int = 4,
        num_classes: int = 10,
        in_channels: int = 3,
        pool: Pool = "cls",
        window: int | None = None,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        check_sizes(patch_size=patch_size, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        check_sizes(num_classes=num_classes, in_channels=in_channels)
        if dim % heads:
            raise ValueError(f"`dim` must be a multiple of `heads` = {heads}, got {dim}.")
        check_choice("pool", pool, get_args(Pool))
        check_at_least("norm_eps", norm_eps, 0)
        grid = check_side("`image_size`", image_size, patch_size)
        super().__init__()
        self.image_size = image_size

        mask = None if window is None else neighbourhood_mask(grid, window, pool == "cls")
        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "cls" else None
        self.pos_embed = nn.Parameter(torch.zeros(1, grid**2 + (pool == "cls"), dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential()
        for rate in drop_path_rates(drop_path, depth):
            attention = Attention(dim, heads, qkv_bias=qkv_bias, dropout=dropout, mask=mask)
            msa = ResidualMSA(nn.LayerNorm(dim, norm_eps), attention, rate)
            mlp = ResidualMLP(nn.LayerNorm(dim, norm_eps), mlp_ratio * dim, dropout, rate)
            self.blocks.append(chain(msa=msa, mlp=mlp))
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.head = nn.Linear(dim, num_classes)

        init_transformer(*(layer for layer in self.modules() if isinstance(layer, nn.Linear)))
        init_transformer(self.pos_embed)
        if self.cls_token is not None:
            init_transformer(self.cls_token)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(n, num_classes)` of images `(n, in_channels, image_size, image_size)`.

        Raises:
            ValueError: If the images have another size.
        """
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images must be {self.image_size}x{self.image_size}, got "
                f"{x.shape[-2]}x{x.shape[-1]}; resize them or build the model with `image_size`."
            )
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (n, patches, dim), row by row
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.blocks(self.dropout(x + self.pos_embed))
        x = x.mean(dim=1) if self.cls_token is None else x[:, 0]
        logits: Tensor = self.head(self.norm(x))
        return logits


def neighbourhood_mask(grid: int, window: int, class_token: bool) -> Tensor:
    """Return which tokens see which when patches see `window` x `window` neighbours.

    Args:
        grid: Patches per side.
        window: Side of the neighbourhood, odd so that it has a centre.
        class_token: Whether a class token comes first; it sees and is seen by all.

    Returns:
        Boolean `(tokens, tokens)`, with `tokens = grid² + class_token`; rows attend to columns.

    Raises:
        ValueError: If `window` is not a whole number, even, or below 1.
    """
    check_count("window", window)
    if window < 1 or window % 2 == 0:
        raise ValueError(f"`window` must be odd and at least 1, got {window}.")
    place = torch.cartesian_prod(torch.arange(grid), torch.arange(grid))  # (patches, 2)
    distance = (place[:, None] - place[None, :]).abs().amax(dim=-1)
    return F.pad(distance <= window // 2, (int(class_token), 0, int(class_token), 0), value=True)


class ViTSizes(TypedDict, total=False):
    """What a ViT constructor accepts; see `VisionTransformer`."""

    image_size: int
    patch_size: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: int
    num_classes: int
    in_channels: int
    pool: Pool
    window: int | None
    qkv_bias: bool
    dropout: float
    drop_path: float
    norm_eps: float


def vit_small(**sizes: Unpack[ViTSizes]) -> VisionTransformer:
    """Return a ViT-S with patches of 2.

    Args:
        **sizes: Arguments of `VisionTransformer`.
    """
    return VisionTransformer(**(ViTSizes(dim=384, depth=12, heads=6) | sizes))


def vit_tiny(**sizes: Unpack[ViTSizes]) -> VisionTransformer:
    """Return the CIFAR ViT-Ti of Park & Kim (2022).

    Args:
        **sizes: Arguments of `VisionTransformer`.
    """
    return VisionTransformer(**(ViTSizes(dim=192, depth=12, heads=3) | sizes))


def vit_micro(**sizes: Unpack[ViTSizes]) -> VisionTransformer:
    """Return a ViT that one CPU core trains.

    Args:
        **sizes: Arguments of `VisionTransformer`.
    """
    return VisionTransformer(**(ViTSizes(patch_size=4, dim=96, depth=6, heads=3) | sizes))


def vit_nano(**sizes: Unpack[ViTSizes]) -> VisionTransformer:
    """Return a ViT for tests and demonstrations.

    Args:
        **sizes: Arguments of `VisionTransformer`.
    """
    return VisionTransformer(**(ViTSizes(patch_size=4, dim=48, depth=4, heads=3) | sizes))
