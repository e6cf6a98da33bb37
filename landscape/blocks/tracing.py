"""One recorded forward pass: which function was called where, and what flowed into what.

Every call of a torch function is a step. A step is known by its ordinal in the pass, which is the
same at every pass with inputs of one shape, so that a later pass can be observed or changed at
that very call (`passes`): no hook, no copy, no rewriting of the model. Values are known by the
step that made them; only values that depend on the model's input are followed.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from landscape.blocks.inputs import main_input
from landscape.objective import outputs_of

INPUT = -1
"""The value that is the model's first input: images, mostly."""


@dataclass(frozen=True)
class Step:
    """One call of a torch function.

    Attributes:
        name: Name of the function, without the underscores of operators and in-place forms.
        ordinal: Number of the call among all calls of the pass; `None` for a module whose inside
            cannot be seen (scripted code).
        span: Innermost module that was running, an index into `Trace.spans`.
        inputs: Values among its arguments that depend on the model's input, in order.
        shape: Shape of its (first) output tensor; `None` if it returns none.
        follows: Whether the output depends on the model's input.
        sizes: Facts of the call: shapes of all tensor arguments, in order.
        positions: Index of each of `inputs` among the tensor arguments.
        dim: The argument `dim` where there is one.
        heads: Number of attention heads that the call works on, 0 if it is no attention.
    """

    name: str
    ordinal: int | None
    span: int
    inputs: tuple[int, ...]
    shape: tuple[int, ...] | None
    follows: bool
    sizes: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    dim: int | None
    heads: int = 0


@dataclass
class Span:
    """One call of a module.

    Attributes:
        path: Name of the module.
        kind: Its class.
        parent: Span of the module that called it; -1 for the model itself.
        first: Number of steps before it.
        end: Number of steps after it.
        output: Value that it returned, `None` if it is not followed.
    """

    path: str
    kind: type[nn.Module]
    parent: int
    first: int
    end: int = -1
    output: int | None = None


@dataclass
class Trace:
    """One forward pass.

    Attributes:
        steps: Calls in order; the value `i` is the output of `steps[i]`.
        spans: Module calls in the order in which they began; the first is the model's.
        num_samples: Samples in the batch that was traced.
        input_shape: Shape of the model's first input tensor.
        outputs: Values of the model's logits, or of all that it returns where there are none.
    """

    steps: list[Step] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    num_samples: int = 0
    input_shape: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    def inside(self, step: int, span: int) -> bool:
        """Whether a step was called by a module or by one below it."""
        current = self.steps[step].span
        while current > span:
            current = self.spans[current].parent
        return current == span

    def path(self, step: int) -> str:
        """Return the name of the innermost module that made a call."""
        return self.spans[self.steps[step].span].path


def record(model: nn.Module, inputs: Any) -> Trace:
    """Trace one forward pass of a model in the mode that it is in.

    Args:
        model: Any module.
        inputs: A batch: one tensor, or keyword arguments.

    Returns:
        The trace.

    Raises:
        ValueError: If the logits do not depend on the input by calls that can be seen.
    """
    first = main_input(model, inputs)  # what else is given, a mask or a size, is a constant here
    recorder = _Recorder(first)
    # No inference mode: a model that caches a tensor in it could not be trained afterwards.
    with warnings.catch_warnings(), torch.no_grad(), recorder.modules(model), recorder:
        # A compiled part is entered twice: with its wrapper, and by itself.
        warnings.filterwarnings("ignore", ".* when there are global hooks on modules", UserWarning)
        returned = _tensors(outputs_of(model, inputs))
    trace = recorder.trace
    trace.num_samples, trace.input_shape = len(first), tuple(first.shape)
    values = (recorder.values.get(id(t), INPUT) for t in returned)
    trace.outputs = tuple(dict.fromkeys(value for value in values if value != INPUT))
    if not trace.outputs:
        raise ValueError(
            f"`model` must compute its outputs by torch functions, got outputs of a "
            f"{type(model).__name__} whose inside cannot be seen; pass the module that it was "
            "scripted or exported from."
        )
    return trace


class _Recorder(TorchFunctionMode):
    """Writes a trace; keeps every tensor alive so that an identity stays that of one tensor."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.trace = Trace()
        self.values: dict[int, int] = {id(first): INPUT}
        self._alive: list[Any] = [first]
        self._stack: list[int] = []
        self._ordinal = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        # Looked up before the call: one in place makes a new value of an old tensor.
        inputs = [(self.values[id(t)], i) for i, t in enumerate(given) if id(t) in self.values]
        sizes = tuple(tuple(t.shape) for t in given)
        out = func(*args, **kwargs)
        self._add(function_name(func), self._ordinal, inputs, sizes, out, _dim(args, kwargs), args)
        self._ordinal += 1
        return out

    @contextmanager
    def modules(self, model: nn.Module) -> Iterator[None]:
        """Follow which of the model's modules is running."""
        names = {id(module): name for name, module in model.named_modules()}

        def enter(module: nn.Module, args: Any) -> None:
            if id(module) in names:
                parent = self._stack[-1] if self._stack else -1
                self._stack.append(len(self.trace.spans))
                span = Span(names[id(module)], type(module), parent, len(self.trace.steps))
                self.trace.spans.append(span)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if id(module) not in names:
                return
            returned, given = _tensors(output), _tensors(args)
            inputs = [(self.values[id(t)], i) for i, t in enumerate(given) if id(t) in self.values]
            if inputs and returned and not any(id(t) in self.values for t in returned):
                with torch._C.DisableTorchFunction():  # what is read of a tensor is no call
                    self._add("opaque", None, inputs, (), output)
            span = self.trace.spans[self._stack.pop()]
            span.end = len(self.trace.steps)
            known = [self.values[id(t)] for t in returned if id(t) in self.values]
            span.output = known[0] if known else None

        with register_module_forward_pre_hook(enter), register_module_forward_hook(leave):
            yield

    def _add(
        self,
        name: str,
        ordinal: int | None,
        inputs: list[tuple[int, int]],
        sizes: tuple[tuple[int, ...], ...],
        out: Any,
        dim: int | None = None,
        args: tuple[Any, ...] = (),
    ) -> None:
        made = _tensors(out)
        follows = bool(made and inputs)
        if follows:
            self._alive.append(out)
            self.values |= {id(t): len(self.trace.steps) for t in made}
        self.trace.steps.append(
            Step(
                name=name,
                ordinal=ordinal,
                span=self._stack[-1] if self._stack else 0,
                inputs=tuple(value for value, _ in inputs),
                shape=tuple(made[0].shape) if made else None,
                follows=follows,
                sizes=sizes,
                positions=tuple(position for _, position in inputs),
                dim=dim,
                heads=_heads(name, made, args),
            )
        )


def function_name(func: Any) -> str:
    """Return the name of a torch function: `add` for `torch.add`, `a + b` and `a += b`."""
    name = str(getattr(func, "__name__", func))
    if name.startswith("__") and name.endswith("__"):
        bare = name.strip("_")
        return bare[1:] if bare in {"iadd", "radd"} else bare
    return name.rstrip("_")


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return dim if isinstance(dim, int) else None


def _heads(name: str, made: list[Tensor], args: tuple[Any, ...]) -> int:
    """Return the number of heads of an attention call: said by an argument, or the third axis."""
    if name == "multi_head_attention_forward":
        return int(args[4])
    if name in {"softmax", "scaled_dot_product_attention"} and made and made[0].dim() >= 4:
        return made[0].shape[-3]
    return 0
