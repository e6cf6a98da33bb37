"""What a result prints: a line a field, numbers with their errors, long arrays by their range."""

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

_WIDTH = 100
_NUMBERS = 76  # of these, for numbers with their errors, which go on in the next line
_FEW = 8  # entries of an array that are shown one by one


def summarize(result: Any) -> str:
    """Return a dataclass in words, fields that are `None` left out.

    A field is followed by its error where there is a field for that: `x_stderr`, `x_interval`, or
    `errors` or `stderr` of `value`, `values` or `variance`. Other text is cut at the end of a line,
    with "…".

    Args:
        result: The dataclass; fields that are dataclasses themselves are set in below their name,
            or in one line where they `describe()` themselves.
    """
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    fields = {name: value for name, value in fields.items() if value is not None}
    errors = {
        name: next((e for e in _errors_of(name) if _fits(value, fields.get(e))), None)
        for name, value in fields.items()
    }
    own = [name for name in fields if name not in errors.values()]
    width = max(map(len, own), default=0)
    lines = [type(result).__name__]
    for name in own:
        value, error = fields[name], errors[name]
        text = _words(value) if error is None else _with_error(value, fields[error])
        if error is not None:
            text = text.replace("\n", f"\n{'':<{width}}  ")
        first, *nested = text.splitlines() or [""]
        lines += [f"  {line}".rstrip() for line in (f"{name:<{width}}  {first}", *nested)]
    return "\n".join(map(_cut, lines))


def _errors_of(name: str) -> list[str]:
    own = [f"{name}_stderr", f"{name}_interval"]
    return [*own, "errors", "stderr"] if name in ("value", "values", "variance") else own


def _fits(value: Any, error: Any) -> bool:
    """Whether an error is one of each number of a value that is short enough to be spelt out."""
    if error is None or not isinstance(value, float | np.ndarray):
        return False
    if np.ndim(value) == 0:
        return np.shape(error) in ((), (2,))
    return np.shape(error) == np.shape(value) and 0 < np.size(value) <= _FEW


def _with_error(value: Any, error: Any) -> str:
    if np.shape(value) != np.shape(error):
        return f"{_words(value)} [{', '.join(map(_words, error))}]"
    pairs = zip(np.ravel(value), np.ravel(error), strict=True)
    spelt = ", ".join(f"{_words(v)}\xa0±\xa0{e:.{2 if e < 100 else 4}g}" for v, e in pairs)
    return textwrap.fill(spelt, _NUMBERS).replace("\xa0", " ")


def _words(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return value.describe() if hasattr(value, "describe") else repr(value)
    if isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_brief(each)}" for key, each in value.items()) or "none"
    if isinstance(value, tuple | list):
        return ", ".join(map(_brief, value)) or "none"
    return str(value)


def _brief(value: Any) -> str:
    """Return one of several things in a few words."""
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    if isinstance(value, Mapping):
        return f"{len(value)} entries"
    if isinstance(value, tuple | list | np.ndarray):
        return f"({_words(value)})"
    return _words(value)


def _array(array: np.ndarray) -> str:
    if 0 < array.size <= _FEW and array.ndim == 1:
        return ", ".join(map(_words, array))
    if array.dtype == bool:
        return f"{array.shape}, {array.sum()} true"
    if not np.issubdtype(array.dtype, np.number) or not array.size:
        return f"{array.shape}, {array.dtype}"
    finite = array[np.isfinite(array)]
    missing = array.size - finite.size
    span = f", {_words(finite.min())} to {_words(finite.max())}" if finite.size else ""
    return f"{array.shape}{span}" + (f", {missing} not finite" if missing else "")


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"
