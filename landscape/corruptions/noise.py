"""Noise: Gaussian, shot (Poisson) and impulse (salt and pepper), independent in every channel.

Kernels take float images `(n, c, h, w)` in units of grey levels, 0 to 255, the arguments of
`severities.py` and the `Streams` of the samples, and return images in the same units; what lies
outside 0 … 255 is cut off afterwards.
"""

import functools
import math

import torch
from torch import Tensor

from landscape.corruptions.streams import Streams

_FRACTION_BITS = 20  # of a random 31-bit number; the others choose the column of the alias table


def gaussian_noise(x: Tensor, scale: float, streams: Streams) -> Tensor:
    """Add normal noise with a standard deviation of `scale` of full scale."""
    return streams.normal(*x.shape[1:]).mul_(255 * scale).add_(x)


def shot_noise(x: Tensor, photons: float, streams: Streams) -> Tensor:
    """Return N / photons of full scale, N ~ Poisson(photons · x), cut off at full scale."""
    return shot_values(poisson(x, photons, streams), photons)


def shot_values(counts: Tensor, photons: float) -> Tensor:
    """Return the grey levels of photon counts, rounded down in float64 as in the original."""
    most = torch.arange(math.ceil(photons) + 1, dtype=torch.float64, device="cpu")
    table = ((most / photons).clamp(max=1) * 255).floor().float().to(counts.device)
    return _looked_up(table, counts.clamp(max=len(table) - 1))


def impulse_noise(x: Tensor, share: float, streams: Streams) -> Tensor:
    """Replace a share of the values by 0 or 255, equally often."""
    chance = streams.uniform(*x.shape[1:])
    # 0 and 1 by clamping: an order of magnitude faster on a CPU than by masks.
    kept, not_black = ((chance - edge).mul_(1e12).clamp_(0, 1) for edge in (share, share / 2))
    return (x - 255).mul_(kept).add_(not_black, alpha=255)


def poisson(x: Tensor, photons: float, streams: Streams) -> Tensor:
    """Return Poisson numbers with means `photons · x / 255`, int32 shaped like `x`.

    `x` holds whole grey levels, so one table a level serves all: the alias method (Walker, 1977)
    takes one random number and two look-ups a value.
    """
    lowest, threshold, alias = (t.to(x.device) for t in alias_tables(float(photons)))
    columns = threshold.shape[1]
    bits = streams.bits(*x.shape[1:])
    column = (bits >> _FRACTION_BITS) & (columns - 1)
    level = x.int()
    index = level * columns + column
    own = ((bits & ((1 << _FRACTION_BITS) - 1)) - _looked_up(threshold, index)) >> 31  # all bits
    other = _looked_up(alias, index)
    return (other ^ ((other ^ column) & own)).add_(_looked_up(lowest, level))


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """Return the entries of a table at flat indices, shaped like these."""
    return table.flatten().index_select(0, index.flatten()).view_as(index)


@functools.lru_cache(maxsize=16)
def alias_tables(photons: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the alias tables of Poisson(photons · level / 255), one row for each of 256 levels.

    Args:
        photons: Mean count at full scale.

    Returns:
        Smallest count `(256,)`, int32; threshold of each column `(256, k)`, int32 in units of
        2⁻²⁰; and the column that stands in for it `(256, k)`, int32. The k counts from the
        smallest on miss less than 1e-12 of the probability.
    """
    columns = 1 << math.ceil(math.log2(16 * math.sqrt(photons) + 16))
    mean = photons * torch.arange(256, dtype=torch.float64, device="cpu")[:, None] / 255
    lowest = (mean.floor() - columns // 2).clamp(min=0)
    count = lowest + torch.arange(columns, dtype=torch.float64, device="cpu")
    rest = (torch.xlogy(count, mean) - mean - torch.lgamma(count + 1)).exp()
    rest *= columns / rest.sum(1, keepdim=True)
    threshold = torch.ones_like(rest)
    alias = torch.arange(columns, device="cpu").expand_as(rest).clone()
    # What a column lacks is taken from the fullest one; a column that is done holds exactly 1.
    for _ in range(columns):
        least, poor = rest.min(1, keepdim=True)
        rich = rest.argmax(1, keepdim=True)
        lacking = (1 - least).clamp(min=0)
        open_ = lacking > 0
        threshold.scatter_(1, poor, torch.where(open_, least, threshold.gather(1, poor)))
        alias.scatter_(1, poor, torch.where(open_, rich, alias.gather(1, poor)))
        rest.scatter_(1, poor, torch.where(open_, 1.0, least))
        rest.scatter_add_(1, rich, -lacking)
    scaled = (threshold * (1 << _FRACTION_BITS)).round()
    return lowest.squeeze(1).int(), scaled.int(), alias.int()
