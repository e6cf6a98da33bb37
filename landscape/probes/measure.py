"""The objective and its metrics at one set of weights."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from landscape.batches import PreparedBatch
from landscape.objective import FrozenObjective, as_logits
from landscape.probes.batch_norm import recalibrated_buffers
from landscape.probes.metrics import Accuracy, CalibrationError, LossError

L2 = Literal["squared", "norms"]
BatchNorm = Literal["fixed", "recalibrate"]

_METERS: dict[str, type[Accuracy | CalibrationError]] = {
    "accuracy": Accuracy,
    "ece": CalibrationError,
}


class PointMeter:
    """Measures a frozen objective at any weights.

    Attributes:
        columns: Names of the values that `measure` returns.
        passes: Forward passes over the data that one measurement takes.
    """

    def __init__(
        self, frozen: FrozenObjective, metrics: Sequence[str], l2: L2, batch_norm: BatchNorm
    ) -> None:
        """Choose what to measure.

        Args:
            frozen: The objective on its model and data.
            metrics: Any of "accuracy" and "ece".
            l2: Definition of the L2 term, see `landscape.probes.surface`.
            batch_norm: Whether running statistics stay as found.
        """
        self._frozen, self._metrics, self._l2 = frozen, metrics, l2
        self._recalibrate = batch_norm == "recalibrate"
        self.columns = ("nll", "nll_stderr", "l2", *metrics)
        self.passes = 2 if self._recalibrate else 1

    def measure(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the values of `columns` as a float64 vector on the device.

        Args:
            parameters: Every parameter of the model by name.

        Raises:
            ValueError: If the targets do not allow a metric, at the first batch.
        """
        frozen = self._frozen
        loss, device = frozen.objective.loss, frozen.space.device
        with torch.no_grad():
            state = dict(parameters)
            if self._recalibrate:
                state.update(recalibrated_buffers(frozen, parameters))
            error, meters = LossError(loss, device), self._meters()
            nll = torch.zeros((), dtype=torch.float64, device=device)
            for batch in frozen.batches:
                mean, logits = self._loss_and_logits(state, batch)
                nll += batch.weight * mean.double()
                if logits is not None:
                    for meter in (error, *meters):
                        meter.add(logits, batch)
            extra = [meter.result() for meter in meters]
            return torch.stack([nll, error.result(nll), self._penalty(parameters), *extra])

    def _meters(self) -> list[Accuracy | CalibrationError]:
        loss, device = self._frozen.objective.loss, self._frozen.space.device
        return [_METERS[name](loss, device) for name in self._metrics]

    def _loss_and_logits(
        self, state: Mapping[str, Tensor], batch: PreparedBatch
    ) -> tuple[Tensor, Tensor | None]:
        frozen = self._frozen
        if frozen.objective.loss is not None:
            logits = frozen.logits(state, batch.inputs)
            return frozen.loss(logits, batch), logits
        if not self._metrics:
            return frozen.data_term(state, batch), None
        inputs = batch.inputs
        if isinstance(inputs, Mapping) and batch.targets is not None:
            inputs = {**inputs, "labels": batch.targets}
        outputs = frozen.outputs(state, inputs)
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs.loss
        return loss, as_logits(outputs)

    def _penalty(self, parameters: Mapping[str, Tensor]) -> Tensor:
        chosen = {name: parameters[name] for name in self._frozen.space.names}
        if self._l2 == "squared":
            return self._frozen.penalty(chosen)
        norms = [torch.linalg.vector_norm(p.double()) for p in chosen.values()]
        return self._frozen.objective.weight_decay * torch.stack(norms).sum()
