"""Forward and backward pass of a training step as a CUDA graph.

The host takes longer to launch the operations of a small batch than a GPU to run them. Recorded
once and replayed (`landscape.recording`), they are launched at once; batch and gradients
then lie in memory of the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from landscape._streams import read_streams, same_streams
from landscape.batches import Inputs, copied
from landscape.recording import Recording, apart, overwrite, shape_of, side_stream, trial
from landscape.restore import same_buffers
from landscape.training.surroundings import same_random_state

Passes = Callable[[Inputs, Tensor], tuple[Tensor, ...]]


class Recorded:
    """Passes of one batch after another, recorded at the second one of the first shape.

    Batches of other shapes go unrecorded, and all of them where the model waits for the device,
    draws from a random stream of the CPU, or exchanges a buffer instead of writing to it.

    Attributes:
        stream: Where all passes are to run; `None` without a CUDA device: nothing is recorded.
    """

    def __init__(
        self, passes: Passes, model: nn.Module, parameters: Sequence[Tensor], device: torch.device
    ) -> None:
        """Wrap passes; nothing is computed yet.

        Args:
            passes: Writes `.grad` of the parameters, and returns tensors that have no graph.
            model: The model.
            parameters: All that get a gradient.
            device: Device of the model.
        """
        self._passes, self._model, self._parameters = passes, model, parameters
        self.stream = side_stream(device)
        self._recordable = self.stream is not None
        self._shape: Any = None
        self._batch: tuple[Inputs, Tensor] | None = None
        self._recording: Recording[tuple[Tensor, ...]] | None = None
        self._gradients: list[Tensor | None] = []

    def __call__(self, inputs: Inputs, targets: Tensor) -> tuple[Tensor, ...]:
        """Return what the passes return, in memory of its own."""
        shape = shape_of((inputs, targets)) if self._recordable else None
        if shape is None or shape != self._shape:
            self._shape = self._shape or shape
            return self._passes(inputs, targets)
        if self._recording is None:
            self._record(inputs, targets)
        if self._recording is None or self.stream is None:
            return self._passes(inputs, targets)
        with apart(self.stream):
            overwrite(self._batch, (inputs, targets))
        self._recording.replay(self.stream)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient  # a batch of another shape had gradients of its own
        return tuple(t.clone() for t in self._recording.result)

    def _record(self, inputs: Inputs, targets: Tensor) -> None:
        """Record the passes, if they can be; what a trial of them changes is put back."""
        assert self.stream is not None
        with apart(self.stream):
            self._batch = copied(inputs), copied(targets)
            work = partial(self._passes, *self._batch)
            with same_buffers(self._model) as are_same, same_random_state(self._model):
                before = read_streams()
                never_waits = trial(work)[1]
                self._recordable = (
                    never_waits and are_same() and same_streams(before, read_streams())
                )
            for parameter in self._parameters:
                parameter.grad = None
            if self._recordable:
                torch.cuda.empty_cache()  # the recording takes as much once more
                self._recording = Recording(work, self.stream)
                self._gradients = [parameter.grad for parameter in self._parameters]
