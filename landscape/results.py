"""Results: frozen dataclasses of NumPy arrays and numbers, one `.npz` each, nothing pickled.

A file holds every array under its field path (`largest.values`) and one JSON string `meta` with
the class name, the numbers, and where the result came from (`Provenance`).
"""

import dataclasses
import glob
import io
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from landscape.summary import summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMAT = "landscape result 1"
_LARGE = 1 << 24  # bytes from which nothing is compressed: weights take long and hardly shrink


class _UnknownError(Exception):
    """A file is complete, but holds what this version of the package does not know."""


class Result:
    """Base of every result: `save`, `load` and `plot`.

    Subclasses are frozen dataclasses whose fields are arrays, numbers, strings, `None`, other
    results, or tuples and string-keyed dicts of these.
    """

    _classes: ClassVar[dict[str, type["Result"]]] = {}
    _plot: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Result._classes[cls.__name__] = cls
        # A dataclass would write out all numbers, and cannot compare or hash arrays.
        for name in ("__repr__", "__eq__", "__hash__"):
            if name not in vars(cls):
                setattr(cls, name, vars(Result)[name])

    def __repr__(self) -> str:
        return summarize(self)

    def __eq__(self, other: object) -> bool:
        """Whether another result is of the same class and holds the same, NaN for NaN.

        That includes where it came from and how long it took.
        """
        return type(self) is type(other) and _same(vars(self), vars(other))

    def __hash__(self) -> int:
        shapes = [v.shape for v in vars(self).values() if isinstance(v, np.ndarray)]
        return hash((type(self), *shapes))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to one `.npz` file, atomically, and return its path.

        Args:
            path: File to write; `.npz` is appended where it is missing.
        """
        path = Path(path)
        if path.suffix != ".npz":
            path = path.with_name(path.name + ".npz")
        arrays: dict[str, np.ndarray] = {}
        meta = json.dumps({"format": _FORMAT, "result": _encode(self, "", arrays)})
        buffer = io.BytesIO()
        large = sum(array.nbytes for array in arrays.values()) > _LARGE
        save = np.savez if large else np.savez_compressed
        save(buffer, allow_pickle=False, meta=np.array(meta), **arrays)
        write_atomically(path, buffer.getbuffer())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a result that `save` wrote.

        Args:
            path: The `.npz` file; the suffix may be left out, as for `save`.

        Returns:
            The result; its class is `cls` or a subclass of it.

        Raises:
            OSError: If there is no such file, or it cannot be opened.
            ValueError: If the file is damaged, foreign, of a newer version, or holds another kind
                of result.
        """
        path = Path(path)
        named = path.with_name(path.name + ".npz")
        if not path.is_file() and named.is_file():
            path = named
        with path.open("rb") as file:
            content = io.BytesIO(file.read())
        try:
            with np.load(content, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            meta = json.loads(str(arrays.pop("meta")))
            if meta["format"] != _FORMAT:
                raise _UnknownError(f"format {meta['format']!r}")
            result = _decode(meta["result"], arrays)
        except _UnknownError as error:
            raise ValueError(
                f"`path` must hold what this version of `landscape` knows, got {error} in "
                f"{str(path)!r}; update `landscape`, or import the module that defines the class "
                "(`landscape.training` defines some)."
            ) from None
        except Exception as error:  # damaged bytes raise anything
            raise ValueError(
                f"`path` must be a complete file written by `Result.save`, got {str(path)!r} "
                f"({type(error).__name__}: {error}); compute the result again."
            ) from error
        if not isinstance(result, cls):
            raise ValueError(
                f"`path` must hold a {cls.__name__}, got a {type(result).__name__} in "
                f"{str(path)!r}; load it with `{type(result).__name__}.load`."
            )
        return result

    def plot(self, *, ax: "Axes | None" = None, **artist: Any) -> "Axes":
        """Draw with the function of `landscape.plot` made for this result.

        Args:
            ax: Axes to draw on; fresh ones by default.
            **artist: Passed to that function.

        Returns:
            The axes.

        Raises:
            TypeError: If no plot is made for this kind of result.
        """
        from landscape import plot

        if self._plot is None:
            raise TypeError(f"{type(self).__name__} has no plot of its own.")
        axes: Axes = getattr(plot, self._plot)(self, ax=ax, **artist)
        return axes


@dataclass(frozen=True)
class Provenance(Result):
    """Where a result came from.

    Attributes:
        landscape: Version of this package.
        torch: Version of PyTorch.
        model: Class of the model.
        num_parameters: Number of parameters that were probed.
        objective: The objective in words: loss, weight decay, transform, parameters, seed.
        num_samples: Number of samples in the data.
        device: Device of the model, with its name.
        dtype: Precision of the model.
        seed: Initial seed of the probe's generator.
        seconds: Wall time.
        num_hvps: Hessian-vector products over all of the data.
        num_forwards: Forward passes over all of the data.
        settings: Other arguments of the probe.
    """

    landscape: str = ""
    torch: str = ""
    model: str = ""
    num_parameters: int = 0
    objective: str = ""
    num_samples: int = 0
    device: str = ""
    dtype: str = ""
    seed: int | None = None
    seconds: float = 0.0
    num_hvps: float = 0.0
    num_forwards: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the essentials in one line."""
        samples = f"{self.num_samples:,} samples" if self.num_samples else ""
        where = f"{self.device} {self.dtype}".strip()
        told = [self.model, f"{self.num_parameters:,} parameters", samples, where]
        return ", ".join([part for part in told if part] + [f"{self.seconds:.3g} s"])


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never half.

    What processes that were killed have left half written of this file is removed. A link is
    followed.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if _has_ended(part.suffixes[-2][1:].partition("-")[0]):
            part.unlink(missing_ok=True)
    writer = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _has_ended(process: str) -> bool:
    """Whether no process of that number runs; only POSIX systems can be asked."""
    if os.name == "posix" and process.isdecimal():
        try:
            os.kill(int(process), 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:  # it is another user's
            return False
    return False


def _same(a: Any, b: Any) -> bool:
    a, b = (x.item() if isinstance(x, np.generic) else x for x in (a, b))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        numbers = np.issubdtype(a.dtype, np.inexact) and np.issubdtype(b.dtype, np.inexact)
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=numbers)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float) and np.isnan([a, b]).all():
        return True
    return not isinstance(a, np.ndarray) and not isinstance(b, np.ndarray) and bool(a == b)


def _encode(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, Result) and dataclasses.is_dataclass(value):
        fields = {
            f.name: _encode(getattr(value, f.name), f"{path}{f.name}.", arrays)
            for f in dataclasses.fields(value)
        }
        return {"class": type(value).__name__, "fields": fields}
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError(f"A result holds no object arrays, got one in {path[:-1]!r}.")
        name = path[:-1]
        # The keys "a.b" and "a" → "b" have the same path; the archive takes some for itself.
        while name in arrays or name.endswith(".npy") or name in ("meta", "file", "allow_pickle"):
            name += "'"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, dict):
        return {"dict": [[k, _encode(v, f"{path}{k}.", arrays)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        return [_encode(v, f"{path}{i}.", arrays) for i, v in enumerate(value)]
    if getattr(value, "ndim", None) == 0:  # of NumPy, or a tensor that was given as an argument
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"A result cannot hold a {type(value).__name__} in {path[:-1]!r}.")


def _decode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v, arrays) for v in value)
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "dict" in value:
        return {k: _decode(v, arrays) for k, v in value["dict"]}
    cls, fields = Result._classes.get(value["class"]), value["fields"]
    if cls is None or not dataclasses.is_dataclass(cls):
        raise _UnknownError(f"a {value['class']}")
    if unknown := sorted(fields.keys() - {f.name for f in dataclasses.fields(cls)}):
        raise _UnknownError(f"a {value['class']} with {', '.join(unknown)}")
    return cls(**{k: _decode(v, arrays) for k, v in fields.items()})
