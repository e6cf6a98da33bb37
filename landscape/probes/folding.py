"""Batch norms folded into the convolutions before them, for forward passes at moved weights.

In evaluation mode a batch norm multiplies each channel by s = γ / √(running variance + ε) and adds
β − s · running mean: a convolution before it can do both, with w s in the place of its weights w.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Pair:
    """A convolution and the batch norm that alone sees its output.

    Attributes:
        conv: Name of the convolution in the model.
        norm: Name of the batch norm.
    """

    conv: str
    norm: str


class Calls(TorchFunctionMode):
    """Watches the plain convolutions and batch norms of a model during one pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._count: dict[nn.Module, int] = {}
        self._outputs: list[tuple[nn.Module, Tensor]] = []  # of convolutions
        self._uses: Counter[int] = Counter()  # of tensors, in functions that return one
        self._weights: dict[nn.Module, list[int]] = {}  # of convolutions, those of the pass
        self._follows: list[tuple[nn.Module, nn.Module, int]] = []

    def pairs(self) -> list[Pair]:
        """Return the pairs of layers that were called once, with tensors of their own."""
        owners = Counter(id(tensor) for module in self._names for tensor in _tensors(module))

        def is_plain(module: nn.Module) -> bool:
            owned = all(owners[id(tensor)] == 1 for tensor in _tensors(module))
            hooks = module._forward_hooks or module._forward_pre_hooks
            return owned and not hooks and self._count[module] == 1

        return [
            Pair(self._names[conv], self._names[norm])
            for conv, norm, output in self._follows
            if is_plain(conv)
            and is_plain(norm)
            and all(self._uses[tensor] == 1 for tensor in (output, *self._weights[conv]))
            and conv._parameters.get("weight") is not None
            and norm.running_mean is not None
            and "forward" not in vars(norm)
        ]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make one call, and count what it makes something of."""
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            given = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            self._uses.update(given)
        return out

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        """Count a call of a layer."""
        self._count[module] = self._count.get(module, 0) + 1
        if type(module) in _CONVOLUTIONS:
            self._outputs.append((module, output))  # kept, so that no other gets its id
            self._uses[id(output)] = 0  # another had it before
            self._weights[module] = [id(tensor) for tensor in _tensors(module)]
        else:
            for conv, made in self._outputs:
                if args and args[0] is made:
                    self._follows.append((conv, module, id(made)))


@contextmanager
def calls_of(model: nn.Module) -> Iterator[Calls]:
    """Yield what sees the calls of the model's plain convolutions and batch norms inside."""
    calls = Calls(model)
    with ExitStack() as hooks, calls:
        for module in model.modules():
            if type(module) in (*_CONVOLUTIONS, *_NORMS):
                hooks.enter_context(module.register_forward_hook(calls.note))
        yield calls


@contextmanager
def folded(
    model: nn.Module, pairs: Sequence[Pair], state: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Let batch norms return what they are given, and yield a state that makes up for it.

    Args:
        model: The model; left as it was found.
        pairs: What to fold.
        state: All parameters and buffers by name.
    """
    state = dict(state)
    with ExitStack() as stack:
        for pair in pairs:
            conv, norm = model.get_submodule(pair.conv), model.get_submodule(pair.norm)
            eps: Any = norm.eps
            scale = torch.rsqrt(state[f"{pair.norm}.running_var"] + eps)
            if norm.weight is not None:
                scale = scale * state[f"{pair.norm}.weight"]
            shift = -scale * state[f"{pair.norm}.running_mean"]
            if norm.bias is not None:
                shift = shift + state[f"{pair.norm}.bias"]
            if conv.bias is not None:
                shift = shift + scale * state[f"{pair.conv}.bias"]
            weight = state[f"{pair.conv}.weight"]
            state[f"{pair.conv}.weight"] = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            state[f"{pair.conv}.bias"] = shift
            stack.enter_context(patch.dict(conv._parameters, bias=nn.Parameter(shift, False)))
            stack.enter_context(patch.dict(norm.__dict__, forward=_same))
        yield state


def _tensors(module: nn.Module) -> list[Tensor]:
    each = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in each if tensor is not None]


def _same(x: Tensor) -> Tensor:
    return x
