"""One training run from epoch to epoch: what it keeps, how it starts, what it writes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from landscape.results import Result
from landscape.training import checkpoints as files
from landscape.training import loop
from landscape.training.checkpoints import Named, Saves
from landscape.training.schedule import Schedule
from landscape.training.seeding import stream, stream_seed

Floats = NDArray[np.float64]
History = dict[str, list[float]]

_COLUMNS = (
    "epoch",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "seconds",
)
_TRANSFORM, _GLOBAL = 2, 3  # random streams of an epoch; 0 and 1 are those of `DeviceImages`


@dataclass(frozen=True)
class FitResult(Result):
    """History of a training run and where its checkpoints are.

    Row `i` belongs to epoch `i + 1`. Training numbers are means over the epoch, taken in training
    mode on transformed batches as the weights move (accuracy against the heaviest class of a soft
    target); validation numbers are taken after the epoch in evaluation mode.

    Attributes:
        epoch: Epochs done `(e,)`: 1, 2, …
        learning_rate: Rate of the first parameter group at the last step of each epoch `(e,)`.
        train_loss: Mean loss per sample `(e,)`, in nats for a cross-entropy.
        train_accuracy: Share of correct predictions `(e,)`, 0 to 1.
        validation_loss: Mean loss per sample on `validation` `(e,)`; NaN without.
        validation_accuracy: Share of correct predictions on `validation` `(e,)`; NaN without.
        seconds: Wall time of each epoch `(e,)`.
        checkpoints: Path of the state dict of each named epoch reached so far, by its name.
        trajectory: Paths of the state dicts of the trajectory so far, from epoch 0 on.
    """

    epoch: Floats
    learning_rate: Floats
    train_loss: Floats
    train_accuracy: Floats
    validation_loss: Floats
    validation_accuracy: Floats
    seconds: Floats
    checkpoints: dict[Named, str]
    trajectory: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What stays the same from the first epoch to the last."""

    step: loop.Step
    data: Iterable[Any]
    validation: Iterable[Any] | None
    schedule: Schedule | LRScheduler
    epochs: int
    seed: int
    saves: Saves
    rates: tuple[float, ...]  # initial learning rates, one a parameter group

    @property
    def num_batches(self) -> int:
        """Number of steps an epoch."""
        if not isinstance(self.data, Sized):
            raise ValueError(
                "`data` must have a length, its number of batches, because the schedule needs it; "
                "pass a list or a DataLoader."
            )
        return len(self.data)

    def identity(self) -> dict[str, int | str]:
        """Return what a run and its continuation must have in common."""
        return {
            "epochs": self.epochs,
            "seed": self.seed,
            "model": type(self.step.model).__name__,
            "num_parameters": sum(p.numel() for p in self.step.model.parameters()),
            "optimizer": type(self.step.optimizer).__name__,
            "num_batches": self.num_batches,
        }


def start(run: Run, resume: bool) -> History:
    """Return the history so far, after loading the state that belongs to it.

    Args:
        run: The run; its model, optimizer and schedule get the state of the last epoch done.
        resume: Whether to look for such a state, rather than to insist that there is none.

    Returns:
        Values by column, empty for a run that starts.

    Raises:
        ValueError: If the folder holds a run that is not to be resumed, or another one.
    """
    folder = run.saves.folder
    state = None
    if resume:
        if folder is None:
            raise ValueError("`folder` must be given to `resume` from it.")
        state = files.load_resume(folder)
        if state is not None:
            files.write_log(folder / "log.csv", state["history"])
    elif folder is not None and files.has_run(folder):
        raise ValueError(
            f"`folder` must hold no run yet, but {folder} does; pass `resume=True` to go on with "
            "it, or another folder."
        )
    if state is None:
        run.saves.write(run.step.model, 0)
        return {column: [] for column in _COLUMNS}
    for name, value in run.identity().items():
        if state["run"].get(name) != value:
            raise ValueError(
                f"`folder` must hold the same run, but there `{name}` is "
                f"{state['run'].get(name)!r} and here {value!r}; choose another folder."
            )
    run.step.model.load_state_dict(state["model"])
    run.step.optimizer.load_state_dict(state["optimizer"])
    if isinstance(run.schedule, LRScheduler):
        run.schedule.load_state_dict(state["schedule"])
    history: History = state["history"]
    return history


def run_epoch(run: Run, epoch: int, history: History, bar: tqdm[Any]) -> None:
    """Train and validate for one epoch and append a row to the history.

    Args:
        run: The run.
        epoch: Epochs done before.
        history: Gets one value a column.
        bar: Moves on by one a step.

    Raises:
        FloatingPointError: If loss or weights become NaN or infinite.
    """
    started = time.perf_counter()
    step = run.step
    good = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}

    def before_step(index: int) -> None:
        bar.update()
        if not isinstance(run.schedule, LRScheduler):
            factor = run.schedule(epoch + index / run.num_batches)
            for group, rate in zip(step.optimizer.param_groups, run.rates, strict=True):
                group["lr"] = rate * factor

    bar.set_description(f"Epoch {epoch + 1}/{run.epochs}")
    with loop.global_stream(step.device, stream_seed(run.seed, epoch, _GLOBAL)):
        generator = stream(run.seed, epoch, _TRANSFORM)
        train = loop.train_epoch(step, loop.epoch_batches(run.data, epoch), generator, before_step)
        _check_finite(run, train, epoch, good)
        validation = loop.validate(step, run.validation if run.validation is not None else ())
    row = (
        float(epoch + 1),
        float(step.optimizer.param_groups[0]["lr"]),
        train.loss(),
        train.accuracy(),
        validation.loss(),
        validation.accuracy(),
        time.perf_counter() - started,
    )
    for column, value in zip(_COLUMNS, row, strict=True):
        history[column].append(value)
    bar.set_postfix(loss=f"{row[2]:.4f}", accuracy=f"{row[3]:.4f}")
    if isinstance(run.schedule, ReduceLROnPlateau):
        run.schedule.step(row[4] if run.validation is not None else row[2])
    elif isinstance(run.schedule, LRScheduler):
        run.schedule.step()


def write(run: Run, history: History) -> None:
    """Write what belongs on disk after an epoch: weights if wanted, resume state, log.

    Args:
        run: The run.
        history: Its history, the epoch just done included.
    """
    folder, epoch = run.saves.folder, len(history["epoch"])
    if folder is None:
        return
    run.saves.write(run.step.model, epoch)
    scheduler = run.schedule if isinstance(run.schedule, LRScheduler) else None
    state = {
        "run": run.identity(),
        "model": run.step.model.state_dict(),
        "optimizer": run.step.optimizer.state_dict(),
        "schedule": None if scheduler is None else scheduler.state_dict(),
        "history": history,
    }
    files.save_resume(folder, epoch, state)
    files.write_log(folder / "log.csv", history)


def result(run: Run, history: History) -> FitResult:
    """Return the history so far and the checkpoints written so far.

    Args:
        run: The run.
        history: Its history.

    Returns:
        Arrays of one value an epoch, and paths.
    """
    done, saves = len(history["epoch"]), run.saves
    return FitResult(
        **{column: np.array(values, dtype=np.float64) for column, values in history.items()},
        checkpoints={n: str(saves.path(e)) for n, e in saves.named.items() if e <= done},
        trajectory=tuple(str(saves.path(e)) for e in saves.trajectory if e <= done),
    )


def _check_finite(run: Run, means: loop.Means, epoch: int, good: dict[str, torch.Tensor]) -> None:
    """Raise, with the last good weights put back, if the epoch went wrong; one transfer."""
    parameters = list(run.step.model.parameters())
    finite = torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).all()
    bad = means.first_bad()
    if bad is None and finite:
        return
    run.step.model.load_state_dict(good)
    what = "weights" if bad is None else f"loss of step {bad + 1}"
    raise FloatingPointError(
        f"The {what} in epoch {epoch + 1} became NaN or infinite; the model holds the weights of "
        f"the end of epoch {epoch}. Lower the learning rate, lengthen the warm-up, or clip."
    )
