"""The path of a training run through parameter space."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from landscape.probes.checkpoints import Checkpoints, Source, read_state, read_trail, shape_in
from landscape.probes.directions import Directions, check_directions
from landscape.provenance import weights_provenance
from landscape.results import Provenance, Result


@dataclass(frozen=True)
class PolarTrajectory(Result):
    """A training path as distance from its end and angle to its start.

    Attributes:
        radius: `(t,)`: distance to the last checkpoint over that of the first; 1 … 0.
        angle: `(t,)`: angle at the last checkpoint between a checkpoint and the first, in radians,
            0 … π; NaN where the radius is 0.
        steps: `(t,)`: epoch or step of each checkpoint, its index where none is known.
        distance: Distance between the first and the last checkpoint, in parameter space.
        provenance: Where the result came from.
    """

    _plot: ClassVar[str | None] = "polar_trajectory"

    radius: np.ndarray
    angle: np.ndarray
    steps: np.ndarray
    distance: float
    provenance: Provenance


@dataclass(frozen=True)
class Trajectory(Result):
    """A training path in the coordinates of given directions.

    Attributes:
        coordinates: `(t, num)`: the point of the plane nearest to each checkpoint, in the
            coordinates of a surface along the same directions.
        residual: `(t,)`: share of each checkpoint's distance to the origin that the plane does not
            show, ‖Δ − Σ_k a_k d_k‖ / ‖Δ‖, from 0 (in the plane) to 1; 0 at the origin itself.
        steps: `(t,)`: epoch or step of each checkpoint, its index where none is known.
        provenance: Where the result came from.
    """

    _plot: ClassVar[str | None] = "trajectory"

    coordinates: np.ndarray
    residual: np.ndarray
    steps: np.ndarray
    provenance: Provenance


def polar_trajectory(
    checkpoints: Checkpoints, *, model: nn.Module | None = None
) -> PolarTrajectory:
    """Training path in polar coordinates (Park & Kim 2022, Fig. 1b).

    With Δ_t = θ_t − θ_last and Δ_0 = θ_first − θ_last,

        r_t = ‖Δ_t‖ / ‖Δ_0‖,    φ_t = arccos(⟨Δ_t, Δ_0⟩ / (‖Δ_t‖ ‖Δ_0‖)),

    over the parameters, not the buffers, in float64. Cost: each checkpoint is read once.

    Args:
        checkpoints: State dicts, paths or modules in order, or a folder of checkpoints; the first
            is the initialisation and the last the optimum.
        model: Tells which entries of a state dict are parameters; without it, floating-point
            entries that are no running statistics.

    Returns:
        Radius and angle of each checkpoint.

    Raises:
        ValueError: If there are fewer than two checkpoints, they are not of one model, or the
            first equals the last.
    """
    started = time.perf_counter()
    trail = read_trail(checkpoints, model=model)
    squares = torch.zeros(len(trail.states), dtype=torch.float64, device="cpu")
    along = torch.zeros_like(squares)
    for _, _, piece in trail.displacements(trail.states[-1]):
        squares += piece.square().sum(1).cpu()
        along += (piece @ piece[0]).cpu()
    if squares[0] == 0:
        raise ValueError(
            "`checkpoints` must begin and end at different weights, got the same; "
            "did the training run?"
        )
    norms = squares.sqrt().numpy()
    cosine = np.full(len(norms), np.nan)
    np.divide(along.numpy(), norms * norms[0], out=cosine, where=norms != 0)
    return PolarTrajectory(
        radius=norms / norms[0],
        angle=np.arccos(cosine.clip(-1, 1)),
        steps=np.array(trail.steps),
        distance=float(norms[0]),
        provenance=weights_provenance(
            model="" if model is None else type(model).__name__,
            num_parameters=trail.dim,
            seconds=time.perf_counter() - started,
        ),
    )


def project_trajectory(
    checkpoints: Checkpoints,
    directions: Directions,
    *,
    origin: Source | None = None,
    model: nn.Module | None = None,
) -> Trajectory:
    """Orthogonal projection of a training path onto the plane of a surface.

    The coordinates a minimise ‖θ_t − θ_origin − Σ_k a_k d_k‖ over all parameters (Li et al. 2018,
    sec. 7); directions need be neither orthogonal nor of length 1. Beware that random directions
    show next to nothing of a path (see `Trajectory.residual`): use `pca_directions`.

    Args:
        checkpoints: State dicts, paths or modules in order, or a folder of checkpoints.
        directions: Directions of the surface.
        origin: State at the centre of the surface; by default the last checkpoint.
        model: Tells which entries of a state dict are parameters.

    Returns:
        Coordinates of each checkpoint.

    Raises:
        ValueError: If checkpoints, origin and directions do not belong to one model, or the
            directions are not independent.
    """
    started = time.perf_counter()
    check_directions(directions)
    trail = read_trail(checkpoints, model=model, at_least=1)
    state = trail.states[-1] if origin is None else read_state(origin, "origin")[0]
    for name in trail.names:
        got, wanted = shape_in(state, name), shape_in(trail.states[-1], name)
        if got != wanted:
            raise ValueError(
                f"`origin` must be of the model of the checkpoints, got {got} for {name!r} of "
                f"shape {wanted}."
            )
    vectors = [_flat(vector, trail.states[-1], trail.names) for vector in directions.vectors]
    gram = torch.from_numpy(directions.inner_products)
    scale = gram.diag().sqrt()
    if not torch.linalg.matrix_rank(gram / torch.outer(scale, scale), hermitian=True) == len(gram):
        raise ValueError("`directions` must be independent, got cosines of ±1 or a zero direction.")
    squares = torch.zeros(len(trail.states), dtype=torch.float64, device="cpu")
    along = torch.zeros(len(trail.states), len(vectors), dtype=torch.float64, device="cpu")
    for name, start, piece in trail.displacements(state):
        squares += piece.square().sum(1).cpu()
        if name in vectors[0]:
            stop = start + piece.shape[1]
            plane = torch.stack([vector[name][start:stop] for vector in vectors])
            along += piece.cpu() @ plane.T
    coordinates = torch.linalg.solve(gram, along.T).T
    outside = (squares - (coordinates * along).sum(1)).clamp_min(0)
    residual = torch.where(squares == 0, 0.0, (outside / squares).sqrt())
    return Trajectory(
        coordinates=coordinates.numpy(),
        residual=residual.numpy(),
        steps=np.array(trail.steps),
        provenance=weights_provenance(
            model="" if model is None else type(model).__name__,
            num_parameters=trail.dim,
            seconds=time.perf_counter() - started,
            settings={"directions": directions.kind},
        ),
    )


def _flat(
    vector: Mapping[str, np.ndarray], state: Mapping[str, Tensor], names: tuple[str, ...]
) -> dict[str, Tensor]:
    for name, array in vector.items():
        if name not in names or state[name].shape != array.shape:
            raise ValueError(
                f"`directions` must be made for the model of the checkpoints, got {name!r} of "
                f"shape {array.shape}, which these lack."
            )
    return {name: torch.from_numpy(array).double().reshape(-1) for name, array in vector.items()}
