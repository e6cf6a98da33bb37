"""Ways to remove a part of a block, each a change of one call of the forward pass.

- the residual branch: the sum returns its skip;
- a convolution: it returns what it was given (Park & Kim, 2022, remove the 3x3 convolution of a
  ResNet's bottleneck so);
- an attention head: its output is zero.

A part that cannot be removed raises `Irremovable` with the reason: a block that changes the size of
its map has no identity to be replaced by.
"""

import operator
from contextlib import suppress
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from landscape.blocks.passes import Handler
from landscape.blocks.structure import Unit, attention_of
from landscape.blocks.tracing import Step, Trace, function_name

Part = Literal["branch", "conv"] | int
"""`"branch"`, `"conv"`, or the index of an attention head."""


class Irremovable(ValueError):
    """A part that has no lesion, and the reason."""


def removal(trace: Trace, unit: Unit, part: Part) -> tuple[int, Handler]:
    """Return the ordinal of the call to change and what it does instead.

    Args:
        trace: A pass with inputs of the shape at hand.
        unit: The block.
        part: What of it to remove.

    Raises:
        Irremovable: If the block has no such part, or it has no lesion.
    """
    if part == "branch":
        step, handler = _branch(trace, unit)
    elif part == "conv":
        step, handler = _convolution(trace, unit)
    elif isinstance(part, SupportsIndex):
        step, handler = _head(trace, unit, operator.index(part))
    else:
        raise Irremovable(f"what can be removed of it is {_parts(trace, unit)}")

    def same(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function_name(func) != step.name:
            raise ValueError(
                f"`model` must make the same calls for every batch, got {function_name(func)!r} "
                f"instead of {step.name!r} in block {unit.name!r}; does its control flow depend on "
                "the data?"
            )
        return handler(func, args, kwargs)

    assert step.ordinal is not None  # these functions are none whose inside is hidden
    return step.ordinal, same


def _parts(trace: Trace, unit: Unit) -> str:
    """Return what can be removed of a block, in words."""
    listed = []
    for part in ("branch", "conv"):
        with suppress(Irremovable):
            removal(trace, unit, part)
            listed.append(repr(part))
    heads = num_heads(trace, unit)
    listed += [f"a head from 0 to {heads - 1}"] if heads else []
    return " or ".join(listed) or "nothing"


def num_heads(trace: Trace, unit: Unit) -> int:
    """Return the number of attention heads of a block; 0 if it has none that can be told apart."""
    step = _attention(trace, unit)
    return 0 if step is None else step.heads


def _branch(trace: Trace, unit: Unit) -> tuple[Step, Handler]:
    if unit.kind == "pool":
        raise Irremovable("it changes the size or the channels of the map")
    if unit.addition is None:
        raise Irremovable("it has no residual branch")
    if unit.projected:
        raise Irremovable("its skip is a projection: it changes the size or the channels")
    skip = unit.skip or 0

    def pass_skip(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        return tensors[skip].clone()  # a copy: what follows may write in place

    return trace.steps[unit.addition], pass_skip


def _convolution(trace: Trace, unit: Unit) -> tuple[Step, Handler]:
    spatial = [trace.steps[s] for s in unit.branch if _is_spatial(trace.steps[s])]
    if not spatial:
        raise Irremovable("it has no convolution over space")
    kept = [step for step in spatial if step.shape == step.sizes[0]]
    if not kept:
        raise Irremovable("its convolution changes the size or the channels of the map")

    def pass_input(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["input"]
        return given.clone()

    return kept[-1], pass_input


def _head(trace: Trace, unit: Unit, head: int) -> tuple[Step, Handler]:
    step = _attention(trace, unit)
    if step is None or not step.heads:
        raise Irremovable("it has no attention heads that can be told apart")
    if not 0 <= head < step.heads:
        raise Irremovable(f"it has {step.heads} heads, from 0 to {step.heads - 1}")

    def without_head(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        keep = torch.ones(out.shape[-3], 1, 1, dtype=out.dtype, device=out.device)
        keep[head] = 0
        return out * keep

    def without_projected_head(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        weight = args[_OUT_PROJECTION].clone()  # (dim, heads * head_dim)
        weight.unflatten(1, (step.heads, -1))[:, head] = 0
        args = (*args[:_OUT_PROJECTION], weight, *args[_OUT_PROJECTION + 1 :])
        return func(*args, **kwargs)

    whole = step.name == "multi_head_attention_forward"
    return step, without_projected_head if whole else without_head


_OUT_PROJECTION = 11
"""Position of the output projection among the arguments of `F.multi_head_attention_forward`."""


def _attention(trace: Trace, unit: Unit) -> Step | None:
    """Return the call whose output has an axis of heads, `None` without one."""
    return next((step for step in attention_of(trace, unit.branch) if step.heads), None)


def _is_spatial(step: Step) -> bool:
    return step.name == "conv2d" and max(step.sizes[1][2:]) > 1
