"""How far confidence and accuracy differ, by bins of the confidence (Guo et al. 2017, eq. 3)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

NUM_BINS = 15
"""Bins of the expected calibration error, as in Guo et al. (2017)."""


def largest_probability(logits: Tensor) -> Tensor:
    """Return the largest softmax probability of outputs `(n, classes, …)`, in float64."""
    return logits.double().softmax(1).amax(1)


class CalibrationBins:
    """Sums over the samples of equal bins (low, high] of the confidence, in float64 on the device.

    With c the confidence of a sample, its largest softmax probability, and r = 1 where the
    prediction is right (else 0), ECE = Σ_b |Σ (r − c)| / n, the inner sum over the samples of bin
    b. A sample with a NaN confidence is in no bin, and makes all errors NaN.
    """

    def __init__(self, num_bins: int = NUM_BINS) -> None:
        self._num_bins = num_bins
        self._count = torch.zeros((), dtype=torch.float64, device="cpu")
        self._sums = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, confidence: Tensor, right: Tensor, counted: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            confidence: `(n,)` in float64: c of each sample.
            right: `(n,)` in float64: its r.
            counted: `(n,)` in float64: 0 where a sample does not count, else 1; by default all do.
        """
        ones = torch.ones_like(confidence)
        counted = ones if counted is None else counted
        edges = self._edges(confidence.device)
        inside = (confidence[:, None] > edges[:-1]) & (confidence[:, None] <= edges[1:])
        gap = right - confidence
        columns = [ones, confidence, right, gap**2, confidence * (1 - confidence)]
        # A NaN confidence is in no bin; as NaN times 0 it would be in all.
        values = torch.stack(columns, dim=1).nan_to_num(0.0) * counted[:, None]
        self._sums = self._sums + inside.double().T @ values
        self._count = self._count + torch.where(confidence.isnan(), torch.nan, counted).sum()

    def error(self) -> Tensor:
        """Return the expected calibration error, on the device."""
        return (self._sums[:, 2] - self._sums[:, 1]).abs().sum() / self._count

    def fields(self) -> dict[str, Any]:
        """Return the fields of an `Evaluation`; its module has the formulas."""
        ece, num_samples = float(self.error()), float(self._count)
        count, confidence, right, squares, noise = self._sums.cpu().numpy().T
        # Σ (±(r − c) − ece)² = Σ (r − c)² − n·ece²
        spread = max(float(squares.sum()) / num_samples - ece**2, 0.0)
        held = np.where(count > 0, count, np.nan)
        return {
            "ece": ece,
            "ece_stderr": float(np.sqrt(spread / (num_samples - 1))) if num_samples > 1 else np.nan,
            "ece_noise": float(np.minimum(np.sqrt(2 / np.pi * noise), 2 * noise).sum())
            / num_samples,
            "bin_edges": self._edges(torch.device("cpu")).numpy(),
            "bin_count": count.round().astype(np.int64),
            "bin_confidence": confidence / held,
            "bin_accuracy": right / held,
        }

    def _edges(self, device: torch.device) -> Tensor:
        edges = torch.arange(self._num_bins + 1, dtype=torch.float64, device=device)
        return edges / self._num_bins
