"""Top Hessian eigenvalues of every mini-batch (Park & Kim, 2022, Fig. 1c), with NEP and APE.

The Hessian is that of the objective on frozen data, loss and weight decay, in evaluation mode.
Leaving out the weight decay or the augmentation is a common mistake (Park & Kim, 2022, sec. 2).
"""

import itertools
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from landscape._checks import check_at_least
from landscape._progress import count
from landscape.batches import PreparedBatch
from landscape.linalg.eigenpairs import Eigenpairs, warn_unconverged
from landscape.linalg.hessian import HessianOperator, Memory, Precision, check_finite_losses
from landscape.linalg.lockstep import BASIS, group_size, multiply_in_step, shape_of
from landscape.linalg.search import EigenSearch, multiply
from landscape.objective import FrozenObjective, Objective
from landscape.probes.hessian import (
    Engine,
    HessianSpectrum,
    check_arguments,
    remedy,
    start_vectors,
)
from landscape.provenance import provenance
from landscape.results import Provenance, Result


@dataclass(frozen=True)
class HessianMaxSpectrum(Result):
    """Top eigenvalues of the Hessian of every mini-batch (Park & Kim, 2022, Fig. 1c).

    Attributes:
        eigenvalues: By magnitude, largest first, shape `(batches, k)`.
        residuals: ‖Hv − λv‖ of each, shape `(batches, k)`.
        converged: Whether each error estimate is at most `tol` · |λ|, shape `(batches, k)`.
        nep: Negative max eigenvalue proportion, ∫_{-∞}^0 p(λ)dλ, over all eigenvalues gathered.
        nep_interval: 95 % bootstrap interval of `nep` over mini-batches, (low, high).
        ape: Average of the positive max eigenvalues, ∫_0^∞ λp(λ)dλ / ∫_0^∞ p(λ)dλ; NaN if none.
        ape_interval: 95 % bootstrap interval of `ape` over mini-batches, (low, high).
        num_hvps: Mini-batch Hessian-vector products in all.
        provenance: Where it came from.
    """

    eigenvalues: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    nep: float
    nep_interval: tuple[float, float]
    ape: float
    ape_interval: tuple[float, float]
    num_hvps: int
    provenance: Provenance

    _plot: ClassVar[str | None] = "hessian_max_spectrum"


def hessian_max_spectrum(
    model: nn.Module,
    data: Iterable[Any],
    *,
    objective: Objective = Objective(),
    k: int = 5,
    tol: float = 1e-3,
    max_iter: int = 100,
    certify: bool | float = True,
    num_bootstrap: int = 2000,
    start: HessianSpectrum | Eigenpairs | np.ndarray | torch.Tensor | None = None,
    memory: Memory = "auto",
    group: int | None = None,
    precision: Precision = "full",
    generator: torch.Generator | None = None,
    engine: Engine = "native",
    progress: bool = False,
) -> HessianMaxSpectrum:
    """Top-`k` Hessian eigenvalues of every mini-batch (Park & Kim, 2022, Fig. 1c).

    The paper gathers the five largest by magnitude of mini-batches of 16 samples, from a tenth of
    the training set, at the objective that was optimised (loss, weight decay, augmented data).

    Args:
        model: Any module; left as it was found.
        data: Re-iterable of mini-batches, each measured by itself.
        objective: Whose Hessian.
        k: Eigenvalues a mini-batch.
        tol: Relative error of the eigenvalues.
        max_iter: Largest number of products a mini-batch.
        certify: Look for multiple and missed eigenvalues; a number is the probability of a miss
            to admit (`top_eigenpairs`).
        num_bootstrap: Resamplings of mini-batches for the intervals.
        start: What was found before, with vectors, or vectors `(m, dim)`: the first mini-batch's
            Krylov space starts from their sum instead of a random vector. Every other one's starts
            from the sum of the eigenvectors found before it, which saves 1 or 2 products.
        memory: What may be kept of a mini-batch's graph between products, where it is alone.
        group: Mini-batches solved together, in lock-step (`landscape.linalg.lockstep`); each starts
            from what its like in the group before found. By default 1 on a CPU, where that is
            fastest, and on a GPU as many as its free memory holds, if `vmap` can run the model.
        precision: `"tf32"` or `"bf16"` search with cheaper products on a GPU; `k` products in full
            precision a mini-batch then give the residuals (`hessian_spectrum`). `"bf16"` solves one
            mini-batch after the other.
        generator: Source of the start vectors and resamplings; seed 0 by default.
        engine: `"pyhessian"` runs PyHessian on the same frozen objective, as a second opinion
            (`landscape.probes.pyhessian_engine` says what it can do).
        progress: Show a bar.

    Returns:
        Eigenvalues, NEP and APE with intervals. Cost: 15 to 25 products a mini-batch.

    Raises:
        ValueError: If an argument is out of range, or the loss of a mini-batch is not finite.
        TypeError: If `data` is not a re-iterable of batches.
    """
    began = time.perf_counter()
    generator = check_arguments(k, engine, start, precision, generator)
    if group is not None and engine != "native":
        raise ValueError(f"`group` needs engine='native', got {engine!r}.")
    first = start_vectors(start)
    seed = generator.initial_seed()
    frozen = objective.freeze(model, data, check_mean=False)
    if k > frozen.space.dim:
        raise ValueError(f"`k` must be at most the dimension {frozen.space.dim}, got {k}.")
    _check_finite(frozen)
    size = 1 if engine == "pyhessian" else group_size(frozen, group, precision)
    solver = _Solver(frozen, k, tol, max_iter, certify, memory, generator, size, first, precision)
    total = frozen.num_batches
    rows: list[Eigenpairs] = []
    with count("Hessian max spectrum", progress, total) as bar:
        if engine == "pyhessian":
            from landscape.probes import pyhessian_engine

            for batch in frozen.batches:
                operator = solver.operator(batch)
                found = pyhessian_engine.top_eigenpairs(
                    operator, k, tol=tol, max_iter=max_iter, generator=generator
                )
                rows.append(found)
                bar.update()
        else:
            for _, alike in itertools.groupby(frozen.batches, shape_of):
                while batches := list(itertools.islice(alike, solver.size)):
                    rows += solver.solve(batches, bar.update)
    eigenvalues = np.stack([row.values for row in rows])
    converged = np.stack([row.converged for row in rows])
    num_hvps = sum(row.num_matvecs for row in rows)
    if engine == "pyhessian":
        pyhessian_engine.warn_unconverged([converged], num_hvps, tol)
    else:
        warn_unconverged([converged], num_hvps, tol, remedy(precision))
    nep_interval, ape_interval = _bootstrap(eigenvalues, num_bootstrap, generator)
    return HessianMaxSpectrum(
        eigenvalues=eigenvalues,
        residuals=np.stack([row.residuals for row in rows]),
        converged=converged,
        nep=_nep(eigenvalues),
        nep_interval=nep_interval,
        ape=_ape(eigenvalues),
        ape_interval=ape_interval,
        num_hvps=num_hvps,
        provenance=provenance(
            frozen,
            seed=seed,
            seconds=time.perf_counter() - began,
            num_hvps=num_hvps / total,
            settings={"k": k, "tol": tol, "engine": engine, "certify": certify}
            | {"precision": precision}
            | {"kept_batches": solver.kept, "num_batches": total, "group": solver.size},
        ),
    )


class _Solver:
    """Finds the top eigenpairs of mini-batches, `size` of them at a time.

    Attributes:
        size: Mini-batches solved together; halved when memory runs out.
        kept: Number of mini-batches whose graph was kept between products.
    """

    def __init__(
        self,
        frozen: FrozenObjective,
        k: int,
        tol: float,
        max_iter: int,
        certify: bool | float,
        memory: Memory,
        generator: torch.Generator,
        size: int,
        first: torch.Tensor | None,
        precision: Precision,
    ) -> None:
        self._frozen, self._k, self._certify, self._memory = frozen, k, certify, memory
        self._precision: Precision = precision
        self._settings: dict[str, Any] = {"tol": tol, "max_iter": max_iter, "generator": generator}
        self._settings |= {"wanted": {"top": (k, "LM")}, "rough": precision != "full"}
        self._firsts = [first] * size  # where each of a group starts from
        self.size, self.kept = size, 0

    def operator(self, batch: PreparedBatch) -> HessianOperator:
        """Return the Hessian of one mini-batch."""
        frozen = self._frozen.of_batch(batch)
        operator = HessianOperator.of(frozen, memory=self._memory, precision=self._precision)
        self.kept += operator.num_kept
        return operator

    def solve(self, batches: list[PreparedBatch], tick: Callable[[], object]) -> list[Eigenpairs]:
        """Return the top eigenpairs of mini-batches of one shape.

        Args:
            batches: At most `size` of them.
            tick: Called for each when it is done.
        """
        rows: list[Eigenpairs] = []
        while batches:
            some = batches[: self.size]
            try:
                searches = self._together(some) if len(some) > 1 else [self._alone(some[0])]
            except torch.OutOfMemoryError:
                if len(some) == 1:
                    raise
                searches = []
            if not searches:  # only now has the exception let go of the memory
                self.size = -(-len(some) // 2)
                torch.cuda.empty_cache()
                continue
            self._firsts[: len(searches)] = [search.direction("top") for search in searches]
            rows += [search.pairs("top") for search in searches]
            batches = batches[len(some) :]
            for _ in some:
                tick()
        return rows

    def _alone(self, batch: PreparedBatch) -> EigenSearch:
        operator = self.operator(batch)
        search = self._search(None, None)
        search.run(operator.matvec, starts=1, certify=self._certify, first=self._firsts[0])
        if self._precision != "full":
            exact = HessianOperator.of(self._frozen.of_batch(batch), memory=self._memory)
            multiply(search.check(), exact.matvec)
        return search

    def _together(self, batches: list[PreparedBatch]) -> list[EigenSearch]:
        frozen = self._frozen
        basis_dtype = torch.promote_types(frozen.space.dtype, torch.float32)
        searches = [self._search(self._k + BASIS, basis_dtype) for _ in batches]
        steps = [
            search.steps(starts=1, certify=self._certify, first=first)
            for search, first in zip(searches, self._firsts, strict=False)
        ]
        multiply_in_step(steps, frozen, batches, self._precision)
        if self._precision != "full":
            multiply_in_step([search.check() for search in searches], frozen, batches)
        self.kept += len(batches)
        return searches

    def _search(self, max_basis: int | None, basis_dtype: torch.dtype | None) -> EigenSearch:
        return EigenSearch(
            self._frozen.space, max_basis=max_basis, basis_dtype=basis_dtype, **self._settings
        )


def _check_finite(frozen: FrozenObjective) -> None:
    with torch.no_grad():
        losses = [frozen.data_term(frozen.space.values, batch) for batch in frozen.batches]
    check_finite_losses(losses)


def _nep(eigenvalues: np.ndarray) -> float:
    return float((eigenvalues < 0).mean())


def _ape(eigenvalues: np.ndarray) -> float:
    positive = eigenvalues[eigenvalues > 0]
    return float(positive.mean()) if len(positive) else float("nan")


def _bootstrap(
    eigenvalues: np.ndarray, count: int, generator: torch.Generator
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the 95 % percentile intervals of NEP and APE over resampled mini-batches."""
    check_at_least("num_bootstrap", count, 1)
    batches = len(eigenvalues)
    draws = torch.randint(
        batches, (count, batches), generator=generator, device=generator.device
    ).cpu()
    samples = [(_nep(eigenvalues[rows]), _ape(eigenvalues[rows])) for rows in draws.numpy()]
    with warnings.catch_warnings():  # no resample has a positive one: the interval is NaN
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low, high = np.nanpercentile(np.array(samples), [2.5, 97.5], axis=0)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))
