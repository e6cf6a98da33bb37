"""Scores of a classifier clean and under every corruption, summed in one pass over the data."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from landscape.probes.calibration import CalibrationBins, largest_probability
from landscape.probes.scores import Moments, Truth, Truths


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
        self._truths = Truths()
        self._clean, self._mean = Moments(), Moments()
        self._sums: list[Tensor] = []  # of the errors clean and under each corruption ...
        self._products: list[Tensor] = []  # ... and of their products, one of each per batch
        self._changed = [Moments() for _ in self.conditions]
        self._clean_bins = CalibrationBins()
        self._bins = [CalibrationBins() for _ in self.conditions]
        self._scores: list[Tensor] = []  # of the present batch, clean ones first

    def add_clean(self, logits: Tensor, targets: Tensor | None) -> Truth:
        """Begin a batch; return what its outputs are compared with."""
        truth = self._truths.read(logits, targets)
        self._scores = [truth.scores(logits)]
        self._clean.add(self._scores[0])
        self._clean_bins.add(largest_probability(logits), self._scores[0][:, 1])
        return truth

    def add(self, condition: int, logits: Tensor, truth: Truth) -> None:
        """Add the outputs for the batch under one condition."""
        scores = truth.scores(logits)
        self._changed[condition].add(torch.cat([scores, scores - self._scores[0]], dim=1))
        self._bins[condition].add(largest_probability(logits), scores[:, 1])
        self._scores.append(scores)

    def close_batch(self) -> None:
        """End a batch, all conditions of which were added in turn."""
        changed = torch.stack(self._scores[1:])
        self._mean.add(changed.mean(0))
        wrong = 1 - changed[..., 1].view(len(self._names), len(self._levels), -1).mean(1)
        wrong = torch.cat([1 - self._scores[0][None, :, 1], wrong])
        self._sums.append(wrong.sum(1))
        self._products.append(wrong @ wrong.T)
        self.count += wrong.shape[1]

    def fields(self) -> dict[str, Any]:
        """Return the fields of the result; one transfer.

        Raises:
            ValueError: If a label was no class of the model.
        """
        self._truths.finish()
        clean, mean = (moments.result().cpu().numpy() for moments in (self._clean, self._mean))
        shape = (len(self._names), len(self._levels))
        rows = torch.stack([each.result() for each in self._changed]).cpu().numpy()
        nll, right, nll_step, right_step = (rows[..., i].T.reshape(2, *shape) for i in range(4))
        ece = torch.stack([bins.error() for bins in (*self._bins, self._clean_bins)]).cpu().numpy()
        return {
            "corruptions": self._names,
            "severities": self._levels,
            "error": 1 - right[0],
            "error_stderr": right[1],
            "error_increase": -right_step[0],
            "error_increase_stderr": right_step[1],
            "nll": nll[0],
            "nll_stderr": nll[1],
            "nll_increase": nll_step[0],
            "nll_increase_stderr": nll_step[1],
            "ece": ece[:-1].reshape(shape),
            "clean_error": float(1 - clean[0, 1]),
            "clean_error_stderr": float(clean[1, 1]),
            "clean_nll": float(clean[0, 0]),
            "clean_nll_stderr": float(clean[1, 0]),
            "clean_ece": float(ece[-1]),
            "mean_corruption_error": float(1 - mean[0, 1]),
            "mean_corruption_error_stderr": float(mean[1, 1]),
            "error_covariance": self._covariance(),
        }

    def _covariance(self) -> np.ndarray:
        """Return the covariance of the mean errors, clean and under each corruption."""
        sums, products = (torch.stack(each).sum(0) for each in (self._sums, self._products))
        spread = (products - sums.outer(sums) / self.count) / self.count
        freedom = self.count - 1
        covariance: np.ndarray = (spread / freedom if freedom else spread * torch.nan).cpu().numpy()
        return covariance
