"""The chosen parameters of a model as one flat vector.

Curvature is taken with respect to a vector θ: the chosen parameters, raveled one after the other
in the order of `model.named_parameters()`. A tied parameter is one parameter, under its first name.
"""

import fnmatch
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from landscape._checks import check_materialised, check_module, check_type, nearest
from landscape.restore import exclusive

Choice = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None

_SMALL = 0.1


class ParameterSpace:
    """Values of the chosen parameters of a model, and the way between names and a flat vector.

    Attributes:
        names: Names of the chosen parameters, in order.
        values: Name to a detached copy of the value at the time of construction.
        fixed: Name to a detached copy of every other parameter.
        buffers: Name to a detached copy of every buffer.
        dim: Number of chosen scalars.
        dtype: Precision of the flat vector.
        device: Device of the model.
    """

    def __init__(self, model: nn.Module, choice: Choice = None) -> None:
        """Copy the values of the chosen parameters.

        Args:
            model: Any module; all of it on one device.
            choice: Glob pattern(s) over parameter names, or a predicate `(name, parameter)`;
                `None` chooses every parameter. Only parameters with `requires_grad` count.

        Raises:
            ValueError: If no trainable parameter is chosen, a pattern matches nothing, or the
                parameters are not materialised on one device.
        """
        check_module(model)
        with exclusive(model):
            chosen = _choose(model, choice)
            _check_placement(model, chosen)
            self.names = tuple(chosen)
            self.values = {name: p.detach().clone() for name, p in chosen.items()}
            others = {n: t for n, t in model.named_parameters() if n not in chosen}
            self.fixed = {name: t.detach().clone() for name, t in others.items()}
            self.buffers = {name: t.detach().clone() for name, t in model.named_buffers()}
        self.shapes = tuple(v.shape for v in self.values.values())
        self._sizes = [v.numel() for v in self.values.values()]
        self.dim = sum(self._sizes)
        first = next(iter(self.values.values()))
        self.device = first.device
        self.dtype = first.dtype
        for value in self.values.values():
            self.dtype = torch.promote_types(self.dtype, value.dtype)

    @property
    def shapes_by_name(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the chosen parameters, in the order of the flat vector."""
        return {name: tuple(value.shape) for name, value in self.values.items()}

    @functools.cached_property
    def awake(self) -> dict[str, Tensor]:
        """The values, with small numbers in the place of tensors that are zero throughout.

        Behind a layer of zeros, such as a head before training, nothing of a model shows: not that
        it draws random numbers, nor that it mixes the samples of a batch.
        """
        asleep = {n: v for n, v in self.values.items() if v.is_floating_point() and not v.any()}
        if not asleep:
            return self.values
        generator = torch.Generator().manual_seed(0)
        draw = functools.partial(torch.randn, generator=generator, device="cpu")
        noise = {n: draw(v.shape) for n, v in asleep.items()}
        return self.values | {n: (_SMALL * noise[n]).to(v) for n, v in asleep.items()}

    def state(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all that the model is called with: given parameters, the others, and buffers.

        Buffers are cloned: a module that writes to its own must not move the next call.
        """
        buffers = {name: t.clone() for name, t in self.buffers.items()}
        return {**self.fixed, **buffers, **parameters}

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """Return the tensors (by name, or in order) as one vector of shape `(dim,)`."""
        if isinstance(tensors, Mapping):
            tensors = [tensors[name] for name in self.names]
        return torch.cat([t.to_dense().reshape(-1).to(self.dtype) for t in tensors])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector of shape `(dim,)` as tensors by name."""
        pieces = torch.split(vector, self._sizes)
        return {
            name: shaped(piece, shape).to(value.dtype)
            for (name, value), piece, shape in zip(
                self.values.items(), pieces, self.shapes, strict=True
            )
        }


def shaped(piece: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a piece of a vector in a shape, copied where it may hold complex numbers as pairs.

    `torch.view_as_complex` takes no pairs that begin at an odd place of their storage.
    """
    return (piece.clone() if tuple(shape[-1:]) == (2,) else piece).view(shape)


def aliases(model: nn.Module) -> dict[str, str]:
    """Return every parameter name, tied names included, to the first name of its parameter.

    Those of a compiled model also go by the names that they had before.
    """
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(p), name)
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    return {plain_name(name): known for name, known in names.items()} | names


def plain_name(name: str) -> str:
    """Return the name that a parameter of a compiled model had before."""
    return name.replace("_orig_mod.", "")


def call_with(model: nn.Module, state: Mapping[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
    """Call a model with other parameters and buffers in place; the model keeps its own.

    PyTorch's own tying goes by name. A module that is registered twice has two names for one
    parameter, which it exchanges twice, and the second tensor stays in the model. Here every place
    that holds a tensor is named once.

    Args:
        model: Any module.
        state: Tensors by (first) name; a tied tensor goes to each of its places.
        *args: Positional arguments of the call.
        **kwargs: Keyword arguments of the call.

    Returns:
        What the model returns.
    """
    first: dict[int, str] = {}
    placed = {}
    for prefix, module in model.named_modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            name = f"{prefix}.{attribute}" if prefix else attribute
            known = first.setdefault(id(tensor), name)
            if tensor is not None and known in state:
                placed[name] = state[known]
    return functional_call(model, placed, args, kwargs, tie_weights=False)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP gathers the parameters of a part of a model when it is called."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a costly import; without it none is sharded
    if fsdp is None:
        return False
    kinds = fsdp.FSDPModule, fsdp.FullyShardedDataParallel
    return any(isinstance(module, kinds) for module in model.modules())


def check_parameters(choice: object) -> None:
    """Refuse what chooses no parameters.

    Raises:
        TypeError: If it is neither patterns nor a predicate, nor `None`.
    """
    if not callable(choice):
        wanted = "patterns of names, a predicate `(name, parameter)` or None"
        check_type("parameters", choice, Iterable | None, wanted)


def _choose(model: nn.Module, choice: Choice) -> dict[str, nn.Parameter]:
    if isinstance(model, torch.jit.ScriptModule | nn.DataParallel):
        inner = "`model.module`" if isinstance(model, nn.DataParallel) else "what it was made of"
        raise TypeError(
            "`model` must be a module that can be called with other parameters, got a "
            f"{type(model).__name__}; pass {inner}."
        )
    if is_sharded(model):
        raise TypeError(
            "`model` must hold its own parameters, got one that FSDP shards; load its full state "
            "into a model that is not wrapped."
        )
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "`model` must have a parameter with `requires_grad`, got none; "
            "call `model.requires_grad_(True)`."
        )
    check_parameters(choice)
    if choice is None:
        return trainable
    if callable(choice):
        chosen = {n: p for n, p in trainable.items() if choice(n, p)}
    else:
        canonical = aliases(model)
        wanted: set[str] = set()
        for pattern in [choice] if isinstance(choice, str) else choice:
            if not isinstance(pattern, str):
                raise TypeError(
                    "`parameters` must be patterns of names, or a predicate `(name, parameter)`, "
                    f"got a {type(pattern).__name__}."
                )
            matched = {canonical[n] for n in fnmatch.filter(canonical, pattern)}
            if not matched:
                raise ValueError(
                    f"`parameters` must match parameter names, got {pattern!r}, which matches "
                    f"none; the nearest are {nearest(pattern, canonical)}."
                )
            wanted |= matched
        chosen = {n: p for n, p in trainable.items() if n in wanted}
    if not chosen:
        raise ValueError(
            f"`parameters` must choose a parameter with `requires_grad`, got {choice!r}, "
            "which chooses none."
        )
    return chosen


def _check_placement(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> None:
    check_materialised(model)
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"`model` must be on one device, got {sorted(devices)}.")
    for name, p in chosen.items():
        if not p.is_floating_point():
            raise ValueError(
                f"`parameters` must be real and floating, got {p.dtype} in {name!r}; choose "
                "others, or let the model hold real ones and call `torch.view_as_complex`."
            )
