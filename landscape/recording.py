"""GPU work recorded once and replayed (CUDA graphs).

The host takes longer to launch an operation than a GPU to run it on a small batch: a product of 16
images is thousands of operations, and eagerly made it takes 3 to 8 times as long as the operations
do. A recording launches all of them at once. It reads and writes the same memory at every replay,
so what it works on is copied into place before, and its result is overwritten by the next one.

Only work that never waits for the device can be recorded; `unsynchronised` finds out by a trial,
because a recording that fails leaves CUDA's random state unusable.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Recording(Generic[T]):
    """Work on a stream, recorded.

    Attributes:
        result: What the work returned; its tensors hold what the last replay wrote.
    """

    result: T

    def __init__(
        self,
        work: Callable[[], T],
        stream: torch.cuda.Stream,
        before: "Recording[Any] | None" = None,
    ) -> None:
        """Record; nothing is computed yet.

        Args:
            work: Launches operations on the current stream and never waits for the device. The
                same must have run before, which makes what libraries set up on first use.
            stream: Any but the default one.
            before: A recording that is replayed before this one on the same stream; the memory
                that it works in serves this one too.
        """
        self._graph = torch.cuda.CUDAGraph()
        pool = None if before is None else before._graph.pool()
        with apart(stream):
            # Other threads, such as those of a loader, may go on with what they do.
            self._graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                self.result = work()
            finally:
                self._graph.capture_end()

    def replay(self, stream: torch.cuda.Stream) -> None:
        """Run the work.

        Args:
            stream: The one that it was recorded on.
        """
        with apart(stream):
            self._graph.replay()


class Repeated:
    """A function of a vector that is called often, on a GPU recorded at the second call."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], device: torch.device, recordable: bool = True
    ) -> None:
        """Wrap a function.

        Args:
            function: Of one vector; on a GPU what it reads besides must stay in place.
            device: Device of the vectors.
            recordable: Whether it may be recorded.
        """
        self._function = function
        self.stream = side_stream(device)
        self._recordable = recordable and self.stream is not None
        self._recording: Recording[Tensor] | None = None
        self._input: Tensor | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """Return the function's value, in memory of its own."""
        if self.stream is None:
            return self._function(v)
        with apart(self.stream):
            if not self._recordable:
                return self._function(v)
            if self._input is None:
                found, self._recordable = trial(lambda: self._function(v))
                self._input = v.clone()  # not before: a trial that fails has found out nothing
                return found
            self._input.copy_(v)
            if self._recording is None:
                self._recording = Recording(partial(self._function, self._input), self.stream)
            self._recording.replay(self.stream)
            return self._recording.result.clone()


@cache
def side_stream(device: torch.device, place: int = 0) -> torch.cuda.Stream | None:
    """Return a stream to record on, or `None` where nothing can be recorded.

    The same at every call: libraries keep some 100 MB of memory for each stream that was used.

    Args:
        device: Any device.
        place: Number of the stream, for work that goes side by side.
    """
    make: Any = torch.cuda.Stream  # PyTorch does not annotate it
    return make(device) if device.type == "cuda" else None


@contextmanager
def apart(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on a stream after all that is queued on the current one, and before what follows.

    One thread at a time: what another would start on the stream meanwhile could become a part of a
    recording, and trials (`unsynchronised`) switch what holds for all threads.
    """
    if stream is None:
        yield
        return
    with _lock:
        outside = torch.cuda.current_stream(stream.device)
        if outside == stream:
            yield
            return
        stream.wait_stream(outside)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:  # after an error too: what was started by then still runs
            outside.wait_stream(stream)


def trial(work: Callable[[], T]) -> tuple[T, bool]:
    """Return what some work returns, and whether it can be recorded: it never waits."""
    try:
        with unsynchronised():
            return work(), True
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if _WAITS not in str(error):
            raise
    return work(), False


@contextmanager
def unsynchronised() -> Iterator[None]:
    """Let what would wait for the device fail.

    Raises:
        RuntimeError: From the operation that would.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def shape_of(value: Any) -> Any:
    """Return shapes and types of all tensors in mappings and tuples, and the rest in words."""
    if isinstance(value, Mapping):
        return tuple((name, shape_of(entry)) for name, entry in value.items())
    if isinstance(value, tuple):
        return tuple(map(shape_of, value))
    return (value.shape, value.dtype) if isinstance(value, Tensor) else repr(value)


def overwrite(place: Any, value: Any) -> None:
    """Copy all tensors in mappings and tuples into those of another of the same shapes."""
    if isinstance(place, Tensor):
        place.copy_(value)
    elif isinstance(place, Mapping):
        for name, entry in place.items():
            overwrite(entry, value[name])
    elif isinstance(place, tuple):
        for entry, other in zip(place, value, strict=True):
            overwrite(entry, other)


_lock = threading.RLock()
_WAITS = "called a synchronizing CUDA operation"
