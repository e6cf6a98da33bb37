"""The models of Figure 1: their settings, and training what is not trained yet.

Every later figure is measured on these models. Each is trained in a process of its own where there
is no GPU; checkpoints are kept in `runs/` and reused.
"""

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from landscape.models import create_model
from landscape.results import write_atomically
from landscape.training import (
    DeviceImages,
    FitResult,
    WarmupCosine,
    adamw,
    fit,
    load_images,
    recipe,
)

ALTERNET = (
    "AlterNet",
    "alternet18",
    {"depths": (2, 4, 4), "msas": (0, 2, 2), "heads": (1, 2, 4), "head_dim": 16}
    | {"window": 7, "width": 8, "drop_path": 0.1},
)
"""Stages of convolutions that end in MSAs, the size of Figure 1's ResNet: for later figures."""

Work = Callable[["Setting", int, Path, str | None], Any]


@dataclass(frozen=True)
class Setting:
    """Everything that determines the numbers of the figure."""

    dataset: str = "fashion_mnist_mini"
    train_images: int = 6000
    models: tuple[tuple[str, str, dict], ...] = (
        ("ResNet", "resnet20", {"width": 8, "drop_path": 0.1}),
        ("ViT", "vit_nano", {"drop_path": 0.1}),
    )
    epochs: int = 30  # warm-up included
    warmup_epochs: int = 2
    hessian_epochs: tuple[int, ...] = (10, 20, 30)
    batch_size: int = 96
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    surface_points: int = 21
    surface_images: int = 512
    hessian_batches: int = 24  # mini-batches of 16 training images each
    seed: int = 0


LARGE: tuple[tuple[str, str, dict], ...] = (
    ("ResNet", "resnet50", {"drop_path": 0.1}),
    ("ViT", "vit_tiny", {"drop_path": 0.1}),
)
"""The paper's networks."""

LARGE_ALTERNET = ("AlterNet", "alternet50", {"drop_path": 0.1})
"""The same with MSAs at the end of its stages."""

PRESETS = {
    "default": Setting(),
    "quick": Setting(
        train_images=480, epochs=4, warmup_epochs=1, hessian_epochs=(2, 3, 4),
        surface_points=7, surface_images=64, hessian_batches=3,
    ),
    "gpu": Setting(
        dataset="fashion_mnist", train_images=60_000, models=LARGE,
        epochs=8, warmup_epochs=1, hessian_epochs=(3, 5, 8), learning_rate=1.25e-4,
        hessian_batches=24,
    ),
    "paper": Setting(
        dataset="cifar100", train_images=50_000, models=LARGE,
        epochs=305, warmup_epochs=5, hessian_epochs=(105, 205, 305), learning_rate=1.25e-4,
        surface_images=10_000, hessian_batches=312,
    ),
}  # fmt: skip


def work_folder(preset: str, setting: Setting) -> Path:
    """Return the folder of the checkpoints of a preset, emptied if they are of another setting."""
    work = Path("runs") / f"fig1-{preset}-{setting.dataset}"
    stamp, description = work / "setting.json", json.dumps(asdict(setting), indent=1)
    if stamp.exists() and stamp.read_text() != description:
        print(f"{work} holds another setting; computing afresh.")
        old = work.with_name(f"{work.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        work.rename(old)  # all at once: emptying may be interrupted
        shutil.rmtree(old)
    if not stamp.exists():
        write_atomically(stamp, description.encode())
    return work


def for_every_model(function: Work, setting: Setting, work: Path, root: str | None) -> None:
    """Call `function(setting, index, work, root)` for every model, side by side on a CPU."""
    if torch.cuda.is_available():
        for index in range(len(setting.models)):
            function(setting, index, work, root)
        return
    # Small models keep one core busy, not two: one process per model, half the cores each.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // len(setting.models))
    workers = []
    for index in range(len(setting.models)):
        os.environ |= {"TQDM_POSITION": str(index), "OMP_NUM_THREADS": str(threads)}
        workers.append(
            context.Process(target=function, args=(setting, index, work, root), daemon=True)
        )
        workers[-1].start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit("A model failed; its message is above. Finished stages are kept.")


def train(
    setting: Setting, index: int, work: Path, root: str | None = None
) -> tuple[nn.Module, FitResult]:
    """Train one model, or load what is trained, and return it with its checkpoints."""
    name, constructor, sizes = setting.models[index]
    data, test = images(setting, root), images(setting, root, "test")
    channels, size = data.images.shape[1:3]
    if constructor.startswith("vit"):
        sizes = sizes | {"image_size": size}
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        model = create_model(
            constructor, in_channels=channels, num_classes=data.num_classes, **sizes
        ).to(data.images.device)
    history = fit(
        model,
        data,
        optimizer=adamw(model, lr=setting.learning_rate, weight_decay=setting.weight_decay),
        schedule=WarmupCosine(setting.epochs, setting.warmup_epochs),
        epochs=setting.epochs,
        transform=augmentation(data),
        validation=test.with_(batch_size=500),
        folder=work / name,
        checkpoints=("init", "warmup", *setting.hessian_epochs, "last"),
        trajectory=max(1, setting.epochs // 40),
        resume=True,
        cuda_graphs=True,
        seed=setting.seed,
        progress=True,
    )
    load_weights(model, history.checkpoints["last"])
    return model, history


def images(setting: Setting, root: str | None, split: str = "train") -> DeviceImages:
    """Return the training images of a setting, or all of its test images, on the device."""
    data = load_images(setting.dataset, root=root, split=split)
    data = data.to("cuda" if torch.cuda.is_available() else "cpu")
    if split == "test":
        return data
    return data.subset(setting.train_images).with_(batch_size=setting.batch_size, shuffle=True)


def augmentation(data: DeviceImages) -> Any:
    """Return the paper's augmentation for these images."""
    return recipe(data.mean, data.std, data.num_classes)


def load_weights(model: nn.Module, path: str) -> None:
    """Load a state dict of a checkpoint."""
    device = next(model.parameters()).device
    model.load_state_dict(torch.load(path, map_location=device, weights_only=True))


def say(name: str, message: str) -> None:
    """Print a line for one model."""
    print(f"[{name}] {message}", flush=True)
