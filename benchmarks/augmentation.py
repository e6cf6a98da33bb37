"""How many images per second: batched augmentation against a per-sample PIL pipeline.

Both do the paper's chain on 32×32×3 images, padded crop, flip, RandAugment (m9, n2, mstd1.0,
bilinear), normalisation, and yield float32 batches of 128: `DeviceImages` with tensor operations
on whole batches, and a PyTorch `DataLoader` over a data set of PIL transforms. The PIL chain is
written here as lean as it can be; where torchvision and timm are installed, theirs, which the
paper's code uses, is measured as well (bilinear, too). One thread, no worker processes. Timed in
turn A B A B …, medians.

    python benchmarks/augmentation.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import machine
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from landscape.training import (
    Compose,
    DeviceImages,
    HorizontalFlip,
    RandAugment,
    RandomCrop,
    load_images,
)

OUTPUT = Path(__file__).parent / "results" / "augmentation.json"
BATCH_SIZE = 128
FILL = (73, 73, 73)


def affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Return the image seen through an affine map of its coordinates."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL
    )


def solarize_add(image: Image.Image, add: int) -> Image.Image:
    """Return the image with `add` added to the values under 128."""
    table = [min(255, value + add) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def signed(value: float) -> float:
    """Return the value with a random sign."""
    return -value if random.random() > 0.5 else value


def rotate(image: Image.Image, level: float) -> Image.Image:
    """Return the image rotated by up to 30 degrees."""
    return image.rotate(signed(30 * level), Image.Resampling.BILINEAR, fillcolor=FILL)


PIL_OPS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, level: ImageOps.autocontrast(image),
    lambda image, level: ImageOps.equalize(image),
    lambda image, level: ImageOps.invert(image),
    rotate,
    lambda image, level: ImageOps.posterize(image, int(4 * level)),
    lambda image, level: ImageOps.solarize(image, min(256, int(256 * level))),
    lambda image, level: solarize_add(image, int(110 * level)),
    lambda image, level: ImageEnhance.Color(image).enhance(1.8 * level + 0.1),
    lambda image, level: ImageEnhance.Contrast(image).enhance(1.8 * level + 0.1),
    lambda image, level: ImageEnhance.Brightness(image).enhance(1.8 * level + 0.1),
    lambda image, level: ImageEnhance.Sharpness(image).enhance(1.8 * level + 0.1),
    lambda image, level: affine(image, (1, signed(0.3 * level), 0, 0, 1, 0)),
    lambda image, level: affine(image, (1, 0, 0, signed(0.3 * level), 1, 0)),
    lambda image, level: affine(image, (1, 0, signed(0.45 * level) * image.width, 0, 1, 0)),
    lambda image, level: affine(image, (1, 0, 0, 0, 1, signed(0.45 * level) * image.height)),
)


def pil_augment(image: Image.Image) -> Image.Image:
    """Return a cropped, flipped and RandAugmented image."""
    padded = ImageOps.expand(image, border=4)
    left, top = random.randrange(9), random.randrange(9)
    image = padded.crop((left, top, left + image.width, top + image.height))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for op in random.choices(PIL_OPS, k=2):
        if random.random() < 0.5:
            level = min(max(random.gauss(9, 1), 0), 10) / 10
            image = op(image, level)
    return image


class PILImages(Dataset[tuple[Tensor, int]]):
    """Images as rows of bytes, augmented one at a time."""

    def __init__(self, data: DeviceImages, augment: Callable[[Image.Image], Image.Image]) -> None:
        """Keep the images in PIL's memory order."""
        self.images = data.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.labels.tolist()
        self.augment = augment
        self.mean = torch.tensor(data.mean).view(-1, 1, 1)
        self.std = torch.tensor(data.std).view(-1, 1, 1)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one augmented, normalised image and its label."""
        image = self.augment(Image.fromarray(self.images[index]))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        return x.sub_(self.mean).div_(self.std), self.labels[index]


def timm_augment() -> Callable[[Image.Image], Image.Image] | None:
    """Return the same chain by torchvision and timm, or `None` where they are not installed."""
    try:
        from timm.data.auto_augment import rand_augment_transform
        from torchvision import transforms
    except ImportError:
        return None
    settings = {"img_mean": FILL, "interpolation": Image.Resampling.BILINEAR}
    chain: Callable[[Image.Image], Image.Image] = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            rand_augment_transform("rand-m9-n2-mstd1.0", settings),
        ]
    )
    return chain


def seconds(batches: Any) -> float:
    """Return how long one pass over the batches takes."""
    started = time.perf_counter()
    for x, _ in batches:
        assert x.dtype == torch.float32
    return time.perf_counter() - started


def measure(a: Any, b: Any, rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each pass of A and of B, taken in turn after one warm-up each."""
    seconds(a), seconds(b)
    pairs = [(seconds(a), seconds(b)) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def main() -> None:
    """Measure both chains, with and without RandAugment; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    data = load_images("fashion_mnist_mini", size=32, channels=3, batch_size=BATCH_SIZE)
    where = machine.describe(("torch", "pillow", "numpy"))
    data = data.subset(arguments.images).with_(shuffle=True)
    batched = Compose([RandomCrop(4), HorizontalFlip(), RandAugment(fill=FILL)])
    chains = {
        "normalise only": (None, lambda image: image),
        "paper's chain": (batched, pil_augment),
        "paper's chain, timm": (batched, timm_augment()),
    }
    rows = {}
    for name, (augment, single) in chains.items():
        if single is None:
            continue
        loader = DataLoader(PILImages(data, single), BATCH_SIZE, shuffle=True)
        a, b = measure(data.with_(augment=augment), loader, arguments.rounds)
        rows[name] = {
            "batched_images_per_second": round(data.num_samples / median(a)),
            "pil_images_per_second": round(data.num_samples / median(b)),
            "ratio": round(median(b) / median(a), 1),
            "ratio_of_each_round": [
                round(late / early, 1) for early, late in zip(a, b, strict=True)
            ],
        }
    print(f"{'chain':20s} {'batched, img/s':>15s} {'PIL, img/s':>12s} {'ratio':>7s}  each round")
    for name, row in rows.items():
        print(
            f"{name:20s} {row['batched_images_per_second']:15,d} "
            f"{row['pil_images_per_second']:12,d} {row['ratio']:7.1f}  {row['ratio_of_each_round']}"
        )
    result = {"images": data.num_samples, "batch_size": BATCH_SIZE, **where, "chains": rows}
    machine.write(arguments.output, result)


if __name__ == "__main__":
    main()
