"""How good and how well calibrated the predictions of a classifier are, in one pass.

With p the softmax of the outputs for a sample of label y, its confidence c the largest p_k, and r
= 1 where that is p_y (else 0), over n samples:

- NLL = mean of −log p_y, in nats;
- Brier = mean of Σ_k (p_k − [k = y])², the sum over classes: from 0 to 2 (Brier, 1950);
- ECE = Σ_b |s_b| / n with s_b = Σ (r − c) over the samples of bin b, one of equal bins (low, high]
  of the confidence (Guo et al. 2017, eq. 3).

ECE is biased: |s_b| does not average to 0 for a calibrated model. With V = Σ c(1 − c) it averages
to √(2/π · V) where that is large, and to 2V, which it never exceeds, where hardly a sample will be
wrong. The sum over bins of the smaller of these, over n, is the ECE that a perfectly calibrated
model of the same confidences would show, and it comes with the result. Where a gap stands out from
its noise, |s_b| is ±s_b and ECE a mean over samples of ±(r − c): that is its standard error here.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from landscape._checks import check_count
from landscape.objective import predict
from landscape.probes.calibration import NUM_BINS, CalibrationBins
from landscape.probes.scores import Moments, Truth, Truths, tracked_batches
from landscape.provenance import forward_provenance
from landscape.restore import untouched
from landscape.results import Provenance, Result


@dataclass(frozen=True)
class Evaluation(Result):
    """Quality and calibration of a classifier; shares are between 0 and 1.

    Standard errors are over samples, NaN for a single one.

    Attributes:
        num_samples: Number of samples.
        num_classes: Number of classes.
        num_nonfinite: Number of samples whose NLL is NaN or infinite; they are kept, so the means
            are not finite either.
        nll: Mean negative log-likelihood, in nats.
        nll_stderr: Its standard error.
        accuracy: Share of samples whose largest output is the label.
        accuracy_stderr: Its standard error.
        top5: Share of samples whose label is among the five largest outputs; `None` where there
            are fewer than five classes.
        top5_stderr: Its standard error, or `None`.
        brier: Mean Brier score, the sum over classes, from 0 to 2.
        brier_stderr: Its standard error.
        ece: Expected calibration error.
        ece_stderr: Its standard error where the gaps of the bins are larger than their noise.
        ece_noise: The `ece` that a perfectly calibrated model with these confidences is expected
            to show on as many samples; one of this size says nothing.
        bin_edges: `(bins + 1,)`: edges of the bins of the confidence, from 0 to 1.
        bin_count: `(bins,)`: number of samples in each.
        bin_confidence: `(bins,)`: their mean confidence, NaN in an empty bin.
        bin_accuracy: `(bins,)`: share of them that are right, NaN in an empty bin.
        provenance: Where the result came from.
    """

    _plot: ClassVar[str | None] = "reliability_diagram"

    num_samples: int
    num_classes: int
    num_nonfinite: int
    nll: float
    nll_stderr: float
    accuracy: float
    accuracy_stderr: float
    top5: float | None
    top5_stderr: float | None
    brier: float
    brier_stderr: float
    ece: float
    ece_stderr: float
    ece_noise: float
    bin_edges: np.ndarray
    bin_count: np.ndarray
    bin_confidence: np.ndarray
    bin_accuracy: np.ndarray
    provenance: Provenance


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    num_bins: int = NUM_BINS,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a classifier: NLL, accuracy, top-5 accuracy, calibration error, Brier score.

    The formulas stand at the top of this module. With soft targets t the NLL is −Σ_k t_k log p_k,
    the Brier score Σ_k (p_k − t_k)², and the label the largest entry of t. Ties count as in a sort
    that keeps the order of the classes. Cost: one forward pass over the data; memory does not grow
    with them.

    Args:
        model: Any module that returns a tensor `(n, classes)` or has it as `.logits`; left as it
            was found.
        data: Re-iterable of batches, each `(x, y)` or a mapping; labels `(n,)` or target
            probabilities `(n, classes)`.
        num_bins: Bins of the expected calibration error.
        progress: Show a progress bar.

    Returns:
        The evaluation.

    Raises:
        TypeError: If `data` cannot be iterated over twice.
        ValueError: If `num_bins` is below 1, or outputs or targets are not those of a classifier;
            ignored labels are refused.
    """
    check_count("num_bins", num_bins, 1)
    start = time.perf_counter()
    batches = tracked_batches(model, data, "Evaluation", progress)
    truths, moments, bins = Truths(), Moments(), CalibrationBins(num_bins)
    with untouched(model), torch.no_grad():
        for inputs, targets, _ in batches:
            logits = predict(model, inputs)
            truth = truths.read(logits, targets)
            scores, p = truth.scores(logits), logits.double().softmax(1)
            nonfinite = ~scores[:, 0].isfinite()
            columns = [scores.T, _top5(logits, truth), _brier(p, truth), nonfinite.double()]
            moments.add(torch.cat([c.reshape(-1, len(p)) for c in columns]).T)
            bins.add(p.amax(1), scores[:, 1])
    truths.finish()
    means, errors = moments.result().tolist()
    has_top5 = truths.num_classes >= 5
    return Evaluation(
        num_samples=moments.count,
        num_classes=truths.num_classes,
        num_nonfinite=round(means[4] * moments.count),
        nll=means[0],
        nll_stderr=errors[0],
        accuracy=means[1],
        accuracy_stderr=errors[1],
        top5=means[2] if has_top5 else None,
        top5_stderr=errors[2] if has_top5 else None,
        brier=means[3],
        brier_stderr=errors[3],
        **bins.fields(),
        provenance=forward_provenance(
            model,
            num_samples=moments.count,
            seconds=time.perf_counter() - start,
            num_forwards=1,
            settings={"num_bins": num_bins},
        ),
    )


def _top5(logits: Tensor, truth: Truth) -> Tensor:
    """Return 1 where fewer than five outputs come before that of the label, `(n,)`."""
    own = logits.gather(1, truth.labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < truth.labels[:, None]
    before = ((logits > own) | ((logits == own) & earlier)).sum(1)
    return torch.where(logits.isnan().any(1), torch.nan, (before < 5).double())


def _brier(p: Tensor, truth: Truth) -> Tensor:
    target = truth.soft
    if target is None:
        target = nn.functional.one_hot(truth.labels, p.shape[1])
    return (p - target.double()).square().sum(1)
