"""Where attention helps: the build-up of an AlterNet, one trained network a step.

Park & Kim (2022, sec. 4.1) go from a CNN to an AlterNet by the rule

1. replace convolution blocks by MSA blocks alternately, from the end of a stage;
2. if the added MSA does not improve the predictions, replace a block at the end of an earlier
   stage instead.

So every step tries one more MSA than the best network so far. It begins with the last stage, stays
in a stage while its MSAs help and it has room, and then goes to the one before, until the first
stage is done (Fig. 12a).
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from landscape._checks import check_choice, check_data
from landscape._digest import bytes_of
from landscape._loaders import one_pass
from landscape._names import lasting_name
from landscape._progress import track
from landscape._streams import OwnStreams
from landscape.models.alternate import alternate
from landscape.models.alternet import msa_positions
from landscape.models.residual_stages import count_msas, resnet_stages
from landscape.probes.evaluate import Evaluation, evaluate
from landscape.provenance import forward_provenance
from landscape.training.build_up_table import BuildUp, Row, load_table, rows_of, table_of
from landscape.training.checkpoints import save
from landscape.training.data import identity_of
from landscape.training.fit import fit

Criterion = Literal["accuracy", "nll"]
Train = Callable[[nn.Module, Iterable[Any]], object]

_OURS = {"model", "data", "optimizer", "schedule", "folder", "resume", "seed"}


def build_up(
    model: nn.Module,
    data: Iterable[Any],
    *,
    validation: Iterable[Any],
    train: Train | Mapping[str, Any],
    criterion: Criterion = "accuracy",
    heads: Sequence[int] | None = None,
    head_dim: int | None = None,
    window: int | Sequence[int] | None = None,
    image_size: int = 32,
    folder: str | PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> BuildUp:
    """Build an alternating network from a ResNet, step by step (Park & Kim, 2022, sec. 4.1).

    Every network is trained from the weights of `model` and new MSA blocks drawn from `seed`, so a
    step does not depend on how the steps before it were trained. A gain within the noise counts
    as one: the rule has no test of significance, but the table has the standard errors.

    Cost: one training for each step, at most one more than there is room for MSAs (half of the
    blocks of each stage).

    Args:
        model: The network to begin with, as in `alternate`; it is left as it was.
        data: Training data, as `fit` or your function takes them.
        validation: Re-iterable of batches `(x, y)` that decide.
        train: Settings of `fit` such as `{"epochs": 20, "transform": transform}`; or a function
            that is called with each network and `data` and trains it in place.
        criterion: What has to improve: `"accuracy"` or `"nll"`.
        heads: As in `alternate`.
        head_dim: As in `alternate`.
        window: As in `alternate`.
        image_size: As in `alternate`.
        folder: Where every finished step is kept: the table so far in `build_up.npz` and the
            trained weights in `step-00.pt`, …. A build-up that was killed goes on from there; with
            settings for `fit` the step that was under way goes on, too. `DeviceImages` must be
            alike then; other data are not compared.
        seed: Seed of the new blocks and of the training; PyTorch's global state is left as found.
        progress: Show a bar of steps.

    Returns:
        The table; `alternate(model, result.best)` is the network.

    Raises:
        ValueError: If `model` has no such stages or the windows do not fit (see `alternate`),
            `criterion` is unknown, a setting of `train` is decided here, or `folder` holds
            another build-up.
    """
    check_data(data)
    check_data(validation, "validation")
    check_choice("criterion", criterion, get_args(Criterion))
    if isinstance(train, Mapping) and (taken := sorted(_OURS & train.keys())):
        raise ValueError(
            f"`train` must leave {', '.join(taken)} to `build_up`; pass a function of (model, "
            "data) that calls `fit` to choose the optimizer of each network."
        )
    sizes: dict[str, Any] = {
        "heads": None if heads is None else tuple(heads),
        "head_dim": head_dim,
        "window": window if window is None or isinstance(window, int) else tuple(window),
        "image_size": image_size,
    }

    def grow(msas: Sequence[int]) -> nn.Module:
        return alternate(model, msas, **sizes)

    stages = resnet_stages(model)
    depths = tuple(len(stage) for stage in stages)
    start = tuple(count_msas(stage) for stage in stages)
    device = next(model.parameters()).device
    with OwnStreams(seed, [device]).entered():
        largest = grow(tuple(depth // 2 for depth in depths))  # what does not fit is refused here
    _check_validation(largest, validation)
    where = None if folder is None else Path(folder)
    source = forward_provenance(
        model,
        num_samples=0,
        seed=seed,
        settings={
            "weights": _digest(model),
            "train": _describe(train),
            **sizes,
            **identity_of(data=data, validation=validation),
        },
    )
    found = None if where is None else load_table(where / "build_up.npz", criterion, source)
    rows = [] if found is None else rows_of(found)
    num_samples = 0 if found is None else found.provenance.num_samples
    source = replace(source, num_samples=num_samples)
    most = range(1 + sum(depth // 2 for depth in depths))
    with track(most, "Build-up", progress) as bar:
        bar.update(len(rows))
        while (step := next_step(depths, start, [(r.stage, r.kept) for r in rows])) is not None:
            began = time.perf_counter()
            with OwnStreams(seed, [device]).entered():
                network = grow(step[1])
                _train(network, data, train, where, len(rows), seed)
            scores = evaluate(network, validation)
            rows.append(_row(rows, depths, step, network, scores, criterion, began))
            source = replace(source, num_samples=scores.num_samples)
            if where is not None:
                save(where / f"step-{len(rows) - 1:02d}.pt", network.state_dict())
                table_of(rows, depths, criterion, source).save(where / "build_up.npz")
            bar.update()
    return table_of(rows, depths, criterion, source)


def _check_validation(network: nn.Module, validation: Iterable[Any]) -> None:
    """Evaluate an untrained network on the first batch, so that an error comes before work."""
    first = next(iter(one_pass(validation)), None)
    if first is None:
        raise ValueError("`validation` must yield at least one sample, got none; is it empty?")
    try:
        evaluate(network, [first])
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`data`", "`validation`")) from error


def next_step(
    depths: Sequence[int], start: Sequence[int], done: Sequence[tuple[int, bool]]
) -> tuple[int, tuple[int, ...]] | None:
    """Return what the rule tries next.

    Args:
        depths: Blocks per stage.
        start: MSAs per stage to begin with.
        done: Stage and fate (kept or not) of each step so far; the first is the beginning.

    Returns:
        The stage that gets an MSA, -1 for the beginning, and the MSAs per stage of the network; or
        `None` at the end.
    """
    best = list(start)
    if not done:
        return -1, tuple(best)
    stage = len(depths) - 1
    for tried, kept in done[1:]:
        stage = tried if kept else tried - 1
        best[tried] += kept
    while stage >= 0 and 2 * (best[stage] + 1) > depths[stage]:
        stage -= 1
    if stage < 0:
        return None
    best[stage] += 1
    return stage, tuple(best)


def _row(
    before: Sequence[Row],
    depths: Sequence[int],
    step: tuple[int, tuple[int, ...]],
    network: nn.Module,
    scores: Evaluation,
    criterion: Criterion,
    began: float,
) -> Row:
    """Return the row of a step, which is kept where it beats the last one that was."""
    stage, msas = step
    best = next((row for row in reversed(before) if row.kept), None)
    if best is None or math.isnan(best.accuracy if criterion == "accuracy" else best.nll):
        kept = True
    elif criterion == "accuracy":
        kept = scores.accuracy > best.accuracy
    else:
        kept = scores.nll < best.nll
    return Row(
        stage=stage,
        position=-1 if stage < 0 else msa_positions(depths[stage], msas[stage])[-1],
        msas=msas,
        num_parameters=sum(p.numel() for p in network.parameters()),
        accuracy=scores.accuracy,
        accuracy_stderr=scores.accuracy_stderr,
        nll=scores.nll,
        nll_stderr=scores.nll_stderr,
        kept=kept,
        seconds=time.perf_counter() - began,
    )


def _train(
    network: nn.Module,
    data: Iterable[Any],
    train: Train | Mapping[str, Any],
    folder: Path | None,
    step: int,
    seed: int,
) -> None:
    """Train one network, from where it was stopped where `fit` has kept that."""
    if not isinstance(train, Mapping):
        train(network, data)
        return
    where = None if folder is None else folder / f"step-{step:02d}"
    fit(network, data, folder=where, resume=where is not None, seed=seed, **train)


def _digest(model: nn.Module) -> str:
    """Return what tells the weights of two models apart."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + bytes_of(tensor))
    return digest.hexdigest()[:16]


def _describe(train: Train | Mapping[str, Any]) -> str:
    """Return in words how the networks are trained; two functions of one name look the same."""
    if not isinstance(train, Mapping):
        return getattr(train, "__qualname__", type(train).__name__)
    plain = int | float | str | None

    def text(value: Any) -> str:
        if isinstance(value, plain):
            return str(value)
        return lasting_name(value) if callable(value) else type(value).__name__

    return ", ".join(f"{name}={text(value)}" for name, value in sorted(train.items()))
