"""Products through the kernels of a GPU, on one or in Triton's interpreter on a CPU.

The interpreter has to be chosen before Triton is imported, so it has a process of its own:

    TRITON_INTERPRET=1 python -m tests.linalg.kernels

prints the errors of all cases, beside those of PyTorch in float32, and how often each kernel ran.
"""

import copy
import json
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from landscape import HessianOperator, Objective
from landscape.linalg import gpu, layers
from landscape.models import create_model


class Tokens(nn.Module):
    """Layer norms that are short, long or without a shift, of what is not in one piece."""

    def __init__(self):
        super().__init__()
        self.wide = nn.LayerNorm(1100)
        self.bare = nn.LayerNorm(20, bias=False)
        self.head = nn.Linear(20, 3, bias=False)

    def forward(self, x):
        x = self.wide(x.flatten(1)[:, :1100].repeat(3, 1)).view(-1, 55, 20)
        return self.head(self.bare(x.transpose(0, 1)).sin().mean(0)).view(3, -1, 3).sum(0)


def rows():
    """More rows than a product sums in one go, and widths that are no multiples of tiles."""
    return nn.Sequential(
        nn.Flatten(1),
        nn.Unflatten(1, (96, 32)),
        nn.Linear(32, 70, bias=False),
        nn.LayerNorm(70),
        nn.Linear(70, 33),
        nn.GELU(),
        nn.Linear(33, 40, bias=False),
        nn.Tanh(),
        nn.Flatten(1),
        nn.Linear(96 * 40, 3),
    )


def wide():
    """Sums so long that they go in parts."""
    return nn.Sequential(
        nn.Flatten(1), nn.Linear(3072, 600), nn.Tanh(), nn.Linear(600, 40), nn.Linear(40, 3)
    )


def convs():
    """Kernels and maps of many shapes, and convolutions that there is no kernel for."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, stride=4),
        nn.Tanh(),
        nn.Conv2d(64, 70, 3, padding=1, bias=False),
        nn.BatchNorm2d(70),
        nn.ReLU(),
        nn.Conv2d(70, 65, 1),
        nn.Tanh(),
        nn.Conv2d(65, 66, (3, 5), padding=(2, 2), dilation=(2, 1)),
        nn.Tanh(),
        nn.Conv2d(66, 66, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(66, 64, 2, stride=2),
        nn.Tanh(),
        nn.Conv2d(64, 64, (4, 2), padding=(3, 1), dilation=2),
        nn.Tanh(),
        nn.Conv2d(64, 300, 1),
        nn.Tanh(),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(300, 64, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(64, 64, 1),
        nn.AvgPool2d(5),
        nn.Flatten(1),
        nn.Linear(64, 3),
    )


def pixels():
    """A convolution of single pixels, over more of them than it sums in one go."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 8, stride=8),
        nn.Tanh(),
        nn.Conv2d(64, 300, 1),
        nn.Tanh(),
        nn.AvgPool2d(4),
        nn.Flatten(1),
        nn.Linear(300, 3),
    )


class Views(nn.Module):
    """Biases and scales that are views: columns of a table, or one number for all."""

    def __init__(self):
        super().__init__()
        self.table, self.one = nn.Parameter(torch.randn(64, 6)), nn.Parameter(torch.ones(1))
        sizes = (64, 64, 1, 1), (64, 64), (64, 64), (64, 64), (3, 64)
        self.weights = nn.ParameterList(torch.randn(size) / 8 for size in sizes)

    def forward(self, x):
        conv, *linear, head = self.weights
        columns = self.table.unbind(1)
        x = F.pad(F.avg_pool2d(x, 4), (0, 0, 0, 0, 0, 61))
        x = F.conv2d(x, conv, columns[0], padding=(0,))
        x = x.tanh().flatten(2).mT
        x = F.layer_norm(x, (64,), columns[1], columns[2])
        x = F.layer_norm(x, (64,), self.one.expand(64), self.one.expand(64))
        x = F.linear(x, linear[0], columns[3])
        x = F.linear(F.gelu(F.linear(x, linear[1], columns[4])), linear[2], columns[5])
        return F.linear(x.tanh().mean(1), head)


class Experts(nn.Module):
    """Layers of which the second gets no sample."""

    def __init__(self):
        super().__init__()
        norm = nn.Sequential(nn.Flatten(2), nn.LayerNorm(16), nn.Unflatten(2, (4, 4)))
        self.first, self.second = (
            nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), copy.deepcopy(norm)) for _ in range(2)
        )
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        x = F.pad(F.avg_pool2d(x, 8), (0, 0, 0, 0, 0, 61))
        mine = torch.ones(len(x), dtype=torch.bool, device=x.device)
        out = torch.zeros_like(x)
        out[mine], out[~mine] = self.first(x[mine]), self.second(x[~mine])
        return self.head(out.tanh().mean((2, 3)))


class Long(nn.Module):
    """Norms of rows that are too long for a kernel."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(3072 * 3), nn.Linear(3072 * 3, 3)

    def forward(self, x):
        return self.head(self.norm(x.flatten(1).repeat(1, 3)).sin())


def vit(**sizes):
    return create_model("vit_nano", dim=32, depth=2, heads=2, num_classes=3, **sizes)


# name: (model, images, which parameters)
CASES = {
    "vit": (vit, 3, None),
    "vit with windows": (lambda: vit(window=3, pool="gap"), 3, None),
    "a block of a vit": (vit, 3, "blocks.1.*"),
    "rows": (rows, 7, None),
    "wide": (wide, 33, None),
    "tokens": (Tokens, 4, None),
    "convolutions": (convs, 2, None),
    "weights of a convolution": (pixels, 40, "2.weight"),
    "views": (Views, 2, None),
    "experts": (Experts, 4, None),
    "long rows": (Long, 4, None),
}


@contextmanager
def as_on_a_gpu(kernels):
    """With or without kernels, and channels first, as a CPU has them last."""
    before = gpu._runs_kernels, layers._Replacing
    gpu._runs_kernels = lambda device: kernels
    layers._Replacing = lambda channels_last: before[1](channels_last=False)
    try:
        yield
    finally:
        gpu._runs_kernels, layers._Replacing = before


def errors(name, device):
    """Return the relative errors of a product in float32 through the kernels, and without them."""
    build, images, parameters = CASES[name]
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    x, y = torch.randn(images, 3, 32, 32), torch.arange(images) % 3
    objective = Objective(parameters=parameters)

    def product(dtype, kernels=False):
        model.to(device, dtype)
        data = [(x.to(device, dtype), y.to(device))]
        with as_on_a_gpu(kernels):
            operator = HessianOperator(model, data, objective)
            v = torch.randn(operator.dim, generator=torch.Generator().manual_seed(1))
            return operator.matvec(v.to(device, dtype)).double().cpu()

    plain, ours, exact = product(torch.float32), product(torch.float32, True), product(torch.double)
    return [float((found - exact).norm() / exact.norm()) for found in (ours, plain)]


def counting():
    """Count the calls of every kernel from now on."""
    from landscape.linalg.gpu import attention, convolution, matmul, pointwise

    calls = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for module, names in (
        (attention, ("bend", "centre")),
        (convolution, ("convolve", "of_weight")),
        (matmul, ("multiply",)),
        (pointwise, ("bend", "norm_curvature")),
    ):
        for name in names:
            full = f"{module.__name__.rpartition('.')[2]}.{name}"
            setattr(module, name, counted(full, getattr(module, name)))
    return calls


if __name__ == "__main__":
    torch.set_num_threads(1)
    calls = counting()
    found = {name: errors(name, "cpu") for name in CASES}
    print(json.dumps({"errors": found, "calls": calls}))
