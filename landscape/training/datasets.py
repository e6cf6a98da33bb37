"""Image data sets by name: an embedded one, verified downloads, or a local folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from landscape._checks import check_choice
from landscape.training.data import DeviceImages
from landscape.training.formats import Bytes, read_cifar, read_idx

Split = Literal["train", "test"]

_EMBEDDED = Path(__file__).parent / "embedded"
_TORONTO = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class _Source:
    """What is known of a data set: published `files`, in reading order, with their checksums."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: str  # words
    base_url: str | None
    files: dict[Split, dict[str, str]]
    members: dict[Split, tuple[str, ...]] = field(default_factory=dict)  # of a CIFAR archive
    label_bytes: int = 0  # of a CIFAR record; 0 marks idx files


_CIFAR10 = {
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
}
_CIFAR100 = {
    "cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
}

_FASHION = _Source(
    mean=(0.2860,),
    std=(0.3530,),
    classes="T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle_boot",
    base_url="https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    files={
        "train": {
            "train-images-idx3-ubyte.gz": (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
            ),
            "train-labels-idx1-ubyte.gz": (
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
            ),
        },
        "test": {
            "t10k-images-idx3-ubyte.gz": (
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
            ),
        },
    },
)

# Mean and standard deviation are those of the whole training set; the subset uses them too.
_SOURCES = {
    "fashion_mnist_mini": replace(_FASHION, base_url=None),
    "fashion_mnist": _FASHION,
    "cifar10": _Source(
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        classes="airplane automobile bird cat deer dog frog horse ship truck",
        base_url=_TORONTO,
        files={"train": _CIFAR10, "test": _CIFAR10},
        members={
            "train": tuple(f"data_batch_{part}.bin" for part in range(1, 6)),
            "test": ("test_batch.bin",),
        },
        label_bytes=1,
    ),
    "cifar100": _Source(
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        classes="""
            apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge
            bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud
            cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl
            hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man
            maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
            pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
            rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
            sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip
            turtle wardrobe whale willow_tree wolf woman worm""",
        base_url=_TORONTO,
        files={"train": _CIFAR100, "test": _CIFAR100},
        members={"train": ("train.bin",), "test": ("test.bin",)},
        label_bytes=2,
    ),
}


def load_images(
    name: str,
    *,
    root: str | PathLike[str] | None = None,
    split: Split = "train",
    device: torch.device | str = "cpu",
    size: int | None = None,
    channels: int | None = None,
    batch_size: int = 128,
    shuffle: bool = False,
    progress: bool = False,
) -> DeviceImages:
    """Return a data set by name, as unsigned bytes on one device.

    `"fashion_mnist_mini"` comes with the package: 6,000 training and 2,000 test images of
    Fashion-MNIST, equally many a class, no network needed. `"fashion_mnist"`, `"cifar10"` and
    `"cifar100"` are downloaded once into the user's cache (pooch, sha256 checked) in their binary
    formats. Nothing is unpickled.

    Args:
        name: `"fashion_mnist_mini"`, `"fashion_mnist"`, `"cifar10"` or `"cifar100"`.
        root: Local folder to read instead of downloading. It holds the published files (for CIFAR
            the `.tar.gz` of the binary version or what it unpacks to). No checksum is applied to
            files of yours, but their structure is checked.
        split: `"train"` or `"test"`.
        device: Where the images shall live.
        size: Pad the images with zeros to this height and width, for instance 32.
        channels: Repeat a single channel to this number, for instance 3.
        batch_size: Samples per batch.
        shuffle: Whether each epoch has an order of its own.
        progress: Whether a download shows a bar.

    Returns:
        `DeviceImages` in file order, with the class names and the channel means and standard
        deviations of the training set.

    Raises:
        ValueError: If the name or split is unknown, or a file is missing, truncated or corrupt.
    """
    check_choice("name", name, tuple(_SOURCES))
    source = _SOURCES[name]
    check_choice("split", split, tuple(source.files))
    if root is not None:
        paths = _local_paths(Path(root), source, split)
    elif source.base_url is None:
        paths = [_EMBEDDED / name / file for file in source.files[split]]
    else:
        paths = [
            _download(source.base_url + file, sha256, name, progress)
            for file, sha256 in source.files[split].items()
        ]
    images, labels = _read(paths, source, split)
    return DeviceImages(
        torch.tensor(images, device="cpu").to(device),
        torch.tensor(labels, device="cpu").to(device),
        mean=source.mean,
        std=source.std,
        classes=tuple(source.classes.split()),
        batch_size=batch_size,
        shuffle=shuffle,
    ).resized(size, channels)


def _local_paths(root: Path, source: _Source, split: Split) -> list[Path]:
    """Return the files of a local folder to read; for CIFAR the archive, or the folder itself."""
    if not root.is_dir():
        raise ValueError(f"`root` must be an existing folder, got {root}.")
    if source.label_bytes:
        archives = [root / file for file in source.files[split] if (root / file).is_file()]
        return archives or [root]
    paths = []
    for file in source.files[split]:
        found = [path for path in (root / file, root / file.removesuffix(".gz")) if path.is_file()]
        if not found:
            raise ValueError(f"`root` must hold {file}, gzipped or not; {root} does not.")
        paths.append(found[0])
    return paths


def _download(url: str, sha256: str, name: str, progress: bool) -> Path:
    """Return the cached copy of a published file, fetched and verified if need be."""
    import pooch

    return Path(
        pooch.retrieve(
            url,
            known_hash=f"sha256:{sha256}",
            fname=url.rsplit("/", 1)[1],
            path=Path(pooch.os_cache("landscape")) / name,
            progressbar=progress,
        )
    )


def _read(paths: Sequence[Path], source: _Source, split: Split) -> tuple[Bytes, NDArray[np.int64]]:
    """Return images `(n, c, h, w)` and labels `(n,)`."""
    if source.label_bytes:
        return read_cifar(paths[0], source.members[split], label_bytes=source.label_bytes)
    images, labels = (read_idx(path) for path in paths)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"`{paths[0]}` and `{paths[1]}` must hold as many images as labels, got shapes "
            f"{images.shape} and {labels.shape}."
        )
    return images[:, None], labels.astype(np.int64)
