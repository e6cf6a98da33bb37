"""Outputs of a model at moved weights, at the price of the least memory traffic.

On a CPU a batch goes through the model in parts whose activations stay in the cache, convolutions
see their channels last, and batch norms after them are folded into their weights. Loss and metrics
see the outputs of the whole batch, so a loss need not be a mean over samples for that. Whether the
model itself can be cut (batch norms without running statistics can not) is tried at the start, on
a few samples.

A GPU takes the batch as it is, and the whole point as one recording (`PointMeter`).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from landscape.batches import Inputs, names_of_rows, rows_of
from landscape.objective import FrozenObjective, as_logits
from landscape.parameters import call_with
from landscape.probes.folding import Pair, calls_of, folded
from landscape.probes.weights import laid_out
from landscape.switches import eagerly, is_compiled
from landscape.trial import has_batch_statistics

PART = 16
"""Fewest samples a part, a heuristic: the best of 8, 16, 32, 64 for ViTs and for wide ResNets."""

CACHE = 1 << 22
"""Bytes of the largest activation of a part that may have up to 4 · PART samples, a heuristic: 32
to 64 samples are best for a ResNet-20 and a small ViT, whose activations are small."""


class Forward:
    """Forward passes of a frozen objective's model with other parameters.

    Attributes:
        channels_last: Memory format that four-dimensional parameters should have.
        part: Most samples that go through the model at once; 0 for whole batches.
    """

    def __init__(self, frozen: FrozenObjective) -> None:
        """Find out how the model can be called.

        Args:
            frozen: The objective on its model and data; costs 64 samples of its first batch, and 32
                more for each way to cut it that changes the outputs.
        """
        self._frozen = frozen
        self._parts = _Parts(frozen.model)
        self.part, self.channels_last, self._pairs = self._plan()

    def logits(self, state: Mapping[str, Tensor], inputs: Inputs, size: int) -> Tensor:
        """Return the outputs `(size, …)` of one batch.

        Args:
            state: Parameters (and buffers) by name.
            inputs: Inputs of the batch.
            size: Number of its samples.
        """
        if not self.part or (size <= self.part and not self.channels_last and not self._pairs):
            return self._frozen.logits(state, inputs)
        return self._cut_logits(state, inputs, size, self.part, self.channels_last, self._pairs)

    def _plan(self) -> tuple[int, bool, list[Pair]]:
        """Return samples a part, channels last, folds: the cheapest that give the same outputs."""
        frozen = self._frozen
        batch = next(iter(frozen.batches))
        on_cpu = frozen.space.device.type == "cpu"
        mixes = has_batch_statistics(frozen.model)  # however little it shows at these weights
        if not on_cpu or mixes or frozen.objective.loss is None or batch.size <= PART:
            return 0, False, []
        size = min(batch.size, 2 * PART)
        inputs = rows_of(batch.inputs, batch.size, slice(0, size))
        self._parts.names = names_of_rows(batch.inputs, batch.size)
        for state in (frozen.space.awake, frozen.space.values):
            try:
                with (
                    eagerly(),
                    _largest_output(frozen.model) as largest,
                    calls_of(frozen.model) as calls,
                ):
                    expected = frozen.logits(state, inputs)
                break
            except Exception:  # it wants zeros where they are, or all of a batch
                continue
        else:
            return 0, False, []
        part = min(max(CACHE * size // max(largest), PART), 4 * PART)
        convolves = any(isinstance(module, nn.Conv2d) for module in frozen.model.modules())
        last = (True, False) if convolves and frozen.space.dtype == torch.float32 else (False,)
        pairs = [] if is_compiled(frozen.model) else calls.pairs()
        for channels_last, folds in itertools.product(last, [pairs, []] if pairs else [[]]):
            try:
                weights = laid_out({**frozen.space.fixed, **state}, channels_last)
                outputs = self._cut_logits(weights, inputs, size, PART, channels_last, folds)
            except Exception:  # such as a `view` that wants its channels first
                continue
            if _close(outputs, expected):
                return part, channels_last, folds
        return 0, False, []

    def _cut_logits(
        self,
        state: Mapping[str, Tensor],
        inputs: Inputs,
        size: int,
        part: int,
        channels_last: bool,
        pairs: Sequence[Pair],
    ) -> Tensor:
        state = self._frozen.space.state(state)
        model = self._frozen.model
        with self._frozen.evaluating(), folded(model, pairs, state) as state:
            named = {f"model.{name}": value for name, value in state.items()}
            call = (inputs, size, part, channels_last)
            outputs: Tensor = call_with(self._parts, named, *call)
        return outputs


class _Parts(nn.Module):
    """A model called on parts of a batch: one exchange of its parameters for all of them."""

    names: frozenset[str] = frozenset()  # entries of a mapping that have a row per sample

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs, size: int, part: int, channels_last: bool) -> Tensor:
        outputs = []
        count = -(-size // part)
        ends = [size * i // count for i in range(count + 1)]
        for start, end in itertools.pairwise(ends):
            rows = rows_of(inputs, size, slice(start, end), self.names)
            if isinstance(rows, Mapping):
                outputs.append(as_logits(self.model(**rows)))
                continue
            if channels_last and rows.dim() == 4:
                rows = rows.contiguous(memory_format=torch.channels_last)
            outputs.append(as_logits(self.model(rows)))
        return torch.cat(outputs)


@contextmanager
def _largest_output(model: nn.Module) -> Iterator[list[int]]:
    """Yield a list of the bytes of what each module returns, filled while inside."""
    sizes = [1]

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() * output.element_size())

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_hook(note))
        yield sizes


def _close(outputs: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ by rounding alone."""
    if outputs.shape != expected.shape:
        return False
    tolerance = min(1e3 * torch.finfo(expected.dtype).eps, 1e-2)
    error = (outputs - expected).abs().max()
    return bool(error <= tolerance * expected.abs().max())
