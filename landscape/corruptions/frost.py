"""Procedural textures of frost, in place of the photographs that ImageNet-C and CIFAR-C blend in.

A texture is a normal random field whose power falls off as a power of the frequency, one field for
the three channels of a sample. Colour, contrast, exponent and the share of the variance that lies
in the means of crops are those measured on 32×32 crops of the original's five photographs, at the
scale at which each profile cuts them out; a sample takes one of them by chance, as often as there.
So mean, variance and power spectrum are alike, and there are no crystals to be seen.
"""

from typing import Any

import torch
from torch import Tensor

from landscape.corruptions.streams import Streams

# Mean and standard deviation of red, green and blue of each photograph; at scale 1.1 and at scale
# 0.2 the exponent (power ∝ frequency^−exponent) and the variance's share that is one offset a crop.
_PHOTOGRAPHS = torch.tensor(
    [
        [78, 149, 166, 26.9, 16.5, 15.3, 2.1, 0.58, 1.1, 0.35],
        [201, 205, 214, 21.4, 22.1, 22.6, 2.8, 0.40, 0.8, 0.19],
        [201, 205, 214, 21.4, 22.1, 22.6, 2.8, 0.40, 0.8, 0.19],  # the original has it twice
        [138, 153, 165, 28.5, 28.5, 29.9, 2.5, 0.33, 0.4, 0.14],
        [112, 123, 135, 44.4, 43.3, 41.7, 2.5, 0.37, 1.1, 0.16],
        [71, 95, 105, 35.2, 42.7, 47.4, 2.6, 0.45, 1.3, 0.13],  # CIFAR-C leaves it out
    ],
    dtype=torch.float32,
    device="cpu",
)


def frost_texture(h: int, w: int, streams: Streams, *, small: bool) -> Tensor:
    """Return textures `(n, 3, h, w)` in grey levels, 0 to 255.

    Args:
        h: Height.
        w: Width.
        streams: Streams of the samples.
        small: At a fifth of the size, without the last photograph, as for CIFAR-C.
    """
    table = _PHOTOGRAPHS.to(streams.device)
    chosen = table[streams.integers(0, 5 if small else 6)]
    mean, deviation = chosen[:, :3], chosen[:, 3:6]
    exponent, share = chosen[:, 8:].unbind(1) if small else chosen[:, 6:8].unbind(1)
    field = power_law(2 * h, 2 * w, exponent, streams)[:, :h, :w]  # a torus, but not in the crop
    offset = streams.normal()
    share = share.view(-1, 1, 1)
    field = (1 - share).sqrt() * field + share.sqrt() * offset.view(-1, 1, 1)
    texture = mean[..., None, None] + deviation[..., None, None] * field[:, None]
    return texture.clamp_(0, 255)


def power_law(h: int, w: int, exponent: Tensor, streams: Streams) -> Tensor:
    """Return normal random fields on a torus, mean 0, variance 1, power ∝ frequency^−exponent.

    Args:
        h: Height, even.
        w: Width, even.
        exponent: Exponent of each sample `(n,)`.
        streams: Streams of the samples.

    Returns:
        Tensor `(n, h, w)`.
    """
    made: dict[str, Any] = {"dtype": torch.float32, "device": streams.device}
    frequency = torch.hypot(torch.fft.fftfreq(h, **made)[:, None], torch.fft.rfftfreq(w, **made))
    amplitude = (-0.5 * exponent.view(-1, 1, 1) * frequency.log()).exp()
    amplitude[:, 0, 0] = 0
    power = amplitude.square()
    total = 2 * power.sum((1, 2)) - power[:, :, 0].sum(1) - power[:, :, -1].sum(1)
    amplitude /= (total / (h * w)).sqrt().view(-1, 1, 1)
    spectrum = torch.fft.rfft2(streams.normal(h, w))
    torch.view_as_real(spectrum).mul_(amplitude.unsqueeze(-1))
    field: Tensor = torch.fft.irfft2(spectrum, s=(h, w))
    return field
