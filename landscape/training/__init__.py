"""Training core: images resident on the device, batched augmentation, and a plain training loop."""

from landscape.training.data import DeviceImages, Transform, denormalize, normalize
from landscape.training.datasets import load_images

__all__ = [
    # data
    "DeviceImages",
    "Transform",
    "denormalize",
    "load_images",
    "normalize",
]
