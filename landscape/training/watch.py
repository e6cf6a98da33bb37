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
    # fit_ensemble(models, data, epochs=100, callbacks=[[watch] for watch in one_a_model])
    table = watch.history("hmes")
    table.step, table.values["nep"], table.values["ape"]

The budget is divided equally between the P probes. With T seconds of training so far, probes not
counted, S seconds that one of them has taken and s those of its last measurement, it is measured
when it is due and S + s ≤ budget · T / P, and recorded as skipped otherwise. What a probe takes is
not known before its first measurement, which is always made, and a measurement may take longer
than the one before: such an excess is paid off before that probe runs again. A run too short to
pay it off ends above the budget.
"""

import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import astuple
from os import PathLike
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from landscape._checks import check_callable, check_count
from landscape.restore import same_buffers, same_modes, same_trainable
from landscape.results import Result, write_atomically
from landscape.training.checkpoints import csv_lines
from landscape.training.surroundings import same_random_state
from landscape.training.watch_history import (
    COLUMNS,
    LOG,
    MEASURED,
    SKIPPED,
    Row,
    WatchHistory,
    read_log,
    result_path,
)

Probe = Callable[[nn.Module], Result]


class Watch:
    """Callback that measures probes every so many epochs, and keeps every result on disk.

    Call it as `watch(model, epochs_done)`: `fit` does so with `callbacks=[watch]`, before the first
    epoch and after each; a loop of your own may count steps instead. The folder holds
    `PROBE/STEP.npz`, one result each, and `watch.csv`, one row per probe that was due. Probes leave
    the model as it was found, and the global random states of PyTorch, NumPy and Python are put
    back after each, so training takes the same course with and without them; an error in a probe
    ends it.

    Args:
        probes: What to measure, by name: functions of the model that return a `Result`. Names
            become folders.
        folder: Where the results go; made where it is missing.
        every: Measure where the number of epochs done is a multiple of this, 0 included.
        budget: Largest share of the training time that all probes together may take, 0.1 for a
            tenth and `math.inf` for no bound; see the top of this module for what is counted.
        resume: Go on with what `folder` holds. What it has beyond the epoch of the first call is
            dropped, because training has gone back before it.

    Raises:
        ValueError: If `every` is below 1, `budget` is not positive, there is no probe or one whose
            name is no file name, or `folder` holds a record and is not to be resumed, or a file of
            that name which is none.
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
        check_count("every", every, 1)
        if not budget > 0:
            raise ValueError(f"`budget` must be positive, a share of the training, got {budget}.")
        if not probes:
            raise ValueError("`probes` must hold at least one probe, got none.")
        for name, probe in probes.items():
            check_callable("probes", probe, "functions of the model")
            if not name or Path(name).name != name or name.startswith("."):
                raise ValueError(f"`probes` must have names that are file names, got {name!r}.")
        self._probes = dict(probes)
        self._folder = Path(folder)
        self._every, self._budget = every, budget
        self._rows = read_log(self._folder / LOG)
        if self._rows and not resume:
            raise ValueError(
                f"`folder` must hold no record yet, but {self._folder} does; pass `resume=True` to "
                "go on with it, or another folder."
            )
        self._training = 0.0
        self._step: int | None = None
        self._taken: dict[str, tuple[float, float]] = {}
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
        0, or the one that a record is resumed at, there is none.

        Args:
            model: The model that is trained; left as found.
            step: Epochs (or steps) done, never fewer than at the call before.

        Raises:
            ValueError: If `step` is no whole number, or below that of the call before.
            TypeError: If a probe does not return a `Result`.
        """
        check_count("step", step, 0)
        step = operator.index(step)
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
        try:
            if step % self._every == 0:
                same = itertools.takewhile(lambda row: row.step == step, reversed(self._rows))
                done = {row.probe for row in same}
                for name in self._probes:
                    if name not in done:
                        self._measure(name, model, step)
        finally:
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
                result_path(self._folder, row.probe, row.step).unlink(missing_ok=True)
        self._rows = [row for row in self._rows if row.step <= step]
        self._training = self._rows[-1].training if self._rows else 0.0
        if self._rows and self._rows[-1].step == step:
            self._since = perf_counter()  # what was loaded since is no training
        self._taken = dict.fromkeys(self._probes, (0.0, 0.0))
        for row in self._rows:
            self._count(row)
        write_atomically(self._folder / LOG, csv_lines(COLUMNS, *map(astuple, self._rows)))

    def _measure(self, name: str, model: nn.Module, step: int) -> None:
        """Measure one probe, or record that it would go beyond its share of the budget."""
        spent, last = self._taken[name]
        allowed = self._budget * self._training / len(self._probes)
        status, seconds = SKIPPED, 0.0
        if not spent + last > allowed:  # ∞ · 0 s of training is NaN
            start = perf_counter()
            # One's own may pass over a loader, which draws a seed, or call `eval`.
            with (
                same_random_state(model), same_modes(model),
                same_trainable(model), same_buffers(model),
            ):  # fmt: skip
                result = self._probes[name](model)
            if not isinstance(result, Result):
                raise TypeError(
                    f"`probes` must return a Result, got a {type(result).__name__} from {name!r}."
                )
            result.save(result_path(self._folder, name, step))
            _synchronize(model)
            status, seconds = MEASURED, perf_counter() - start
        row = Row(step, name, status, seconds, self._training)
        self._rows.append(row)
        self._count(row)
        with (self._folder / LOG).open("ab") as file:  # rewriting it would take ever longer
            file.write(csv_lines(astuple(row)))

    def _count(self, row: Row) -> None:
        """Add a measurement to what its probe has taken in all and the last time."""
        if row.status == MEASURED:
            spent, _ = self._taken.get(row.probe, (0.0, 0.0))
            self._taken[row.probe] = (spent + row.seconds, row.seconds)


def _synchronize(model: nn.Module) -> None:
    """Wait for a CUDA device, so that the clock tells what belongs to what."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
