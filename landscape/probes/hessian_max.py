"""Top Hessian eigenvalues of every mini-batch (Park & Kim, 2022, Fig. 1c), with NEP and APE.

The Hessian is that of the objective on frozen data, loss and weight decay, in evaluation mode.
Leaving out the weight decay or the augmentation is a common mistake (Park & Kim, 2022, sec. 2).
"""

import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from landscape._checks import check_count
from landscape._progress import progress_bar
from landscape.linalg.eigenpairs import Eigenpairs, warn_unconverged
from landscape.linalg.gradient import Precision, check_precision
from landscape.linalg.hessian import HessianOperator, Memory, check_keeps, check_losses
from landscape.linalg.lock_step import MiniBatchSolver
from landscape.linalg.search import start_vector
from landscape.objective import Objective, check_objective
from landscape.probes.hessian import (
    Engine,
    HessianSpectrum,
    check_arguments,
    check_native,
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
        nep: Negative max eigenvalue proportion, ∫_{-∞}^0 p(λ)dλ, over all finite eigenvalues
            gathered. One within its error, or within rounding, of 0 counts as neither negative nor
            positive, here and in `ape` (`signed_eigenvalues`): those of a rank below `k`.
        nep_interval: 95 % bootstrap interval of `nep` over mini-batches, (low, high); NaN for a
            single one. For fewer than ten it is a rough one, as it ends at the extreme mini-batches
            at most: of two it covers the truth in half of the cases, of three in 75 %, of five in
            90 %. Where all resamples are alike, as of 0, 1, and mini-batches of as many negative
            ones each, it is that of as many independent values (Clopper & Pearson 1934, with the
            degrees of freedom of Korn & Graubard 1998). Of some 180 other spectra of this
            repository's figures the median variance of NEP is 0.7 of that of independent values.
        ape: Average of the positive max eigenvalues, ∫_0^∞ λp(λ)dλ / ∫_0^∞ p(λ)dλ; NaN if none.
        ape_interval: That of `ape`.
        num_hvps: Mini-batch Hessian-vector products in all, differences of gradients that stand
            for one (`top_eigenpairs`) among them.
        provenance: Where it came from.
        errors: Estimates of the eigenvalues' errors (`Eigenpairs`), shape `(batches, k)`.
        miss: Bound on the probability that a value of a mini-batch is missing (`Eigenpairs`), shape
            `(batches,)`.
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
    errors: np.ndarray | None = None
    miss: np.ndarray | None = None

    _plot: ClassVar[str | None] = "hessian_max_spectrum"

    @property
    def signed_eigenvalues(self) -> np.ndarray:
        """`(batches, k)`: the eigenvalues, 0 for those that count as neither sign."""
        eps = torch.finfo(getattr(torch, self.provenance.dtype or "float32")).eps
        return _signed(self.eigenvalues, self.errors, eps)


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
        k: Eigenvalues per mini-batch.
        tol: Relative error of the eigenvalues.
        max_iter: Largest number of products per mini-batch.
        certify: Look for multiple and missed eigenvalues; a number is the probability of a miss
            to aim at, for at most as many products as were made before (`top_eigenpairs`): `miss`
            says what was reached.
        num_bootstrap: Resamplings of mini-batches for the intervals.
        start: What was found before, with vectors, or vectors `(m, dim)`: the first mini-batch's
            Krylov space starts from their sum instead of a random vector. Every other one's starts
            from the sum of the eigenvectors found before it, which saves 1 or 2 products.
        memory: What may be kept of the mini-batches' graphs between products on a CPU; a GPU keeps
            them.
        group: Mini-batches solved side by side (`landscape.linalg.mini_batches`); the next one
            starts from what the one before in its place found. On a GPU by default as many as half
            of its free memory holds, up to 8. On a CPU 2, each on a thread with its share of
            PyTorch's, where PyTorch has two and the memory holds the data and two graphs; pass 1
            for a model that must run on the calling thread.
        precision: `"tf32"` or `"bf16"` search with cheaper products on a GPU; `k` products in full
            precision a mini-batch then give the residuals (`hessian_spectrum`).
        generator: Source of the start vectors and resamplings; seed 0 by default.
        engine: `"pyhessian"` runs PyHessian on the same frozen objective, as a second opinion
            (`landscape.probes.pyhessian_engine` says what it can do).
        progress: Show a bar.

    Returns:
        Eigenvalues, NEP and APE with intervals. Cost: 15 to 35 products per mini-batch (18 to 46 in
        the figures of this repository).

    Raises:
        ValueError: If an argument is out of range, or the loss of a mini-batch is not finite.
        TypeError: If `data` is not a re-iterable of batches.
    """
    began = time.perf_counter()
    generator = check_arguments(k, engine, tol, certify, start, memory, precision, generator)
    check_count("max_iter", max_iter, k if engine == "native" else 1)
    check_count("num_bootstrap", num_bootstrap, 1)
    if group is not None:
        check_count("group", group, 1)
    check_native(engine, group=group)
    given = start_vectors(start)
    seed = generator.initial_seed()
    check_objective(objective)
    frozen = objective.freeze(model, data, check_mean=False)
    check_precision(precision, frozen.space)
    first = None if given is None else start_vector(given, frozen.space.dim)
    if k > frozen.space.dim:
        raise ValueError(
            f"`k` must be at most the dimension {frozen.space.dim}, got {k}; lower `k`."
        )
    check_keeps(frozen)
    check_losses(frozen)
    total = frozen.num_batches
    if frozen.num_left_out:
        warnings.warn(
            f"{frozen.num_left_out} mini-batches without a sample or label that counts are left "
            "out, so rows of the result are not numbered like the batches.",
            stacklevel=2,
        )
    settings: dict[str, Any] = {}
    advice = remedy(precision)
    with progress_bar("Hessian max spectrum", progress, total) as bar:
        if engine == "pyhessian":
            from landscape.probes import pyhessian_engine

            advice = pyhessian_engine.REMEDY
            rows = []
            for batch in frozen.batches:
                operator = HessianOperator.of(frozen.of_batch(batch), memory=memory)
                rows.append(
                    pyhessian_engine.top_eigenpairs(
                        operator, k, tol=tol, max_iter=max_iter, generator=generator
                    )
                )
                bar.update()
        else:
            solver = MiniBatchSolver(
                frozen,
                k,
                tol=tol,
                max_iter=max_iter,
                certify=certify,
                memory=memory,
                generator=generator,
                group=group,
                first=first,
                precision=precision,
            )
            rows = solver.run(bar.update)
            settings = {"certify": certify, "kept_batches": solver.kept, "group": solver.size}
    eigenvalues = np.stack([row.values for row in rows])
    converged = np.stack([row.converged for row in rows])
    num_hvps = sum(row.num_matvecs for row in rows)
    warn_unconverged([converged], num_hvps, tol, advice)
    errors = np.stack([row.errors for row in rows])
    signed = _signed(eigenvalues, errors, torch.finfo(frozen.space.dtype).eps)
    nep_interval, ape_interval = _bootstrap(signed, num_bootstrap, generator)
    return HessianMaxSpectrum(
        eigenvalues=eigenvalues,
        residuals=np.stack([row.residuals for row in rows]),
        converged=converged,
        nep=_nep(signed),
        nep_interval=nep_interval,
        ape=_ape(signed),
        ape_interval=ape_interval,
        num_hvps=num_hvps,
        errors=errors,
        miss=np.array([row.miss for row in rows]),
        provenance=provenance(
            frozen,
            seed=seed,
            seconds=time.perf_counter() - began,
            num_hvps=num_hvps / total,
            settings={"k": k, "tol": tol, "engine": engine}
            | {"precision": precision, "num_batches": total}
            | settings,
        ),
    )


def _signed(eigenvalues: np.ndarray, errors: np.ndarray | None, eps: float) -> np.ndarray:
    """Return the eigenvalues with 0 for those that rounding or their error may have signed."""
    size = np.where(np.isfinite(eigenvalues), np.abs(eigenvalues), np.nan)
    rounding = 10 * eps * np.fmax.reduce(size, axis=1, keepdims=True)
    bound = rounding if errors is None else np.fmax(errors, rounding)
    signed: np.ndarray = np.where(size <= bound, 0.0, eigenvalues)  # NaN stays NaN
    return signed


def _nep(eigenvalues: np.ndarray) -> float:
    finite = eigenvalues[np.isfinite(eigenvalues)]
    return float((finite < 0).mean()) if len(finite) else float("nan")


def _ape(eigenvalues: np.ndarray) -> float:
    positive = eigenvalues[np.isfinite(eigenvalues) & (eigenvalues > 0)]
    return float(positive.mean()) if len(positive) else float("nan")


def _bootstrap(
    eigenvalues: np.ndarray, count: int, generator: torch.Generator
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return 95 % intervals of NEP and APE over resampled mini-batches, NaN for a single one.

    Percentiles of a bootstrap cover too little where there are few mini-batches: resamples spread
    by √((n − 1)/n) of what they should, and a normal distribution's quantile stands where Student's
    should. So the percentiles are those further out that a normal distribution has there
    (Hesterberg, 2015, sec. 4.4, the expanded percentile interval).
    """
    from scipy import stats  # slow to import

    batches = len(eigenvalues)
    if batches < 2:
        return (float("nan"),) * 2, (float("nan"),) * 2
    student = stats.t.ppf(0.975, batches - 1)
    tail = 100 * stats.norm.cdf(-student * np.sqrt(batches / (batches - 1)))
    draws = torch.randint(
        batches, (count, batches), generator=generator, device=generator.device
    ).cpu()
    samples = [(_nep(eigenvalues[rows]), _ape(eigenvalues[rows])) for rows in draws.numpy()]
    with warnings.catch_warnings():  # no resample has a positive one: the interval is NaN
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low, high = np.nanpercentile(np.array(samples), [tail, 100 - tail], axis=0)
    negative = eigenvalues[np.isfinite(eigenvalues)] < 0
    if low[0] == high[0]:  # resamples tell nothing of others
        effective = len(negative) * (stats.t.ppf(0.975, len(negative) - 1) / student) ** 2
        some, others = effective * negative.mean(), effective * (~negative).mean()
        low[0] = stats.beta.ppf(0.025, some, others + 1) if some else 0
        high[0] = stats.beta.ppf(0.975, some + 1, others) if others else 1
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))
