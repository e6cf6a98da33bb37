"""Checks of arguments shared by the probes: name, rule, value, remedy."""

import difflib
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Refuse a number below its minimum.

    Raises:
        ValueError: If `value` is below `minimum` (or NaN).
    """
    try:
        fits = bool(value >= minimum)
    except TypeError:
        raise ValueError(f"`{name}` must be a number, got {value!r}.") from None
    if not fits:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


def check_count(name: str, value: object, minimum: int) -> None:
    """Refuse a value that is not a whole number, or is below its minimum.

    Raises:
        ValueError: If it is either.
    """
    try:
        whole = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"`{name}` must be a whole number, got {value!r}.") from None
    check_at_least(name, whole, minimum)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value outside a closed set of choices.

    Raises:
        ValueError: If `value` is not among `choices`.
    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, got {value!r}.")


def check_module(model: object) -> None:
    """Refuse a model that is no module.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")


def check_data(data: object) -> None:
    """Refuse what cannot be iterated over twice.

    Raises:
        TypeError: If `data` is no iterable of batches, or a one-shot iterator.
    """
    if isinstance(data, torch.Tensor):
        raise TypeError("`data` must be an iterable of batches, got a tensor; pass `[(x, y)]`.")
    if not isinstance(data, Iterable):
        raise TypeError(
            f"`data` must be an iterable of batches such as a DataLoader or a list of (x, y), "
            f"got {type(data).__name__}."
        )
    # Only an iterator is asked for one: a loader would start its workers.
    if isinstance(data, Iterator) and iter(data) is data:
        raise TypeError(
            f"`data` must be re-iterable because a probe passes over it several times, got the "
            f"one-shot {type(data).__name__}; pass a DataLoader, or `list(data)`."
        )


def check_generator(generator: Any) -> torch.Generator:
    """Return `generator`, or a fresh one with seed 0 for `None`.

    Raises:
        TypeError: If `generator` is neither.
    """
    if generator is None:
        return torch.Generator().manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"`generator` must be a torch.Generator or None, got {type(generator).__name__}; "
            "pass `torch.Generator().manual_seed(seed)`."
        )
    return generator


def check_materialised(model: torch.nn.Module) -> None:
    """Refuse a model whose weights are not there yet.

    Raises:
        ValueError: If a parameter is lazy or on the meta device.
    """
    for name, p in model.named_parameters():
        if isinstance(p, torch.nn.parameter.UninitializedParameter):
            raise ValueError(
                f"`model` has the lazy parameter {name!r}; run one forward pass first."
            )
        if p.is_meta:
            raise ValueError(f"`model` has {name!r} on the meta device; load its weights first.")


def check_python(model: torch.nn.Module) -> None:
    """Refuse a model with a part in TorchScript, which hides the calls that it makes.

    Raises:
        TypeError: If there is one.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f" in {name!r}" if name else ""
            raise TypeError(
                f"`model` must be plain Python throughout, got TorchScript{where}; pass the "
                "module that it was made from."
            )


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return the `known` names most like `name`, quoted, for an error message."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.3) or known[:count]
    return ", ".join(repr(match) for match in close)
