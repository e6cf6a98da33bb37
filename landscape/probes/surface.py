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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from landscape.objective import Objective
from landscape.probes.directions import Directions
from landscape.probes.grid import Points, axes, axis, spans
from landscape.probes.measure import L2, BatchNorm
from landscape.probes.scan import Metric, scan
from landscape.results import Provenance, Result


class _AlongDirections(Result):
    """Values along directions, which are as large as the model each."""

    directions: Directions

    def without_vectors(self) -> Self:
        """Return the result without the vectors of its directions, for a small file.

        What the directions are stays known; to use them again, keep them by
        `result.directions.save`.
        """
        bare = replace(self.directions, vectors=tuple({} for _ in self.directions.vectors))
        return replace(self, directions=bare)  # type: ignore[type-var]


@dataclass(frozen=True)
class LossLine(_AlongDirections):
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
        evaluated: `(p,)`: which points were measured; the others were interpolated, but for
            their `l2`, which has a closed form. `None` where every point was measured.
        interpolation_error: Estimate (no bound) of the largest absolute error at the interpolated
            points: `"loss"` (that of `nll` too), and `"accuracy"` and `"ece"` where asked for.
            `nll_stderr` is interpolated without an estimate. `None` where every point was asked
            for.
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
    evaluated: np.ndarray | None = None
    interpolation_error: dict[str, float] | None = None


@dataclass(frozen=True)
class LossSurface(_AlongDirections):
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
        evaluated: `(p, q)`: which points were measured; the others were interpolated, but for
            their `l2`, which has a closed form. `None` where every point was measured.
        interpolation_error: Estimate (no bound) of the largest absolute error at the interpolated
            points: `"loss"` (that of `nll` too), and `"accuracy"` and `"ece"` where asked for.
            `nll_stderr` is interpolated without an estimate. `None` where every point was asked
            for.
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
    evaluated: np.ndarray | None = None
    interpolation_error: dict[str, float] | None = None


def loss_surface(
    model: nn.Module,
    data: Iterable[Any],
    *,
    directions: Directions | None = None,
    span: float | Sequence[float] = 1.0,
    points: Points | Sequence[Points] = 21,
    objective: Objective = Objective(),
    metrics: Metric | Sequence[Metric] = ("loss", "accuracy"),
    l2: L2 = "squared",
    batch_norm: BatchNorm = "fixed",
    tol: float | None = None,
    resume: str | os.PathLike[str] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LossSurface:
    """Loss over a plane through the model's weights (Li et al. 2018; Park & Kim 2022, Fig. 1a).

    The formulas stand at the top of this module. Cost: one forward pass over the data a point
    (two with `batch_norm="recalibrate"`), fewer points with `tol`, one batch and about 110 samples
    at the start, and memory for the directions twice and two sets of weights.

    Args:
        model: Any module; left as it was found.
        data: Re-iterable of batches.
        directions: Two directions; by default `random_directions` (filter-normalised) among the
            objective's parameters.
        span: Ends of the axes: a number s for -s … s, `(low, high)` for both, or
            `(x_low, x_high, y_low, y_high)`.
        points: Points per axis, one number for both or one each; a sequence of increasing
            coordinates instead of a number is taken as it is (two coordinates as a list: a tuple
            of two is one entry per axis).
        objective: Loss, weight decay, transform and chosen parameters.
        metrics: Any of `"loss"` (always there), `"accuracy"` and `"ece"`.
        l2: `"squared"` for (λ/2)‖θ‖², `"norms"` for λ Σ_p ‖p‖, with λ the weight decay of
            `objective`, over its chosen parameters.
        batch_norm: `"fixed"` keeps running statistics as found; `"recalibrate"` estimates them
            again at each point (not the surface of one function any more, and no longer
            independent of the batch size). They are those of `data`: where these are a test set,
            not those of the training set, which papers on mode connectivity take.
        tol: Measure only the points that have to be, from coarse to fine, and interpolate the
            others (`landscape.probes.adaptive` has the rule), until the estimated error of each
            quantity in `metrics` is at most `tol` times its range over the measured points; for
            `"loss"` the range is that of `loss`, of which only the NLL is interpolated. Never more
            points than the grid has, all of them where the surface is rough at the scale of the
            grid. Points that are not finite are not interpolated over: their cells are measured
            in full. Accuracy over few samples has steps: pass `metrics="loss"` to leave it out.
            `None` measures every point.
        resume: File of finished points. If it exists, its points are not computed again (but for
            one, as a check); it must belong to the same model, data, directions, objective and
            grid. A file of a surface with `tol` serves one without, and the other way round.
        generator: Source of the default directions; `None` is a fresh one with seed 0.
        progress: Show a progress bar.

    Returns:
        The surface.

    Raises:
        ValueError: If an argument is out of range, the directions belong to another model, the file
            to resume from to another surface, or the targets are no classes: those of a regression
            or of several labels a sample want `metrics="loss"`.
    """
    x, y = axes(span, points)
    fields = scan(
        model,
        data,
        (x, y),
        directions=directions,
        objective=objective,
        metrics=metrics,
        l2=l2,
        batch_norm=batch_norm,
        tol=tol,
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
    metrics: Metric | Sequence[Metric] = ("loss", "accuracy"),
    l2: L2 = "squared",
    batch_norm: BatchNorm = "fixed",
    tol: float | None = None,
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
        tol: Error over range at points that are interpolated; `None` measures every point.
        resume: File of finished points.
        generator: Source of the default direction.
        progress: Show a progress bar.

    Returns:
        The line.

    Raises:
        ValueError: As in `loss_surface`.
    """
    x = axis(spans(span, 1)[0], points)
    fields = scan(
        model,
        data,
        (x,),
        directions=directions,
        objective=objective,
        metrics=metrics,
        l2=l2,
        batch_norm=batch_norm,
        tol=tol,
        resume=resume,
        generator=generator,
        progress=progress,
    )
    return LossLine(x=x, **fields)
