"""Forward and backward pass of a training step as a CUDA graph.

The host takes longer to launch the operations of a small batch than a GPU to run them. Recorded
once and replayed (`landscape.recording`), they are launched at once; batch and gradients
then lie in memory of the recording, and what it reads of the model besides its parameters (buffers,
tensors that are attributes) is kept as it was then.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from landscape._streams import read_streams, same_streams
from landscape.batches import Inputs, copied
from landscape.recording import Recording, apart, overwrite, shape_of, side_stream, trial
from landscape.restore import same_tensors, tensors_of
from landscape.training.surroundings import same_random_state

Passes = Callable[[Inputs, Tensor], tuple[Tensor, ...]]


class Recorded:
    """Passes of one batch after another, recorded at the second one of the first shape.

    Batches of other shapes go unrecorded, and all of them where the model waits for the device,
    draws from a random stream of the CPU, or exchanges a buffer or another tensor of its own
    instead of writing to it; or where a graph that the caller keeps ends at a parameter.

    Attributes:
        stream: Where all passes are to run; `None` without a CUDA device: nothing is recorded.
    """

    def __init__(
        self,
        passes: Passes,
        modules: Sequence[nn.Module],
        parameters: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        """Wrap passes; nothing is computed yet.

        Args:
            passes: Writes `.grad` of the parameters, and returns tensors that have no graph.
            modules: What the passes call: the model, and a loss that is a module.
            parameters: All that get a gradient.
            device: Device of the model.
        """
        self._passes, self._modules, self._parameters = passes, modules, parameters
        self.stream = side_stream(device)
        self._recordable = self.stream is not None and not any(map(_ends_a_graph, parameters))
        self._held: list[Tensor] = []
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
            with ExitStack() as stack:
                are_same = [stack.enter_context(same_tensors(each)) for each in self._modules]
                stack.enter_context(same_random_state(self._modules[0]))
                before = read_streams()
                # Checkpointing sets it for dropout to draw the same again: not to be recorded.
                set_state = torch.cuda.set_rng_state
                with patch.object(torch.cuda, "set_rng_state", wraps=set_state) as rewinds:
                    never_waits = trial(work)[1]
                self._recordable = (
                    never_waits
                    and not rewinds.called
                    and all(same() for same in are_same)
                    and same_streams(before, read_streams())
                )
            for parameter in self._parameters:
                parameter.grad = None
            if self._recordable:
                torch.cuda.empty_cache()  # the recording takes as much once more
                self._held = [t for each in self._modules for t in tensors_of(each)]
                self._recording = Recording(work, self.stream)
                self._gradients = [parameter.grad for parameter in self._parameters]


def _ends_a_graph(parameter: Tensor) -> bool:
    """Return whether a graph that is alive ends at a parameter.

    The node there adds up gradients on the stream that it was made on, which is not the one that is
    recorded. It lives as long as a graph that it belongs to, so a mark on it tells.
    """
    if not parameter.requires_grad:
        return False

    def marks() -> dict[Any, Any]:
        with torch.enable_grad():
            view: Any = parameter.view_as(parameter).grad_fn
        found: dict[Any, Any] = view.next_functions[0][0].metadata
        return found

    marks()[_MARK] = True
    return marks().pop(_MARK, False) is True


_MARK = object()
