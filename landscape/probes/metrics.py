"""What is measured at one point of a surface, summed batch by batch in float64 on the device.

The sums are over samples, so nothing depends on how the data were batched, and a sample with NaN
among its outputs makes every metric of the point NaN.
"""

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from landscape.batches import PreparedBatch
from landscape.losses import counts_labels, for_loss, is_probability, loss_settings, sample_weights
from landscape.probes.calibration import CalibrationBins, largest_probability


class LossError:
    """Standard error over samples of a mean loss.

    With terms c_n and weights a_n of the samples, the mean is m = Σ c_n / Σ a_n, and with shares
    w_n = a_n / Σ a_n, S = Σ w_n² and T = Σ w_n³ the square of its standard error

        S / (S + S² − 2T) · Σ (c_n − a_n m)² / (Σ a_n)²,

    which has no bias where the losses c_n / a_n have one variance. For a_n = 1 it is the usual one,
    as the factor is n/(n−1) then; samples of large weight draw the mean to themselves.
    """

    def __init__(self, loss: Any, device: torch.device) -> None:
        self._loss, self._unreduced = loss, unreduced(loss)
        self._sums = torch.zeros(7, dtype=torch.float64, device=device)  # n, c, …, aaa

    def add(self, logits: Tensor, batch: PreparedBatch) -> None:
        """Add one batch."""
        if self._unreduced is None or batch.targets is None:
            return
        losses = self._unreduced(for_loss(self._loss, logits), batch.targets)
        if losses.dim() == 0 or len(losses) != batch.size:
            self._unreduced = None
            return
        a = sample_weights(self._loss, batch.targets)
        c = losses.detach().double().reshape(batch.size, -1)
        # Where weights are counts of labels (segmentation) they belong to a sum, else to a mean.
        c = c.sum(1) if counts_labels(self._loss, batch.targets) else c.mean(1)
        counted = (a > 0).sum()
        self._sums += torch.stack([counted, c.sum(), a.sum(), c @ c, c @ a, a @ a, (a**3).sum()])

    def result(self, mean: Tensor) -> Tensor:
        """Return the standard error of `mean`, NaN where the loss has no terms by sample."""
        n, c, a, cc, ca, aa, aaa = self._sums
        squares = (cc - 2 * mean * ca + mean**2 * aa).clamp_min(0)
        s, t = aa / a**2, aaa / a**3
        error = (squares * s / (s + s**2 - 2 * t)).sqrt() / a
        # A loss whose own mean is another one has unreduced terms that mean something else.
        known = (c / a - mean).abs() <= 1e-3 * mean.abs()
        return torch.where(known & (n > 1), error, torch.nan)


class Accuracy:
    """Share of the samples whose largest output is the label.

    Soft targets count as the class of their largest entry; ignored labels do not count.
    """

    def __init__(self, loss: Any) -> None:
        self._ignore = loss_settings(loss)[1]
        self._sums = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, logits: Tensor, batch: PreparedBatch) -> None:
        """Add one batch."""
        right, counted = hits(logits, batch.targets, self._ignore)
        self._sums = self._sums + torch.stack([right.sum(), counted.sum()])

    def result(self) -> Tensor:
        """Return the accuracy."""
        return self._sums[0] / self._sums[1]


class CalibrationError:
    """Expected calibration error over `NUM_BINS` bins; ignored labels do not count."""

    def __init__(self, loss: Any) -> None:
        self._ignore = loss_settings(loss)[1]
        self._bins = CalibrationBins()

    def add(self, logits: Tensor, batch: PreparedBatch) -> None:
        """Add one batch."""
        right, counted = hits(logits, batch.targets, self._ignore)
        self._bins.add(*(t.reshape(-1) for t in (largest_probability(logits), right, counted)))

    def result(self) -> Tensor:
        """Return the expected calibration error."""
        return self._bins.error()


def check_classes(targets: Tensor | None) -> None:
    """Refuse floating targets that are no class probabilities.

    Regression and several labels a sample are: what the largest entry is says nothing there.

    Raises:
        ValueError: If a row has one entry, a negative one, or a sum other than 1.
    """
    if targets is None or not targets.is_floating_point():
        return
    if targets.dim() < 2 or targets.shape[1] < 2 or not is_probability(targets):
        raise ValueError(
            "`metrics` must be ('loss',) where the targets are no class labels, got floating "
            f"targets {tuple(targets.shape)} that are no probabilities of two or more classes."
        )


def hits(logits: Tensor, targets: Tensor | None, ignore: int) -> tuple[Tensor, Tensor]:
    """Return (1 where the prediction is right, 1 where the label counts), in float64.

    Raises:
        ValueError: If the targets are not class labels of these outputs, or there is one class.
    """
    labels = targets
    if targets is not None and targets.is_floating_point() and targets.shape == logits.shape:
        labels = targets.argmax(1) if logits.dim() > 1 else None
    if (
        labels is None
        or labels.is_floating_point()
        or logits.dim() < 2
        or logits.shape[1] < 2
        or labels.shape != logits.shape[:1] + logits.shape[2:]
    ):
        got = "no targets" if targets is None else f"{targets.dtype} {tuple(targets.shape)}"
        raise ValueError(
            "`metrics` must be ('loss',) where the targets are no labels of two or more classes, "
            f"got {got} for outputs of shape {tuple(logits.shape)}."
        )
    counted = (labels != ignore).double()
    right = (logits.argmax(1) == labels).double() * counted
    right = torch.where(logits.isnan().any(1), torch.nan, right)
    return right, counted


def unreduced(loss: Any) -> Any:
    """Return the loss with `reduction="none"`, or `None` where it has no such setting."""
    if isinstance(loss, nn.Module):
        if not hasattr(loss, "reduction"):
            return None
        loss = copy.copy(loss)
        loss.reduction = "none"
        return loss
    function = loss.func if isinstance(loss, functools.partial) else loss
    try:
        has_reduction = "reduction" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return functools.partial(loss, reduction="none") if has_reduction else None
