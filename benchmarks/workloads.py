"""Trained models and fixed batches that the benchmarks share.

Weights after 200 training steps on Fashion-MNIST (padded to 32 x 32, repeated to 3 channels), from
a fixed seed; they are kept in `benchmarks/.cache`, as are reference results.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape.models import create_model
from landscape.training import DeviceImages, load_images

Batch = tuple[Tensor, Tensor]

CACHE = Path(__file__).parent / ".cache"


def trained(name: str, *, steps: int, **sizes: int) -> nn.Module:
    """Return a model in evaluation mode after `steps` steps of AdamW, batch 64, rate 1e-3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(name, **sizes)
    described = "-".join(f"{k}{v}" for k, v in sizes.items())
    path = CACHE / f"{name}-{described}-{steps}-torch{torch.__version__}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    images = _images(64)
    epochs = itertools.chain.from_iterable(images.batches(epoch) for epoch in itertools.count())
    train(model, epochs, steps)
    CACHE.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def train(model: nn.Module, batches: Iterable[Batch], steps: int) -> None:
    """Take some steps of AdamW at rate 1e-3, and leave the model in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for x, y in itertools.islice(batches, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


def batches(count: int, size: int) -> list[Batch]:
    """Return `count` batches of `size` training images."""
    return list(itertools.islice(_images(size).batches(epoch=1000), count))


def cached(
    kind: str, model: nn.Module, data: list[Batch], compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """Return `compute()`, kept on disk for these weights and data."""
    digest = hashlib.sha256(kind.encode())
    for tensor in itertools.chain(model.state_dict().values(), *data):
        digest.update(tensor.numpy().tobytes())
    path = CACHE / f"{kind}-{digest.hexdigest()[:16]}.npy"
    if not path.exists():
        values = compute()
        CACHE.mkdir(exist_ok=True)
        np.save(path, values)
    kept: np.ndarray = np.load(path)
    return kept


def _images(size: int) -> DeviceImages:
    return load_images("fashion_mnist_mini", size=32, channels=3, batch_size=size, shuffle=True)
