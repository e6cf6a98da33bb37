"""Work side by side on threads that share those of PyTorch.

An operation on a few images is too small to fill several cores: two of them, each on one core, take
less time than one after the other on both.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import nullcontext
from threading import Event
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def num_threads() -> int:
    """Return among how many threads work can be shared: PyTorch's, if each can have a share."""
    openmp: Any = torch.backends.openmp  # PyTorch does not annotate it
    return torch.get_num_threads() if openmp.is_available() else 1


def side_by_side(
    work: Sequence[Callable[[], T]],
    stopped: Event | None = None,
    pool: ThreadPoolExecutor | None = None,
) -> list[T]:
    """Call functions at the same time, each on its share of PyTorch's threads.

    Args:
        work: Called each in a thread of its own.
        stopped: Set as soon as one has failed, or at an interrupt, for the others to end; and when
            all are done.
        pool: Threads to use; those that are made for one call find none of the memory that an
            earlier one has left.

    Returns:
        What they return.

    Raises:
        Exception: The first that one of them raises, when all have ended.
    """
    count, with_gradients = torch.get_num_threads(), torch.is_grad_enabled()

    def call(function: Callable[[], T]) -> T:
        torch.set_num_threads(max(count // len(work), 1))  # of this thread
        with torch.set_grad_enabled(with_gradients):
            return function()

    try:
        with ThreadPoolExecutor(len(work)) if pool is None else nullcontext(pool) as threads:
            calls = [threads.submit(call, function) for function in work]
            try:
                for done in as_completed(calls):
                    done.result()
            finally:
                if stopped is not None:
                    stopped.set()
                wait(calls)
    finally:
        torch.set_num_threads(count)  # of threads to come
    return [done.result() for done in calls]
