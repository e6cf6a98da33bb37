"""One epoch of several training runs at once."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from landscape._loaders import OwnGenerators
from landscape._streams import OwnStreams
from landscape.restore import same_buffers
from landscape.training import loop, run
from landscape.training.draws import Draws, replayed
from landscape.training.run import Callback, History, Run
from landscape.training.stacking import Stack, stack_batches

Batch = tuple[Any, Tensor, list[Tensor]]
"""Inputs, targets and dropout masks of one member."""

_TOLERANCE = 1e-2  # of a gradient, a heuristic: what rounding makes is far below, a mix-up above


def run_epoch(
    stack: Stack,
    runs: Sequence[Run],
    epoch: int,
    histories: Sequence[History],
    good: Sequence[dict[str, Any]],
    bar: "tqdm[Any]",
) -> None:
    """Train and validate every member for one epoch and append a row to each history.

    Args:
        stack: The models of the runs.
        runs: The runs.
        epoch: Epochs done before.
        histories: Each gets one value per column.
        good: Weights of each member before the epoch.
        bar: Moves on by one per step of a member.

    Raises:
        FloatingPointError: If loss or weights of a member become NaN or infinite.
    """
    started = time.perf_counter()
    bar.set_description(f"Epoch {epoch + 1}/{runs[0].epochs}")
    stack.check_alike()
    streams = [run.global_stream(member, epoch) for member in runs]
    means = _train_epoch(stack, runs, epoch, streams, bar)
    trained = [means.member(k) for k in range(len(runs))]
    for k, member in enumerate(runs):
        with named(k):
            run.check_finite(member, trained[k], epoch, good[k])
    validated = []
    for member, own in zip(runs, streams, strict=True):
        with own.entered():
            data = member.validation if member.validation is not None else ()
            validated.append(loop.validate(member.step, data))
    seconds = time.perf_counter() - started
    for k, member in enumerate(runs):
        run.finish_epoch(member, histories[k], trained[k], validated[k], seconds)
    bar.set_postfix(loss=f"{sum(own.loss() for own in trained) / len(runs):.4f}")


def rehearse(stack: Stack, runs: Sequence[Run], exactly: bool = False) -> tuple[bool, bool]:
    """Take gradients of the first batch together and one by one; then all is as before.

    What belongs to one member alone and is no tensor of its state (an attribute, the row of an
    embedding that stays as it is, a buffer that is assigned) shows in them. So does, in float32, a
    ReLU that rounding puts on the other side of zero.

    Args:
        stack: The models of the runs.
        runs: The runs.
        exactly: Whether the models are in float64 meanwhile, whatever the data.

    Returns:
        Whether they agree; and if not, whether a model by itself has other gradients again, because
        it draws random numbers.

    Raises:
        Exception: Where a step of all at once fails.
    """
    before = {name: tensor.clone() for name, tensor in stack.state.items()}
    streams = [run.global_stream(member, 0) for member in runs]
    firsts = [
        next(_batches(member, stream, OwnGenerators(member.data), 0), None)
        for member, stream in zip(runs, streams, strict=True)
    ]
    taken = [batch for batch in firsts if batch is not None]
    if len(taken) < len(runs):
        return True, False  # nothing to see
    if exactly:
        taken = [_doubled(batch) for batch in taken]
    try:
        with streams[0].entered():
            together = stack.gradients(_losses(stack, taken)[0])
        for k, (member, stream, batch) in enumerate(zip(runs, streams, taken, strict=True)):
            alone = _alone(stack, k, member, stream, batch)
            if alone is None:
                return False, False
            if alone.dtype.itemsize < 4:
                continue  # rounding alone is as much
            size = _TOLERANCE * alone.norm()
            if not (together[k] - alone).norm() <= size:
                again = _alone(stack, k, member, stream, batch)
                return False, again is not None and bool((again - alone).norm() > size)
    finally:
        _put_back(stack, before)
    return True, False


def _alone(
    stack: Stack,
    index: int,
    member: Run,
    stream: OwnStreams,
    batch: Batch,
) -> Tensor | None:
    """Return the gradient of a member, or `None` where its model has exchanged a buffer."""
    model = member.step.model
    with same_buffers(model) as are_same, stream.entered(), replayed(batch[2]):
        gradient = stack.gradient_alone(index, loop.forward(member.step, model, *batch[:2])[0])
        kept = are_same()
    return gradient if kept else None


def _doubled(value: Any) -> Any:
    """Return floating tensors in mappings and sequences in float64, and the rest as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: _doubled(entry) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(_doubled, value))
    return value


def _put_back(stack: Stack, before: Mapping[str, Tensor]) -> None:
    for name, tensor in stack.state.items():
        tensor.copy_(before[name])


def call(callbacks: Sequence[Sequence[Callback]], runs: Sequence[Run], done: int) -> None:
    """Call what each member has, with its model and the number of epochs done."""
    for own, member in zip(callbacks, runs, strict=True):
        run.call(own, member, done)


@contextmanager
def same_generators(runs: Sequence[Run]) -> Iterator[list[OwnGenerators]]:
    """Yield what each member's data draw from, as if it had them alone for an epoch.

    So members see one order of a loader that shuffles with a generator of its own.

    Args:
        runs: The runs.
    """
    generators = [OwnGenerators(member.data) for member in runs]
    yield generators
    for own in generators:
        own.keep()


@contextmanager
def named(member: int) -> Iterator[None]:
    """Say which member it was whose training diverged."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"Member {member}: {error}") from error


def _train_epoch(
    stack: Stack,
    runs: Sequence[Run],
    epoch: int,
    streams: Sequence[OwnStreams],
    bar: "tqdm[Any]",
) -> loop.Means:
    """Take one step a batch with all members; return means of values `(members,)`."""
    means = loop.Means()
    with same_generators(runs) as generators:
        batches = [_batches(*each, epoch) for each in zip(runs, streams, generators, strict=True)]
        for index, taken in enumerate(itertools.zip_longest(*batches)):
            if None in taken:
                raise ValueError(
                    f"`data` must give all members equally many batches, got {index} for some and "
                    'more for others; take subsets of equal length, or method="loop".'
                )
            for member in runs:
                run.set_rates(member, epoch, index)
            with streams[0].entered():  # for random layers other than dropout
                tally = _losses(stack, taken)
            stack.update(tally[0])
            means.add(*tally)
            bar.update(len(runs))
    loop.check_any(means)
    return means


def _losses(stack: Stack, batches: Sequence[Batch]) -> loop.Tally:
    """Return what `Stack.losses` returns for a batch of each member."""
    inputs, targets, masks = zip(*batches, strict=True)
    drawn = [torch.stack(own) for own in zip(*masks, strict=True)]
    return stack.losses(stack_batches(inputs), stack_batches(targets), drawn)


def _batches(
    member: Run, stream: OwnStreams, generators: OwnGenerators, epoch: int
) -> Iterator[Batch]:
    """Yield inputs, targets and dropout masks of one member, drawn as its own run draws them."""
    generator, draws = run.transform_stream(member, epoch), Draws(member.step.model)
    with stream.entered(), generators.entered():
        iterator = iter(loop.epoch_batches(member.data, epoch))
    for index in itertools.count():
        with stream.entered(), generators.entered():
            raw = next(iterator, None)
            if raw is None:
                return
            inputs, targets = loop.prepare(member.step, raw, index, generator)
            masks = draws.draw(inputs)
        yield inputs, targets, masks
