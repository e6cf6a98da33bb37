"""The state of a run on disk: what it is resumed from, found again, written, tidied up."""

import errno
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from landscape._loaders import generators_of
from landscape.training import checkpoints as files
from landscape.training.run import COLUMNS, History, Run


def find(run: Run, resume: bool, latest: int | None = None) -> dict[str, Any] | None:
    """Return the state in the folder to go on from, or `None` where there is none.

    Args:
        run: The run.
        resume: Whether to look for a state, rather than to insist that there is none.
        latest: Epoch whose state, or one before it, is wanted; `None` is any.

    Raises:
        ValueError: If the folder holds a run that is not to be resumed, or another one.
    """
    folder = run.saves.folder
    if not resume:
        if folder is not None and files.last_epoch(folder):  # one of epoch 0 is no run yet
            raise ValueError(
                f"`folder` must hold no run yet, but {folder} does; pass `resume=True` to go on "
                "with it, or another folder."
            )
        return None
    if folder is None:
        raise ValueError("`folder` must be given to `resume` from it.")
    state = files.load_resume(folder, latest)
    if state is None:
        return None
    there = state["run"]
    for name, value in run.identity().items():
        if there.get(name, value) != value:  # states of old do not hold all
            raise ValueError(
                f"`folder` must hold the same run, but there `{name}` is {there[name]!r} and here "
                f"{value!r}; choose another folder."
            )
    return state


def begin(run: Run, state: dict[str, Any] | None) -> History:
    """Return the history so far, after loading the state that belongs to it.

    Args:
        run: The run; its model, optimizer and schedule get the state.
        state: What `find` found; `None` begins at epoch 0, and writes that state.

    Returns:
        Values by column, empty for a run that starts.

    Raises:
        ValueError: If weights are wanted that the run has not kept.
    """
    if state is None:
        start: History = {column: [] for column in COLUMNS}
        write(run, start)
        return start
    history: History = state["history"]
    done = len(history["epoch"])
    _check_kept(run, done)
    run.step.model.load_state_dict(state["model"])
    run.step.optimizer.load_state_dict(state["optimizer"])
    if isinstance(run.schedule, LRScheduler):
        run.schedule.load_state_dict(state["schedule"])
    if isinstance(run.step.loss, nn.Module) and state.get("loss"):
        run.step.loss.load_state_dict(state["loss"])
    generators = generators_of(run.data)
    for generator, drawn in zip(generators, state.get("generators", ()), strict=False):
        generator.set_state(drawn)  # of a loader that shuffles with one of its own
    if not run.saves.path(done).exists():  # wanted now, and not before
        run.saves.write(run.step.model, done)
    if run.saves.folder is not None:  # a run may be killed between state and log
        files.write_log(run.saves.folder / "log.csv", history)
    return history


def _check_kept(run: Run, done: int) -> None:
    """Refuse to go on from an epoch where weights of one before are wanted that are not there."""
    saves = run.saves
    wanted = sorted({epoch for epoch in (*saves.named.values(), *saves.trajectory) if epoch < done})
    for epoch in wanted:
        if not saves.path(epoch).exists():
            raise ValueError(
                f"`checkpoints` and `trajectory` must be what the run in `folder` has kept, got "
                f"epoch {epoch}, which it has passed without keeping; leave it out, or train "
                "again in another folder."
            )


def write(run: Run, history: History) -> None:
    """Write what belongs on disk after an epoch: weights if wanted, resume state, log.

    Args:
        run: The run.
        history: Its history, the epoch just done included; empty before the first.

    Raises:
        OSError: If it cannot be written, a full disk for instance. The states written before are
            left as they were.
    """
    folder, epoch = run.saves.folder, len(history["epoch"])
    if folder is None:
        return
    scheduler = run.schedule if isinstance(run.schedule, LRScheduler) else None
    state = {
        "run": run.identity(),
        "model": run.step.model.state_dict(),
        "optimizer": run.step.optimizer.state_dict(),
        "schedule": None if scheduler is None else scheduler.state_dict(),
        "loss": run.step.loss.state_dict() if isinstance(run.step.loss, nn.Module) else None,
        "generators": [generator.get_state() for generator in generators_of(run.data)],
        "history": history,
    }
    try:
        run.saves.write(run.step.model, epoch)
        files.save_resume(folder, epoch, state)
        files.write_log(folder / "log.csv", history)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        last = files.last_epoch(folder)
        kept = "no state" if last is None else f"the state after epoch {last}"
        raise OSError(
            error.errno,
            f"Epoch {epoch} could not be written ({error.strerror}); the folder still holds "
            f"{kept}. {'Make room, then go on' if full else 'Go on'} with `resume=True`",
            str(folder),
        ) from error


def tidy(run: Run) -> None:
    """Remove states that are too old, once a newer one is written."""
    if run.saves.folder is not None:
        files.drop_old(run.saves.folder)
