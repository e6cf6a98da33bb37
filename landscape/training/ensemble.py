"""Several models of one architecture trained at once, each as `fit` would train it alone.

Small models leave a processor idle: a step consists of many small operations, and starting them
takes longer than doing them. K models stacked along a new dimension need as many operations as one
of them (`torch.func.stack_module_state` tells the idea, `landscape.training.stacking` does it).
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from landscape._checks import check_callable, check_choice, check_materialised
from landscape._loaders import one_pass
from landscape._progress import progress_bar
from landscape.batches import Transform, split_batch
from landscape.losses import Loss
from landscape.results import Result
from landscape.training import loop, run, stacking, states, surroundings, together
from landscape.training.checkpoints import Named
from landscape.training.run import Callback, FitResult, History, Run
from landscape.training.schedule import Schedule, adamw

Method = Literal["auto", "vmap", "loop"]

_LARGEST_BATCH_ON_CPU = 16  # a heuristic, see `fit_ensemble`


@dataclass(frozen=True)
class EnsembleResult(Result):
    """Histories of models that were trained together.

    Attributes:
        members: History and checkpoints of each model, in the order given.
        method: `"vmap"` (all at once) or `"loop"` (one after another).
    """

    members: tuple[FitResult, ...]
    method: str


def fit_ensemble(
    models: Sequence[nn.Module],
    data: Iterable[Any],
    *,
    epochs: int,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    schedule: Schedule | Sequence[Schedule | LRScheduler] | None = None,
    loss: Loss = F.cross_entropy,
    transform: Transform | None = None,
    clip: float | None = 5.0,
    validation: Iterable[Any] | None = None,
    folder: str | PathLike[str] | None = None,
    checkpoints: Collection[Named] = (),
    trajectory: bool | int = False,
    resume: bool = False,
    method: Method = "auto",
    bfloat16: bool = False,
    seeds: Sequence[int] | None = None,
    callbacks: Sequence[Sequence[Callback]] | None = None,
    progress: bool = False,
) -> EnsembleResult:
    """Train models of one architecture in place, all at once; return the history of each.

    Member k ends with the weights of `fit(models[k], data, optimizer=optimizers[k],
    seed=seeds[k], bfloat16=bfloat16, …)` up to rounding: batches, augmentation, dropout and
    stochastic depth (of `nn.Dropout` and `landscape.models`), BatchNorm statistics, clipping,
    schedule, checkpoints and log are its own. Random layers that do not call
    `torch.nn.functional.dropout` draw for each member independently, but not what `fit` draws. In
    float32 rounding grows from step to step in networks with BatchNorm (a relative 5e-3 in 12
    steps was measured); in float64 it does not show.

    `method="auto"` takes `vmap` on accelerators, and on a CPU for batches of at most 16, where
    starting operations is what takes time; at larger batches one model keeps a CPU busy, and a
    loop over the members is faster. This is a heuristic: on one core small ResNets and ViTs were up
    to 1.6 times as fast under `vmap` at batch 8, a ViT of dim 48 about as fast, and all but the
    smallest slower at batch 32 (`benchmarks/training.py`). What `vmap` cannot run (a cross-entropy
    with class weights and label smoothing, an LSTM), or gives other gradients of the first batch
    than each model alone (attributes that differ), is trained in a loop too. A step under `vmap`
    needs the memory of all members' activations. Validation goes member by member either way.

    Args:
        models: At least one, alike in everything but their weights.
        data: Re-iterable of batches that all members see, as for `fit`; or a list with one per
            member, with equally many batches of equal size, such as subsets of equal length, or
            `[data.with_(seed=s) for s in seeds]` for an order of each's own.
        epochs: Number of epochs in all, those of the warm-up included.
        optimizers: One a model, with its own learning rate and weight decay; `adamw(model)` by
            default. Of AdamW all members are updated at once, other optimizers step one by one.
        schedule: Schedule of all members, or one per member; a PyTorch scheduler is one member's.
        loss: `loss(outputs, targets)`, mean over the samples of a batch.
        transform: Applied to every batch of every member, with a stream of the member's own.
        clip: Largest norm of a member's gradient; `None` does not clip.
        validation: Re-iterable of batches, evaluated for every member after every epoch.
        folder: Member k is kept in `folder/member-00k`, as `fit` would keep it.
        checkpoints: Epochs whose weights are kept, see `fit`.
        trajectory: Every how many epochs weights are kept besides, see `fit`.
        resume: Go on after the last epoch that all members in `folder` have done, see `fit`.
        method: `"vmap"`, `"loop"`, or `"auto"` for whichever should be faster. A run may be
            resumed with another method.
        bfloat16: Forward passes under bfloat16 autocast, in a loop only: `vmap` ignores autocast.
            So, unlike in `fit`, it is off by default on CUDA too, lest the precision depend on
            `method`; compare with `fit(…, bfloat16=False)`.
        seeds: Seed of each member's transform, dropout and stochastic depth; 0, 1, … by default.
        callbacks: One list per model, of what `fit` calls for it: before the first epoch of this
            call and after every one, once all members are on disk. With a `Watch` each, every one
            of them counts the time of all members: give each one K-th of the budget.
        progress: Whether to show a bar.

    Returns:
        Histories, checkpoints and trajectories. Under `vmap` the seconds of an epoch are those of
        all members together.

    Raises:
        ValueError: If an argument is out of range, there are not as many optimizers, schedules,
            seeds, data or lists of callbacks as models, the models differ in architecture, batches
            have different shapes under `vmap` or targets that `loss` cannot take, an optimizer
            cannot train its model, or `folder` holds another run.
        FloatingPointError: If loss or weights of a member become NaN or infinite. All models then
            hold the weights of the end of the last good epoch, and so do the states in `folder`.
        OSError: If an epoch cannot be written to `folder`; the states written before are kept.
    """
    models = list(models)
    _check_models(models)
    check_choice("method", method, ("auto", "vmap", "loop"))
    count, one_each = len(models), _one_each(data)
    given: dict[str, Sequence[Any] | None] = {
        "optimizers": optimizers,
        "schedule": schedule if isinstance(schedule, Sequence) else None,
        "seeds": seeds,
        "callbacks": callbacks,
        "data": one_each,
    }
    if callable(callbacks) or any(callable(own) for own in callbacks or ()):
        raise ValueError("`callbacks` must have one list per model, got functions; use lists.")
    for callback in itertools.chain.from_iterable(callbacks or ()):
        check_callable("callbacks", callback, "functions of the model and the epochs done")
    for name, values in given.items():
        got = len(values) if isinstance(values, Sized) else type(values).__name__
        if values is not None and got != count:
            raise ValueError(f"`{name}` must have one entry per model, {count}, got {got}.")
    if isinstance(schedule, LRScheduler):
        raise ValueError("`schedule` must be one scheduler a member, got one; pass a list.")
    optimizers = optimizers if optimizers is not None else [adamw(model) for model in models]
    for k, (optimizer, model) in enumerate(zip(optimizers, models, strict=True)):
        loop.check_optimizer(optimizer, model, (f"optimizers[{k}]", f"models[{k}]"))
    runs = [
        run.make_run(
            loop.Step(model, optimizers[k], loss, transform, clip, bfloat16),
            data if one_each is None else one_each[k],
            schedule=schedule[k] if isinstance(schedule, Sequence) else schedule,
            epochs=epochs,
            validation=validation,
            folder=None if folder is None else Path(folder) / f"member-{k:03d}",
            checkpoints=checkpoints,
            trajectory=trajectory,
            seed=k if seeds is None else seeds[k],
        )
        for k, model in enumerate(models)
    ]
    if method == "vmap":
        _check_stackable(runs)
        try:
            alike, random = _rehearse(runs)
        except RuntimeError as error:
            error.add_note('It came from `vmap` on the first batch; see if method="loop" runs it.')
            raise
        if not alike and not random:
            raise ValueError(
                "`models` must differ in their weights alone, but their gradients under vmap "
                'differ from those of each alone; use method="loop".'
            )
    at_once = method == "vmap" or (
        method == "auto" and not bfloat16 and _pays(runs) and _stackable(runs)
    )
    return _train(runs, resume, at_once, callbacks or [()] * count, progress)


def _train(
    runs: list[Run],
    resume: bool,
    at_once: bool,
    callbacks: Sequence[Sequence[Callback]],
    progress: bool,
) -> EnsembleResult:
    """Run the epochs that are not done yet and return the histories of all."""
    steps = [member.step for member in runs]
    with ExitStack() as contexts:
        for member in runs:
            last = not at_once and surroundings.prefers_channels_last(member.step.model)
            contexts.enter_context(run.training(member, channels_last=last))
        histories = _begin(runs, resume)
        done, num_steps = len(histories[0]["epoch"]), len(runs) * runs[0].num_batches
        stack = contexts.enter_context(stacking.stacked(steps)) if at_once else None
        bar = contexts.enter_context(progress_bar("Training", progress, runs[0].epochs * num_steps))
        bar.update(done * num_steps)
        together.call(callbacks, runs, done)
        for epoch in range(done, runs[0].epochs):
            good = [run.weights(member) for member in runs]
            try:
                if stack is not None:
                    together.run_epoch(stack, runs, epoch, histories, good, bar)
                else:
                    with together.same_generators(runs) as generators:
                        for k, member in enumerate(runs):
                            with together.named(k), generators[k].entered():
                                run.run_epoch(member, epoch, histories[k], bar)
            except FloatingPointError:
                for member, weights in zip(runs, good, strict=True):
                    member.step.model.load_state_dict(weights)
                raise
            for member, history in zip(runs, histories, strict=True):
                states.write(member, history)
            for member in runs:  # not before all have been written: a common epoch must remain
                states.tidy(member)
            together.call(callbacks, runs, epoch + 1)
    members = tuple(run.result(m, h) for m, h in zip(runs, histories, strict=True))
    return EnsembleResult(members, "vmap" if at_once else "loop")


def _begin(runs: Sequence[Run], resume: bool) -> list[History]:
    """Return the histories so far, with the states of the last epoch that all have done."""
    latest = None
    while True:
        found = [states.find(member, resume, latest) for member in runs]
        epochs = {0 if state is None else len(state["history"]["epoch"]) for state in found}
        if len(epochs) == 1:
            return [states.begin(m, state) for m, state in zip(runs, found, strict=True)]
        latest = min(epochs)


def _one_each(data: Iterable[Any]) -> Sequence[Iterable[Any]] | None:
    """Return `data` if it is a list of one per member, `None` if it is one list of batches."""
    if not isinstance(data, list | tuple) or not data or isinstance(data[0], Mapping):
        return None
    first = data[0]
    is_batch = isinstance(first, list | tuple) and any(isinstance(part, Tensor) for part in first)
    return None if is_batch else data


def _pays(runs: Sequence[Run]) -> bool:
    """Return whether all at once should be faster than one after another."""
    if len(runs) == 1 or runs[0].step.device.type != "cpu":
        return len(runs) > 1
    data = runs[0].data
    size = getattr(data, "batch_size", None)
    if size is None:
        first = next(one_pass(data), None)
        targets = None if first is None else split_batch(first, 0)[1]
        size = 0 if targets is None else len(targets)
    return bool(size <= _LARGEST_BATCH_ON_CPU)


def _check_stackable(runs: Sequence[Run]) -> None:
    """Refuse runs that cannot go all at once."""
    stacking.check_stackable([member.step for member in runs])
    lengths = [member.num_batches for member in runs]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"`data` must give all members equally many batches, got {lengths}; take subsets "
            'of equal length, or method="loop".'
        )


def _stackable(runs: Sequence[Run]) -> bool:
    """Return whether all can go at once: gradients of the first batch are tried and compared."""
    try:
        _check_stackable(runs)
        return _rehearse(runs)[0]
    except Exception:  # where it is an error of the user's, the loop will say so
        return False


def _rehearse(runs: Sequence[Run]) -> tuple[bool, bool]:
    """Return what `together.rehearse` does of runs that have not begun.

    Where gradients differ in float32, those in float64 tell whether that is rounding.
    """
    steps = [member.step for member in runs]
    with ExitStack() as contexts:
        for member in runs:
            contexts.enter_context(run.training(member, channels_last=False))
        with stacking.stacked(steps) as stack:
            alike, random = together.rehearse(stack, runs)
        if alike or random:
            return alike, random
        try:
            with stacking.doubled(steps), stacking.stacked(steps) as stack:
                return together.rehearse(stack, runs, exactly=True)
        except Exception:  # not every model runs in float64
            return False, False


def _check_models(models: Sequence[nn.Module]) -> None:
    """Refuse models that are not of one architecture, precision and device."""
    if not models:
        raise ValueError("`models` must hold at least one model, got none.")
    if len({id(model) for model in models}) < len(models):
        raise ValueError("`models` must be different objects, got one of them twice; copy it.")

    def build(model: nn.Module) -> tuple[Any, ...]:
        check_materialised(model)
        tensors = (*model.named_parameters(), *model.named_buffers())
        return repr(model), [(name, t.shape, t.dtype, t.device) for name, t in tensors]

    for k, model in enumerate(models):
        if build(model) != build(models[0]):
            raise ValueError(
                "`models` must be of one architecture, precision and device, but number "
                f"{k} differs from number 0; train it by itself."
            )
