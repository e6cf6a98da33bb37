"""The objective and its metrics at points of a line or a surface."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from landscape.batches import PreparedBatch
from landscape.objective import FrozenObjective, as_logits
from landscape.probes.batch_norm import recalibrated_buffers
from landscape.probes.forward import Forward
from landscape.probes.metrics import Accuracy, CalibrationError, LossError, check_classes
from landscape.probes.weights import MovedWeights
from landscape.recording import Repeated

L2 = Literal["squared", "norms"]
BatchNorm = Literal["fixed", "recalibrate"]

GROUP = 16
"""Points on a GPU between two looks at their values, a heuristic: a look waits for the device."""

_METERS: dict[str, type[Accuracy | CalibrationError]] = {
    "accuracy": Accuracy,
    "ece": CalibrationError,
}


class PointMeter:
    """Measures a frozen objective at points θ + Σ_k a_k d_k.

    Attributes:
        columns: Names of the values that `measure` returns.
        passes: Forward passes over the data that one measurement takes.
        group: Number of points to measure in one call.
    """

    def __init__(
        self,
        frozen: FrozenObjective,
        vectors: Sequence[Mapping[str, Tensor]],
        metrics: Sequence[str],
        l2: L2,
        batch_norm: BatchNorm,
    ) -> None:
        """Choose what to measure.

        Args:
            frozen: The objective on its model and data.
            vectors: The directions d_k, as `Directions.tensors` gives them.
            metrics: Any of "accuracy" and "ece".
            l2: Definition of the L2 term, see `landscape.probes.surface`.
            batch_norm: Whether running statistics stay as found.
        """
        self._frozen, self._l2 = frozen, l2
        self._start, self._vectors = {**frozen.space.fixed, **frozen.space.values}, vectors
        recalibrate = batch_norm == "recalibrate"
        self.columns = ("nll", "nll_stderr", "l2", *metrics)
        self.passes = 2 if recalibrate else 1
        with torch.no_grad():
            if metrics:
                check_classes(next(iter(frozen.batches)).targets)
            forward = Forward(frozen)
            weights = MovedWeights(self._start, vectors, channels_last=forward.channels_last)
        row = _Row(frozen, forward, weights, metrics, l2, recalibrate)
        self._row = Repeated(row, frozen.space.device, recordable=not frozen.draws)
        self.group = 1 if self._row.stream is None else GROUP

    def measure(self, points: Sequence[Sequence[float]]) -> Tensor:
        """Return the values of `columns`, `(points, columns)`, in float64 on the device.

        Args:
            points: Coordinates (a_1, …) of each.

        Raises:
            ValueError: If the targets do not allow a metric, at the first batch.
        """
        device = self._frozen.space.device
        with torch.no_grad():
            placed = torch.tensor(points, dtype=torch.float64, device=device)
            return torch.stack([self._row(point) for point in placed])

    def penalties(self, points: Sequence[Sequence[float]]) -> np.ndarray:
        """Return the L2 term at each point, `(points,)`, from inner products alone.

        ‖p + Σ_k a_k d_k‖² = cᵀ G c with c = (1, a_1, …) and the Gram matrix G of p and the d_k:
        the value of `measure` but for the rounding of the weights.

        Args:
            points: Coordinates (a_1, …) of each.
        """
        decay = self._frozen.objective.weight_decay
        total = np.zeros(len(points))
        if not decay:
            return total
        c = np.insert(np.asarray(points, dtype=np.float64), 0, 1.0, axis=1)
        for name in self._frozen.space.names:
            vectors = [v[name] for v in self._vectors if name in v]
            rows = torch.stack([t.double().reshape(-1) for t in (self._start[name], *vectors)])
            gram = (rows @ rows.T).cpu().numpy()
            used = c[:, : len(gram)]
            squares = np.einsum("pi,ij,pj->p", used, gram, used).clip(0)
            total += 0.5 * squares if self._l2 == "squared" else np.sqrt(squares)
        return decay * total


@dataclass(frozen=True)
class _Row:
    """The values of `columns` at one point, on the device from its coordinates to the end."""

    frozen: FrozenObjective
    forward: Forward
    weights: MovedWeights
    metrics: Sequence[str]
    l2: L2
    recalibrate: bool

    def __call__(self, point: Tensor) -> Tensor:
        frozen = self.frozen
        state = {**self.weights.start, **self.weights.at(point)}
        if self.recalibrate:
            state.update(recalibrated_buffers(frozen, state))
        sums = _Sums(frozen, self.metrics)
        for batch in frozen.batches:
            sums.add(*self._loss(state, batch), batch)
        return sums.row(self._penalty(state))

    def _loss(
        self, state: Mapping[str, Tensor], batch: PreparedBatch
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss of one batch, and the outputs."""
        if self.frozen.objective.loss is None:
            loss, outputs = self.frozen.own_loss(state, batch)
            return loss, as_logits(outputs) if self.metrics else None
        logits = self.forward.logits(state, batch.inputs, batch.size)
        return self.frozen.loss(logits, batch), logits

    def _penalty(self, state: Mapping[str, Tensor]) -> Tensor:
        chosen = {name: state[name] for name in self.frozen.space.names}
        if self.l2 == "squared":
            return self.frozen.penalty(chosen)
        norms = [torch.linalg.vector_norm(p.double()) for p in chosen.values()]
        return self.frozen.objective.weight_decay * torch.stack(norms).sum()


class _Sums:
    """The sums over batches at one point."""

    def __init__(self, frozen: FrozenObjective, metrics: Sequence[str]) -> None:
        loss, device = frozen.objective.loss, frozen.space.device
        self._nll = torch.zeros((), dtype=torch.float64, device=device)
        self._error = LossError(loss, device)
        self._meters = [_METERS[name](loss) for name in metrics]

    def add(self, mean: Tensor, logits: Tensor | None, batch: PreparedBatch) -> None:
        self._nll += batch.weight * mean.double()
        if logits is not None:
            for meter in (self._error, *self._meters):
                meter.add(logits, batch)

    def row(self, penalty: Tensor) -> Tensor:
        extra = [meter.result() for meter in self._meters]
        return torch.stack([self._nll, self._error.result(self._nll), penalty, *extra])
