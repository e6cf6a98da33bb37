"""The loss along one or two directions through the weights of a model.

At coordinates (a, b) the weights are θ + a·d₁ + b·d₂, computed afresh from θ at every point, and
the value is that of the objective,

    L(θ) = NLL(θ) + L2(θ),    NLL(θ) = (1/N) Σ_n loss(f(x_n; θ), y_n),

with the same frozen data at every point. Two definitions of the L2 term are offered, both over the
objective's chosen parameters p, whether or not they move:

- `"squared"`: (λ/2) Σ_p ‖p‖², the term that weight decay λ stands for.
- `"norms"`: λ Σ_p ‖p‖, norms that are not squared: what the published surfaces of Park & Kim (2022,
  Fig. 1a; their code, λ = 0.05) were drawn with.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from landscape._checks import check_choice, check_generator
from landscape._progress import track
from landscape.objective import Objective
from landscape.probes.directions import Directions, random_directions
from landscape.probes.grid import Points, axes, axis, spans
from landscape.probes.measure import L2, BatchNorm, PointMeter
from landscape.probes.record import fingerprint, open_record
from landscape.provenance import provenance
from landscape.results import Provenance, Result

Metric = Literal["loss", "accuracy", "ece"]


@dataclass(frozen=True)
class LossLine(Result):
    """Loss along one direction.

    Attributes:
        x: `(p,)`: coordinates along the direction; 0 is the model.
        nll: `(p,)`: mean loss over samples, in the unit of the loss (nats for cross-entropy).
        nll_stderr: `(p,)`: its standard error over samples, NaN where the loss has no terms by
            sample. The samples are the same at all points, so errors of neighbours are alike and
            differences near the centre are known better than this.
        l2: `(p,)`: the L2 term, the factor λ included.
        loss: `(p,)`: the objective, `nll + l2`.
        accuracy: `(p,)`: share of samples whose largest output is the label (soft targets: their
            largest entry); `None` where not asked for.
        ece: `(p,)`: expected calibration error over 15 bins; `None` where not asked for.
        num_nonfinite: Number of points whose `loss` is NaN or infinite; they are kept as they are.
        directions: The direction.
        provenance: Where the result came from.
    """

    _plot: ClassVar[str | None] = "loss_line"

    x: np.ndarray
    nll: np.ndarray
    nll_stderr: np.ndarray
    l2: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray | None
    ece: np.ndarray | None
    num_nonfinite: int
    directions: Directions
    provenance: Provenance


@dataclass(frozen=True)
class LossSurface(Result):
    """Loss over the plane of two directions; entry [i, j] belongs to (x[i], y[j]).

    Attributes:
        x: `(p,)`: coordinates along the first direction; 0 is the model.
        y: `(q,)`: coordinates along the second direction.
        nll: `(p, q)`: mean loss over samples, in the unit of the loss (nats for cross-entropy).
        nll_stderr: `(p, q)`: its standard error over samples, NaN where the loss has no terms by
            sample. The samples are the same at all points, so errors of neighbours are alike and
            differences near the centre are known better than this.
        l2: `(p, q)`: the L2 term, the factor λ included.
        loss: `(p, q)`: the objective, `nll + l2`.
        accuracy: `(p, q)`: share of samples whose largest output is the label (soft targets: their
            largest entry); `None` where not asked for.
        ece: `(p, q)`: expected calibration error over 15 bins; `None` where not asked for.
        num_nonfinite: Number of points whose `loss` is NaN or infinite; they are kept as they are.
        directions: The two directions.
        provenance: Where the result came from.
    """

    _plot: ClassVar[str | None] = "loss_surface"

    x: np.ndarray
    y: np.ndarray
    nll: np.ndarray
    nll_stderr: np.ndarray
    l2: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray | None
    ece: np.ndarray | None
    num_nonfinite: int
    directions: Directions
    provenance: Provenance


def loss_surface(
    model: nn.Module,
    data: Iterable[Any],
    *,
    directions: Directions | None = None,
    span: float | Sequence[float] = 1.0,
    points: Points | tuple[Points, Points] = 21,
    objective: Objective = Objective(),
    metrics: Sequence[Metric] = ("loss", "accuracy"),
    l2: L2 = "squared",
    batch_norm: BatchNorm = "fixed",
    resume: str | os.PathLike[str] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LossSurface:
    """Loss over a plane through the model's weights (Li et al. 2018; Park & Kim 2022, Fig. 1a).

    The formulas stand at the top of this module. Cost: one forward pass over the data a point
    (two with `batch_norm="recalibrate"`), and memory for the directions and one set of weights.

    Args:
        model: Any module; left as it was found.
        data: Re-iterable of batches.
        directions: Two directions; by default `random_directions` (filter-normalised) among the
            objective's parameters.
        span: Ends of the axes: a number s for -s … s, `(low, high)` for both, or
            `(x_low, x_high, y_low, y_high)`.
        points: Points an axis, one number for both or one each; a sequence of increasing
            coordinates instead of a number is taken as it is.
        objective: Loss, weight decay, transform and chosen parameters.
        metrics: Any of `"loss"` (always there), `"accuracy"` and `"ece"`.
        l2: `"squared"` for (λ/2)‖θ‖², `"norms"` for λ Σ_p ‖p‖, with λ the weight decay of
            `objective`, over its chosen parameters.
        batch_norm: `"fixed"` keeps running statistics as found; `"recalibrate"` estimates them
            again at each point (not the surface of one function any more, and no longer
            independent of the batch size).
        resume: File of finished points. If it exists, its points are not computed again; it must
            belong to the same model, data, directions, objective and grid.
        generator: Source of the default directions; `None` is a fresh one with seed 0.
        progress: Show a progress bar.

    Returns:
        The surface.

    Raises:
        ValueError: If an argument is out of range, the directions belong to another model, or the
            file to resume from to another surface.
    """
    x, y = axes(span, points)
    fields = _scan(
        model,
        data,
        [(float(a), float(b)) for a in x for b in y],
        directions=directions,
        objective=objective,
        metrics=metrics,
        l2=l2,
        batch_norm=batch_norm,
        resume=resume,
        generator=generator,
        progress=progress,
    )
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            fields[name] = value.reshape(len(x), len(y))
    return LossSurface(x=x, y=y, **fields)


def loss_line(
    model: nn.Module,
    data: Iterable[Any],
    *,
    directions: Directions | None = None,
    span: float | Sequence[float] = 1.0,
    points: Points = 21,
    objective: Objective = Objective(),
    metrics: Sequence[Metric] = ("loss", "accuracy"),
    l2: L2 = "squared",
    batch_norm: BatchNorm = "fixed",
    resume: str | os.PathLike[str] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LossLine:
    """Loss along a line through the model's weights: `loss_surface` with one direction.

    With `between(model, state)` this is the linear interpolation of Goodfellow et al. (2015).
    Cost: one forward pass over the data a point.

    Args:
        model: Any module; left as it was found.
        data: Re-iterable of batches.
        directions: One direction; by default a filter-normalised random one.
        span: Ends of the axis: a number s for -s … s, or `(low, high)`.
        points: Number of points, or their coordinates in increasing order.
        objective: As in `loss_surface`, like the arguments below.
        metrics: Any of `"loss"`, `"accuracy"` and `"ece"`.
        l2: `"squared"` or `"norms"`.
        batch_norm: `"fixed"` or `"recalibrate"`.
        resume: File of finished points.
        generator: Source of the default direction.
        progress: Show a progress bar.

    Returns:
        The line.

    Raises:
        ValueError: As in `loss_surface`.
    """
    x = axis(spans(span, 1)[0], points)
    fields = _scan(
        model,
        data,
        [(float(a),) for a in x],
        directions=directions,
        objective=objective,
        metrics=metrics,
        l2=l2,
        batch_norm=batch_norm,
        resume=resume,
        generator=generator,
        progress=progress,
    )
    return LossLine(x=x, **fields)


def _scan(
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
    """Return the fields that lines and surfaces share, in the order of the grid."""
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
    marks: dict[str, str | float] = {}
    if resume is not None:
        texts = {name: repr(value) for name, value in settings.items()}
        marks = fingerprint(frozen, vectors, meter.first_loss, grid=repr(grid), **texts)
    start = {**frozen.space.fixed, **frozen.space.values}
    with open_record(resume, marks, len(grid), len(meter.columns)) as record, torch.no_grad():
        missing = [index for index in range(len(grid)) if index not in record.done]
        for index in track(missing, "Loss surface" if num == 2 else "Loss line", progress):
            record.add(index, meter.measure(displaced(start, grid[index], vectors)).tolist())
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
            num_forwards=float(meter.passes * len(missing)),
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
