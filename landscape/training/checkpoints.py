"""Checkpoints of a training run: plain state dicts, written whole or not at all.

A run's folder holds

- `epoch-00000.pt`, …: state dicts after that many epochs (0 is the initialisation), loadable with
  `torch.load(path, weights_only=True)`;
- `resume-00007.pt`: everything that is needed to go on after epoch 7 (0 is the start); the last
  two are kept;
- `log.csv`: one row per epoch.
"""

import csv
import io
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from landscape._checks import check_count
from landscape._files import load_tensors
from landscape.results import write_atomically

Named = int | Literal["init", "warmup", "last"]

_KEPT = 2  # resume files: the last one and a spare


@dataclass(frozen=True)
class Saves:
    """Which epochs are kept, and where."""

    folder: Path | None
    named: dict[Named, int]
    trajectory: tuple[int, ...]

    def path(self, epoch: int) -> Path:
        """Return where the state dict after `epoch` epochs lies."""
        return (self.folder or Path()) / f"epoch-{epoch:05d}.pt"

    def write(self, model: nn.Module, epoch: int) -> None:
        """Write the state dict after `epoch` epochs if it is wanted."""
        if epoch in self.named.values() or epoch in self.trajectory:
            save(self.path(epoch), model.state_dict())


def plan(
    folder: str | PathLike[str] | None,
    checkpoints: Collection[Named],
    trajectory: bool | int,
    epochs: int,
    schedule: object,
) -> Saves:
    """Return which epochs are to be kept.

    Args:
        folder: Folder of the run, or `None`.
        checkpoints: Names and numbers of the epochs whose weights are wanted.
        trajectory: Every how many epochs weights are wanted; `True` is 1, `False` is none.
        epochs: Epochs in all.
        schedule: Says by `warmup_epochs`, where it has it, what `"warmup"` means.

    Raises:
        ValueError: If an epoch does not exist, or there is no folder to keep it in.
    """
    if folder is None and (len(checkpoints) or trajectory):
        raise ValueError("`folder` must be given to keep `checkpoints` or a `trajectory`.")
    known: dict[Named, int | None] = {
        "init": 0,
        "warmup": getattr(schedule, "warmup_epochs", None),
        "last": epochs,
    }
    named: dict[Named, int] = {}
    for name in checkpoints:
        name = int(name) if isinstance(name, np.integer) else name
        epoch = name if isinstance(name, int) else known.get(name)
        if epoch is None or not 0 <= epoch <= epochs or epoch != int(epoch):
            raise ValueError(
                f"`checkpoints` must be epochs from 0 to {epochs}, 'init', 'last', or 'warmup' "
                f"where `schedule` has whole `warmup_epochs`, got {name!r}."
            )
        named[name] = int(epoch)
    if not isinstance(trajectory, bool):
        check_count("trajectory", trajectory, 0)
    every = range(0, epochs, int(trajectory)) if trajectory else ()
    kept = (*every, epochs) if trajectory else ()
    return Saves(None if folder is None else Path(folder), named, kept)


def save(path: Path, content: Any) -> None:
    """Write tensors and plain containers atomically, with tensors on the CPU.

    Args:
        path: File to write; its folder is made.
        content: What `torch.load(…, weights_only=True)` can read again.
    """
    buffer = io.BytesIO()
    torch.save(_to_cpu(content), buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> Any:
    """Read what `save` wrote, after checking it for damage.

    Args:
        path: File to read.

    Returns:
        The content, tensors on the CPU.

    Raises:
        ValueError: If the file is truncated or a byte of it has changed.
    """
    try:
        return load_tensors(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"`{path}` is damaged ({error}).") from error


def save_resume(folder: Path, epoch: int, content: Mapping[str, Any]) -> None:
    """Write the state after `epoch` epochs.

    Args:
        folder: Folder of the run.
        epoch: Number of epochs done.
        content: State of model, optimizer and schedule, and the history.

    Raises:
        ValueError: If the first of a run could not be read again.
    """
    path = folder / f"resume-{epoch:05d}.pt"
    save(path, dict(content))
    if epoch == 0:
        try:
            load(path)
        except ValueError as error:
            path.unlink()
            raise ValueError(
                "`folder` must be left out where the state of model, optimizer, loss or schedule "
                f"holds more than tensors, numbers, text and containers of these ({error})."
            ) from error


def drop_old(folder: Path) -> None:
    """Remove all states but the last and a spare.

    Args:
        folder: Folder of the run.
    """
    for path in _resume_files(folder)[:-_KEPT]:
        path.unlink(missing_ok=True)


def load_resume(folder: Path, latest: int | None = None) -> dict[str, Any] | None:
    """Return the latest state that is whole, or `None` where there is none.

    A damaged file is refused with a warning and the one before it is used.

    Args:
        folder: Folder of the run.
        latest: Epoch whose state, or one before it, is wanted; `None` is any.

    Raises:
        ValueError: If there are states but all are damaged.
    """
    files = [p for p in _resume_files(folder) if latest is None or _epoch(p) <= latest]
    for path in reversed(files):
        try:
            content: dict[str, Any] = load(path)
        except ValueError as error:
            warnings.warn(f"{error} Going back to the state before it.", stacklevel=3)
            continue
        return content
    if files:
        raise ValueError(
            f"`folder` must hold a state to resume from, but all in {folder} are damaged; "
            "empty it and train afresh."
        )
    return None


def last_epoch(folder: Path) -> int | None:
    """Return the epoch of the latest state in the folder, `None` where there is none."""
    files = _resume_files(folder)
    return _epoch(files[-1]) if files else None


def write_log(path: Path, columns: Mapping[str, Sequence[float]]) -> None:
    """Write the whole log as CSV, a header and a row per epoch.

    Args:
        path: File to write.
        columns: Values by column name, equally many each.
    """
    write_atomically(path, csv_lines(columns, *zip(*columns.values(), strict=True)))


def csv_lines(*rows: Iterable[object]) -> bytes:
    """Return rows as lines of CSV."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _resume_files(folder: Path) -> list[Path]:
    """Return the resume files, oldest first."""
    return sorted(folder.glob("resume-*.pt"), key=_epoch)


def _epoch(path: Path) -> int:
    """Return the epoch that a resume file belongs to."""
    return int(path.stem.split("-")[1])


def _to_cpu(content: Any) -> Any:
    """Return a copy of nested containers with every tensor on the CPU, strides kept.

    Numbers of NumPy, such as a learning rate, become Python's: they could not be read again.
    """
    if isinstance(content, Tensor):
        return content.detach().cpu().clone()
    if isinstance(content, Mapping):
        return {key: _to_cpu(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_to_cpu(value) for value in content]
    if isinstance(content, tuple):
        return tuple(_to_cpu(value) for value in content)
    return content.item() if isinstance(content, np.generic) else content
