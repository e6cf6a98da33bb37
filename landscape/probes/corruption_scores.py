"""Scores of a classifier clean and under every corruption, summed in one pass over the data."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from landscape.probes.calibration import CalibrationBins, largest_probability
from landscape.probes.scores import PairedScores, Truth


class CorruptionScores:
    """Error, NLL and calibration of every sample clean and under each condition.

    Attributes:
        conditions: Pairs of corruption and severity, severities running fastest.
        count: Number of samples of the batches that were closed.
    """

    def __init__(self, corruptions: tuple[str, ...], severities: tuple[int, ...]) -> None:
        """Set the conditions: every corruption at every severity."""
        self.conditions = [(name, level) for name in corruptions for level in severities]
        self.count = 0
        self._names, self._levels = corruptions, severities
        self._paired = PairedScores(len(self.conditions))
        # Of each batch (1 + corruptions, n): error clean, and mean over severities.
        self._wrong: list[Tensor] = []
        self._clean_bins = CalibrationBins()
        self._bins = [CalibrationBins() for _ in self.conditions]
        self._scores: list[Tensor] = []  # of the present batch under each condition

    def add_clean(self, logits: Tensor, targets: Tensor | None) -> Truth:
        """Begin a batch; return what its outputs are compared with."""
        truth = self._paired.add_clean(logits, targets)
        self._clean_bins.add(largest_probability(logits), self._paired.clean[:, 1])
        return truth

    def add(self, condition: int, logits: Tensor, truth: Truth) -> None:
        """Add the outputs for the batch under one condition."""
        scores = truth.scores(logits)
        self._paired.add(condition, scores)
        self._bins[condition].add(largest_probability(logits), scores[:, 1])
        self._scores.append(scores)

    def close_batch(self) -> None:
        """End a batch, all conditions of which were added in turn."""
        wrong = 1 - torch.stack(self._scores)[..., 1].view(len(self._names), len(self._levels), -1)
        self._wrong.append(torch.cat([1 - self._paired.clean[None, :, 1], wrong.mean(1)]))
        self._scores = []
        self.count = self._paired.count

    def fields(self) -> dict[str, Any]:
        """Return the fields of the result; one transfer.

        Raises:
            ValueError: If a label was no class of the model.
        """
        paired, wrong = self._paired.fields(), torch.cat(self._wrong, dim=1)
        centred = wrong - wrong.mean(1, keepdim=True)
        covariance = (centred @ centred.T / (self.count * (self.count - 1))).cpu().numpy()
        ece = torch.stack([bins.error() for bins in (*self._bins, self._clean_bins)]).cpu().numpy()
        shape = (len(self._names), len(self._levels))
        tables = {
            "error": 1 - paired["accuracy"],
            "error_stderr": paired["accuracy_stderr"],
            "error_increase": -paired["delta_accuracy"],
            "error_increase_stderr": paired["delta_accuracy_stderr"],
            "nll": paired["nll"],
            "nll_stderr": paired["nll_stderr"],
            "nll_increase": paired["delta_nll"],
            "nll_increase_stderr": paired["delta_nll_stderr"],
            "ece": ece[:-1],
        }
        return {
            "corruptions": self._names,
            "severities": self._levels,
            **{name: table.reshape(shape) for name, table in tables.items()},
            "clean_error": 1 - paired["clean_accuracy"],
            "clean_error_stderr": paired["clean_accuracy_stderr"],
            "clean_nll": paired["clean_nll"],
            "clean_nll_stderr": paired["clean_nll_stderr"],
            "clean_ece": float(ece[-1]),
            "mean_corruption_error": float(1 - paired["accuracy"].mean()),
            "mean_corruption_error_stderr": float(np.sqrt(covariance[1:, 1:].mean().clip(0))),
            "error_covariance": covariance,
        }
