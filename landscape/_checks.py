"""Checks of arguments shared by the probes: name, rule, value, remedy."""

import difflib
import math
import numbers
import operator
from collections.abc import Iterable, Iterator, Sequence
from types import UnionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def is_number(value: object) -> bool:
    """Return whether a value is one real number; `True` and `False` are none."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Refuse what is no finite number, or is below its minimum."""
    if not is_number(value):
        raise ValueError(f"`{name}` must be a number, got {value!r}.")
    if not value >= minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
    if value == math.inf:
        raise ValueError(f"`{name}` must be finite, got {value}.")


def check_finite(name: str, value: float) -> None:
    """Refuse what is no finite number."""
    if not is_number(value) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}.")


def check_within(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside an interval, whose ends belong to it."""
    check_finite(name, value)
    if not low <= value <= high:
        raise ValueError(f"`{name}` must lie in [{low}, {high}], got {value}.")


def check_positive(name: str, value: float) -> None:
    """Refuse what is no positive and finite number."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}.")


def check_count(name: str, value: object, minimum: float = -math.inf) -> None:
    """Refuse a value that is not a whole number, or is below its minimum, if there is one."""
    try:
        whole = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        whole = None
    if whole is None:
        raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
    check_at_least(name, whole, minimum)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value outside a closed set of choices."""
    try:
        known = value in choices
    except (ValueError, RuntimeError):  # an array equals a choice in some entries
        known = False
    if not known:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, got {value!r}.")


def check_type(
    name: str, value: object, kind: type | UnionType, wanted: str, remedy: str = ""
) -> None:
    """Refuse a value of another type.

    Args:
        name: Name of the argument.
        value: Its value.
        kind: What it must be an instance of.
        wanted: That in words.
        remedy: What to pass instead.
    """
    if not isinstance(value, kind):
        advice = f"; {remedy}" if remedy else ""
        raise TypeError(f"`{name}` must be {wanted}, got {type(value).__name__}{advice}.")


def check_callable(name: str, value: object, wanted: str) -> None:
    """Refuse what cannot be called, and a class, which is yet to be made an object of."""
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"`{name}` must be {wanted}, got {value!r}.")


def check_module(model: object, name: str = "model") -> None:
    """Refuse a model that is no module."""
    check_type(name, model, nn.Module, "a torch.nn.Module")


def check_device(name: str, device: Any) -> None:
    """Refuse a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"`{name}` must be a device that PyTorch finds here, such as 'cpu', got {device!r}."
        ) from error


def as_numbers(name: str, values: Any, wanted: str) -> np.ndarray:
    """Return numbers, a single one or a sequence, as an array in float64.

    Args:
        name: Name of the argument.
        values: Its value; a tensor may be on any device.
        wanted: What it must be, in words.

    Raises:
        ValueError: If it holds something else.
    """
    held = values.detach().double().cpu().numpy() if isinstance(values, Tensor) else values
    try:
        if held is None or isinstance(held, str | bytes):  # NumPy makes NaN and numbers of these
            raise TypeError
        return np.array(held, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be {wanted}, got {values!r}.") from None


def as_texts(name: str, values: Any, remedy: str) -> tuple[str, ...]:
    """Return texts, a single one or several, as a tuple.

    Args:
        name: Name of the argument.
        values: Its value.
        remedy: What to pass instead of something else.

    Raises:
        TypeError: If it holds something else.
    """
    texts = (values,) if isinstance(values, str) else values
    texts = tuple(texts) if isinstance(texts, Iterable) else (texts,)
    for text in texts:
        check_type(name, text, str, "a string or several", remedy)
    return texts


def check_data(data: object, name: str = "data") -> None:
    """Refuse what cannot be iterated over twice.

    Raises:
        TypeError: If `data` is no iterable of batches, or a one-shot iterator.
    """
    if isinstance(data, torch.Tensor):
        raise TypeError(f"`{name}` must be an iterable of batches, got a tensor; pass `[(x, y)]`.")
    wanted = "an iterable of batches such as a DataLoader or a list of (x, y)"
    check_type(name, data, Iterable, wanted)
    # Only an iterator is asked for one: a loader would start its workers.
    if isinstance(data, Iterator) and iter(data) is data:
        raise TypeError(
            f"`{name}` must be re-iterable because a probe passes over it several times, got the "
            f"one-shot {type(data).__name__}; pass a DataLoader, or `list({name})`."
        )


def check_generator(generator: torch.Generator | None) -> torch.Generator:
    """Return `generator`, or a fresh one with seed 0 for `None`.

    Raises:
        TypeError: If `generator` is neither.
    """
    if generator is None:
        return torch.Generator().manual_seed(0)
    remedy = "pass `torch.Generator().manual_seed(seed)`"
    check_type("generator", generator, torch.Generator, "a torch.Generator or None", remedy)
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


def check_differentiable(model: torch.nn.Module, name: str = "model") -> None:
    """Refuse a model that was made in inference mode, whose tensors autograd does not save."""
    tensors = (*model.parameters(), *model.buffers())
    # Within inference mode itself a copy would not help, and another message says so.
    if not torch.is_inference_mode_enabled() and any(t.is_inference() for t in tensors):
        raise ValueError(
            f"`{name}` must have been made outside of `torch.inference_mode` where gradients are "
            "taken through it; pass `copy.deepcopy(model)`."
        )


def check_python(model: torch.nn.Module) -> None:
    """Refuse a model with a part in TorchScript, which hides the calls that it makes."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f" in {name!r}" if name else ""
            raise TypeError(
                f"`model` must be plain Python throughout, got TorchScript{where}; pass the "
                "module that it was made from."
            )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return three `known` names most like `name`, quoted, for an error message."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    return ", ".join(repr(match) for match in close)
