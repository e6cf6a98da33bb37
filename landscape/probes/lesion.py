"""What a network loses with one of its units (Park & Kim, 2022, Fig. 10b).

A unit is removed at test time, without training again: of a transformer one MSA or one MLP, whose
residual branch is then zero; of a ResNet one convolution over space (the 3x3 one of a bottleneck),
which then returns its input; or one attention head, whose output is then zero. Every sample is
scored with and without, so the differences have paired standard errors.

Everything behind a block's output depends on that output alone. So the pass up to a unit is made
once for all lesions behind it: for units of equal cost the study takes about half as many passes
as there are units.
"""

import functools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from landscape._checks import check_choice
from landscape.blocks import Blocks, check_blocks
from landscape.blocks.block import Traced
from landscape.blocks.lesions import Irremovable, Part, num_heads, removal
from landscape.blocks.passes import PartialPasses
from landscape.probes.scores import PairedResult, PairedScores, tracked_batches
from landscape.provenance import forward_provenance
from landscape.restore import untouched
from landscape.results import Provenance
from landscape.switches import eagerly

Units = Literal["paper", "branch", "conv", "head"]


@dataclass(frozen=True)
class LesionStudy(PairedResult):
    """Accuracy and NLL with one unit removed, for `u` units in network order.

    Differences are lesioned less clean: a unit that matters has a negative `delta_accuracy`.

    Attributes:
        names: Name of the block of each unit.
        kinds: Kind of that block: `"conv"`, `"msa"`, `"mlp"` or `"other"`.
        parts: What was removed of it: `"branch"`, `"conv"`, or `"head 0"`, `"head 1"`, …
        depth: `(u,)`: relative depth of the block, from 0 to 1.
        stage: `(u,)`: number of its stage, which changes where the map gets smaller.
        accuracy: `(u,)`: accuracy without the unit.
        accuracy_stderr: `(u,)`: its standard error over samples.
        delta_accuracy: `(u,)`: its difference from the clean accuracy.
        delta_accuracy_stderr: `(u,)`: its paired standard error.
        nll: `(u,)`: negative log-likelihood without the unit, in nats.
        nll_stderr: `(u,)`: its standard error.
        delta_nll: `(u,)`: its difference from the clean one.
        delta_nll_stderr: `(u,)`: its paired standard error.
        clean_accuracy: Accuracy of the whole model.
        clean_accuracy_stderr: Its standard error.
        clean_nll: Negative log-likelihood of the whole model, in nats.
        clean_nll_stderr: Its standard error.
        skipped: Block to the reason why it has no lesion.
        provenance: Where the result came from; `num_forwards` counts the clean pass and one a unit,
            also where these begin in the middle (`shared_prefix` in the settings).
    """

    _plot: ClassVar[str | None] = "lesion_study"

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    parts: tuple[str, ...]
    depth: np.ndarray
    stage: np.ndarray
    skipped: dict[str, str]
    provenance: Provenance


def lesion_study(
    model: nn.Module,
    data: Iterable[Any],
    *,
    blocks: Blocks | None = None,
    units: Units = "paper",
    progress: bool = False,
) -> LesionStudy:
    """Accuracy and NLL with each unit of a model removed, one at a time.

    Args:
        model: Any classifier; left as it was found.
        data: Re-iterable of batches with labels or target probabilities.
        blocks: Blocks of the model; found with the first batch by default.
        units: `"paper"`, a convolution of each convolutional block and the residual branch of
            every other; `"branch"`, every residual branch; `"conv"`, convolutions alone; `"head"`,
            every attention head.
        progress: Show a progress bar.

    Returns:
        The study. Cost: about half as many forward passes over the data as units, and 2 to 3 more
        (in time up to 5). Memory: one batch, whatever the number of units.

    Raises:
        TypeError: If `data` cannot be iterated over twice, or `blocks` is no `Blocks`.
        ValueError: If `units` is unknown, no unit can be removed, targets are not those of a
            classifier, or `blocks` are those of another model.
    """
    check_choice("units", units, ("paper", "branch", "conv", "head"))
    began = time.perf_counter()
    batches = tracked_batches(model, data, "Lesion study", progress)
    check_blocks("blocks", model, blocks)
    shares = True
    lesions: list[tuple[int, Part]] = []
    with untouched(model), eagerly(), torch.no_grad():
        for inputs, targets, _ in batches:
            blocks = Blocks(model, example=inputs) if blocks is None else blocks
            traced = blocks.traced(inputs)
            passes = _passes(blocks, traced, inputs)
            if not lesions:
                lesions, skipped = _plan(blocks, traced, units)
                paired = PairedScores(len(lesions))
                shares = _resumes(lesions, traced, passes)
            truth = paired.add_clean(passes.logits, targets)
            for unit, logits in enumerate(_lesioned(lesions, traced, passes, shares)):
                paired.add(unit, truth.scores(logits))
    assert blocks is not None  # an empty stream has raised
    known = list(blocks)
    chosen = [known[position] for position, _ in lesions]
    parts = [part if isinstance(part, str) else f"head {part}" for _, part in lesions]
    return LesionStudy(
        names=tuple(block.name for block in chosen),
        kinds=tuple(block.kind for block in chosen),
        parts=tuple(parts),
        depth=np.array([block.depth for block in chosen]),
        stage=np.array([block.stage for block in chosen]),
        **paired.fields(),
        skipped=skipped,
        provenance=forward_provenance(
            model,
            num_samples=paired.count,
            num_forwards=1 + len(lesions),
            seconds=time.perf_counter() - began,
            settings={"units": units, "shared_prefix": shares},
        ),
    )


def _plan(
    blocks: Blocks, traced: Traced, units: Units
) -> tuple[list[tuple[int, Part]], dict[str, str]]:
    """Return what is removed, position of a block and its part, and why other blocks are not."""
    lesions: list[tuple[int, Part]] = []
    skipped: dict[str, str] = {}
    for position, (block, unit) in enumerate(zip(blocks, traced.units, strict=True)):
        for part in _parts(block.kind, units, num_heads(traced.trace, unit)):
            try:
                removal(traced.trace, unit, part)
            except Irremovable as reason:
                skipped[block.name] = str(reason)
            else:
                lesions.append((position, part))
    if not lesions:
        reasons = "; ".join(f"{k}: {v}" for k, v in list(skipped.items())[:3])
        raise ValueError(
            f"`units` must be something that can be removed from the model, got {units!r}, "
            f"which leaves nothing ({reasons or 'it has no such block'})."
        )
    return lesions, skipped


def _parts(kind: str, units: Units, heads: int) -> list[Part]:
    """Return what to remove of a block of this kind."""
    if kind in {"stem", "head"}:
        return []
    if units == "head":
        return [*range(max(heads, 1))] if kind == "msa" else []
    if units == "conv" or (units == "paper" and kind == "conv"):
        return ["conv"] if kind == "conv" else []
    return ["branch"]


def _passes(blocks: Blocks, traced: Traced, inputs: Any) -> PartialPasses:
    follows = (s.ordinal for s in traced.trace.steps if s.follows and s.ordinal is not None)
    return PartialPasses(functools.partial(blocks.predict, inputs), frozenset(follows))


def _lesioned(
    lesions: list[tuple[int, Part]], traced: Traced, passes: PartialPasses, shares: bool
) -> Iterator[Tensor]:
    """Yield the logits of one batch under each lesion, from the last block before it on."""
    walk = _Walk(traced, passes)
    for position, part in lesions:
        if shares:
            walk.advance(position)
        ordinal, handler = removal(traced.trace, traced.units[position], part)
        yield passes.logits_from(walk.start, walk.value, {ordinal: handler})


class _Walk:
    """The output of one block after the other, each computed from the one before.

    Attributes:
        start: Ordinal of the call that made it, `None` before the first.
        value: The output.
    """

    def __init__(self, traced: Traced, passes: PartialPasses) -> None:
        self._traced, self._passes = traced, passes
        self.start: int | None = None
        self.value: Tensor | None = None

    def advance(self, position: int) -> None:
        """Go to the last output before a block on which all that follows depends."""
        outputs = [unit.value for unit in self._traced.units[:position] if unit.is_cut]
        end = self._traced.trace.steps[outputs[-1]].ordinal if outputs else None
        if end is not None and end != self.start:
            self.value = self._passes.value_at(end, self.start, self.value)
            self.start = end


def _resumes(lesions: list[tuple[int, Part]], traced: Traced, passes: PartialPasses) -> bool:
    """Whether passes that begin in the middle give the logits of the whole pass."""
    walk = _Walk(traced, passes)
    try:
        for position, _ in lesions:
            walk.advance(position)
        logits = passes.logits_from(walk.start, walk.value, {})
    except Exception:  # control flow that depends on values: whatever it raises without them
        return False
    return torch.allclose(logits, passes.logits, rtol=1e-4, atol=1e-5, equal_nan=True)
