"""How right a model is about each sample, and means of that over all samples.

With p the softmax of the outputs, a sample of label y has the negative log-likelihood −log p_y (in
nats), and is right where its largest output is that of y. With soft targets t the former is
−Σ_k t_k log p_k, and the label is the largest entry of t.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from landscape._checks import as_numbers
from landscape._progress import track
from landscape.batches import LABEL_KEYS, stream_batches
from landscape.probes.metrics import hits
from landscape.results import Result


def tracked_batches(
    model: nn.Module,
    data: Iterable[Any],
    description: str,
    progress: bool,
    other: nn.Module | None = None,
) -> Iterator[tuple[Any, Any, int]]:
    """Return `stream_batches(model, data, other)` behind a progress bar."""
    total = operator.length_hint(data) or None
    return iter(track(stream_batches(model, data, other), description, progress, total))


@dataclass(frozen=True)
class Truth:
    """What the outputs for a batch are compared with.

    Attributes:
        labels: `(n,)`: class of each sample.
        soft: `(n, classes)`: its target probabilities, or `None` for the label alone.
    """

    labels: Tensor
    soft: Tensor | None

    def nll(self, logits: Tensor) -> Tensor:
        """Return the negative log-likelihood of each sample in nats, `(n,)` in float64."""
        # In float64 its gradient is right, too, where a probability rounds to 1 in float32.
        log_p = logits.double().log_softmax(1)
        if self.soft is None:
            return -log_p.gather(1, self.labels[:, None])[:, 0]
        # A class that was ruled out, by an output of −∞, counts nothing where its target is 0.
        return -torch.where(self.soft > 0, self.soft * log_p, 0.0).sum(1)

    def scores(self, logits: Tensor) -> Tensor:
        """Return `(n, 2)` in float64: NLL, and 1 where the prediction is right."""
        return torch.stack([self.nll(logits), hits(logits, self.labels, ignore=-1)[0]], dim=1)


class LargestSoFar:
    """Largest values over batches, on a GPU checked after the first batch and at the end.

    So that the host need not wait for the device in between.
    """

    def __init__(self, check: Callable[[Sequence[float]], None]) -> None:
        """Set what `check` is told: the largest values up to now."""
        self._check = check
        self._largest: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Add the values `(k,)` of one batch."""
        first = self._largest is None
        self._largest = values if self._largest is None else torch.maximum(self._largest, values)
        if first or values.device.type == "cpu":
            self.finish()

    def finish(self) -> None:
        """Check all that was added."""
        if self._largest is not None:
            self._check(self._largest.tolist())


class Truths:
    """Reads the targets of batches, and refuses those that are no classes of the model.

    Attributes:
        num_classes: Number of outputs of the model.
    """

    def __init__(self) -> None:
        self.num_classes = 0
        self._largest = LargestSoFar(self._check)

    def read(self, logits: Tensor, targets: Tensor | None) -> Truth:
        """Return the truth of one batch; labels out of range are refused in `finish` at last.

        Args:
            logits: Outputs `(n, classes)`.
            targets: Labels `(n,)` or probabilities `(n, classes)`.

        Raises:
            ValueError: If outputs or targets have another shape.
        """
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(
                "`model` must return one output for each of two or more classes, (n, classes), "
                f"got shape {tuple(logits.shape)}; wrap the model."
            )
        if targets is None:
            raise ValueError(
                "`data` must hold class labels, got no targets; pass (x, y), or a mapping with "
                f"one of {LABEL_KEYS}."
            )
        soft = targets.is_floating_point()
        if targets.shape != (logits.shape if soft else logits.shape[:1]):
            raise ValueError(
                "`data` must hold integer labels (n,) or target probabilities (n, classes), got "
                f"{targets.dtype} {tuple(targets.shape)} for outputs {tuple(logits.shape)}."
            )
        self.num_classes = logits.shape[1]
        labels = targets.argmax(1) if soft else targets.long()
        lowest, highest = labels.aminmax()
        off = (targets.double().sum(1) - 1).abs().amax() if soft else lowest.new_zeros(())
        negative = -targets.amin() if soft else lowest.new_zeros(())
        self._largest.add(torch.stack([t.double() for t in (-lowest, highest, off, negative)]))
        return Truth(labels.clamp(0, self.num_classes - 1), targets if soft else None)

    def finish(self) -> None:
        """Refuse the data if a label was no class of the model, or a soft target no probability."""
        self._largest.finish()

    def _check(self, largest: Sequence[float]) -> None:
        lowest, highest, off, negative = 0.0 - largest[0], *largest[1:]
        if lowest < 0 or highest >= self.num_classes:
            raise ValueError(
                f"`data` must have labels in 0 … {self.num_classes - 1} for the "
                f"{self.num_classes} outputs of `model`, got labels from {lowest:.0f} to "
                f"{highest:.0f}; leave out samples without a label."
            )
        if not (off <= 1e-2 and negative <= 0):
            raise ValueError(
                "`data` must have soft targets that are probabilities, got entries as low as "
                f"{-negative:.3g} and sums that differ from 1 by up to {off:.3g}."
            )


class Moments:
    """Mean over samples and its standard error, merged batch by batch in float64 on the device.

    Sums of squares are taken about the means (Chan, Golub & LeVeque, 1983), so equal
    values have no error at all. NaN and infinite values make the mean what they are.

    Attributes:
        count: Number of samples.
    """

    def __init__(self) -> None:
        self.count = 0
        self._total = self._squares = torch.empty(0, device="cpu")

    def add(self, values: Tensor) -> None:
        """Add the values `(n, k)` of one batch."""
        values, n = values.double(), len(values)
        total = values.sum(0)
        squares = (values - total / n).square().sum(0)
        if self.count:
            step = total / n - self._total / self.count
            squares = squares + self._squares + step**2 * (n * self.count / (n + self.count))
            total = total + self._total
        self.count, self._total, self._squares = self.count + n, total, squares

    def result(self) -> Tensor:
        """Return `(2, k)`: means, and √(s²/n) of the unbiased s² (NaN for a single sample)."""
        spread = self._squares / (self.count - 1) if self.count > 1 else self._squares * torch.nan
        return torch.stack([self._total / self.count, (spread / self.count).sqrt()])


@dataclass(frozen=True)
class PairedResult(Result):
    """What results of NLL and accuracy under `k` conditions share, against the clean samples.

    Attributes:
        accuracy: `(k,)`: accuracy under each condition.
        accuracy_stderr: `(k,)`: its standard error over samples.
        delta_accuracy: `(k,)`: its difference from the clean accuracy.
        delta_accuracy_stderr: `(k,)`: its paired standard error.
        nll: `(k,)`: mean negative log-likelihood, in nats.
        nll_stderr: `(k,)`: its standard error over samples.
        delta_nll: `(k,)`: its difference from the clean one.
        delta_nll_stderr: `(k,)`: its paired standard error.
        clean_accuracy: Accuracy without any condition.
        clean_accuracy_stderr: Its standard error.
        clean_nll: NLL without any condition.
        clean_nll_stderr: Its standard error.
    """

    accuracy: np.ndarray
    accuracy_stderr: np.ndarray
    delta_accuracy: np.ndarray
    delta_accuracy_stderr: np.ndarray
    nll: np.ndarray
    nll_stderr: np.ndarray
    delta_nll: np.ndarray
    delta_nll_stderr: np.ndarray
    clean_accuracy: float
    clean_accuracy_stderr: float
    clean_nll: float
    clean_nll_stderr: float


class PairedScores:
    """NLL and accuracy under several conditions, against the same samples left clean.

    Attributes:
        clean: `(n, 2)`: scores of the present batch left clean.
    """

    clean: Tensor

    def __init__(self, num_conditions: int) -> None:
        """Set the number of conditions."""
        self._truths = Truths()
        self._clean = Moments()
        self._changed = [Moments() for _ in range(num_conditions)]

    @property
    def count(self) -> int:
        """Number of samples."""
        return self._clean.count

    def add_clean(self, logits: Tensor, targets: Tensor | None) -> Truth:
        """Begin a batch; return what its outputs are compared with."""
        truth = self._truths.read(logits, targets)
        self.clean = truth.scores(logits)
        self._clean.add(self.clean)
        return truth

    def add(self, condition: int, scores: Tensor) -> None:
        """Add the scores `(n, 2)` of the batch under one condition."""
        self._changed[condition].add(torch.cat([scores, scores - self.clean], dim=1))

    def fields(self) -> dict[str, Any]:
        """Return the fields of a `PairedResult`; one transfer.

        Raises:
            ValueError: If a label was no class of the model.
        """
        self._truths.finish()
        clean = torch.cat([self._clean.result(), self._clean.result() * 0], dim=1)
        rows = torch.stack([clean, *(each.result() for each in self._changed)]).cpu().numpy()
        fields: dict[str, Any] = {}
        for column, name in enumerate(("nll", "accuracy", "delta_nll", "delta_accuracy")):
            for kind, suffix in enumerate(("", "_stderr")):
                values = rows[:, kind, column]
                fields[name + suffix] = values[1:].copy()
                if column < 2:
                    fields[f"clean_{name}{suffix}"] = float(values[0])
        return fields


def increasing(name: str, values: Sequence[float]) -> np.ndarray:
    """Return the values of the conditions as an array `(k,)`.

    Raises:
        ValueError: If they are none, not finite, negative, or do not increase.
    """
    wanted = "numbers from 0 upwards that increase"
    array = as_numbers(name, values, wanted)
    good = array.ndim == 1 and array.size > 0 and bool(np.isfinite(array).all())
    if not good or array[0] < 0 or not (np.diff(array) > 0).all():
        raise ValueError(f"`{name}` must be {wanted}, got {values!r}.")
    return array
