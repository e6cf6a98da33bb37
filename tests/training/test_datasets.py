"""`load_images`: the embedded set, the true binary formats, and files that must be refused."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from landscape.training import datasets, load_images
from landscape.training.formats import read_idx, write_idx

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 28, 28), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 7, dtype=np.uint8)


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder, images=IMAGES, labels=LABELS, *, zipped=True):
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        raw = idx_bytes(array)
        path = folder / f"train-{name}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(raw) if zipped else raw)


def cifar_records(count, label_bytes, highest):
    labels = RNG.integers(0, highest, (count, label_bytes), dtype=np.uint8)
    pixels = RNG.integers(0, 256, (count, 3072), dtype=np.uint8)
    return labels, pixels, np.concatenate([labels, pixels], axis=1).tobytes()


def write_cifar10(folder, count=3):
    parts = [cifar_records(count, 1, 10) for _ in range(5)]
    for index, (_, _, raw) in enumerate(parts, start=1):
        (folder / f"data_batch_{index}.bin").write_bytes(raw)
    return [np.concatenate([part[field] for part in parts]) for field in (0, 1)]


def test_embedded_set_is_stratified_fashion_mnist():
    train, test = (load_images("fashion_mnist_mini", split=split) for split in ("train", "test"))
    assert train.images.shape == (6000, 1, 28, 28)
    assert test.images.shape == (2000, 1, 28, 28)
    assert torch.bincount(train.labels).tolist() == [600] * 10
    assert torch.bincount(test.labels).tolist() == [200] * 10
    assert train.classes[9] == "Ankle_boot"
    # the statistics of the 60,000 images hold for a fair draw of 6,000
    pixels = train.images.double() / 255
    assert abs(pixels.mean() - train.mean[0]) < 0.005
    assert abs(pixels.std() - train.std[0]) < 0.005
    # the drawn samples come in no class order
    assert len(train.labels[:100].unique()) == 10


def test_embedded_set_padded_and_repeated_and_its_licence_is_there():
    data = load_images("fashion_mnist_mini", split="test", size=32, channels=3, batch_size=64)
    x, y = next(iter(data))
    assert x.shape == (64, 3, 32, 32)
    assert torch.equal(
        data.images[:, 1, 2:30, 2:30], load_images("fashion_mnist_mini", split="test").images[:, 0]
    )
    assert len(data.mean) == 3
    licence = Path(datasets.__file__).parent / "embedded/fashion_mnist_mini/LICENSE"
    assert "Zalando SE" in licence.read_text()


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_from_a_local_folder(tmp_path, zipped):
    write_fashion(tmp_path, zipped=zipped)
    data = load_images("fashion_mnist", root=tmp_path)
    assert np.array_equal(data.images[:, 0].numpy(), IMAGES)
    assert np.array_equal(data.labels.numpy(), LABELS)


def test_cifar10_from_a_local_folder_and_a_nested_one(tmp_path):
    nested = tmp_path / "cifar-10-batches-bin"
    nested.mkdir()
    labels, pixels = write_cifar10(nested)
    for root in (nested, tmp_path):
        data = load_images("cifar10", root=root)
        assert np.array_equal(data.labels.numpy(), labels[:, 0])
        # planes red, green, blue, each row by row
        assert np.array_equal(data.images.numpy(), pixels.reshape(15, 3, 32, 32))


def test_cifar100_from_the_archive_takes_the_fine_label(tmp_path):
    labels, pixels, raw = cifar_records(4, 2, 100)
    with tarfile.open(tmp_path / "cifar-100-binary.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("cifar-100-binary/train.bin")
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
    data = load_images("cifar100", root=tmp_path)
    assert np.array_equal(data.labels.numpy(), labels[:, 1])
    assert np.array_equal(data.images.numpy(), pixels.reshape(4, 3, 32, 32))
    assert data.num_classes == 100
    assert (data.classes[0], data.classes[99]) == ("apple", "worm")
    assert len(set(data.classes)) == 100
    with pytest.raises(ValueError, match="must hold test.bin"):
        load_images("cifar100", root=tmp_path, split="test")


def test_cut_gzip_is_refused(tmp_path):
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no complete gzip file"):
        load_images("fashion_mnist", root=tmp_path)


def test_flipped_byte_in_gzip_is_refused(tmp_path):
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="no complete gzip file"):
        load_images("fashion_mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (idx_bytes(IMAGES)[:-1], r"must hold 5504 bytes for its header \(7, 28, 28\), got 5503"),
        (idx_bytes(IMAGES) + b"\0", "got 5505"),
        (idx_bytes(IMAGES)[:9], "must hold"),
        (b"", "idx file of unsigned bytes .* got nothing"),
        (b"<html>404</html>", "got 3c 68 74 6d"),
        (struct.pack(">HBBI", 0, 13, 1, 1) + b"\0\0\0\0", "got 00 00 0d 01"),
    ],
    ids=["cut", "long", "header", "empty", "html", "float"],
)
def test_wrong_idx_file_is_refused(tmp_path, raw, match):
    write_fashion(tmp_path, zipped=False)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(raw)
    with pytest.raises(ValueError, match=match):
        load_images("fashion_mnist", root=tmp_path)


@pytest.mark.parametrize("shape", [(3,), (2, 4, 5), (0, 3)], ids=str)
def test_what_is_written_as_idx_is_read_again(tmp_path, shape):
    array = RNG.integers(0, 256, shape, dtype=np.uint8).T
    write_idx(tmp_path / "array.gz", array)
    np.testing.assert_array_equal(read_idx(tmp_path / "array.gz"), array, strict=True)


def test_images_and_labels_of_different_number_are_refused(tmp_path):
    write_fashion(tmp_path, labels=LABELS[:-1])
    with pytest.raises(ValueError, match="as many images as labels"):
        load_images("fashion_mnist", root=tmp_path)


def test_label_out_of_range_is_refused(tmp_path):
    write_fashion(tmp_path, labels=np.full(7, 10, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"`labels` must lie in \[0, 9\]"):
        load_images("fashion_mnist", root=tmp_path)


def test_cut_cifar_file_is_refused(tmp_path):
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="`data_batch_4.bin` .* multiple of 3073 bytes"):
        load_images("cifar10", root=tmp_path)


def test_shifted_cifar_records_are_refused_by_their_labels(tmp_path):
    write_cifar10(tmp_path, count=50)
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(b"\xff" * 5 + path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="`labels` must lie in"):
        load_images("cifar10", root=tmp_path)


def test_cut_or_changed_cifar_archive_is_refused(tmp_path):
    raw = cifar_records(20, 2, 100)[2]
    path = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("cifar-100-binary/train.bin")
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
    good = path.read_bytes()
    changed = good[:-8] + bytes([good[-8] ^ 1]) + good[-7:]  # the checksum begins there
    for damaged in (good[: len(raw) // 2], changed):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no complete .tar.gz"):
            load_images("cifar100", root=tmp_path)


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="`name` must be one of 'fashion_mnist_mini', .* got 'mnist'"
    ):
        load_images("mnist")
    with pytest.raises(ValueError, match="`split` must be one of 'train', 'test', got 'val'"):
        load_images("fashion_mnist_mini", split="val")
    with pytest.raises(ValueError, match="`root` must be an existing folder"):
        load_images("cifar10", root=tmp_path / "absent")
    with pytest.raises(ValueError, match="must hold train-images-idx3-ubyte.gz"):
        load_images("fashion_mnist", root=tmp_path)
    with pytest.raises(ValueError, match="must hold data_batch_1.bin"):
        load_images("cifar10", root=tmp_path)


def test_download_asks_for_the_published_files_with_their_checksums(tmp_path, monkeypatch):
    write_fashion(tmp_path)
    asked = []

    def retrieve(url, known_hash, fname, path, progressbar):
        asked.append((url, known_hash))
        return str(tmp_path / fname)

    monkeypatch.setattr("pooch.retrieve", retrieve)
    data = load_images("fashion_mnist")
    assert np.array_equal(data.labels.numpy(), LABELS)
    assert [url.rsplit("/", 1)[1] for url, _ in asked] == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
    ]
    assert all(url.startswith("https://") for url, _ in asked)
    assert all(len(known_hash) == len("sha256:") + 64 for _, known_hash in asked)


def test_downloaded_file_with_another_checksum_is_refused(tmp_path, monkeypatch):
    cache = tmp_path / "cifar10"
    cache.mkdir()
    (cache / "cifar-10-binary.tar.gz").write_bytes(b"not the archive")
    served = tmp_path / "served.tar.gz"
    served.write_bytes(b"not the archive either")
    monkeypatch.setattr("pooch.os_cache", lambda _: tmp_path)

    def copy_instead(url, output_file, pooch, **_):
        Path(output_file).write_bytes(served.read_bytes())

    monkeypatch.setattr("pooch.core.choose_downloader", lambda *_, **__: copy_instead)
    with pytest.raises(ValueError, match="hash"):
        load_images("cifar10")
