"""Work side by side on threads that share those of PyTorch.

An operation on a few images is too small to fill several cores: two of them, each on one core, take
less time than one after the other on both.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event

import torch


def side_by_side(work: Sequence[Callable[[], None]], stopped: Event) -> None:
    """Call functions at the same time, each on its share of PyTorch's threads.

    Args:
        work: Called each in a thread of its own.
        stopped: Set as soon as one has failed, or at an interrupt, for the others to end.

    Raises:
        Exception: The first that one of them raises, when all have ended.
    """
    threads, with_gradients = torch.get_num_threads(), torch.is_grad_enabled()

    def call(function: Callable[[], None]) -> None:
        torch.set_num_threads(max(threads // len(work), 1))  # of this thread
        with torch.set_grad_enabled(with_gradients):
            function()

    try:
        with ThreadPoolExecutor(len(work)) as pool:
            try:
                for done in as_completed([pool.submit(call, function) for function in work]):
                    done.result()
            finally:
                stopped.set()
    finally:
        torch.set_num_threads(threads)  # of threads to come
