"""The points of a line or a surface, one after the other: what both probes share."""

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from landscape._checks import check_choice, check_generator
from landscape._progress import track
from landscape.objective import Objective
from landscape.probes.directions import Directions, random_directions
from landscape.probes.measure import L2, BatchNorm, PointMeter
from landscape.probes.record import fingerprint, open_record
from landscape.provenance import provenance

Metric = Literal["loss", "accuracy", "ece"]


def scan(
    model: nn.Module,
    data: Iterable[Any],
    grid: list[tuple[float, ...]],
    *,
    directions: Directions | None,
    objective: Objective,
    metrics: Sequence[Metric],
    l2: L2,
    batch_norm: BatchNorm,
    resume: str | os.PathLike[str] | None,
    generator: torch.Generator | None,
    progress: bool,
) -> dict[str, Any]:
    """Measure an objective at the points θ + Σ_k a_k d_k.

    Args:
        model: The model at θ.
        data: Re-iterable of batches.
        grid: Coordinates (a_1, …) of each point.
        directions: As many as there are coordinates; `None` draws random ones.
        objective: See `landscape.probes.surface`, like the arguments below.
        metrics: What to measure.
        l2: Definition of the L2 term.
        batch_norm: What becomes of running statistics.
        resume: File of finished points.
        generator: Source of random directions.
        progress: Show a bar.

    Returns:
        The fields that the results of lines and surfaces share, arrays in the order of the grid.
    """
    started = time.perf_counter()
    extra = _extra_metrics(metrics)
    check_choice("l2", l2, ("squared", "norms"))
    check_choice("batch_norm", batch_norm, ("fixed", "recalibrate"))
    generator = check_generator(generator)
    num = len(grid[0])
    if directions is None:
        directions = random_directions(
            model, num=num, parameters=objective.parameters, generator=generator
        )
    _check_directions(directions, num)
    vectors = directions.tensors(model)
    frozen = objective.freeze(model, data)
    meter = PointMeter(frozen, extra, l2, batch_norm)
    settings: dict[str, Any] = {"metrics": extra, "l2": l2, "batch_norm": batch_norm}
    marks: dict[str, str] = {}
    if resume is not None:
        texts = {name: repr(value) for name, value in settings.items()}
        marks = fingerprint(frozen, vectors, grid=repr(grid), **texts)
    start = {**frozen.space.fixed, **frozen.space.values}

    def measure(index: int) -> list[float]:
        values: list[float] = meter.measure(displaced(start, grid[index], vectors)).tolist()
        return values

    with open_record(resume, marks, len(grid), len(meter.columns)) as record, torch.no_grad():
        missing = [index for index in range(len(grid)) if index not in record.done]
        num_measured = len(missing) + _check_record(record.done, measure)
        for index in track(missing, "Loss surface" if num == 2 else "Loss line", progress):
            record.add(index, measure(index))
        table = np.array([record.done[index] for index in range(len(grid))])
    columns = {name: table[:, i] for i, name in enumerate(meter.columns)}
    loss = columns["nll"] + columns["l2"]
    return {
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
            num_forwards=float(meter.passes * num_measured),
            settings=settings,
        ),
    }


def displaced(
    start: Mapping[str, Tensor],
    coordinates: Sequence[float],
    vectors: Sequence[Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Return θ + Σ_k a_k d_k by name, rounded once to the precision of each parameter.

    Args:
        start: θ: every parameter of the model.
        coordinates: The a_k.
        vectors: The d_k, as `Directions.tensors` gives them.

    Returns:
        New tensors for the parameters that move, those of `start` for the others.
    """
    parameters = dict(start)
    for name, value in start.items():
        if name not in vectors[0]:
            continue
        moved = value.to(vectors[0][name].dtype)
        for step, vector in zip(coordinates, vectors, strict=True):
            moved = torch.add(moved, vector[name], alpha=float(step))
        parameters[name] = moved.to(value.dtype)
    return parameters


def _check_record(
    done: Mapping[int, Sequence[float]], measure: Callable[[int], Sequence[float]]
) -> int:
    """Measure one finished point again, which tells two losses of one name apart.

    Args:
        done: Index to the values of the finished points, the loss first.
        measure: Returns the values at an index.

    Returns:
        Number of points measured.

    Raises:
        ValueError: If the loss is another one than before.
    """
    if not done:
        return 0
    index = max(done, key=lambda i: abs(done[i][0]) if math.isfinite(done[i][0]) else -1.0)
    before, now = done[index][0], measure(index)[0]
    if not np.isclose(now, before, rtol=1e-3, atol=0, equal_nan=True):
        raise ValueError(
            f"`resume` must hold points of this very surface, got points of another loss: "
            f"{before:.6g} where it is {now:.6g} now; pass another path or remove the file."
        )
    return 1


def _extra_metrics(metrics: Sequence[Metric]) -> tuple[str, ...]:
    """Return the metrics besides the loss, each once and in a fixed order."""
    names: tuple[str, ...] = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for name in names:
        check_choice("metrics", name, ("loss", "accuracy", "ece"))
    return tuple(name for name in ("accuracy", "ece") if name in names)


def _check_directions(directions: Directions, num: int) -> None:
    if not isinstance(directions, Directions):
        raise TypeError(
            f"`directions` must be Directions, got {type(directions).__name__}; make them with "
            "`random_directions`, `eigen_directions`, `pca_directions` or `between`."
        )
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
