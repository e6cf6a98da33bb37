"""Labelled images in folders, one folder a class, decoded as they are asked for."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from landscape._checks import check_choice, check_count
from landscape.training.data import check_mean_and_std, normalize

# Those of torchvision's `ImageFolder`.
_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FolderImages:
    """Re-iterable of batches `(x, y)` of the images below `root/CLASS/`.

    Classes are the folders in the order of their names, as in ImageNet's validation set sorted
    into folders. Each image is resized so that its shorter side is `resize`, cropped to its centre
    of `size` x `size` and normalised.

    Attributes:
        classes: Names of the classes.
        mean: Mean of each channel, in units of full scale.
        std: Standard deviation of each channel.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        size: int = 224,
        resize: int | None = None,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        crop_mode: Literal["center", "squash"] = "center",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        batch_size: int = 50,
        max_images: int | None = None,
    ) -> None:
        """List the files.

        Args:
            root: Folder of the class folders.
            size: Side of the crops.
            resize: Shorter side before the crop, at least `size`; 8/7 of it by default (256 for
                224).
            interpolation: How images are resized, as those were that the model was trained with.
            crop_mode: `"center"` keeps their aspect, `"squash"` makes both sides `resize`.
            mean: Mean of each channel that the model was trained with.
            std: Standard deviation of each channel.
            batch_size: Images a batch.
            max_images: Use only so many, spread evenly over all.

        Raises:
            ValueError: If there is no image, a size is below 1, `resize` below `size`,
                `interpolation` or `crop_mode` unknown, or `mean` or `std` are not three finite
                numbers, those of `std` positive.
        """
        for name, value in {"size": size, "batch_size": batch_size}.items():
            check_count(name, value, 1)
        if resize is not None:
            check_count("resize", resize, size)
        check_choice("interpolation", interpolation, ("bicubic", "bilinear"))
        check_choice("crop_mode", crop_mode, ("center", "squash"))
        check_mean_and_std(mean, std, channels=3)
        if not Path(root).is_dir():
            raise ValueError(f"`root` must be a folder, got {str(root)!r}.")
        self._size, self._resize = size, resize or round(size * 8 / 7)
        self._interpolation, self._squash = interpolation, crop_mode == "squash"
        self.mean, self.std, self._batch_size = tuple(mean), tuple(std), batch_size
        folders = sorted(
            f for f in Path(root).iterdir() if f.is_dir() and not f.name.startswith(".")
        )
        self.classes = tuple(folder.name for folder in folders)
        files = [
            (file, label)
            for label, folder in enumerate(folders)
            for file in sorted(
                Path(parent, name)
                for parent, _, names in os.walk(folder, followlinks=True)
                for name in names
            )
            if file.suffix.lower() in _SUFFIXES
        ]
        if not files:
            raise ValueError(
                f"`root` must hold a folder of images for each class, got {str(root)!r} with none."
            )
        if max_images is not None and max_images < len(files):
            check_count("max_images", max_images, 1)
            files = [files[i * len(files) // max_images] for i in range(max_images)]
        self._files = files

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self._files)

    def __len__(self) -> int:
        return -(-len(self._files) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images in one order, whatever the batch size."""
        for start in range(0, len(self._files), self._batch_size):
            part = self._files[start : start + self._batch_size]
            images = torch.stack([self._decode(file) for file, _ in part])
            yield (
                normalize(images, self.mean, self.std),
                torch.tensor([y for _, y in part], device="cpu"),
            )

    def _decode(self, file: Path) -> Tensor:
        """Return one image as bytes `(3, size, size)`."""
        from PIL import Image  # comes with matplotlib

        try:
            with Image.open(file) as opened:
                image: Image.Image = opened
                if opened.mode[0] in "IF":  # over 8 bits, which `convert` would cut off at 255
                    wide = np.asarray(opened).astype(np.float64)
                    if opened.mode == "F" or wide.min() < 0 or wide.max() > 65535:
                        raise ValueError("pixels of 32 bits, whose full scale is unknown")
                    image = Image.fromarray((wide / 257).round().astype(np.uint8))
                image = image.convert("RGB")
        except Exception as error:  # damaged bytes, too many pixels, or bits
            raise ValueError(f"`root` must hold whole images, got {file} ({error}).") from error
        # Sizes and corners are rounded as torchvision does.
        sides = (1, 1) if self._squash else image.size
        width, height = (int(self._resize * side / min(sides)) for side in sides)
        image = image.resize((width, height), Image.Resampling[self._interpolation.upper()])
        left, top = round((width - self._size) / 2), round((height - self._size) / 2)
        image = image.crop((left, top, left + self._size, top + self._size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
