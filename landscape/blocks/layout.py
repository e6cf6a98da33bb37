"""Feature maps in one form: channels-first maps, channels-last maps and tokens to (n, c, h, w).

How a value is laid out is read off the trace: the axis of its channels from the layers that take
it, the grid of its tokens from the map that they came from, and the tokens that are no part of the
map (class, distillation, register) from the concatenation that put them there. Windows by tokens,
and other cuts of a map, are told by their aspect; they are no map.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from landscape.blocks.tracing import INPUT, Step, Trace

_LAST = frozenset({"layer_norm", "linear", "rms_norm"})
_NORMS = frozenset({"batch_norm", "group_norm", "instance_norm"})
_SPATIAL = frozenset(
    {"conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"}
)
_SECOND = _NORMS | _SPATIAL | {"conv1d"}
_PERMUTING = frozenset({"permute", "transpose", "movedim", "swapaxes", "swapdims", "T", "get"})
_JOINING = frozenset({"cat", "concat", "concatenate"})


@dataclass(frozen=True)
class Layout:
    """How a value becomes (n, c, h, w), or (n, features) where it is no map.

    Attributes:
        shape: Shape of the value in the traced batch.
        batch: Axis of the samples.
        channels: Axis of the channels.
        grid: Rows and columns, `None` if the value is no map.
        prefix: Tokens before those of the map.
        num_samples: Samples in the traced batch.
    """

    shape: tuple[int, ...]
    batch: int
    channels: int
    grid: tuple[int, int] | None
    prefix: int
    num_samples: int

    def fits(self, shape: torch.Size, num_samples: int) -> bool:
        """Whether a value of `num_samples` samples has the traced shape otherwise."""
        if len(shape) != len(self.shape):
            return False
        return all(
            a * num_samples == b * self.num_samples if axis == self.batch else a == b
            for axis, (b, a) in enumerate(zip(shape, self.shape, strict=True))
        )

    def apply(self, value: Tensor, num_samples: int) -> Tensor:
        """Return the value as (n, c, h, w), or (n, features) where it is no map."""
        if self.grid is None:
            value = value.movedim(self.batch, 0)
            return value.reshape(num_samples, -1)
        if (self.batch, self.channels) != (0, 1):
            value = torch.movedim(value, (self.batch, self.channels), (0, 1))
        if value.dim() == 4:
            return value
        h, w = self.grid
        return value[:, :, self.prefix : self.prefix + h * w].reshape(*value.shape[:2], h, w)


def layout_of(trace: Trace, value: int) -> Layout:
    """Return the layout of a value of the trace."""
    shape, n = trace.steps[value].shape or (), trace.num_samples
    batch = 0 if not shape or shape[0] == n or n not in shape else shape.index(n)
    if len(shape) == 4:
        channels = 1 if _channel_axis(trace, value) == 1 else 3
        rows, columns = shape[2:] if channels == 1 else shape[1:3]
        pieces = shape[batch] != n  # of images, each by itself, have an aspect of their own
        grid = (rows, columns) if pieces or _is_grid(trace, rows, columns) else None
        return Layout(shape, batch, channels, grid, 0, n)
    if len(shape) == 3:
        channels = 1 if _channel_axis(trace, value) == 1 and batch == 0 else 2
        tokens = shape[3 - batch - channels]
        grid3, prefix = _token_grid(trace, value, tokens)
        return Layout(shape, batch, channels, grid3, prefix, n)
    return Layout(shape, batch, min(1, len(shape) - 1), None, 0, n)


def _channel_axis(trace: Trace, value: int) -> int:
    """Return 1 or -1: where the channels are for the first layer that takes or made the value."""
    steps, shape = trace.steps, trace.steps[value].shape
    frontier = {value}
    for step in range(value + 1, min(len(steps), value + 60)):
        if frontier & set(steps[step].inputs):
            axis = _axis_of_layer(steps[step])
            if axis:
                return axis
            if _keeps_channels(steps[step], shape):
                frontier.add(step)
    return _axis_behind(steps, value) or (1 if len(shape or ()) == 4 else -1)


def _axis_behind(steps: list[Step], value: int) -> int:
    """Return 1 or -1 for the last layer before a value, 0 if none tells."""
    shape = steps[value].shape
    while not (axis := _axis_of_layer(steps[value])):
        step = steps[value]
        if step.name in _PERMUTING:
            return -1 if _moves_channels_last(steps, step) else 0
        given = [i for i in step.inputs if i >= 0]
        before = [i for i in given if _keeps_channels(steps[i], shape)]
        before = before or [i for i in given if steps[i].shape == shape]  # permuted itself
        if not before:
            return 0
        value = max(before)
    return axis


def _moves_channels_last(steps: list[Step], step: Step) -> bool:
    """Whether a step turns what a convolution made, (n, c, h, w), to (n, h, w, c)."""
    given = step.inputs[0] if step.inputs else INPUT
    before = steps[given].shape if given != INPUT else None
    if before is None or len(before) != 4 or step.shape != (before[0], *before[2:], before[1]):
        return False
    return _axis_behind(steps, given) == 1


def _axis_of_layer(step: Step) -> int:
    """Return the axis of the channels of a layer, 0 if it does not tell."""
    if step.name in _NORMS and len(step.sizes[0]) == 2:
        return -1  # all tokens in one batch, as in LeViT: the second axis is the last
    return -1 if step.name in _LAST else 1 if step.name in _SECOND else 0


def _keeps_channels(step: Step, shape: tuple[int, ...] | None) -> bool:
    """Whether a step has the same shape, or the same last axis and size: tokens and their map."""
    if step.shape == shape:
        return step.name not in _PERMUTING
    if step.shape is None or shape is None or step.name in _PERMUTING:
        return False
    return step.shape[-1] == shape[-1] and math.prod(step.shape) == math.prod(shape)


def _token_grid(trace: Trace, value: int, tokens: int) -> tuple[tuple[int, int] | None, int]:
    """Return rows and columns of a token sequence, and the number of tokens before its map."""
    todo = {value}
    wanted = {tokens: 0}  # length of a sequence -> tokens before it
    while (current := max(todo, default=INPUT)) != INPUT:  # inputs are older than what is made
        todo.remove(current)
        step = trace.steps[current]
        grid = _grid_of(trace, step, wanted)
        if grid is not None:
            return grid, wanted[grid[0] * grid[1]]
        if step.name in _JOINING and step.shape is not None and len(step.shape) == 3:
            axis = (1 if step.dim is None else step.dim) % 3
            length = step.shape[axis]
            if length in wanted:
                before = wanted[length]
                for size in step.sizes:
                    wanted.setdefault(size[axis], before)
                    before += size[axis]
        todo.update(step.inputs)
    return _grid_by_aspect(trace.input_shape, tokens)


def _grid_of(trace: Trace, step: Step, wanted: dict[int, int]) -> tuple[int, int] | None:
    """Return the rows and columns of a map with one of the `wanted` numbers of positions."""
    shape = step.shape
    if shape is None or len(shape) != 4 or shape[0] != trace.num_samples:
        return None
    made = _acts_over_space(step)
    for rows, columns in (shape[2:],) if made else (shape[2:], shape[1:3]):
        single = min(rows, columns) == 1  # which elsewhere may be keys by a head, say
        if rows * columns not in wanted or rows * columns == 1 or (single and not made):
            continue
        if _is_grid(trace, rows, columns):
            return rows, columns
    return None


def _is_grid(trace: Trace, rows: int, columns: int) -> bool:
    """Whether two axes are those of a map, not windows by tokens or the like.

    A map has the aspect of the images, or of what a layer over space has made of them (its strides
    may differ down and across), up to a row or column of rounding.
    """
    if len(trace.input_shape) != 4:
        return True
    n = trace.num_samples
    made = {step.shape[2:] for step in trace.steps
            if step.shape and step.shape[0] == n and _acts_over_space(step)}  # fmt: skip
    made = {shape for shape in made if min(shape) > 1}
    return any(
        abs(rows * width - columns * height) <= max(height, width)
        for height, width in made | {trace.input_shape[2:]}
    )


def _acts_over_space(step: Step) -> bool:
    """Whether a step makes a map by a convolution with a kernel, or pooling."""
    if step.name not in _SPATIAL or step.shape is None:
        return False
    before, *weight = step.sizes
    return step.name != "conv2d" or step.shape[2:] != before[2:] or max(weight[0][2:]) > 1


def _grid_by_aspect(images: tuple[int, ...], tokens: int) -> tuple[tuple[int, int] | None, int]:
    """Return the grid with the aspect of the images, behind as few other tokens as possible."""
    if len(images) != 4:
        return None, 0
    height, width = images[2:]
    for prefix in range(min(tokens, 9)):
        for rows in range(1, tokens + 1):
            columns, rest = divmod(tokens - prefix, rows)
            if not rest and rows * columns > 1 and rows * width == columns * height:
                return (rows, columns), prefix
    return None, 0
