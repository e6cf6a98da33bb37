"""Directions that are not random: Hessian eigenvectors, principal components, other solutions."""

import math
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from landscape._checks import check_at_least, check_count
from landscape.linalg.operators import to_array
from landscape.parameters import Choice, ParameterSpace
from landscape.probes.checkpoints import Checkpoints, Source, State, read_state, read_trail
from landscape.probes.directions import Directions, other_parameters
from landscape.provenance import weights_provenance


def eigen_directions(
    spectrum: Any, model: nn.Module | None = None, *, num: int = 2, parameters: Choice = None
) -> Directions:
    """Leading eigenvectors of a Hessian as directions of length 1.

    They show the sharpest directions there are, where random ones show the average. Coordinates
    along them are distances in parameter space.

    Args:
        spectrum: A `HessianSpectrum` (its largest eigenvalues; for the most negative ones pass
            `spectrum.smallest`) or `Eigenpairs`, computed with vectors, or an array `(k, dim)`.
        model: The model whose Hessian it is; a `HessianSpectrum` knows its parameters itself.
        num: Number of leading vectors to take.
        parameters: With a model, the `parameters` of the objective whose Hessian it is.

    Returns:
        The directions.

    Raises:
        ValueError: If there are no vectors, fewer than `num`, or of another length, or no model
            where the spectrum does not know its parameters.
    """
    check_count("num", num, 1)
    started = time.perf_counter()
    vectors = spectrum
    if not isinstance(spectrum, np.ndarray | torch.Tensor):
        vectors = getattr(getattr(spectrum, "largest", spectrum), "vectors", None)
    if vectors is None:
        raise ValueError("`spectrum` must hold eigenvectors, got none; compute it with vectors.")
    if model is None:
        shapes, others = getattr(spectrum, "shapes", None), getattr(spectrum, "others", ())
        if shapes is None:
            raise ValueError(
                "`model` must be given where `spectrum` is no HessianSpectrum of this version, "
                f"got {type(spectrum).__name__} alone."
            )
        name, dtypes = spectrum.provenance.model, {}
    else:
        space = ParameterSpace(model, parameters)
        shapes, others = space.shapes_by_name, other_parameters(model, space.names)
        name, dtypes = type(model).__name__, {n: v.dtype for n, v in space.values.items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    table = vectors if isinstance(vectors, torch.Tensor) else torch.from_numpy(vectors)
    table = table.detach().cpu()
    if table.dim() != 2 or table.shape[1] != sum(sizes):
        raise ValueError(
            f"`spectrum` must have vectors of shape (k, {sum(sizes)}) for this model, got "
            f"{tuple(table.shape)}; pass the objective's `parameters`."
        )
    if len(table) < num:
        raise ValueError(f"`spectrum` must hold at least {num} vectors, got {len(table)}.")
    directions = []
    for row in table[:num].double():
        pieces = zip(shapes.items(), torch.split(row / row.norm(), sizes), strict=True)
        directions.append(
            {n: to_array(p.view(s), dtypes.get(n, table.dtype)) for (n, s), p in pieces}
        )
    return Directions(
        vectors=tuple(directions),
        kind="eigen",
        normalization="unit",
        ignored=tuple(others),
        provenance=weights_provenance(
            model=name,
            num_parameters=sum(sizes),
            seconds=time.perf_counter() - started,
        ),
    )


def pca_directions(
    checkpoints: Checkpoints, *, num: int = 2, model: nn.Module | None = None
) -> Directions:
    """Principal components of the checkpoints of a training run, of length 1.

    The leading eigenvectors of Σ_t (θ_t − m)(θ_t − m)ᵀ with the mean m of the checkpoints, from the
    Gram matrix in float64: the plane that holds most of the trajectory (Li et al. 2018, sec. 7.2).
    Coordinates along them are distances in parameter space; the first checkpoint is on the positive
    side. Beware that the components of a random walk look like a smooth path too.

    Args:
        checkpoints: State dicts, paths or modules in order, or a folder of checkpoints.
        num: Number of components.
        model: Tells which entries of a state dict are parameters; without it, floating-point
            entries that are no running statistics.

    Returns:
        The directions, `explained_variance` among them.

    Raises:
        ValueError: If there are fewer than `num + 1` checkpoints, one is not finite, or they differ
            in fewer directions than `num`.
    """
    check_count("num", num, 1)
    started = time.perf_counter()
    trail = read_trail(checkpoints, model=model, at_least=num + 1)
    origin = trail.states[-1]
    count = len(trail.states)
    gram = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    for _, _, piece in trail.displacements(origin):
        piece = piece - piece.mean(0)
        gram += (piece @ piece.T).cpu()
    if not gram.isfinite().all():
        raise ValueError(
            "`checkpoints` must be finite, got NaN or infinite weights; leave them out."
        )
    values, mixes = torch.linalg.eigh(gram)
    values, mixes = values.flip(0).clamp_min(0), mixes.flip(1)
    if not values[num - 1] > 1e-12 * values[0]:
        raise ValueError(
            f"`checkpoints` must differ in at least {num} directions, got variances "
            f"{values[:num].tolist()}; pass more checkpoints or a smaller `num`."
        )
    mixes = mixes[:, :num] * torch.where(mixes[0, :num] < 0, -1.0, 1.0) / values[:num].sqrt()
    flat = [
        {n: torch.empty(origin[n].numel(), dtype=torch.float64, device="cpu") for n in trail.names}
        for _ in range(num)
    ]
    for name, start, piece in trail.displacements(origin):
        components = mixes.T @ piece.cpu()  # the mixes sum to 0, so no mean has to be taken off
        for vector, component in zip(flat, components, strict=True):
            vector[name][start : start + len(component)] = component
    return Directions(
        vectors=tuple(
            {n: to_array(v.view(origin[n].shape), origin[n].dtype) for n, v in vector.items()}
            for vector in flat
        ),
        kind="pca",
        normalization="unit",
        ignored=trail.ignored,
        explained_variance=(values[:num] / values.sum()).numpy(),
        provenance=weights_provenance(
            model="" if model is None else type(model).__name__,
            num_parameters=trail.dim,
            seconds=time.perf_counter() - started,
            settings={"num_checkpoints": count},
        ),
    )


def between(model: nn.Module, *states: Source, parameters: Choice = None) -> Directions:
    """Directions from the model to other weights: θ_k − θ, as long as the way there.

    With one state, coordinate 0 is the model and 1 the state (the line of Goodfellow et al. 2015);
    with two, the surface is the plane through all three, at (0, 0), (1, 0) and (0, 1), and its axes
    are in general neither orthogonal nor of one length (see `Directions.cosines` and `norms`).
    All parameters move, biases and norms too; buffers do not, so with batch normalisation
    `loss_line(…, batch_norm="recalibrate")` is the fair comparison along the way.

    Args:
        model: The model at the origin.
        *states: State dicts, paths or modules.
        parameters: Glob pattern(s) or predicate choosing a subset, as in `Objective`.

    Returns:
        One direction a state.

    Raises:
        ValueError: If no state is given, or one lacks a parameter, equals the model, or is not
            reached because parameters without `requires_grad` differ.
    """
    check_at_least("states", len(states), 1)
    started = time.perf_counter()
    space = ParameterSpace(model, parameters)
    values = space.values
    vectors: list[dict[str, np.ndarray]] = []
    for index, source in enumerate(states):
        state: State = read_state(source, "states")[0]
        vector = {}
        for name, value in values.items():
            if name not in state or state[name].shape != value.shape:
                got = tuple(state[name].shape) if name in state else "none"
                raise ValueError(
                    f"`states` must be of this model, got shape {got} for {name!r} in state "
                    f"{index} and {tuple(value.shape)} in the model; names begin with "
                    f"{next(iter(state))!r} there and {next(iter(values))!r} here, so what wraps "
                    "one of them, such as `torch.compile`, may have to be taken off."
                )
            there, here = state[name].to("cpu", torch.float64), value.to("cpu", torch.float64)
            vector[name] = to_array(there - here, value.dtype)
        if parameters is None:
            for name, value in space.fixed.items():
                if name in state and not torch.equal(state[name].to(value), value):
                    raise ValueError(
                        "`states` must differ from the model in parameters with `requires_grad`, "
                        f"got another {name!r} in state {index}; call "
                        "`model.requires_grad_(True)`, or choose what moves with `parameters`."
                    )
        if not any(array.any() for array in vector.values()):
            raise ValueError(f"`states` must differ from the model, got the same in {index}.")
        vectors.append(vector)
    return Directions(
        vectors=tuple(vectors),
        kind="between",
        ignored=other_parameters(model, values),
        provenance=weights_provenance(
            model=type(model).__name__,
            num_parameters=sum(v.numel() for v in values.values()),
            seconds=time.perf_counter() - started,
        ),
    )
