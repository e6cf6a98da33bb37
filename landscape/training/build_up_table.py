"""The table of a build-up: a row per step, and the way from a file back to its rows."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from landscape.results import Provenance, Result


@dataclass(frozen=True)
class BuildUp(Result):
    """The table of a build-up (Park & Kim, 2022, Fig. 12a); row 0 is the network to begin with.

    Standard errors are those over validation images; they do not cover the choice of seed.

    Attributes:
        depths: Blocks per stage.
        stage: `(s,)`: stage that gets an MSA in this step, counted from 0; -1 in row 0.
        position: `(s,)`: which block of that stage becomes one, counted from 0; -1 in row 0.
        msas: `(s, stages)`: MSAs per stage of the network of this step.
        num_parameters: `(s,)`: its parameters.
        accuracy: `(s,)`: share of right predictions on the validation data.
        accuracy_stderr: `(s,)`: its standard error.
        nll: `(s,)`: negative log-likelihood on the validation data, in nats.
        nll_stderr: `(s,)`: its standard error.
        kept: `(s,)`: whether the step improved on the best network before it.
        seconds: `(s,)`: time of training and validation.
        criterion: What had to improve, `"accuracy"` or `"nll"`.
        provenance: Where the result came from.
    """

    _plot: ClassVar[str | None] = "build_up"

    depths: tuple[int, ...]
    stage: np.ndarray
    position: np.ndarray
    msas: np.ndarray
    num_parameters: np.ndarray
    accuracy: np.ndarray
    accuracy_stderr: np.ndarray
    nll: np.ndarray
    nll_stderr: np.ndarray
    kept: np.ndarray
    seconds: np.ndarray
    criterion: str
    provenance: Provenance

    @property
    def best(self) -> tuple[int, ...]:
        """Return the MSAs per stage of the network that was built: `alternate(model, best)`."""
        return tuple(int(count) for count in self.msas[np.flatnonzero(self.kept)[-1]])


@dataclass(frozen=True)
class Row:
    """One step, with the fields of `BuildUp`."""

    stage: int
    position: int
    msas: tuple[int, ...]
    num_parameters: int
    accuracy: float
    accuracy_stderr: float
    nll: float
    nll_stderr: float
    kept: bool
    seconds: float


_COLUMNS = [field.name for field in fields(Row)]


def table_of(
    rows: Sequence[Row], depths: tuple[int, ...], criterion: str, source: Provenance
) -> BuildUp:
    """Return the table of the steps so far."""
    columns = {name: np.array([getattr(row, name) for row in rows]) for name in _COLUMNS}
    seconds = float(columns["seconds"].sum())
    return BuildUp(
        depths=depths,
        criterion=criterion,
        provenance=replace(source, seconds=seconds),
        **columns,
    )


def rows_of(table: BuildUp) -> list[Row]:
    """Return the steps of a table."""
    return [
        Row(
            **{name: getattr(table, name)[i].item() for name in _COLUMNS if name != "msas"},
            msas=tuple(table.msas[i].tolist()),
        )
        for i in range(len(table.stage))
    ]


def load_table(path: Path, criterion: str, source: Provenance) -> BuildUp | None:
    """Return the table that a file holds, `None` where there is no file.

    Args:
        path: The file.
        criterion: What has to improve.
        source: Where the table that is to be gone on with comes from.

    Raises:
        ValueError: If the file holds the table of another build-up.
    """
    if not path.exists():
        return None
    found = BuildUp.load(path)
    theirs = found.provenance
    here = {"criterion": criterion, "seed": source.seed, **source.settings}
    there = {"criterion": found.criterion, "seed": theirs.seed, **theirs.settings}
    for name, value in here.items():
        if there.get(name, value) != value:  # tables of old do not hold all
            raise ValueError(
                f"`folder` must hold the same build-up, but in {path.parent} `{name}` is "
                f"{there[name]!r} and here {value!r}; choose another folder."
            )
    return found
