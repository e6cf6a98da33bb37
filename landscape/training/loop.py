"""One epoch of training and one of validation."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from landscape import trial
from landscape._checks import check_differentiable, check_materialised, check_module, check_type
from landscape._loaders import with_own_workers
from landscape.batches import (
    Inputs,
    Placement,
    Transform,
    call_on,
    copied,
    split_batch,
    transformed,
)
from landscape.losses import Loss, amount_averaged, is_classification, is_probability, loss_settings
from landscape.objective import as_logits
from landscape.recording import apart
from landscape.restore import eval_mode
from landscape.training.data import DeviceImages
from landscape.training.recorded import Passes, Recorded

# Mean loss of a batch, the amount it is averaged over, correct and counted predictions: scalars.
Tally = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Step:
    """What every training step does: transform, loss, gradient, clip, update.

    Attributes:
        model: Model in training mode.
        optimizer: Optimizer on its parameters.
        loss: `loss(outputs, targets)`, a mean over samples.
        transform: Random transform of a batch, or `None`.
        clip: Largest norm of the gradient, or `None`.
        bfloat16: Whether the forward pass runs under bfloat16 autocast.
        cuda_graphs: Whether forward and backward pass are recorded, on a CUDA device.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    transform: Transform | None
    clip: float | None
    bfloat16: bool
    cuda_graphs: bool = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that get a gradient: the optimizer's, and what it does not have of the model's."""
        return list(dict.fromkeys([*optimized(self.optimizer), *self.model.parameters()]))

    def clear_gradients(self) -> None:
        """Let go of all gradients, those that the optimizer does not have included."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device


def optimized(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of an optimizer, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def check_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    names: tuple[str, str] = ("optimizer", "model"),
) -> None:
    """Refuse an optimizer that cannot train a model.

    Args:
        optimizer: The optimizer.
        model: The model.
        names: What the caller calls them.

    Raises:
        ValueError: If it has other parameters instead of the model's, or none that requires a
            gradient, or needs a closure, or the model was made in inference mode.
        TypeError: If it is no optimizer, or the model no module.
    """
    its, own = names
    check_module(model, own)
    check_materialised(model)
    check_type(its, optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    check_differentiable(model, own)
    parameters = optimized(optimizer)
    ours = set(model.parameters())
    foreign = sum(p not in ours for p in parameters)
    missing = any(p.requires_grad for p in ours.difference(parameters))
    if foreign and missing:  # those of a loss may be there beside all of the model's
        raise ValueError(
            f"`{its}` must be on the parameters of `{own}`, got {foreign} of {len(parameters)} "
            "that are not; make it when the model is complete, with all that is to be trained."
        )
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            f"`{its}` must have a parameter that requires a gradient, got {len(parameters)} that "
            "do not; call `requires_grad_()` on the parts to train."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"`{its}` must take its step from one gradient, got LBFGS, which needs a closure; "
            "take SGD or AdamW."
        )


class Means:
    """Means of loss and accuracy over samples, kept on the device until asked for."""

    def __init__(self) -> None:
        self._tallies: list[Tensor] = []  # of each batch, `(4,)` or `(4, members)`

    def add(self, *tally: Tensor) -> None:
        """Count a batch: what `forward` returns, scalars or one per member."""
        self._tallies.append(torch.stack([number.detach().double() for number in tally]))

    @property
    def num_batches(self) -> int:
        """Number of batches counted."""
        return len(self._tallies)

    def member(self, index: int) -> "Means":
        """Return the means of one member, where values of several `(members,)` were counted."""
        own = Means()
        own._tallies = [tally[:, index] for tally in self._tallies]
        return own

    def first_bad(self) -> int | None:
        """Return the index of the first batch whose loss is not finite, or `None`.

        The mean over ignored labels alone is NaN, but has no weight and no gradient; it is bad
        where no batch has another.
        """
        value, amount, _, _ = self._columns()
        bad = (~value.isfinite() & ((amount != 0) | (amount == 0).all())).nonzero()
        return int(bad[0]) if len(bad) else None

    def loss(self) -> float:
        """Return the mean loss per sample."""
        value, amount, _, _ = self._columns()
        return float((torch.where(amount > 0, value, 0.0) * amount).sum() / amount.sum())

    def accuracy(self) -> float:
        """Return the share of correct predictions; NaN where the targets are no classes."""
        _, _, correct, counted = self._columns()
        return float(correct.sum() / counted.sum())

    def _columns(self) -> Tensor:
        """Return the four numbers of all batches, `(4, batches)`."""
        return torch.stack(self._tallies, 1) if self._tallies else torch.zeros(4, 0, device="cpu")


def train_epoch(
    step: Step,
    batches: Iterable[Any],
    generator: torch.Generator,
    before_step: Callable[[int], None],
) -> Means:
    """Take one optimizer step a batch.

    Args:
        step: What a step does.
        batches: Batches of this epoch.
        generator: Source of `step.transform`.
        before_step: Called with the index of each step, to set the learning rate.

    Returns:
        Means over the epoch. A loss that is not finite does not stop it: looking would make the
        host wait for the device at every step.

    Raises:
        ValueError: If there is no batch, or one has no targets, or none that the loss can take.
    """
    means = Means()
    parameters = optimized(step.optimizer)
    passes: Passes = partial(_passes, step)
    stream = None
    if step.cuda_graphs:
        modules = [each for each in (step.model, step.loss) if isinstance(each, nn.Module)]
        passes = recorded = Recorded(passes, modules, step.parameters, step.device)
        stream = recorded.stream
    with apart(stream):
        for index, raw in enumerate(batches):
            before_step(index)
            inputs, targets = prepare(step, raw, index, generator)
            if not targets.numel():
                continue
            first = not means.num_batches
            with trial.explained("training on", inputs, targets) if first else nullcontext():
                tally = passes(inputs, targets)
            if step.clip is not None:
                _clip(parameters, step.clip)
            step.optimizer.step()
            means.add(*tally)
    check_any(means)
    return means


def _clip(parameters: Sequence[Tensor], largest: float) -> None:
    """Scale gradients to a norm of at most `largest`, as `clip_grad_norm_` does.

    Of sparse ones it has no norm before PyTorch 2.14.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    values = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    nn.utils.clip_grads_with_norm_(parameters, largest, nn.utils.get_total_norm(values))


def _passes(step: Step, inputs: Inputs, targets: Tensor) -> tuple[Tensor, ...]:
    """Take the gradient of a batch, and return what it counts."""
    loss, *counts = forward(step, step.model, inputs, targets)
    step.clear_gradients()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), *counts


def check_any(means: Means) -> None:
    """Refuse an epoch without a batch."""
    if not means.num_batches:
        raise ValueError("`data` must yield at least one batch, got none; is it empty?")


def validate(step: Step, data: Iterable[Any]) -> Means:
    """Return the mean loss and accuracy in evaluation mode, without transform.

    Args:
        step: Whose model and loss to use.
        data: Batches.
    """
    means = Means()
    with torch.no_grad(), eval_mode(step.model):
        for index, raw in enumerate(data):
            inputs, targets = prepare(step, raw, index)
            means.add(*forward(step, step.model, inputs, targets))
    return means


def epoch_batches(data: Iterable[Any], epoch: int) -> Iterable[Any]:
    """Return the batches of an epoch: those with its own order where `data` knows of epochs."""
    return data.batches(epoch) if isinstance(data, DeviceImages) else with_own_workers(data)


def prepare(
    step: Step, raw: Any, index: int, generator: torch.Generator | None = None
) -> tuple[Inputs, Tensor]:
    """Return a raw batch where the model is, in its precision, transformed if it is for training.

    Args:
        step: Says model and transform.
        raw: Batch `(x, y)` or a mapping.
        index: Its number, for messages.
        generator: Source of the transform; `None` does not transform.

    Raises:
        ValueError: If the batch has no targets.
    """
    inputs, targets = split_batch(raw, index)
    if targets is None:
        raise ValueError(f"`data` must hold targets, got none in batch {index}; pass (x, y).")
    placement = Placement.of(step.model)
    inputs, targets = placement.place(inputs), placement.place(targets)
    if is_classification(step.loss) and not targets.is_floating_point():
        targets = targets.long()
    if step.transform is not None and generator is not None:
        inputs, targets = transformed(step.transform, inputs, targets, generator)
        return placement.place(inputs), placement.place(targets)
    return copied(inputs), targets  # a model may write into them


def forward(step: Step, call: Callable[..., Any], inputs: Inputs, targets: Tensor) -> Tally:
    """Return what a batch counts; for `Means.add`, and the first for the gradient.

    Args:
        step: Says the loss and the precision.
        call: The model, or a function that calls it with other weights.
        inputs: For `call`.
        targets: Targets of the batch.

    Returns:
        Mean loss; the amount it is averaged over; how many predictions are correct, NaN where the
        targets are no classes; and of how many. Scalars, all but the first in float64.

    Raises:
        ValueError: If the loss would broadcast the targets or take them for others, or, on a CPU,
            there is no output for a label.
    """
    with torch.autocast(step.device.type, torch.bfloat16, enabled=step.bfloat16):
        outputs = call_on(call, inputs)
        logits = as_logits(outputs)
        trial.check_targets(step.loss, logits, targets)  # of shapes and types: nothing waits
        with trial.labels_named(step.loss, logits):
            value = step.loss(logits, targets)
    counts = (
        amount_averaged(step.loss, targets, len(targets)),
        *_correct(step.loss, logits.detach(), targets),
    )
    amount, correct, counted = (
        count.double()
        if isinstance(count, Tensor)
        else value.detach().new_full((), count, dtype=torch.float64)
        for count in counts
    )
    return value, amount, correct, counted


def _correct(loss: Loss, logits: Tensor, targets: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Return how many predictions agree with the (heaviest) target class, and of how many.

    Ignored labels do not count. Floats are classes if they are what a cross-entropy takes: rows of
    probabilities; so several labels a sample, or numbers to be fitted, are none.
    """
    no_classes = float("nan"), 1.0
    if logits.ndim < 2 or logits.shape[1] < 2:
        return no_classes
    predicted = logits.argmax(1)
    if not targets.is_floating_point():
        if targets.shape != predicted.shape:
            return no_classes
        counted = targets != loss_settings(loss)[1]
        return ((predicted == targets) & counted).sum(), counted.sum()
    if targets.shape != logits.shape:
        return no_classes
    correct = (predicted == targets.argmax(1)).sum()
    if not is_classification(loss):
        correct = torch.where(is_probability(targets), correct, torch.nan)
    return correct, float(predicted.numel())
