"""Plain training with the recipe of Park & Kim (2022), interruptible at any moment.

    for each epoch: for each batch: transform, loss, gradient, clip, step

Every random number of an epoch is a function of `(seed, epoch)`: the order and augmentation of
`DeviceImages`, the draws of `transform`, and the global streams of PyTorch, NumPy and
Python, from which dropout, stochastic depth and data sets draw (set for each epoch, and left as
found). A generator of a DataLoader's own goes on from epoch to epoch, and is part of the state. So
a run that was killed and resumed equals the uninterrupted one bit for bit on a CPU with the same
number of threads; but for what lives elsewhere, as a buffer that the model's state leaves out.
"""

from collections.abc import Collection, Iterable, Sequence
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from landscape._checks import check_callable, check_module
from landscape._progress import progress_bar
from landscape.batches import Transform
from landscape.losses import Loss
from landscape.training import loop, run, states, surroundings
from landscape.training.checkpoints import Named
from landscape.training.run import Callback, FitResult
from landscape.training.schedule import Schedule, adamw


def fit(
    model: nn.Module,
    data: Iterable[Any],
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Schedule | LRScheduler | None = None,
    loss: Loss = F.cross_entropy,
    transform: Transform | None = None,
    clip: float | None = 5.0,
    validation: Iterable[Any] | None = None,
    folder: str | PathLike[str] | None = None,
    checkpoints: Collection[Named] = (),
    trajectory: bool | int = False,
    resume: bool = False,
    bfloat16: bool | None = None,
    channels_last: bool | None = None,
    cuda_graphs: bool = False,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
) -> FitResult:
    """Train a model in place; return the history and the checkpoints.

    The defaults are the recipe of Park & Kim (2022) for CNNs and ViTs alike: AdamW with learning
    rate 1.25e-4 and weight decay 0.05 on every parameter, 5 epochs of warm-up, cosine to 0,
    gradient norm clipped at 5. Augmentation, mixup, cutmix and label smoothing are a `transform`
    (see `recipe`); stochastic depth belongs to the model.

    Args:
        model: Any module, on the device and in the precision to train in. It is put in training
            mode; parts of a model in training mode that are in evaluation mode, such as frozen
            batch norms, stay so. Training flags and memory format are left as found, gradients
            are cleared.
        data: Re-iterable of batches, each `(x, y)` or a mapping. Of `DeviceImages` each epoch is
            taken with its own augmentation and, where `shuffle` is set, its own order. Workers of
            a DataLoader begin anew with every epoch, so that it can be resumed.
        epochs: Number of epochs in all, those of the warm-up included.
        optimizer: Optimizer on parameters of the model; `adamw(model)` by default.
        schedule: Function of the position in epochs that returns the factor on the optimizer's
            learning rates, evaluated at every step; or a PyTorch scheduler on `optimizer`, stepped
            after every epoch. By default `WarmupCosine(epochs, min(5, epochs - 1))`.
        loss: `loss(outputs, targets)`, mean over the samples of a batch.
        transform: Applied to `(x, y, generator)` of every training batch, drawn anew each time.
        clip: Largest norm of the gradient over all parameters; `None` does not clip.
        validation: Re-iterable of batches, evaluated after every epoch.
        folder: Where checkpoints, the state to resume from and `log.csv` go; `None` writes nothing.
        checkpoints: Epochs whose weights are kept: numbers (epochs done), `"init"`, `"warmup"`
            (after `schedule.warmup_epochs`), `"last"`.
        trajectory: Keep the weights of the initialisation, after every epoch (`True`) or every so
            many, and of the last epoch.
        resume: Go on where the run in `folder` stopped; start afresh where there is none. A
            finished run is returned at once, its weights loaded into `model`. All that decides on
            the weights must be as it was, functions by name, `DeviceImages` by content; other data
            are not compared.
        bfloat16: Forward pass under bfloat16 autocast; by default on CUDA only (slower on CPUs).
            `fit_ensemble` has it off by default.
        channels_last: Train in channels-last memory format; by default where the model has a
            convolution with overlapping windows and, on a CPU, no strided 1x1 convolution of fewer
            than 16 channels, whose gradient PyTorch may get wrong in this format, and no
            `DistributedDataParallel`, which mistakes gradients in this format for others.
        cuda_graphs: On a CUDA device, record forward and backward pass in every epoch and replay
            them for all batches of the first one's shape: faster where operations take less time
            than their launch. What a model does in Python (hooks, counters, branches) happens as it
            is recorded only; one that waits for the device, draws on the CPU or exchanges buffers
            is detected, and trained without recording; so is one with a parameter that a graph
            still refers to, such as that of a loss which you have kept.
        seed: Seed of `transform`, dropout and stochastic depth; `DeviceImages` has its own.
        callbacks: Each called as `callback(model, epochs_done)` before the first epoch of this call
            and after every one, once it is on disk; a `Watch` is one. A model left in evaluation
            mode goes back to training. What one raises ends the training, which can be resumed
            from there.
        progress: Whether to show a bar.

    Returns:
        History, checkpoints and trajectory.

    Raises:
        ValueError: If an argument is out of range, `optimizer` cannot train `model`, `loss` is no
            mean, `data` have no length or targets that `loss` cannot take, or `folder` holds
            another run.
        FloatingPointError: If loss or weights become NaN or infinite. The model then holds the
            weights of the end of the last good epoch, and so does the state in `folder`; the
            optimizer's moments are of no more use.
        OSError: If an epoch cannot be written to `folder`, a full disk for instance; the states
            written before are left as they were.
    """
    if callable(callbacks):
        raise ValueError("`callbacks` must be a list of functions, got a function; put it in one.")
    check_module(model)
    for callback in callbacks:
        check_callable("callbacks", callback, "functions of the model and the epochs done")
    optimizer = optimizer or adamw(model)
    loop.check_optimizer(optimizer, model)
    if bfloat16 is None:
        bfloat16 = next(model.parameters()).device.type == "cuda"
    this = run.make_run(
        loop.Step(model, optimizer, loss, transform, clip, bool(bfloat16), cuda_graphs),
        data,
        schedule=schedule,
        epochs=epochs,
        validation=validation,
        folder=folder,
        checkpoints=checkpoints,
        trajectory=trajectory,
        seed=seed,
    )
    if channels_last is None:
        channels_last = surroundings.prefers_channels_last(model)
    with run.training(this, channels_last):
        history = _train(this, resume, callbacks, progress)
    return run.result(this, history)


def _train(
    this: run.Run,
    resume: bool,
    callbacks: Sequence[Callback],
    progress: bool,
) -> run.History:
    """Run the epochs that are not done yet and return the history of all."""
    history = states.begin(this, states.find(this, resume))
    done = len(history["epoch"])
    run.call(callbacks, this, done)
    with progress_bar("Training", progress, this.epochs * this.num_batches) as bar:
        bar.update(done * this.num_batches)
        for epoch in range(done, this.epochs):
            run.run_epoch(this, epoch, history, bar)
            states.write(this, history)
            states.tidy(this)
            run.call(callbacks, this, epoch + 1)
    return history
