"""Trace of a symmetric operator by Hutch++ (Meyer, Musco, Musco & Woodruff, 2021, algorithm 1)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from landscape._checks import check_count
from landscape.linalg.operators import SymmetricOperator, generator_on, not_finite
from landscape.results import Provenance, Result

FEWEST = 6
"""Products of which each third still has a spread."""


@dataclass(frozen=True)
class TraceEstimate(Result):
    """Trace with its standard error.

    Attributes:
        value: Estimate of the trace.
        stderr: Standard error of the random part; 0 where nothing was left to sample.
        captured: Part of the trace taken exactly in the sketched subspace.
        samples: Random samples of the rest, shape `(s,)`.
        num_matvecs: Products that were spent.
        provenance: Where it came from.
    """

    value: float
    stderr: float
    captured: float
    samples: np.ndarray
    num_matvecs: int
    provenance: Provenance | None = None


def hutch_plus_plus(
    operator: SymmetricOperator,
    *,
    num_matvecs: int = 60,
    generator: torch.Generator,
    tick: Callable[[int], object] = lambda count: None,
) -> TraceEstimate:
    """Estimate a trace: exact on a sketched subspace Q, random on its complement.

        tr(A) = tr(Qᵀ A Q) + E[gᵀ (I − QQᵀ) A (I − QQᵀ) g],   Q = orth(A S),  g, S of signs ±1

    Args:
        operator: Any symmetric operator.
        num_matvecs: Products to spend, a third each for the sketch, its trace and the rest.
        generator: Source of the signs.
        tick: Called with their number after some products.

    Returns:
        The estimate; its relative error falls as 1 / `num_matvecs` for a decaying spectrum.

    Raises:
        ValueError: If `num_matvecs` is below 6, or a product is not finite.
    """
    check_count("num_matvecs", num_matvecs, FEWEST)
    size = min(num_matvecs // 3, operator.dim)
    sketch = operator @ _signs(operator, size, generator)
    tick(size)
    basis = torch.linalg.qr(sketch.double())[0]
    captured = float((basis * (operator @ basis.to(operator.dtype)).double()).sum())
    tick(size)
    spent = 2 * size
    samples = np.zeros(0)
    if size < operator.dim:
        probes = _signs(operator, size, generator).double()
        probes -= basis @ (basis.T @ probes)
        products = (operator @ probes.to(operator.dtype)).double()
        samples = (probes * products).sum(0).cpu().numpy()
        tick(size)
        spent += size
    rest = float(samples.mean()) if len(samples) else 0.0
    stderr = float(samples.std(ddof=1) / np.sqrt(len(samples))) if len(samples) else 0.0
    if not np.isfinite(captured + rest):
        raise not_finite(operator.dtype)
    return TraceEstimate(captured + rest, stderr, captured, samples, spent)


def _signs(operator: SymmetricOperator, count: int, generator: torch.Generator) -> Tensor:
    generator = generator_on(operator.device, generator)
    bits = torch.randint(
        2, (operator.dim, count), generator=generator, device=generator.device, dtype=torch.int8
    )
    return bits.to(operator.device, operator.dtype).mul_(2).sub_(1)
