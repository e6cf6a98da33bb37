"""One training run from epoch to epoch: what it is made of and what an epoch does."""

import copy
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from landscape._checks import check_callable, check_count, check_data, is_number
from landscape._loaders import one_pass
from landscape._names import lasting_name
from landscape._streams import OwnStreams
from landscape.batches import split_batch
from landscape.losses import check_reduction
from landscape.objective import check_transform
from landscape.provenance import forward_provenance
from landscape.results import Provenance, Result
from landscape.training import loop, surroundings
from landscape.training.checkpoints import Named, Saves, plan
from landscape.training.data import identity_of
from landscape.training.schedule import Schedule, WarmupCosine
from landscape.training.seeding import stream, stream_seed

Floats = NDArray[np.float64]
History = dict[str, list[float]]
Callback = Callable[[nn.Module, int], object]  # of the model and the number of epochs done

COLUMNS = (
    "epoch",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "seconds",
)
# Of an optimizer's settings; those after the first two decide on how a step is computed alone.
_COMPARED_OR_ALIKE = {"lr", "weight_decay", "foreach", "fused", "capturable", "differentiable"}
_TRANSFORM, _GLOBAL = 2, 3  # random streams of an epoch; 0 and 1 are those of `DeviceImages`


@dataclass(frozen=True)
class FitResult(Result):
    """History of a training run and where its checkpoints are.

    Row `i` belongs to epoch `i + 1`. Training numbers are means over the epoch, taken in training
    mode on transformed batches as the weights move; validation numbers are taken after the epoch in
    evaluation mode. Accuracies are against the heaviest class of a soft target, over all labels but
    ignored ones, and NaN where the targets are no classes: regression, several labels a sample.

    Attributes:
        epoch: Epochs done `(e,)`: 1, 2, …
        learning_rate: Rate of the first parameter group at the last step of each epoch `(e,)`.
        train_loss: Mean loss per sample `(e,)`, in nats for a cross-entropy.
        train_accuracy: Share of correct predictions `(e,)`, 0 to 1.
        validation_loss: Mean loss per sample on `validation` `(e,)`; NaN without.
        validation_accuracy: Share of correct predictions on `validation` `(e,)`; NaN without.
        seconds: Wall time of each epoch `(e,)`.
        checkpoints: Path of the state dict of each named epoch reached so far, by its name.
        trajectory: Paths of the state dicts of the trajectory so far, from epoch 0 on.
        provenance: Where it came from: the run's seed, its steps an epoch and what trained it.
    """

    epoch: Floats
    learning_rate: Floats
    train_loss: Floats
    train_accuracy: Floats
    validation_loss: Floats
    validation_accuracy: Floats
    seconds: Floats
    checkpoints: dict[Named, str]
    trajectory: tuple[str, ...]
    provenance: Provenance = Provenance()

    _plot: ClassVar[str | None] = "training_history"


@dataclass(frozen=True)
class Run:
    """What stays the same from the first epoch to the last."""

    step: loop.Step
    data: Iterable[Any]
    validation: Iterable[Any] | None
    schedule: Schedule | LRScheduler
    epochs: int
    seed: int
    saves: Saves
    rates: tuple[float, ...]  # initial learning rates, one per parameter group

    @property
    def num_batches(self) -> int:
        """Number of steps an epoch."""
        try:
            return len(cast(Sized, self.data))
        except TypeError as error:  # also of a DataLoader, if what it loads has none
            raise ValueError(
                "`data` must have a length, its number of batches, because the schedule needs it; "
                "pass a list, or a DataLoader of a data set with `__len__`."
            ) from error

    def settings(self) -> dict[str, Any]:
        """Return what trains the model, in words and numbers."""
        step, schedule = self.step, self.schedule
        has_state = isinstance(schedule, LRScheduler)
        return {
            "epochs": self.epochs,
            "optimizer": type(step.optimizer).__name__,
            "num_batches": self.num_batches,
            # A scheduler may have moved the rates of an optimizer that is handed in again.
            "learning_rates": None if has_state else self.rates,
            "optimizer_defaults": _defaults(step.optimizer),
            "weight_decays": tuple(g.get("weight_decay") for g in step.optimizer.param_groups),
            "schedule": type(schedule).__name__ if has_state else lasting_name(schedule),
            "loss": lasting_name(step.loss),
            "transform": None if step.transform is None else lasting_name(step.transform),
            "clip": step.clip,
            "bfloat16": step.bfloat16,
        }

    def identity(self) -> dict[str, Any]:
        """Return what a run and its continuation must have in common."""
        own = {
            "seed": self.seed,
            "model": type(self.step.model).__name__,
            "num_parameters": sum(p.numel() for p in self.step.model.parameters()),
        }
        return self.settings() | own | self._identity_of_data

    @cached_property
    def _identity_of_data(self) -> dict[str, Any]:
        """What the data are, which is looked at once."""
        return identity_of(data=self.data, validation=self.validation)


def _defaults(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what an optimizer was made with that decides on its steps, but rates and decays.

    Its groups have these too, but schedulers may move them.
    """

    def is_plain(value: object) -> bool:
        if isinstance(value, tuple):
            return all(map(is_plain, value))
        return isinstance(value, bool | int | float | str)

    return {
        name: value
        for name, value in optimizer.defaults.items()
        if is_plain(value) and name not in _COMPARED_OR_ALIKE
    }


def make_run(
    step: loop.Step,
    data: Iterable[Any],
    *,
    schedule: Schedule | LRScheduler | None,
    epochs: int,
    validation: Iterable[Any] | None,
    folder: str | PathLike[str] | None,
    checkpoints: Collection[Named],
    trajectory: bool | int,
    seed: int,
) -> Run:
    """Return a run after checking what `fit` was given; its arguments are explained there.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If one is of another type.
    """
    check_data(data)
    if validation is not None:
        check_data(validation, "validation")
    check_count("epochs", epochs, 1)
    check_count("seed", seed, 0)
    if step.clip is not None and not (is_number(step.clip) and step.clip > 0):
        raise ValueError(f"`clip` must be positive or None, got {step.clip!r}.")
    check_callable("loss", step.loss, "a function of outputs and targets")
    check_reduction(step.loss)
    if step.transform is not None:
        check_transform(step.transform)
    if (
        isinstance(schedule, LRScheduler)
        and getattr(schedule, "optimizer", None) is not step.optimizer
    ):
        raise ValueError(
            "`schedule` must be a scheduler on the optimizer that trains, got one on "
            "another; pass that optimizer too."
        )
    schedule = schedule or WarmupCosine(epochs, min(5, epochs - 1))
    if not isinstance(schedule, LRScheduler):
        check_callable("schedule", schedule, "a function of the epoch, or a PyTorch scheduler")
    run = Run(
        step=step,
        data=data,
        validation=validation,
        schedule=schedule,
        epochs=epochs,
        seed=seed,
        saves=plan(folder, checkpoints, trajectory, epochs, schedule),
        rates=tuple(group["lr"] for group in step.optimizer.param_groups),
    )
    _ = run.num_batches  # an error comes before work
    if validation is not None and _is_empty(validation):
        raise ValueError("`validation` must yield at least one batch, got none; is it empty?")
    return run


def _is_empty(data: Iterable[Any]) -> bool:
    try:
        return not len(cast(Sized, data))
    except TypeError:  # also of a DataLoader, if what it loads has none
        return next(iter(one_pass(data)), None) is None


@contextmanager
def training(run: Run, channels_last: bool) -> Iterator[None]:
    """Train inside; memory format, flags and learning rates are put back, gradients cleared."""
    model, optimizer = run.step.model, run.step.optimizer
    if torch.is_inference_mode_enabled():
        raise RuntimeError("Training must be outside of `torch.inference_mode`.")
    with (
        torch.enable_grad(),
        surroundings.channels_last_format(model, channels_last),
        surroundings.training_mode(model),
    ):
        try:
            yield
        finally:
            run.step.clear_gradients()
            if not isinstance(run.schedule, LRScheduler):
                for group, rate in zip(optimizer.param_groups, run.rates, strict=True):
                    group["lr"] = rate


def run_epoch(run: Run, epoch: int, history: History, bar: "tqdm[Any]") -> None:
    """Train and validate for one epoch and append a row to the history.

    Args:
        run: The run.
        epoch: Epochs done before.
        history: Gets one value per column.
        bar: Moves on by one per step.

    Raises:
        FloatingPointError: If loss or weights become NaN or infinite.
    """
    started = time.perf_counter()
    good = weights(run)

    def before_step(index: int) -> None:
        bar.update()
        set_rates(run, epoch, index)

    bar.set_description(f"Epoch {epoch + 1}/{run.epochs}")
    with global_stream(run, epoch).entered():
        batches = loop.epoch_batches(run.data, epoch)
        train = loop.train_epoch(run.step, batches, transform_stream(run, epoch), before_step)
        check_finite(run, train, epoch, good)
        validation = loop.validate(run.step, run.validation if run.validation is not None else ())
    finish_epoch(run, history, train, validation, time.perf_counter() - started)
    bar.set_postfix(loss=f"{train.loss():.4f}", accuracy=f"{train.accuracy():.4f}")


def call(callbacks: Iterable[Callback], run: Run, done: int) -> None:
    """Call back after an epoch, or before the first; training goes on in training mode."""
    for callback in callbacks:
        with surroundings.back_in_training(run.step.model):
            callback(run.step.model, done)


def global_stream(run: Run, epoch: int) -> OwnStreams:
    """Return the global streams of an epoch: of dropout, stochastic depth, the user's code."""
    return OwnStreams(stream_seed(run.seed, epoch, _GLOBAL), [run.step.device])


def transform_stream(run: Run, epoch: int) -> torch.Generator:
    """Return the stream that the transform draws from in an epoch."""
    return stream(run.seed, epoch, _TRANSFORM)


def set_rates(run: Run, epoch: int, index: int) -> None:
    """Set the learning rates of a step, where the schedule is a function of the position.

    Args:
        run: The run.
        epoch: Epochs done before.
        index: Steps done before in this epoch.
    """
    if isinstance(run.schedule, LRScheduler):
        return
    factor = run.schedule(epoch + index / run.num_batches)
    for group, rate in zip(run.step.optimizer.param_groups, run.rates, strict=True):
        group["lr"] = rate * factor


def finish_epoch(
    run: Run, history: History, train: loop.Means, validation: loop.Means, seconds: float
) -> None:
    """Append the row of an epoch to the history, and step a PyTorch scheduler.

    Args:
        run: The run.
        history: Gets one value per column.
        train: Means over the training batches.
        validation: Means over the validation data, empty without.
        seconds: Wall time.
    """
    row = (
        len(history["epoch"]) + 1.0,
        float(run.step.optimizer.param_groups[0]["lr"]),
        train.loss(),
        train.accuracy(),
        validation.loss(),
        validation.accuracy(),
        seconds,
    )
    for column, value in zip(COLUMNS, row, strict=True):
        history[column].append(value)
    if isinstance(run.schedule, ReduceLROnPlateau):
        run.schedule.step(row[4] if run.validation is not None else row[2])
    elif isinstance(run.schedule, LRScheduler):
        run.schedule.step()


def result(run: Run, history: History) -> FitResult:
    """Return the history so far and the checkpoints written so far.

    Args:
        run: The run.
        history: Its history.
    """
    done, saves = len(history["epoch"]), run.saves
    return FitResult(
        **{column: np.array(values, dtype=np.float64) for column, values in history.items()},
        checkpoints={n: str(saves.path(e)) for n, e in saves.named.items() if e <= done},
        trajectory=tuple(str(saves.path(e)) for e in saves.trajectory if e <= done),
        provenance=forward_provenance(
            run.step.model,
            num_samples=_num_samples(run.data),
            seed=run.seed,
            seconds=sum(history["seconds"]),
            num_forwards=float(done),
            settings=run.settings(),
        ),
    )


def _num_samples(data: Iterable[Any]) -> int:
    """Return how many samples an epoch has; 0 where only a pass over the data would tell."""
    with suppress(TypeError, ValueError):  # of what has no length or no targets
        if isinstance(data, list | tuple):
            targets = [split_batch(raw, index)[1] for index, raw in enumerate(data)]
            return sum(len(own) for own in targets if own is not None)
        if not isinstance(data, DataLoader):
            return int(getattr(data, "num_samples", 0))
        if data.batch_sampler is not None:  # else its data set may hold whole batches
            dataset = data.dataset
            return len(
                cast(Sized, dataset if isinstance(dataset, IterableDataset) else data.sampler)
            )
    return 0


def weights(run: Run) -> dict[str, Any]:
    """Return a copy of the model's parameters and buffers, and of what else its state has."""
    return {
        name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in run.step.model.state_dict().items()
    }


def check_finite(run: Run, means: loop.Means, epoch: int, good: dict[str, Any]) -> None:
    """Raise, with the last good weights put back, if the epoch went wrong; one transfer.

    Args:
        run: The run.
        means: Means over the training batches.
        epoch: Epochs done before.
        good: Weights before the epoch.

    Raises:
        FloatingPointError: If loss or weights are NaN or infinite.
    """
    parameters = list(run.step.model.parameters())
    finite = torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).all()
    bad = means.first_bad()
    if bad is None and finite:
        return
    run.step.model.load_state_dict(good)
    what = "weights" if bad is None else f"loss of step {bad + 1}"
    raise FloatingPointError(
        f"The {what} in epoch {epoch + 1} became NaN or infinite; the model holds the weights of "
        f"the end of epoch {epoch}. Lower the learning rate, lengthen the warm-up, or clip; begin "
        "with a new optimizer."
    )
