"""Training core: images resident on the device, batched augmentation, and a plain training loop.

    data = load_images("fashion_mnist_mini", size=32, channels=3, shuffle=True)
    transform = recipe(data.mean, data.std, data.num_classes)
    result = fit(model, data, epochs=20, transform=transform, folder="runs/vit")

The same `transform` makes the objective that was optimised, for every probe of the result:
`Objective(weight_decay=0.05, transform=transform)`.
"""

from landscape.training.augment import (
    Compose,
    Denormalize,
    HorizontalFlip,
    Normalize,
    RandomCrop,
    RandomErasing,
)
from landscape.training.build_up import build_up
from landscape.training.build_up_table import BuildUp
from landscape.training.data import DeviceImages, denormalize, normalize
from landscape.training.datasets import load_images
from landscape.training.ensemble import EnsembleResult, fit_ensemble
from landscape.training.fit import fit
from landscape.training.folder import FolderImages
from landscape.training.mixing import CutMix, LabelSmoothing, Mixup, OneOf, recipe
from landscape.training.randaugment import RandAugment
from landscape.training.run import FitResult
from landscape.training.schedule import Schedule, WarmupCosine, adamw
from landscape.training.watch import Watch
from landscape.training.watch_adapters import LightningWatch, TrainerWatch
from landscape.training.watch_history import WatchHistory

__all__ = [
    # data
    "DeviceImages",
    "FolderImages",
    "denormalize",
    "load_images",
    "normalize",
    # transforms of a batch
    "Compose",
    "CutMix",
    "Denormalize",
    "HorizontalFlip",
    "LabelSmoothing",
    "Mixup",
    "Normalize",
    "OneOf",
    "RandAugment",
    "RandomCrop",
    "RandomErasing",
    "recipe",
    # training
    "EnsembleResult",
    "FitResult",
    "Schedule",
    "WarmupCosine",
    "adamw",
    "fit",
    "fit_ensemble",
    # the build-up of an AlterNet
    "BuildUp",
    "build_up",
    # probes meanwhile
    "LightningWatch",
    "TrainerWatch",
    "Watch",
    "WatchHistory",
]
