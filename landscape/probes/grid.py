"""Coordinates of the points of a line or a surface."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from landscape._checks import as_numbers

Points = int | Sequence[float] | np.ndarray


def spans(
    span: float | Sequence[float], num_axes: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the (low, high) ends of the x and the y axis.

    Args:
        span: A number s for -s … s, `(low, high)` for every axis, or
            `(x_low, x_high, y_low, y_high)`.
        num_axes: 1 or 2.

    Raises:
        ValueError: If `span` is none of these.
    """
    kinds = "a number, (low, high)" + (" or (x_low, x_high, y_low, y_high)" * (num_axes == 2))
    given = as_numbers("span", span, kinds)
    ends = given.ravel().tolist()
    if given.ndim == 0:
        ends = [-ends[0], ends[0]] * 2
    elif len(ends) == 2:
        ends = ends * 2
    if given.ndim > 1 or len(ends) != 4 or (num_axes == 1 and ends[:2] != ends[2:]):
        raise ValueError(f"`span` must be {kinds}, got {span!r}.")
    if not np.isfinite(ends).all() or not (ends[0] < ends[1] and ends[2] < ends[3]):
        raise ValueError(f"`span` must be finite and increasing, got {span!r}.")
    return (ends[0], ends[1]), (ends[2], ends[3])


def axis(span: tuple[float, float], points: Points) -> np.ndarray:
    """Return the coordinates `(p,)` of one axis.

    Args:
        span: Ends of the axis.
        points: Number of evenly spaced points, or the coordinates themselves.

    Raises:
        ValueError: If `points` is below 2, or the coordinates do not increase.
    """
    if isinstance(points, int | np.integer):
        count = int(points)
        if count < 2:
            raise ValueError(
                f"`points` must be at least 2, got {count}; pass `[0.0]` for a single point."
            )
        steps = np.arange(count)
        # Written so that the middle of -s … s is 0 and not a rounding error.
        even: np.ndarray = (span[0] * (count - 1 - steps) + span[1] * steps) / (count - 1)
        return even
    kinds = "a number or finite coordinates"
    coordinates = as_numbers("points", points, kinds)
    if coordinates.ndim != 1 or not len(coordinates) or not np.isfinite(coordinates).all():
        raise ValueError(f"`points` must be {kinds}, got {points!r}.")
    if not (np.diff(coordinates) > 0).all():
        raise ValueError(f"`points` must increase, got {points!r}; sort them.")
    return coordinates


def axes(
    span: float | Sequence[float], points: Points | Sequence[Points]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates of the x and the y axis.

    Args:
        span: As in `spans`.
        points: As in `axis`, for both axes; two of these, in a tuple or as lists, for each.

    Raises:
        ValueError: If an argument is out of range.
    """
    x_span, y_span = spans(span, 2)
    each: Any = (points, points)
    if isinstance(points, tuple) and len(points) == 2:
        each = points
    elif isinstance(points, list) and len(points) == 2 and np.ndim(points[0]):
        each = points  # two lists; two numbers are one axis
    return axis(x_span, each[0]), axis(y_span, each[1])
