"""What several families share: stochastic depth, windowed attention, initial weights."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape._checks import check_count


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole samples (Huang et al., 2016, eq. 2).

    In training each sample's branch is zeroed with probability `rate` and divided by `1 - rate`
    otherwise, so that its mean stays the same; in eval mode nothing happens. Draws from the
    global generator, in training only, as `nn.Dropout` does.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        _check_rate("rate", rate)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` of shape `(n, ...)` with whole samples dropped."""
        if not self.training or self.rate == 0:
            return x
        keep = F.dropout(x.new_ones(len(x), *[1] * (x.ndim - 1)), self.rate)
        return x * keep

    def extra_repr(self) -> str:
        """Show the rate in `print(model)`."""
        return f"rate={self.rate}"


class Residual(nn.Module):
    """`x + drop_path(branch(x))`: hook this module for the sum, `branch` for the update."""

    def __init__(self, branch: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.branch = branch
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, of the shape of `x`."""
        out: Tensor = x + self.drop_path(self.branch(x))
        return out


class WindowAttention(nn.Module):
    """Multi-head attention inside windows that tile the map, with relative position bias.

    Per head, `softmax(q kᵀ / √d + b) v`, where `b` depends only on the offset from query to key:
    one table `position_bias (2 window - 1, 2 window - 1)` that all heads share. Maps
    `(n, in_channels, h, w)` to `(n, out_channels, h, w)`; `window` divides `h` and `w`.
    """

    offset: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, *, heads: int, head_dim: int, window: int
    ) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.query = nn.Conv2d(in_channels, heads * head_dim, 1, bias=False)
        self.key_value = nn.Conv2d(in_channels, 2 * heads * head_dim, 1, bias=False)
        self.project = nn.Conv2d(heads * head_dim, out_channels, 1)
        self.position_bias = nn.Parameter(torch.zeros(2 * window - 1, 2 * window - 1))
        self.register_buffer("offset", _offsets(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended map, `(n, out_channels, h, w)`."""
        h, w = x.shape[2:]
        key, value = self.key_value(x).chunk(2, dim=1)
        q, k, v = (self._split(t) for t in (self.query(x), key, value))
        bias = self.position_bias.flatten()[self.offset]  # (window², window²)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = self.project(self._merge(x, h, w))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """Cut `(n, heads * d, h, w)` into windows, `(n * windows, heads, window², d)`."""
        n, channels, h, w = x.shape
        size, d = self.window, channels // self.heads
        x = x.reshape(n, self.heads, d, h // size, size, w // size, size)
        return x.permute(0, 3, 5, 1, 4, 6, 2).reshape(-1, self.heads, size**2, d)

    def _merge(self, x: Tensor, h: int, w: int) -> Tensor:
        """Undo `_split` for a map of `h` x `w`."""
        _, heads, _, d = x.shape
        size = self.window
        x = x.reshape(-1, h // size, w // size, heads, size, size, d)
        return x.permute(0, 3, 6, 1, 4, 2, 5).reshape(-1, heads * d, h, w)


def _offsets(window: int) -> Tensor:
    """Return where the bias of query `i` and key `j` lies in the flat table, `(window²,) * 2`."""
    place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    row, column = (place[None, :] - place[:, None] + window - 1).unbind(-1)
    return row * (2 * window - 1) + column


def chain(**modules: nn.Module) -> nn.Sequential:
    """Return an `nn.Sequential` whose steps are named, in the order given."""
    return nn.Sequential(OrderedDict(modules))


def drop_path_rates(last: float, num_blocks: int) -> list[float]:
    """Return one rate a block, rising linearly from 0 to `last` (after Huang et al., eq. 4)."""
    _check_rate("drop_path", last)
    return [last * i / max(num_blocks - 1, 1) for i in range(num_blocks)]


def split_by_stage(values: Sequence[float], depths: Sequence[int]) -> list[list[float]]:
    """Return `values` cut into consecutive lists of lengths `depths`."""
    ends = [sum(depths[:i]) for i in range(len(depths) + 1)]
    return [list(values[start:stop]) for start, stop in pairwise(ends)]


def init_conv_net(model: nn.Module) -> None:
    """Initialise in place as ResNets are: Kaiming normal convolutions (He et al., 2015, eq. 14).

    Their variance is `2 / fan_out`. Norms and linear layers keep PyTorch's default.

    Args:
        model: Module whose convolutions are visited.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def init_transformer(*items: Tensor | nn.Linear | nn.Conv2d) -> None:
    """Initialise in place as DeiT and timm do: truncated normal of deviation 0.02, biases 0.

    As there, the truncation is at -2 and 2, a hundred deviations away: a normal in practice.

    Args:
        *items: Parameters, or linear layers and convolutions with their biases.
    """
    for item in items:
        nn.init.trunc_normal_(item if isinstance(item, Tensor) else item.weight, std=0.02)
        if not isinstance(item, Tensor) and item.bias is not None:
            nn.init.zeros_(item.bias)


def init_with_attention(model: nn.Module) -> None:
    """Initialise in place: convolutions as ResNets have them, attention as transformers.

    Args:
        model: Module whose convolutions and `WindowAttention`s are visited.
    """
    init_conv_net(model)
    for module in model.modules():
        if isinstance(module, WindowAttention):
            projections = (module.query, module.key_value, module.project)
            init_transformer(*projections, module.position_bias)


def check_sizes(**sizes: int) -> None:
    """Refuse any size, given by its argument's name, that is below 1."""
    for name, value in sizes.items():
        check_count(name, value, 1)


def check_side(name: str, side: int, multiple: int) -> int:
    """Return `side / multiple`.

    Args:
        name: What to call `side` in the error.
        side: A height or width in pixels.
        multiple: Size of the pieces it is cut into.

    Raises:
        ValueError: If the pieces do not fit, naming the sizes nearby that do.
    """
    if side % multiple or side < multiple:
        low = multiple * max(side // multiple, 1)
        raise ValueError(
            f"{name} must be a multiple of {multiple}, got {side}; "
            f"pad or resize the images, e.g. to {low} or {low + multiple}."
        )
    return side // multiple


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"`{name}` must be at least 0 and below 1, got {rate}.")
