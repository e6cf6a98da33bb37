"""A file of finished points, so that a killed computation goes on where it stopped.

The first line says what the points belong to; each further line is one point behind its checksum,
on the disk before the next one is computed. A line that was cut off or damaged, and whatever
follows it, is dropped and computed again.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from landscape._checks import check_type
from landscape._digest import bytes_of
from landscape.objective import FrozenObjective
from landscape.results import write_atomically

_FORMAT = "landscape points 1"


class PointRecord:
    """Finished points by index, kept in a file if there is one.

    Attributes:
        done: Index to the values of that point.
    """

    def __init__(
        self, path: Path | None, header: Mapping[str, Any], done: dict[int, list[float]]
    ) -> None:
        """Start with the points that are done.

        Args:
            path: The file, made with the first point; `None` keeps them in memory only.
            header: First line of a new file.
            done: Points that it holds.
        """
        self.done = done
        self._path, self._header = path, header
        self._descriptor: int | None = None

    def add(self, index: int, values: Sequence[float]) -> None:
        """Keep one point; it is on the disk when this returns."""
        self.done[index] = list(values)
        if self._path is None:
            return
        if self._descriptor is None:
            if not self._path.exists():
                write_atomically(self._path, _line(self._header))
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        line = _line({"index": index, "values": list(values)})
        while line:  # at the limit of a quota a part may be written
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def check_record(path: str | os.PathLike[str]) -> None:
    """Refuse a folder, and what is no path.

    Raises:
        ValueError: If it is a folder.
        TypeError: If it is no path.
    """
    check_type("resume", path, str | os.PathLike, "a path")
    if Path(path).is_dir():
        raise ValueError(f"`resume` must be a file, got the folder {str(path)!r}.")


@contextmanager
def open_record(
    path: str | os.PathLike[str] | None,
    fingerprint: Mapping[str, str],
    num_points: int,
    num_values: int,
) -> Iterator[PointRecord]:
    """Open the record of one surface, and close its file afterwards.

    Args:
        path: The file, which may not exist yet; `None` keeps the points in memory only.
        fingerprint: What the points belong to, as texts by name.
        num_points: Number of points of the surface.
        num_values: Number of values at each.

    Yields:
        The record, with the points that the file already holds.

    Raises:
        ValueError: If the file holds something else, or points of something else.
    """
    path = None if path is None else Path(path)
    header = {"format": _FORMAT, "fingerprint": dict(fingerprint)}
    done: dict[int, list[float]] = {}
    if path is not None and path.exists():
        done, good_bytes = _read(path, header, num_points, num_values)
        if good_bytes < path.stat().st_size:
            os.truncate(path, good_bytes)
    record = PointRecord(path, header, done)
    try:
        yield record
    finally:
        record.close()


def fingerprint(
    frozen: FrozenObjective, directions: Iterable[Mapping[str, Tensor]], **other: str
) -> dict[str, str]:
    """Return what the values of a surface depend on, as digests by name.

    The data may be cut into other batches, unless `other` says how they are. Two losses of one
    name look the same here.

    Args:
        frozen: The objective on its model and data; they are read once.
        directions: Directions of the surface.
        **other: Further settings.
    """
    model, space = frozen.model, frozen.space
    data: dict[str, Any] = {}
    for batch in frozen.batches:
        inputs = batch.inputs if isinstance(batch.inputs, Mapping) else {"": batch.inputs}
        for key, value in [*inputs.items(), ("targets", batch.targets)]:
            data.setdefault(key, hashlib.sha256()).update(_bytes(value))
    state = {**space.values, **space.fixed, **space.buffers}
    loss = frozen.objective.loss
    weights = loss.state_dict() if isinstance(loss, nn.Module) else {}
    return {
        "model": f"{type(model).__name__} {_digest(state)}",
        "directions": " ".join(_digest(d) for d in directions),
        "data": " ".join(f"{key} {digest.hexdigest()}" for key, digest in data.items()),
        "objective": f"{frozen.objective.describe()} {_digest(weights)}",
        **other,
    }


def _read(
    path: Path, header: dict[str, Any], num_points: int, num_values: int
) -> tuple[dict[int, list[float]], int]:
    """Return the points of a record and the number of bytes that are whole."""
    lines = path.read_bytes().splitlines(keepends=True)
    found = _parse(lines[0]) if lines else None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(
            f"`resume` must be a new file or one written by an earlier run, got {str(path)!r}, "
            "which holds something else; pass another path."
        )
    ours, theirs = header["fingerprint"], found["fingerprint"]
    other = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if other:
        raise ValueError(
            f"`resume` must hold points of this surface, got points of another "
            f"{', '.join(other)} in {str(path)!r}; pass another path or remove the file."
        )
    done: dict[int, list[float]] = {}
    good = len(lines[0])
    for line in lines[1:]:
        point = _parse(line)
        if (
            not isinstance(point, dict)
            or not 0 <= point["index"] < num_points
            or len(point["values"]) != num_values
        ):
            break
        done[point["index"]] = [float(v) for v in point["values"]]
        good += len(line)
    return done, good


def _line(content: Any) -> bytes:
    text = json.dumps(content).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> Any:
    """Return what `_line` wrote, `None` if the line is not whole."""
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:32]


def _bytes(value: Any) -> bytes:
    return bytes_of(value) if isinstance(value, Tensor) else repr(value).encode()
