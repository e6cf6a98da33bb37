"""Spectrum of the Hessian over all of the data: both edges, density and trace.

The Hessian is that of the objective on frozen data, loss and weight decay, in evaluation mode.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import nn

from landscape._checks import (
    check_choice,
    check_count,
    check_generator,
    check_positive,
    check_type,
)
from landscape._progress import progress_bar
from landscape.linalg.certificate import check_certify
from landscape.linalg.eigenpairs import Eigenpairs, warn_unconverged
from landscape.linalg.gradient import Precision
from landscape.linalg.hessian import HessianOperator, Memory, check_memory
from landscape.linalg.krylov import RitzPairs
from landscape.linalg.quadrature import SpectralDensity, check_density, density_of, spectral_density
from landscape.linalg.search import EigenSearch, check_basis, multiply, start_vector
from landscape.linalg.trace import FEWEST, TraceEstimate, hutch_plus_plus
from landscape.objective import Objective, check_objective
from landscape.provenance import provenance
from landscape.results import Provenance, Result

Engine = Literal["native", "pyhessian"]


@dataclass(frozen=True)
class HessianSpectrum(Result):
    """Both edges, density and trace of one Hessian.

    Attributes:
        largest: The k largest eigenvalues, largest first.
        smallest: The k smallest, smallest (most negative) first.
        density: Eigen-density, where it was asked for.
        trace: Estimate of the trace.
        trace_stderr: Its standard error.
        dim: Number of parameters.
        num_hvps: Hessian-vector products over all of the data.
        asymmetry: Largest measured |uᵀHv − vᵀHu| of unit vectors: rounding of the products.
        provenance: Where it came from.
        shapes: Shapes of the parameters that an eigenvector runs through, by name and in order.
        others: Names of the model's other parameters.
    """

    largest: Eigenpairs
    smallest: Eigenpairs
    density: SpectralDensity | None
    trace: float
    trace_stderr: float
    dim: int
    num_hvps: int
    asymmetry: float
    provenance: Provenance
    shapes: dict[str, tuple[int, ...]] | None = None
    others: tuple[str, ...] = ()

    _plot: ClassVar[str | None] = "hessian_spectrum"


def hessian_spectrum(
    model: nn.Module,
    data: Iterable[Any],
    *,
    objective: Objective = Objective(),
    k: int = 5,
    density: bool = True,
    tol: float = 1e-3,
    max_iter: int | None = None,
    num_probes: int = 1,
    max_basis: int | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    certify: bool | float = True,
    vectors: bool = False,
    start: HessianSpectrum | Eigenpairs | np.ndarray | torch.Tensor | None = None,
    memory: Memory = "auto",
    precision: Precision = "full",
    generator: torch.Generator | None = None,
    engine: Engine = "native",
    progress: bool = False,
) -> HessianSpectrum:
    """Largest and smallest eigenvalues, density and trace of the Hessian over all of the data.

    One Krylov space serves everything: its Ritz pairs give both edges, its start vectors the
    density and the trace (stochastic Lanczos quadrature, `landscape.linalg.quadrature`). Edge
    eigenvalues that are simple and have converged enter the density exactly, all but the `k`-th, of
    which no copies are looked for.

    The lower edge often lies in a crowd and takes most of the products. The largest eigenvalue
    alone, as along a training run, is `top_eigenpairs(HessianOperator(model, data), 1, "LA")`: in
    10 products where `k=1` takes 56 here, for a small network at 21 steps of its training, and in
    9 with the vectors of the step before as `start`.

    Args:
        model: Any module; left as it was found.
        data: Re-iterable of batches; the mean is over all samples, however batched.
        objective: Whose Hessian.
        k: Number of eigenvalues at each edge; no more than there are parameters are returned.
        density: Also return the density; at least 40 products per probe are then made, or as many
            as `max_iter` allows.
        tol: Relative error of the eigenvalues.
        max_iter: Largest number of products; by default 200, or 80 a probe where that is more.
        num_probes: Random start vectors; more of them narrow trace and density, each at about as
            many products again.
        max_basis: Largest number of basis vectors; by default as many as fit 4 GiB, but at least
            4 `k` + 10.
        basis_dtype: Precision of the basis, float64 or float32 (`top_eigenpairs`).
        basis_device: Device of the basis; `"cpu"` spares a GPU's memory.
        certify: Look for multiple and missed eigenvalues; a number is the probability of a miss
            to aim at, for at most as many products as were made before (`top_eigenpairs`): `miss`
            says what was reached.
        vectors: Return the eigenvectors too.
        start: The result at an earlier checkpoint, with `vectors`, or vectors `(m, dim)`: the
            Krylov space starts from their sum. Needs `density=False`, as a density is that of
            random start vectors; the trace then comes from the certificate's random vector alone,
            and is NaN with `certify=False`.
        memory: What the operator may keep between products (`HessianOperator`).
        precision: `"tf32"` or `"bf16"` search with cheaper products on a GPU (`HessianOperator`).
            One product in full precision a pair then gives the residuals and better values, so
            the loss of precision is never silent: an eigenvector may be off by the rounding, its
            eigenvalue by the square of that. Density and trace are those of the cheap products.
        generator: Source of the start vectors; seed 0 by default.
        engine: `"pyhessian"` runs PyHessian on the same frozen objective, as a second opinion
            (`landscape.probes.pyhessian_engine` says what it can do); it shows no progress.
        progress: Show a bar.

    Returns:
        The spectrum. Cost: `num_hvps` products over all data, 1.5 to 3.5 gradients each.

    Raises:
        ValueError: If an argument is out of range, or the loss is not finite.
        TypeError: If `data` is not a re-iterable of batches.
    """
    began = time.perf_counter()
    check_count("num_probes", num_probes, 1)
    generator = check_arguments(k, engine, tol, certify, start, memory, precision, generator)
    if max_iter is None:
        max_iter = max(200, 80 * num_probes)
    check_count("max_iter", max_iter, 1)
    check_basis(max_basis, basis_dtype, basis_device)
    check_native(engine, max_basis=max_basis, basis_dtype=basis_dtype, basis_device=basis_device)
    given = start_vectors(start)
    if given is not None and density:
        raise ValueError("`start` needs `density=False`, got `density=True`.")
    seed = generator.initial_seed()
    check_objective(objective)
    frozen = objective.freeze(model, data)
    k = min(k, frozen.space.dim)
    first = None if given is None else start_vector(given, frozen.space.dim)
    if engine == "pyhessian":
        from landscape.probes import pyhessian_engine

        operator = HessianOperator.of(frozen, memory=memory, precision=precision)

        return pyhessian_engine.spectrum(
            operator,
            k,
            density=density,
            tol=tol,
            max_iter=max_iter,
            num_probes=num_probes,
            vectors=vectors,
            generator=generator,
            began=began,
        )
    search = EigenSearch(
        frozen.space,
        {"largest": (k, "LA"), "smallest": (k, "SA")},
        tol=tol,
        max_iter=max_iter,
        max_basis=max_basis,
        basis_dtype=basis_dtype,
        basis_device=basis_device,
        generator=generator,
        rough=precision != "full",
    )
    operator = HessianOperator.of(frozen, memory=memory, precision=precision)
    with progress_bar("Hessian spectrum", progress, max_iter) as bar:
        search.run(
            operator.matvec,
            starts=num_probes if first is None else 1,
            certify=certify,
            min_iter=40 * num_probes if density else 0,
            first=first,
            tick=bar.update,
        )
        if precision != "full":
            for _ in multiply(search.check(), operator.exact().matvec):
                pass
    largest, smallest = search.pairs("largest", vectors), search.pairs("smallest", vectors)
    advice = search.remedy() if precision == "full" else remedy(precision)
    warn_unconverged([largest.converged, smallest.converged], search.num_matvecs, tol, advice)
    taken = search.snapshot(num_probes)
    looked = search.miss < 1  # for copies: not where the products were spent before
    measure = None if taken is None else _density(*taken, operator.dim, k - 1 if looked else 0)
    return HessianSpectrum(
        largest=largest,
        smallest=smallest,
        density=measure if density else None,
        trace=float("nan") if measure is None else measure.trace,
        trace_stderr=float("nan") if measure is None else measure.trace_stderr,
        dim=operator.dim,
        num_hvps=search.num_matvecs,
        asymmetry=search.space.asymmetry,
        shapes=operator.frozen.space.shapes_by_name,
        others=tuple(operator.frozen.space.fixed),
        provenance=provenance(
            operator.frozen,
            seed=seed,
            seconds=time.perf_counter() - began,
            num_hvps=search.num_matvecs,
            settings={"engine": engine, "k": k, "tol": tol, "precision": precision}
            | {"num_probes": num_probes, "certify": certify, "warm": first is not None}
            | {"kept_batches": operator.num_kept, "num_batches": operator.frozen.num_batches},
        ),
    )


def hessian_density(
    model: nn.Module,
    data: Iterable[Any],
    *,
    objective: Objective = Objective(),
    num_steps: int = 80,
    num_probes: int = 1,
    sigma: float | None = None,
    memory: Memory = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SpectralDensity:
    """Eigen-density of the Hessian over all of the data, by stochastic Lanczos quadrature.

    Args:
        model: Any module; left as it was found.
        data: Re-iterable of batches.
        objective: Whose Hessian.
        num_steps: Lanczos steps a probe.
        num_probes: Number of random probes.
        sigma: Width of the smoothing; by default a hundredth of the range of the spectrum.
        memory: What the operator may keep between products (`HessianOperator`).
        generator: Source of the probes; seed 0 by default.
        progress: Show a bar.

    Returns:
        The density, after `num_steps · num_probes` products (Ghorbani et al., 2019).

    Raises:
        ValueError: If an argument is out of range, or the loss is not finite.
        TypeError: If `data` is not a re-iterable of batches.
    """
    began = time.perf_counter()
    check_density(num_steps, num_probes, sigma)
    generator = check_generator(generator)
    seed = generator.initial_seed()
    operator = HessianOperator(model, data, objective, memory=memory)
    with progress_bar("Hessian density", progress, num_steps * num_probes) as bar:
        found = density_of(
            operator,
            num_steps=num_steps,
            num_probes=num_probes,
            sigma=sigma,
            generator=generator,
            tick=bar.update,
        )
    settings = {"num_steps": num_steps, "num_probes": num_probes, "sigma": found.sigma}
    return replace(found, provenance=_provenance(operator, seed, began, settings))


def hessian_trace(
    model: nn.Module,
    data: Iterable[Any],
    *,
    objective: Objective = Objective(),
    num_matvecs: int = 60,
    memory: Memory = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TraceEstimate:
    """Trace of the Hessian over all of the data, by Hutch++.

    Args:
        model: Any module; left as it was found.
        data: Re-iterable of batches.
        objective: Whose Hessian.
        num_matvecs: Products to spend, at least 6.
        memory: What the operator may keep between products (`HessianOperator`).
        generator: Source of the random signs; seed 0 by default.
        progress: Show a bar.

    Returns:
        The trace with its standard error.

    Raises:
        ValueError: If an argument is out of range, or the loss is not finite.
        TypeError: If `data` is not a re-iterable of batches.
    """
    began = time.perf_counter()
    check_count("num_matvecs", num_matvecs, FEWEST)
    generator = check_generator(generator)
    seed = generator.initial_seed()
    operator = HessianOperator(model, data, objective, memory=memory)
    with progress_bar("Hessian trace", progress, num_matvecs) as bar:
        found = hutch_plus_plus(
            operator, num_matvecs=num_matvecs, generator=generator, tick=bar.update
        )
    settings = {"num_matvecs": num_matvecs}
    return replace(found, provenance=_provenance(operator, seed, began, settings))


def _provenance(
    operator: HessianOperator, seed: int, began: float, settings: dict[str, Any]
) -> Provenance:
    """Return where a result came from that took all products of an operator."""
    return provenance(
        operator.frozen,
        seed=seed,
        seconds=time.perf_counter() - began,
        num_hvps=operator.num_matvecs,
        settings=settings
        | {"kept_batches": operator.num_kept, "num_batches": operator.frozen.num_batches},
    )


def start_vectors(
    start: HessianSpectrum | Eigenpairs | np.ndarray | torch.Tensor | None,
) -> np.ndarray | torch.Tensor | None:
    """Return the vectors to start from, shape `(m, dim)` or `(dim,)`.

    Args:
        start: Vectors, or a result with its vectors.

    Raises:
        ValueError: If a result was computed without vectors.
        TypeError: If it is neither.
    """
    if start is None or isinstance(start, np.ndarray | torch.Tensor):
        return start
    kind = HessianSpectrum | Eigenpairs
    check_type("start", start, kind, "vectors, a HessianSpectrum, Eigenpairs or None")
    parts = [start.largest, start.smallest] if isinstance(start, HessianSpectrum) else [start]
    vectors = [part.vectors for part in parts if part.vectors is not None]
    if not vectors:
        raise ValueError(
            "`start` must hold eigenvectors, got none; compute it with `vectors=True`."
        )
    return np.concatenate(vectors)


def remedy(precision: Precision) -> str:
    """Return what to do about pairs that have not converged."""
    return "raise `max_iter`" if precision == "full" else 'raise `tol` or take `precision="full"`'


def check_arguments(
    k: int,
    engine: str,
    tol: float,
    certify: bool | float,
    start: object,
    memory: Memory,
    precision: str,
    generator: torch.Generator | None,
) -> torch.Generator:
    """Refuse bad arguments of a spectrum, and return the generator to use."""
    check_count("k", k, 1)
    check_positive("tol", tol)
    check_certify(certify)
    check_memory(memory)
    check_choice("precision", precision, get_args(Precision))
    check_choice("engine", engine, get_args(Engine))
    check_native(engine, start=start, precision=None if precision == "full" else precision)
    return check_generator(generator)


def check_native(engine: str, **given: object) -> None:
    """Refuse arguments that PyHessian has no use for, where they are not `None`."""
    for name, value in given.items():
        if value is not None and engine != "native":
            raise ValueError(f"`{name}` needs engine='native', got {engine!r}.")


def _density(ritz: RitzPairs, weights: np.ndarray, dim: int, k: int) -> SpectralDensity:
    """Return the density with the simple converged pairs among the `k` at each edge exact."""
    values, size = ritz.values, len(ritz.values)
    edge = np.zeros(size, dtype=bool)
    edge[: min(k, size)] = edge[max(size - k, 0) :] = True
    spacing = np.full(size, np.inf)
    if size > 1:
        gaps = np.diff(values)
        spacing = np.minimum(np.append(gaps, np.inf), np.insert(gaps, 0, np.inf))
    # Simple: well apart from its neighbours; converged: Ritz and eigenvector within 1 %.
    simple = spacing > 0.02 * np.abs(values)
    exact = edge & simple & (ritz.residuals <= 0.01 * spacing)
    if size == dim:
        exact[:] = True  # the whole spectrum is known
    elif weights[:, ~exact].sum(1).min() < 1e-12:
        exact[:] = False  # the probes lie in the exact part: nothing is left to sample with
    outliers = values[exact]
    nodes = np.broadcast_to(values[~exact], (len(weights), int((~exact).sum())))
    return spectral_density(nodes.copy(), weights[:, ~exact], dim, outliers=outliers)
