"""What the training core gains: images per second of the data path, and models trained at once.

Data path: the paper's augmentation batched on resident bytes against a `DataLoader` over PIL, as in
`benchmarks/augmentation.py`. Ensemble: `fit_ensemble` with `method="vmap"` against `method="loop"`,
for K models, two batch sizes, a small ViT and a small ResNet; an epoch of few steps after one to
warm up, in turn A B A B …, medians, float32. A ratio above 1 says that `vmap` is faster. On a CPU
this is the time that the process computed, which other processes disturb little; with one thread
and an idle machine it is the wall time. CUDA devices are measured, by wall time, where there is
one.

    python benchmarks/training.py [--rounds 2]
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import augmentation
import machine
import torch
from torch import nn
from torch.utils.data import DataLoader

from landscape.models import create_model
from landscape.training import (
    Compose,
    DeviceImages,
    HorizontalFlip,
    RandAugment,
    RandomCrop,
    load_images,
)
from landscape.training.ensemble import fit_ensemble

OUTPUT = Path(__file__).parent / "results" / "training.json"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT, dim 24, depth 3": ("vit_nano", {"dim": 24, "depth": 3, "patch_size": 8}),
    "ViT, dim 48, depth 4": ("vit_nano", {"drop_path": 0.1}),
    "ResNet-20, width 8": ("resnet20", {"width": 8, "drop_path": 0.1}),
}
COUNTS = (1, 4, 8, 16)
BATCH_SIZES = (8, 32)
MEMBER_STEPS = 32  # of all members together in an epoch, at least one each


def data_path(data: DeviceImages, rounds: int) -> dict[str, Any]:
    """Return images per second of the batched and of the PIL pipeline, one pass each in turn."""
    augment = Compose([RandomCrop(4), HorizontalFlip(), RandAugment(fill=augmentation.FILL)])
    images = augmentation.PILImages(data, augmentation.pil_augment)
    loader = DataLoader(images, data.batch_size, shuffle=True)
    a, b = augmentation.measure(data.with_(augment=augment), loader, rounds)
    return {
        "batched_images_per_second": round(data.num_samples / median(a)),
        "pil_images_per_second": round(data.num_samples / median(b)),
        "ratio": round(median(b) / median(a), 2),
        "ratio_of_each_round": [round(late / early, 2) for early, late in zip(a, b, strict=True)],
    }


def seconds(name: str, sizes: dict[str, Any], data: list[Any], count: int, method: Any) -> float:
    """Return what a step of `count` models takes, all at once or one after another."""
    device = data[0][0].device
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    models: list[nn.Module] = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(create_model(name, **sizes).to(device))
    marks: list[float] = []  # the history is on the host by then: the device has finished
    mark = [lambda model, epoch: marks.append(clock())]
    fit_ensemble(models, data, epochs=2, method=method, callbacks=[*[[]] * (count - 1), mark])
    return (marks[2] - marks[1]) / len(data)


def compare(
    name: str, sizes: dict[str, Any], batches: list[Any], count: int, rounds: int
) -> dict[str, Any]:
    """Return milliseconds a step of K models by both methods, taken in turn, and their ratio."""
    in_turn, at_once = [], []
    for _ in range(rounds):
        in_turn.append(seconds(name, sizes, batches, count, "loop"))
        at_once.append(seconds(name, sizes, batches, count, "vmap"))
    return {
        "members": count,
        "loop_ms": round(1e3 * median(in_turn), 2),
        "vmap_ms": round(1e3 * median(at_once), 2),
        "ratio": round(median(in_turn) / median(at_once), 2),
        "ratio_of_each_round": [
            round(slow / fast, 2) for slow, fast in zip(in_turn, at_once, strict=True)
        ],
    }


def ensembles(data: DeviceImages, device: str, rounds: int) -> dict[str, Any]:
    """Return the comparison for every model and batch size on a device, printing it."""
    rows: dict[str, Any] = {}
    for title, (name, sizes) in MODELS.items():
        for size in BATCH_SIZES:
            part = data.with_(batch_size=size).subset(MEMBER_STEPS * size).to(device)
            batches = list(part)
            row = [
                compare(name, sizes, batches[: max(1, MEMBER_STEPS // count)], count, rounds)
                for count in COUNTS
            ]
            rows[f"{title}, batch {size}"] = row
            for entry in row:
                print(
                    f"{title:22s} batch {size:3d}  K = {entry['members']:2d}  "
                    f"loop {entry['loop_ms']:9.1f} ms  vmap {entry['vmap_ms']:9.1f} ms  "
                    f"× {entry['ratio']:.2f}  {entry['ratio_of_each_round']}"
                )
    return rows


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    random.seed(0)
    result: dict[str, Any] = machine.describe(("torch", "numpy", "pillow"))
    data = load_images("fashion_mnist_mini", size=32, channels=3, batch_size=128)
    data = data.subset(arguments.images).with_(shuffle=True)
    result["data_path"] = row = data_path(data, 2 * arguments.rounds)
    print(
        f"data path: batched {row['batched_images_per_second']:,d} images/s, PIL "
        f"{row['pil_images_per_second']:,d} images/s, × {row['ratio']}"
    )
    result["ensemble"] = {"cpu": ensembles(data, "cpu", arguments.rounds), "cuda": "not measured"}
    if torch.cuda.is_available():
        result["cuda_device"] = torch.cuda.get_device_name()
        result["ensemble"]["cuda"] = ensembles(data, "cuda", arguments.rounds)
    result["load_at_end"] = round(os.getloadavg()[0], 2)
    machine.write(arguments.output, result)


if __name__ == "__main__":
    main()
