"""The one wrapper around tqdm: progress is shown only where it was asked for."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def track(
    items: Iterable[T], description: str, progress: bool, total: int | None = None
) -> "tqdm[T]":
    """Return `items` behind a tqdm bar that is silent unless `progress`.

    Args:
        items: What to iterate over.
        description: Text in front of the bar.
        progress: Show the bar, where there is a place for it.
        total: Number of items where `items` has no length.
    """
    return tqdm(
        items,
        desc=description,
        disable=not progress or sys.stderr is None,
        total=total,
        leave=False,
    )


def progress_bar(description: str, progress: bool, total: int) -> "tqdm[int]":
    """Return a tqdm bar to update by hand, silent unless `progress`.

    Args:
        description: Text in front of the bar.
        progress: Show the bar.
        total: Number of updates.
    """
    return track(range(0), description, progress, total)
