"""Readers of the binary formats in which image data sets are published.

Each function turns a file into arrays and refuses one that is truncated, corrupt or of another
kind. Nothing is unpickled and no archive is unpacked to disk.

- idx (MNIST, Fashion-MNIST): four magic bytes (0, 0, type, number of dimensions), one big-endian
  uint32 a dimension, then the values, row major; here always `type` 8, unsigned bytes.
- CIFAR binary: fixed records, `label bytes + 3072` pixels, planes red, green, blue, row major.
  One label byte for CIFAR-10; coarse then fine label for CIFAR-100.
"""

import gzip
import math
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_UNSIGNED_BYTE = 8
_CIFAR_SHAPE = (3, 32, 32)


def read_idx(path: Path) -> Bytes:
    """Return the array stored in an idx file of unsigned bytes, gzipped if named `*.gz`.

    Args:
        path: File in idx format, for instance `train-images-idx3-ubyte.gz`.

    Returns:
        Array with the shape written in the header: `(n, h, w)` for images, `(n,)` for labels.

    Raises:
        ValueError: If the file is truncated, corrupt, or no idx file of unsigned bytes.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"`{path}` is no complete gzip file ({error}); fetch it again.") from error
    if len(raw) < 4 or raw[:3] != bytes((0, 0, _UNSIGNED_BYTE)) or raw[3] == 0:
        raise ValueError(
            f"`{path}` must be an idx file of unsigned bytes (first bytes 00 00 08), got "
            f"{raw[:4].hex(' ') or 'nothing'}; fetch it again."
        )
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise ValueError(
            f"`{path}` must hold a header of {header} bytes, got {len(raw)}; fetch it again."
        )
    shape = tuple(int(size) for size in np.frombuffer(raw[4:header], dtype=">u4"))
    expected = header + math.prod(shape)
    if len(raw) != expected:
        raise ValueError(
            f"`{path}` must hold {expected} bytes for its header {shape}, got {len(raw)}; "
            "fetch it again."
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def write_idx(path: Path, array: Bytes) -> None:
    """Write unsigned bytes as a gzipped idx file; equal arrays give equal files.

    Args:
        path: File to write.
        array: Values of any shape with at least one dimension.
    """
    header = bytes((0, 0, _UNSIGNED_BYTE, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0))


def read_cifar(
    path: Path, members: Sequence[str], *, label_bytes: int
) -> tuple[Bytes, NDArray[np.int64]]:
    """Return images `(n, 3, 32, 32)` and labels `(n,)` of CIFAR's binary version.

    Args:
        path: The published `.tar.gz`, or a folder that holds the files.
        members: File names to read, in order, for instance `("data_batch_1.bin", …)`.
        label_bytes: 1 for CIFAR-10; 2 for CIFAR-100, whose last one (the fine label) counts.

    Raises:
        ValueError: If a file is truncated, corrupt or missing.
    """
    contents = _folder_files(path, members) if path.is_dir() else _tar_files(path, members)
    record = label_bytes + math.prod(_CIFAR_SHAPE)
    for name, content in zip(members, contents, strict=True):
        if not content or len(content) % record:
            raise ValueError(
                f"`{name}` in `{path}` must be a positive multiple of {record} bytes (one record), "
                f"got {len(content)}; fetch it again."
            )
    records = np.frombuffer(b"".join(contents), dtype=np.uint8).reshape(-1, record)
    images = records[:, label_bytes:].reshape(-1, *_CIFAR_SHAPE)
    return images, records[:, label_bytes - 1].astype(np.int64)


def _folder_files(folder: Path, members: Sequence[str]) -> list[bytes]:
    """Return the contents of the named files, in the folder or in a folder just below it."""
    contents = []
    for name in members:
        found = sorted(folder.glob(name)) or sorted(folder.glob(f"*/{name}"))
        if not found:
            raise ValueError(
                f"`{folder}` must hold {name} (CIFAR's *binary* version); it does not."
            )
        contents.append(found[0].read_bytes())
    return contents


def _tar_files(path: Path, members: Sequence[str]) -> list[bytes]:
    """Return the contents of the named members of a gzipped tar archive, read in memory."""
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name in members:
                    stream = archive.extractfile(member)
                    found[name] = stream.read() if stream is not None else b""
            while raw.read(1 << 20):  # the checksum is behind the end of the archive
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"`{path}` is no complete .tar.gz ({error}); fetch it again.") from error
    missing = [name for name in members if name not in found]
    if missing:
        raise ValueError(f"`{path}` must hold {', '.join(missing)} (CIFAR's *binary* version).")
    return [found[name] for name in members]
