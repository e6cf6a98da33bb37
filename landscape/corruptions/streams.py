"""Random numbers that belong to samples: a stream each, the same however samples are batched.

The numbers are a function of `(key, sample, position)`: a counter times an odd stride plus an
offset, both hashed from the key and the index of the sample, goes through two rounds of shift, xor
and multiply (the integer mixer "lowbias32" of C. Wellons, 2018; keys are mixed as in Steele, Lea &
Flood, 2014, "SplitMix64"). Nothing is drawn in turn, so one tensor operation serves all samples,
and the CPU and a GPU make the same bits. PyTorch's shifts of int32 keep the sign, which loses one
bit of 32 a round and leaves more than the 23 that are used.
"""

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_LOW32 = (1 << 32) - 1


class Streams:
    """Random streams of consecutive samples; each call goes on where the one before ended."""

    def __init__(self, key: Tensor, start: int, count: int) -> None:
        """Open the streams of samples `start … start + count − 1`.

        Args:
            key: Number that all of them share, int64 `()`; the numbers are made on its device.
            start: Index of the first sample.
            count: Number of samples.
        """
        index = torch.arange(start + 1, start + count + 1, device=key.device)
        self._offset = _low32(mix64(key + index * _GOLDEN))
        self._stride = _low32(mix64(mix64(key) + index * _GOLDEN)) | 1
        self._drawn = 0

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._offset)

    @property
    def device(self) -> torch.device:
        """Where the numbers are made."""
        return self._offset.device

    def bits(self, *shape: int) -> Tensor:
        """Return random non-negative int32 `(n, *shape)` below 2³¹."""
        size = math.prod(shape)
        position = torch.arange(
            self._drawn, self._drawn + size, dtype=torch.int32, device=self.device
        )
        self._drawn += size
        x = torch.addcmul(self._offset, position, self._stride)
        shifted = x >> 16
        x ^= shifted
        x *= 0x7FEB352D
        x ^= torch.bitwise_right_shift(x, 15, out=shifted)
        x *= 0x846CA68B - (1 << 32)
        x ^= torch.bitwise_right_shift(x, 16, out=shifted)
        return x.view(-1, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Return float32 `(n, *shape)`, uniform on (0, 1): odd multiples of 2⁻²⁴."""
        return (self.bits(*shape) >> 8).float().add_(0.5).mul_(2.0**-23)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return int64 `(n, *shape)`, uniform on `low … high − 1`; `high − low` is small."""
        return self.uniform(*shape).mul_(high - low).long().add_(low)

    def normal(self, *shape: int) -> Tensor:
        """Return float32 `(n, *shape)`, standard normal: quantiles, from −5.4 to 5.4."""
        # Twice a uniform number minus 1: odd multiples of 2⁻²³.
        centred = (self.bits(*shape) >> 8).float().add_(0.5 - (1 << 22)).mul_(2.0**-22)
        return centred.erfinv_().mul_(math.sqrt(2))


def mix64(x: Tensor) -> Tensor:
    """Return int64 numbers hashed one to one."""
    x = (x ^ _shift(x, 30)) * _MIX[0]
    x = (x ^ _shift(x, 27)) * _MIX[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _low32(x: Tensor) -> Tensor:
    """Return the low half of int64 `(n,)` as int32 `(n, 1)`."""
    return ((x & _LOW32) - (1 << 31)).to(torch.int32).unsqueeze(1)
