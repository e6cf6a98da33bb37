"""Training core: images resident on the device, batched augmentation, and a plain training loop."""

from landscape.training.data import DeviceImages, denormalize, normalize
from landscape.training.datasets import load_images
from landscape.training.fit import fit
from landscape.training.run import FitResult
from landscape.training.schedule import Schedule, WarmupCosine, adamw

__all__ = [
    # data
    "DeviceImages",
    "denormalize",
    "load_images",
    "normalize",
    # training
    "FitResult",
    "Schedule",
    "WarmupCosine",
    "adamw",
    "fit",
]
