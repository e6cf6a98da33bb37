"""Probes that run while a model trains, with a bound on the time that they take.

    watch = Watch(
        {
            "hmes": lambda model: hessian_max_spectrum(model, data, objective=objective),
            "variance": lambda model: feature_variance(model, test),
        },
        folder="runs/vit/watch",
        every=5,
        budget=0.1,
    )
    fit(model, data, epochs=100, callbacks=[watch])  # or watch(model, epoch) in any loop
    table = watch.history("hmes")
    table.step, table.values["nep"], table.values["ape"]

The budget is divided equally between the P probes. With T seconds of training so far, probes not
counted, S seconds that one of them has taken and s those of its last measurement, it is measured
when it is due and S + s ≤ budget · T / P, and recorded as skipped otherwise. What a probe takes is
not known before its first measurement, which is always made, and then paid off before the next.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from os import PathLike
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import nn

from landscape._checks import check_at_least
from landscape.results import Provenance, Result, write_atomically

Probe = Callable[[nn.Module], Result]

_LOG = "watch.csv"
_MEASURED, _SKIPPED = "measured", "skipped"


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
        rows = _read_log(Path(folder) / _LOG)
        known = {row.probe for row in rows}
        if name not in known:
            raise ValueError(
                f"`name` must be a probe recorded in {folder}, got {name!r}; there are "
                f"{', '.join(sorted(known)) or 'none'}."
            )
        measured = [row for row in rows if row.probe == name and row.status == _MEASURED]
        skipped = [row.step for row in rows if row.probe == name and row.status == _SKIPPED]
        return cls(
            name=name,
            step=np.array([row.step for row in measured], dtype=np.int64),
            seconds=np.array([row.seconds for row in measured], dtype=np.float64),
            skipped=np.array(skipped, dtype=np.int64),
            results=tuple(Result.load(_path(Path(folder), name, row.step)) for row in measured),
        )


@dataclass(frozen=True)
class _Row:
    """One line of the log: a probe that was due."""

    step: int
    probe: str
    status: str
    seconds: float
    training: float


class Watch:
    """Callback that measures probes every so many epochs, and keeps every result on disk.

    Call it as `watch(model, epochs_done)`: `fit` does so with `callbacks=[watch]`, before the first
    epoch and after each; a loop of your own may count steps instead. The folder holds
    `PROBE/STEP.npz`, one result a file, and `watch.csv`, one row a probe that was due. Probes leave
    the model as it was found, so training takes the same course with and without them.

    Args:
        probes: What to measure, by name: functions of the model that return a `Result`. Names
            become folders.
        folder: Where the results go; made where it is missing.
        every: Measure where the number of epochs done is a multiple of this, 0 included.
        budget: Largest share of the training time that all probes together may take, 0.1 for a
            tenth; see the top of this module for what is counted.
        resume: Go on with what `folder` holds. What it has beyond the epoch of the first call is
            dropped, because training has gone back before it.

    Raises:
        ValueError: If `every` is below 1, `budget` is not positive, there is no probe or one whose
            name is no file name, or `folder` holds a record and is not to be resumed.
    """

    def __init__(
        self,
        probes: Mapping[str, Probe],
        *,
        folder: str | PathLike[str],
        every: int = 1,
        budget: float = 0.1,
        resume: bool = False,
    ) -> None:
        check_at_least("every", every, 1)
        if not budget > 0:
            raise ValueError(f"`budget` must be positive, a share of the training, got {budget}.")
        if not probes:
            raise ValueError("`probes` must hold at least one probe, got none.")
        for name in probes:
            if not name or Path(name).name != name or name.startswith("."):
                raise ValueError(f"`probes` must have names that are file names, got {name!r}.")
        self._probes = dict(probes)
        self._folder = Path(folder)
        self._every, self._budget = every, budget
        self._rows = _read_log(self._folder / _LOG)
        if self._rows and not resume:
            raise ValueError(
                f"`folder` must hold no record yet, but {self._folder} does; pass `resume=True` to "
                "go on with it, or another folder."
            )
        self._training = 0.0
        self._step: int | None = None
        self._since = perf_counter()

    @property
    def training_seconds(self) -> float:
        """Time spent in training so far, probes not counted."""
        return self._training

    @property
    def probe_seconds(self) -> float:
        """Time spent in probes so far."""
        return sum(row.seconds for row in self._rows)

    def __call__(self, model: nn.Module, step: int) -> None:
        """Measure what is due.

        Time since the call before, or since this object was made, counts as training; before step
        0 there is none.

        Args:
            model: The model that is trained; left as found.
            step: Epochs (or steps) done, never fewer than at the call before.

        Raises:
            ValueError: If `step` is below that of the call before.
            TypeError: If a probe does not return a `Result`.
        """
        _synchronize(model)  # what training has still queued is not the time of a probe
        if self._step is None:
            self._begin(step)
        elif step < self._step:
            raise ValueError(
                f"`step` must not go back, got {step} after {self._step}; for another run make "
                "another Watch."
            )
        self._training += perf_counter() - self._since if step else 0.0
        self._step = step
        if step % self._every == 0:
            done = {row.probe for row in self._rows if row.step == step}
            for name in self._probes:
                if name not in done:
                    self._measure(name, model, step)
        self._since = perf_counter()

    def history(self, name: str) -> WatchHistory:
        """Return what a probe has recorded so far.

        Args:
            name: Name of the probe.

        Raises:
            ValueError: If nothing was recorded under that name.
        """
        return WatchHistory.read(self._folder, name)

    def _begin(self, step: int) -> None:
        """Drop what was recorded beyond `step`, and go on with the training time up to there."""
        for row in self._rows:
            if row.step > step:
                _path(self._folder, row.probe, row.step).unlink(missing_ok=True)
        self._rows = [row for row in self._rows if row.step <= step]
        self._training = self._rows[-1].training if self._rows else 0.0
        _write_log(self._folder / _LOG, self._rows)

    def _measure(self, name: str, model: nn.Module, step: int) -> None:
        """Measure one probe, or record that it would go beyond its share of the budget."""
        taken = [row.seconds for row in self._rows if row.probe == name and row.status == _MEASURED]
        allowed = self._budget * self._training / len(self._probes)
        status, seconds = _SKIPPED, 0.0
        if not taken or sum(taken) + taken[-1] <= allowed:
            start = perf_counter()
            result = self._probes[name](model)
            if not isinstance(result, Result):
                raise TypeError(
                    f"`probes` must return a Result, got a {type(result).__name__} from {name!r}."
                )
            result.save(_path(self._folder, name, step))
            _synchronize(model)
            status, seconds = _MEASURED, perf_counter() - start
        self._rows.append(_Row(step, name, status, seconds, self._training))
        _write_log(self._folder / _LOG, self._rows)


def _path(folder: Path, probe: str, step: int) -> Path:
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


def _read_log(path: Path) -> list[_Row]:
    """Return the rows of a log, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            _Row(int(r["step"]), r["probe"], r["status"], float(r["seconds"]), float(r["training"]))
            for r in csv.DictReader(file)
        ]


def _write_log(path: Path, rows: Sequence[_Row]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(field.name for field in fields(_Row))
    writer.writerows(astuple(row) for row in rows)
    write_atomically(path, text.getvalue().encode())


def _synchronize(model: nn.Module) -> None:
    """Wait for a CUDA device, so that the clock tells what belongs to what."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
