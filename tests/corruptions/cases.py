"""Images that the tests of corruptions share."""

import numpy as np
import torch

from landscape.corruptions.streams import Streams


def pictures(n=4, h=32, w=32, channels=3, seed=0):
    """Bytes with the power spectrum of photographs, about 1/f², and correlated channels."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w))
    amplitude = 1 / (frequency + 0.5 / max(h, w))
    white = torch.randn(n, channels, h, w, generator=generator)
    field = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(h, w))
    field = field / field.std((2, 3), keepdim=True)
    field = 0.9 * field[:, :1] + 0.45 * field
    return (55 * field + 120).clamp(0, 255).to(torch.uint8)


def streams(n, key=5):
    """Fresh streams; the same ones at every call."""
    return Streams(torch.tensor(key), 0, n)


def grey_levels(images):
    """Float images as the bytes that `corrupt` makes of them, int64."""
    return (images.clamp(0, 255) + 1e-4).floor().long()


def last(image):
    """An image (c, h, w) as NumPy's (h, w, c)."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
