"""The points of a line or a surface, one after the other: what both probes share."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from landscape._checks import as_texts, check_at_least, check_choice, check_generator, check_module
from landscape._progress import track
from landscape.objective import Objective, check_objective
from landscape.probes.adaptive import interpolate
from landscape.probes.directions import Directions, check_directions, random_directions
from landscape.probes.measure import L2, BatchNorm, PointMeter
from landscape.probes.record import PointRecord, check_record, fingerprint, open_record
from landscape.provenance import provenance
from landscape.trial import has_batch_statistics

Metric = Literal["loss", "accuracy", "ece"]


def scan(
    model: nn.Module,
    data: Iterable[Any],
    axes: Sequence[np.ndarray],
    *,
    directions: Directions | None,
    objective: Objective,
    metrics: Metric | Sequence[Metric],
    l2: L2,
    batch_norm: BatchNorm,
    tol: float | None,
    resume: str | os.PathLike[str] | None,
    generator: torch.Generator | None,
    progress: bool,
) -> dict[str, Any]:
    """Measure an objective at the points θ + Σ_k a_k d_k.

    The arguments are those of `loss_surface` but for `axes`, the coordinates along each direction:
    the grid is their product, the last one running fastest.

    Returns:
        The fields that the results of lines and surfaces share, arrays in the order of the grid.
    """
    started = time.perf_counter()
    check_module(model)
    check_objective(objective)
    extra = _extra_metrics(metrics)
    check_choice("l2", l2, ("squared", "norms"))
    check_choice("batch_norm", batch_norm, ("fixed", "recalibrate"))
    generator = check_generator(generator)
    if tol is not None:
        check_at_least("tol", tol, 0)
    if resume is not None:
        check_record(resume)
    num = len(axes)
    grid = [tuple(map(float, point)) for point in itertools.product(*axes)]
    if directions is None:
        directions = random_directions(
            model, num=num, parameters=objective.parameters, generator=generator
        )
    _check_directions(directions, num)
    vectors = directions.tensors(model)
    frozen = objective.freeze(model, data)
    meter = PointMeter(frozen, vectors, extra, l2, batch_norm)
    settings: dict[str, Any] = {"metrics": extra, "l2": l2, "batch_norm": batch_norm}
    marks: dict[str, str] = {}
    if resume is not None:
        texts = {name: repr(value) for name, value in settings.items()}
        if batch_norm == "recalibrate" or has_batch_statistics(model):
            texts["batch sizes"] = repr([batch.size for batch in frozen.batches])
        marks = fingerprint(frozen, vectors, grid=repr(grid), **texts)

    with open_record(resume, marks, len(grid), len(meter.columns)) as record, torch.no_grad():
        points = _Points(meter, grid, record)
        points.check(1e-3 if frozen.space.dtype.itemsize < 4 else 1e-4)
        missing = [index for index in range(len(grid)) if index not in record.done]
        with track(missing, "Loss surface" if num == 2 else "Loss line", progress) as bar:
            adaptive: dict[str, Any] = {}
            if tol is None:
                points.measure(missing, bar.update)
                table = points.table()
            else:
                settings["tol"] = tol
                table, adaptive = _adaptive(points, axes, tol, bar.update)
    columns = {name: table[:, i] for i, name in enumerate(meter.columns)}
    loss = columns["nll"] + columns["l2"]
    return {
        **adaptive,
        "nll": columns["nll"],
        "nll_stderr": columns["nll_stderr"],
        "l2": columns["l2"],
        "loss": loss,
        "accuracy": columns.get("accuracy"),
        "ece": columns.get("ece"),
        "num_nonfinite": int((~np.isfinite(loss)).sum()),
        "directions": directions,
        "provenance": provenance(
            frozen,
            seed=generator.initial_seed(),
            seconds=time.perf_counter() - started,
            num_forwards=float(meter.passes * points.num_measured),
            settings=settings,
        ),
    }


def _adaptive(
    points: "_Points", axes: Sequence[np.ndarray], tol: float, advance: Callable[[int], Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Measure the points that have to be and interpolate the others, but for L2.

    Returns:
        The values `(points, columns)`, and the fields that tell which were measured.
    """
    x, y = axes if len(axes) == 2 else (axes[0], np.zeros(1))
    names, penalty = points.columns, points.penalties()
    known = np.zeros((len(penalty), len(names)))
    known[:, names.index("nll")] = penalty

    def measure(wanted: np.ndarray) -> np.ndarray:
        points.measure(np.flatnonzero(wanted).tolist(), advance)
        return points.table().reshape(len(x), len(y), -1)

    controlled = np.array([name not in ("nll_stderr", "l2") for name in names])
    allowed = np.where(controlled, tol, np.inf)
    found = interpolate(x, y, measure, allowed, known.reshape(len(x), len(y), -1))
    guess = found.values.reshape(known.shape)
    guess[:, names.index("l2")] = penalty
    shares = [name in ("accuracy", "ece") for name in names]
    guess[:, shares] = guess[:, shares].clip(0, 1)
    measured = points.measured  # a file to resume from may hold more points than were asked for
    error = {
        "loss" if name == "nll" else name: 0.0 if measured.all() else float(found.error[i])
        for i, name in enumerate(names)
        if controlled[i]
    }
    table = np.where(measured[:, None], points.table(), guess)
    return table, {"evaluated": measured, "interpolation_error": error}


class _Points:
    """The points of a grid, measured when asked for and kept in a record.

    Attributes:
        columns: Names of the values of a point.
        num_measured: Number of measurements.
    """

    def __init__(
        self, meter: PointMeter, grid: Sequence[tuple[float, ...]], record: PointRecord
    ) -> None:
        self._meter, self._grid, self._record = meter, grid, record
        self.columns = meter.columns
        self.num_measured = 0

    def measure(self, indices: Sequence[int], advance: Callable[[int], Any]) -> None:
        """Measure the points that the record lacks, each on the disk once it is finished."""
        todo = [index for index in indices if index not in self._record.done]
        while todo:
            part = todo[: self._meter.group]
            for index, row in zip(part, self._values(part), strict=True):
                self._record.add(index, row)
            todo = todo[len(part) :]
            advance(len(part))

    def check(self, rounding: float) -> None:
        """Measure one finished point again, which tells two losses of one name apart.

        Args:
            rounding: Relative difference that another machine, or batch size, may make.

        Raises:
            ValueError: If the loss is another one than before.
        """
        done = self._record.done
        if not done:
            return
        index = max(done, key=lambda i: abs(done[i][0]) if math.isfinite(done[i][0]) else -1.0)
        before, now = done[index][0], self._values([index])[0][0]
        if not np.isclose(now, before, rtol=rounding, atol=0, equal_nan=True):
            raise ValueError(
                f"`resume` must hold points of this surface, got points of another loss: "
                f"{before:.6g} where it is {now:.6g} now; pass another path or remove the file."
            )

    def penalties(self) -> np.ndarray:
        """Return the L2 term at every point, `(points,)`; no forward pass."""
        return self._meter.penalties(self._grid)

    def table(self) -> np.ndarray:
        """Return the values `(points, columns)`, NaN at points that were not measured."""
        nothing = [math.nan] * len(self._meter.columns)
        return np.array([self._record.done.get(i, nothing) for i in range(len(self._grid))])

    @property
    def measured(self) -> np.ndarray:
        """Which points were measured, `(points,)`."""
        return np.array([index in self._record.done for index in range(len(self._grid))])

    def _values(self, indices: Sequence[int]) -> list[list[float]]:
        rows: list[list[float]] = self._meter.measure([self._grid[i] for i in indices]).tolist()
        self.num_measured += len(rows)
        return rows


def _extra_metrics(metrics: Metric | Sequence[Metric]) -> tuple[str, ...]:
    """Return the metrics besides the loss, each once and in a fixed order."""
    names = as_texts("metrics", metrics, "pass 'loss' for the loss alone")
    for name in names:
        check_choice("metrics", name, get_args(Metric))
    return tuple(name for name in ("accuracy", "ece") if name in names)


def _check_directions(directions: Directions, num: int) -> None:
    check_directions(directions)
    if len(directions) != num:
        raise ValueError(
            f"`directions` must hold {num}, got {len(directions)}; choose with "
            f"`directions.select({', '.join(map(str, range(num)))})`, or make others."
        )
    norms = directions.norms
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise ValueError(
            f"`directions` must have finite lengths above 0, got {norms.tolist()}; a filter of "
            "zeros gives a direction of zeros, so pass `normalization=None` or train first."
        )
