"""What a `Watch` keeps on disk, and the way back to a table."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path

import numpy as np

from landscape.results import Provenance, Result

LOG = "watch.csv"
MEASURED, SKIPPED = "measured", "skipped"


@dataclass(frozen=True)
class WatchHistory(Result):
    """What one probe recorded: a table with a row for each time that it was measured.

    Attributes:
        name: Name of the probe.
        step: `(m,)`: epochs (or steps) done when it was measured, ascending.
        seconds: `(m,)`: what each measurement took.
        skipped: `(s,)`: epochs at which it was due but would have gone beyond the budget.
        results: The `m` results.
    """

    name: str
    step: np.ndarray
    seconds: np.ndarray
    skipped: np.ndarray
    results: tuple[Result, ...]

    @property
    def values(self) -> dict[str, np.ndarray]:
        """Return the numbers and arrays of the results stacked, `(m, …)`, by field.

        Those of a result inside a result have names such as `largest.values`. A field is left out
        where it is missing in a result or has not the same shape in all of them.
        """
        tables = [dict(_numbers(result)) for result in self.results]
        return {
            name: np.stack([table[name] for table in tables])
            for name in (tables[0] if tables else ())
            if len({table[name].shape if name in table else None for table in tables}) == 1
        }

    @classmethod
    def read(cls, folder: str | PathLike[str], name: str) -> "WatchHistory":
        """Return what a `Watch` has recorded in its folder.

        Args:
            folder: Folder of the `Watch`.
            name: Name of the probe.

        Raises:
            ValueError: If nothing was recorded under that name.
        """
        rows = read_log(Path(folder) / LOG)
        known = {row.probe for row in rows}
        if name not in known:
            raise ValueError(
                f"`name` must be a probe recorded in {folder}, got {name!r}; there are "
                f"{', '.join(sorted(known)) or 'none'}."
            )
        measured = [row for row in rows if row.probe == name and row.status == MEASURED]
        skipped = [row.step for row in rows if row.probe == name and row.status == SKIPPED]
        return cls(
            name=name,
            step=np.array([row.step for row in measured], dtype=np.int64),
            seconds=np.array([row.seconds for row in measured], dtype=np.float64),
            skipped=np.array(skipped, dtype=np.int64),
            results=tuple(
                Result.load(result_path(Path(folder), name, row.step)) for row in measured
            ),
        )


@dataclass(frozen=True)
class Row:
    """One line of the log: a probe that was due."""

    step: int
    probe: str
    status: str
    seconds: float
    training: float


COLUMNS = [field.name for field in fields(Row)]


def result_path(folder: Path, probe: str, step: int) -> Path:
    """Return where a result lies."""
    return folder / probe / f"{step:06d}.npz"


def _numbers(result: Result, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield the numbers and arrays of a result, and of those inside it, by name."""
    for field in fields(result):  # type: ignore[arg-type]
        name, value = f"{prefix}{field.name}", getattr(result, field.name)
        if isinstance(value, Result) and not isinstance(value, Provenance):
            yield from _numbers(value, f"{name}.")
        elif isinstance(value, int | float | tuple | np.ndarray):
            try:
                array = np.asarray(value)
            except ValueError:  # a tuple of arrays of several shapes
                continue
            if array.dtype.kind in "biufc":
                yield name, array


def read_log(path: Path) -> list[Row]:
    """Return the rows of a log, none where there is no file; a last line cut off is none.

    Raises:
        ValueError: If it is no log.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [
            Row(int(r["step"]), r["probe"], r["status"], float(r["seconds"]), float(r["training"]))
            for r in csv.DictReader(line for line in lines if line.endswith("\n"))
        ]
    except Exception as error:  # of other bytes, columns or words
        raise ValueError(
            f"`folder` must hold the log of a Watch, got {path} ({type(error).__name__}: {error}); "
            "remove it, or choose another folder."
        ) from error
