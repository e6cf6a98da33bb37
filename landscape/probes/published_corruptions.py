"""The published CIFAR-10-C, CIFAR-100-C and ImageNet-C, read from a folder that the user has.

Hendrycks & Dietterich (2019) published CIFAR-C as one `.npy` file per corruption, bytes of shape
(5 · 10,000, 32, 32, 3) ordered by severity, with `labels.npy`; and ImageNet-C as JPEG files in
`corruption/severity/wnid/`. Both keep the order of the clean test set (for ImageNet: that of sorted
folders and file names).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from landscape._checks import check_choice
from landscape.corruptions.severities import CORRUPTIONS, SEVERITIES

_IMAGES = (".jpeg", ".jpg", ".png")

Read = Callable[[str, int, slice], np.ndarray]


@dataclass(frozen=True, eq=False)
class PublishedCorruptions:
    """Corrupted images in files; pass it to `corruption_robustness` as `source`.

    Attributes:
        name: `"CIFAR-C"` or `"ImageNet-C"`.
        corruptions: Names of the corruptions found, in the order of the paper.
        severities: Severities found.
        labels: `(n,)`: labels of the samples, int64.
        read: `read(corruption, severity, samples)`, the bytes `(n, h, w, 3)` of a slice of them.
        seed: `None`: nothing is drawn.
    """

    name: str
    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    labels: np.ndarray
    read: Read
    seed: int | None = None

    def check(self, pixels: Tensor) -> None:
        """Refuse clean images that the files cannot belong to.

        Raises:
            ValueError: If they have not three channels.
        """
        if pixels.shape[1] != 3:
            raise ValueError(
                f"`data` must have RGB images like those of `source`, got shape "
                f"{tuple(pixels.shape)}."
            )

    def take(self, name: str, severity: int, start: int, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the corrupted versions of some clean images.

        Args:
            name: Corruption.
            severity: Severity.
            start: Index of the first sample.
            pixels: The clean images, bytes `(n, 3, h, w)`.
            labels: Their labels `(n,)`.

        Returns:
            Bytes `(n, 3, h, w)` on the CPU.

        Raises:
            ValueError: If labels or sizes differ from those of the files, or a file is damaged.
        """
        part = slice(start, start + len(pixels))
        known = self.labels[part]
        given = labels.cpu().numpy()
        if len(known) != len(given) or not np.array_equal(known, given):
            raise ValueError(
                f"`data` must be the clean images of `source` in the order of its files, got other "
                f"labels or more samples from sample {start} on; do not shuffle."
            )
        images = torch.from_numpy(np.array(self.read(name, severity, part))).permute(0, 3, 1, 2)
        if images.shape != pixels.shape:
            raise ValueError(
                f"`data` must have images of the size of `source`, {tuple(images.shape[1:])}, got "
                f"{tuple(pixels.shape[1:])}; prepare the clean images as the published ones were."
            )
        return images

    def finish(self, count: int) -> None:
        """Refuse data with fewer samples than the files; `take` refuses more.

        Raises:
            ValueError: If so.
        """
        if count != len(self.labels):
            raise ValueError(
                f"`data` must hold the {len(self.labels)} samples of `source`, got {count}; pass "
                "`source.first(count)` for a part."
            )

    def first(self, count: int) -> "PublishedCorruptions":
        """Return the first samples of every corruption and severity alone.

        Args:
            count: Number of samples.

        Returns:
            The same files with fewer samples.

        Raises:
            ValueError: If `count` is not between 1 and the number of samples.
        """
        if not 1 <= count <= len(self.labels):
            raise ValueError(f"`count` must be between 1 and {len(self.labels)}, got {count}.")
        return PublishedCorruptions(
            self.name, self.corruptions, self.severities, self.labels[:count], self.read
        )


def load_published_corruptions(path: str | os.PathLike[str]) -> PublishedCorruptions:
    """Open a folder of CIFAR-10-C, CIFAR-100-C or ImageNet-C.

    Nothing is unpickled. The arrays of CIFAR-C stay on disk until a batch is asked for; ImageNet-C
    needs Pillow, and its labels are the places of the class folders in sorted order.

    Args:
        path: The folder with `labels.npy`, or the one with `gaussian_noise/`, … (or with groups of
            such: `noise/gaussian_noise/`, …).

    Returns:
        The files, to pass to `corruption_robustness` as `source`.

    Raises:
        ValueError: If the folder holds neither, or a file has another form.
    """
    path = Path(path)
    if (path / "labels.npy").is_file():
        return _cifar_c(path)
    folders = {
        name: folder
        for name in CORRUPTIONS
        for folder in (path / name, *sorted(path.glob(f"*/{name}")))
        if folder.is_dir()
    }
    if not folders:
        raise ValueError(
            f"`path` must be a folder with `labels.npy` (CIFAR-C) or with folders named after "
            f"corruptions (ImageNet-C), got {str(path)!r}."
        )
    return _imagenet_c(folders)


def _cifar_c(path: Path) -> PublishedCorruptions:
    labels = _array(path / "labels.npy")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"`path` must hold a whole number a sample in labels.npy, got {labels.dtype} "
            f"{labels.shape}; fetch the file again."
        )
    found = {name: path / f"{name}.npy" for name in CORRUPTIONS}
    arrays = {name: _array(file) for name, file in found.items() if file.is_file()}
    if not arrays:
        raise ValueError(f"`path` must hold files like gaussian_noise.npy, got {str(path)!r}.")
    levels = len(SEVERITIES)
    for name, array in arrays.items():
        good = array.ndim == 4 and array.shape[3] == 3 and array.dtype == np.uint8
        if not good or len(array) != len(labels) or not len(array) or len(array) % levels:
            raise ValueError(
                f"`path` must hold bytes (5 n, h, w, 3) and as many labels, got {array.dtype} "
                f"{array.shape} and {len(labels)} labels in {name}.npy; fetch the file again."
            )
    count = len(labels) // levels
    repeated = np.asarray(labels).astype(np.int64).reshape(levels, count)
    if not (repeated == repeated[0]).all():
        raise ValueError("`path` must hold the same labels for every severity; is it CIFAR-C?")

    def read(name: str, severity: int, samples: slice) -> np.ndarray:
        first = SEVERITIES.index(severity) * count
        return arrays[name][first : first + count][samples]

    return PublishedCorruptions("CIFAR-C", tuple(arrays), SEVERITIES, repeated[0], read)


def _array(file: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # damaged bytes raise anything
        raise ValueError(
            f"`path` must hold complete .npy files, got {file.name}: {error}"
        ) from error
    return array


def _imagenet_c(folders: dict[str, Path]) -> PublishedCorruptions:
    first = next(iter(folders.values()))
    severities = tuple(level for level in SEVERITIES if (first / str(level)).is_dir())
    files = _image_files(first / str(severities[0])) if severities else []
    if not files:
        raise ValueError(
            f"`path` must hold images in corruption/severity/class/, got none in {str(first)!r}."
        )
    for name, folder in folders.items():
        for level in severities:
            if _image_files(folder / str(level)) != files:
                raise ValueError(
                    f"`path` must hold the same images for every corruption and severity, but "
                    f"{name}/{level} differs from {first.name}/{severities[0]}; is it complete?"
                )
    classes = sorted({file.parent.name for file in files})
    labels = np.array([classes.index(file.parent.name) for file in files], dtype=np.int64)

    def read(name: str, severity: int, samples: slice) -> np.ndarray:
        check_choice("name", name, tuple(folders))
        folder = folders[name] / str(severity)
        images = [_decoded(folder / file) for file in files[samples]]
        if len(shapes := {image.shape for image in images}) > 1:
            raise ValueError(
                f"`source` must hold images of one size, got {sorted(shapes)} in {folder}; prepare "
                "them as the published ones were."
            )
        return np.stack(images)

    return PublishedCorruptions("ImageNet-C", tuple(folders), severities, labels, read)


def _image_files(folder: Path) -> list[Path]:
    """Return the images of all classes relative to the folder, in order of class and name."""
    found = (file for file in folder.glob("*/*") if file.suffix.lower() in _IMAGES)
    return sorted(file.relative_to(folder) for file in found)


def _decoded(file: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # damaged bytes raise anything
        raise ValueError(
            f"`source` must hold whole images, got {file} ({error}); fetch it again."
        ) from error
