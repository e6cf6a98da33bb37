"""A model whose blocks are known filters, and data for it."""

import torch
from torch import nn

from landscape.blocks import Blocks

NAMES = ("white", "blur", "laplacian", "head")
KERNELS = {
    "white": [[0, 0, 0], [0, 1, 0], [0, 0, 0]],
    "blur": [[1 / 36, 4 / 36, 1 / 36], [4 / 36, 16 / 36, 4 / 36], [1 / 36, 4 / 36, 1 / 36]],
    "laplacian": [[0, 1, 0], [1, -4, 1], [0, 1, 0]],
}


class Filters(nn.Module):
    """`white` is the input itself; `blur` and `laplacian` filter it, each channel alone."""

    def __init__(self, channels=3):
        super().__init__()
        for name, kernel in KERNELS.items():
            conv = nn.Conv2d(
                channels,
                channels,
                3,
                padding=1,
                padding_mode="circular",
                groups=channels,
                bias=False,
            )
            weight = torch.tensor(kernel, dtype=torch.float32).expand(channels, 1, 3, 3)
            conv.weight = nn.Parameter(weight.clone())
            setattr(self, name, conv)
        self.head = nn.Linear(channels, 2)

    def forward(self, pixel_values):
        x = self.white(pixel_values)
        return self.head((self.blur(x) + self.laplacian(x)).square().mean((-2, -1)))


class Cached(nn.Module):
    """Keeps what it makes at the first call, as rotary embeddings do; drops at random."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.cache = None

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.ones(3, 1, 1, dtype=x.dtype) * 2
        return self.drop(self.norm(self.conv(x))).mul(self.cache).mean((-2, -1))


def filters(dtype=torch.float64, names=NAMES, size=(8, 8)):
    """The model and its blocks."""
    model = Filters().to(dtype)
    return model, Blocks(model, list(names), example=torch.zeros(2, 3, *size, dtype=dtype))


def images(sizes=(12,), size=(8, 8), dtype=torch.float64, seed=0):
    """Batches of white noise; the same images however they are cut."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, *size, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(2, (sum(sizes),), generator=generator)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))
