"""Ordered, named, typed view of any vision model: what its blocks are and what they compute.

    blocks = Blocks(model)
    for block in blocks:
        print(block.name, block.kind, block.depth)
    features = blocks.capture(images)  # name -> (n, c, h, w)
    with blocks.capture(images) as features:
        ...  # let go of at the end
    with blocks.lesion("blocks.3.attn"):
        logits = model(images)  # as if that block were the identity

Blocks are found in the dataflow of one forward pass (`structure`), not by the names of classes:
every residual sum ends a block, so a transformer has one behind each attention and one behind each
MLP, after its residual addition as in Park & Kim (2022). A block is observed or removed at the very
call that computes it, counted from the start of the pass: the model is never copied or rewritten,
and carries hooks inside of `lesion` alone.
"""

import fnmatch
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from landscape._checks import check_module, check_python, check_type, nearest
from landscape.batches import Placement
from landscape.blocks.block import Block, Traced, describe
from landscape.blocks.features import Features
from landscape.blocks.inputs import likely_images, main_input, num_samples, resized, shape_key
from landscape.blocks.layout import Layout, layout_of
from landscape.blocks.lesions import Irremovable, Part, removal
from landscape.blocks.passes import ControlledPass, Handler, is_paused, paused
from landscape.blocks.structure import (
    Kind,
    find_units,
    modules_in_line,
    named_units,
    share_outside,
)
from landscape.blocks.tracing import Trace, function_name, record
from landscape.caches import Cache, caches_of, emptied
from landscape.kept import keeps_tensors
from landscape.objective import as_logits, outputs_of
from landscape.restore import eval_mode, untouched
from landscape.switches import eagerly, without_fast_path

Choose = str | Sequence[str]
Visitor = Callable[[Block, Tensor], None]

_MOST_OUTSIDE = 0.6  # share of the layers: above, the blocks tell little of the model
_TRACED = 3  # samples in the traced batch: a size that no other axis is likely to have


class Blocks:
    """The blocks of a model in the order in which they are computed.

    Args:
        model: Any module; traced in evaluation mode by a forward pass of three samples, several
            where it keeps tensors between calls.
        choose: Names or glob patterns of modules whose outputs are taken instead of the residual
            blocks that are found by themselves.
        example: A batch of inputs (tensor, or mapping of keyword arguments) of the size that the
            model takes; random images of the size that the model states, or else of a common
            size, by default.

    Raises:
        TypeError: If `model` is no module, or `example` no batch.
        ValueError: If no block is found, a pattern matches nothing, or no example fits the model.
    """

    def __init__(
        self, model: nn.Module, choose: Choose | None = None, *, example: Any = None
    ) -> None:
        check_module(model)
        if example is not None:
            main_input(model, example, "example")  # errors before any pass
        compiled = getattr(model, "_orig_mod", None)
        self.model: nn.Module = model if compiled is None else compiled
        self._choose = None if choose is None else _matching(self.model, choose)
        self._traces: dict[Any, Traced] = {}
        self._caches: list[Cache] = []
        traced = self._first_trace() if example is None else self.traced(example)
        self._blocks = describe(traced)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the blocks."""
        return tuple(block.name for block in self._blocks)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of the blocks."""
        return tuple(block.kind for block in self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def __getitem__(self, name: str) -> Block:
        return self._blocks[self.index(name)]

    def __repr__(self) -> str:
        rows = [
            f"  {b.name}: {b.kind}, {b.channels}"
            + (f" x {b.grid[0]} x {b.grid[1]}" if b.grid else "")
            for b in self._blocks
        ]
        return "\n".join([f"Blocks of {type(self.model).__name__}", *rows])

    def index(self, name: str) -> int:
        """Return the position of a block.

        Raises:
            ValueError: If there is none of that name.
        """
        if name not in self.names:
            raise ValueError(
                f"`name` must be one of the {len(self)} blocks, got {name!r}; the nearest are "
                f"{nearest(name, self.names)}."
            )
        return self.names.index(name)

    def predict(self, inputs: Any) -> Tensor:
        """Return the logits of a pass that makes the calls of the trace.

        The pass is in evaluation mode, and without what the model has cached before.

        Args:
            inputs: A batch for the model: a tensor, or a mapping of keyword arguments; it is moved
                to the device and the precision of the model.
        """
        return as_logits(self._outputs(inputs))

    def _outputs(self, inputs: Any) -> Any:
        with paused():  # no call of the trace
            inputs = Placement.of(self.model).place(inputs)
        with eval_mode(self.model), emptied(self._caches), eagerly(), without_fast_path():
            return outputs_of(self.model, inputs)

    def visit(self, inputs: Any, visitor: Visitor) -> Any:
        """Run the model once and show every block's output as it appears.

        Only the output at hand is kept, whatever the number of blocks. Gradients flow unless the
        caller disables them.

        Args:
            inputs: A batch for the model, as in `predict`.
            visitor: Called as `visitor(block, feature)` with `feature (n, c, h, w)`, a view that
                later layers may overwrite, or `(n, features)` where `block.is_map` is false.

        Returns:
            The logits; what the model returns where it has none.

        Raises:
            ValueError: If the model makes other calls than in its trace.
        """
        traced, n = self.traced(inputs), num_samples(self.model, inputs)
        shown: dict[int, list[tuple[Block, str, Layout]]] = {}  # two blocks may end in one call
        for block, unit, layout in zip(self._blocks, traced.units, traced.layouts, strict=True):
            step = traced.trace.steps[unit.value]
            assert step.ordinal is not None  # a unit ends in a call that can be seen
            shown.setdefault(step.ordinal, []).append((block, step.name, layout))
        handlers: dict[int, Handler] = {
            ordinal: functools.partial(_show, ending, n, visitor)
            for ordinal, ending in shown.items()
        }
        with ControlledPass(handlers):
            return self._outputs(inputs)

    def capture(self, inputs: Any) -> Features:
        """Return every block's output by name, each a copy `(n, c, h, w)`, from one forward pass.

        Args:
            inputs: A batch for the model, as in `predict`.

        Returns:
            A dictionary, which as a context lets go of the outputs at its end: `with
            blocks.capture(inputs) as features:`.
        """
        features = Features()

        def keep(block: Block, feature: Tensor) -> None:
            features[block.name] = feature.clone()

        with untouched(self.model), torch.no_grad():
            self.visit(inputs, keep)
        return features

    @contextmanager
    def lesion(self, name: str, part: Part = "branch") -> Iterator[None]:
        """Remove a part of one block from every call of the model inside the context.

        Args:
            name: The block.
            part: `"branch"`, its residual branch, so that the skip alone passes; `"conv"`, its
                last convolution over space, which then returns its input; or the index of an
                attention head, whose output is then zero.

        Raises:
            ValueError: If there is no such block, or nothing can stand in for that part of it.
        """
        position = self.index(name)
        self._removal(self._first, position, part)  # errors before any pass
        active: list[ExitStack] = []

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if is_paused():  # images of a new size: this is the pass that traces them
                return
            with paused():
                traced = self.traced(args[0] if args else kwargs)
                ordinal, handler = self._removal(traced, position, part)
            active.append(ExitStack())
            active[-1].enter_context(emptied(self._caches))
            active[-1].enter_context(ControlledPass({ordinal: handler}))

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if active and not is_paused():
                active.pop().close()

        before = self.model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
        after = self.model.register_forward_hook(end, always_call=True)
        with before, after, eagerly(), without_fast_path():
            yield

    def traced(self, inputs: Any) -> Traced:
        """Return the trace of passes with inputs of this shape, made at the first of them."""
        known = self._traces.get(shape_key(inputs))
        return known or self._remember(inputs, self._record(inputs))

    def _record(self, inputs: Any) -> Trace:
        trace = self._record_of(inputs, _TRACED)
        shapes = [step.shape[:2] for step in trace.steps if step.shape and len(step.shape) == 3]
        if (_TRACED, _TRACED) in shapes:  # as many tokens: which axis is that of the samples?
            lengths = set().union(*shapes)
            trace = self._record_of(inputs, next(n for n in count(4) if n not in lengths))
        return trace

    def _record_of(self, inputs: Any, size: int) -> Trace:
        placement = Placement.of(self.model)
        example = resized(self.model, placement.place(inputs), size)
        with paused(), untouched(self.model), eagerly(), without_fast_path(), torch.no_grad():
            if not keeps_tensors(self.model):
                trace = record(self.model, example)
                if any(not step.sizes and step.shape for step in trace.steps):
                    # What it makes of nothing it may look up from now on, in `functools.lru_cache`.
                    trace = record(self.model, example)
                if not keeps_tensors(self.model):
                    return trace
            found = caches_of(self.model, functools.partial(outputs_of, self.model, example))
            self._caches += [cache for cache in found if cache not in self._caches]
            with emptied(self._caches):
                return record(self.model, example)

    def _remember(self, inputs: Any, trace: Trace) -> Traced:
        """Find the blocks in a trace, and check that they are those of the first one."""
        units = find_units(trace) if self._choose is None else named_units(trace, self._choose)
        if not units:
            check_python(self.model)
            raise ValueError(
                f"`model` must have residual blocks, found none in a {type(self.model).__name__}; "
                f"{_how_to_name(trace)}."
            )
        outside = share_outside(trace, units) if self._choose is None and not self._traces else 0.0
        if outside > _MOST_OUTSIDE:
            warnings.warn(
                f"{outside:.0%} of the layers with weights lie outside the blocks that were found "
                f"in `model`, in parallel streams; {_how_to_name(trace)}.",
                stacklevel=4,
            )
        names = tuple(unit.name for unit in units)
        if self._traces and names != self.names:
            raise ValueError(
                f"`inputs` must have a size at which the model has the {len(self)} blocks of its "
                f"first example, got {len(names)} blocks; make Blocks(model, example=inputs)."
            )
        layouts = tuple(layout_of(trace, unit.value) for unit in units)
        traced = Traced(trace, tuple(units), layouts)
        self._traces[shape_key(inputs)] = traced
        return traced

    @property
    def _first(self) -> Traced:
        return next(iter(self._traces.values()))

    def _removal(self, traced: Traced, position: int, part: Part) -> tuple[int, Handler]:
        try:
            return removal(traced.trace, traced.units[position], part)
        except Irremovable as reason:
            raise ValueError(
                f"`name` and `part` must be something that can be removed, got {part!r} of "
                f"{self.names[position]!r}, but {reason}."
            ) from None

    def _first_trace(self) -> Traced:
        """Trace random images of the first size that the model accepts."""
        reasons = []
        for example in likely_images(self.model):
            try:
                trace = self._record(example)
            except Exception as error:  # whatever a model raises at images of another size
                reasons.append(f"{tuple(example.shape[1:])}: {error}".splitlines()[0])
                continue
            return self._remember(example, trace)
        raise ValueError(
            f"`example` must be given for a {type(self.model).__name__}, no common image size fits "
            f"({'; '.join(reasons[:2])}); pass Blocks(model, example=images)."
        )


def check_blocks(name: str, model: nn.Module, blocks: Blocks | None) -> None:
    """Refuse what are no blocks of a model; `None` stands for those found by themselves.

    Args:
        name: Name of the argument.
        model: The model that is probed.
        blocks: What the user gave.

    Raises:
        TypeError: If `blocks` is something else.
        ValueError: If they are those of another model.
    """
    if blocks is None:
        return
    remedy = "pass Blocks(model, [names or patterns])"
    check_type(name, blocks, Blocks, "Blocks of the model, or None to find them", remedy)
    if blocks.model is not getattr(model, "_orig_mod", model):
        raise ValueError(
            f"`{name}` must be those of the model that is probed, got those of another "
            f"{type(blocks.model).__name__}; pass Blocks(model)."
        )


def _show(
    blocks: Sequence[tuple[Block, str, Layout]],
    n: int,
    visitor: Visitor,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Make a call and show its output: a handler of `ControlledPass` with its first arguments."""
    out = func(*args, **kwargs)
    value = next((t for t in tree_leaves(out) if isinstance(t, Tensor)), None)
    for block, name, layout in blocks:
        if value is None or function_name(func) != name or not layout.fits(value.shape, n):
            raise _changed(block.name, torch.Size() if value is None else value.shape, layout.shape)
        visitor(block, layout.apply(value, n))
    return out


def _matching(model: nn.Module, choose: Choose) -> list[str]:
    """Return the names of the modules that match, in the order of the model."""
    patterns = [choose] if isinstance(choose, str) else list(choose)
    names = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(
                f"`choose` must match names of modules, got {pattern!r}, which matches none; the "
                f"nearest are {nearest(pattern, names)}."
            )
        chosen.update(found)
    if not chosen:
        raise ValueError("`choose` must hold at least one name or pattern, got none.")
    return [name for name in names if name in chosen]


def _how_to_name(trace: Trace) -> str:
    names = modules_in_line(trace)[:3]
    if not names:
        return "it calls no module that could be named; make what is a block a module of its own"
    return f"name its blocks, as in Blocks(model, {names})"


def _changed(name: str, got: torch.Size, traced: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"`model` must make the same calls for every batch, got {tuple(got)} at block {name!r} "
        f"instead of {traced} (apart from the batch size); does control flow depend on the data?"
    )
