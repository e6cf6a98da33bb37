"""Names of functions with their settings, for what says where a result came from."""

import functools
import inspect
import re
from typing import Any

from torch import Tensor, nn

from landscape._digest import digest_of

_MOST = 10  # entries of a tensor that are shown


def name_of(function: Any) -> str:
    """Return the name of a function, with what a `partial` gives it or a module is set to."""
    if isinstance(function, functools.partial):
        given = [_text(value) for value in function.args]
        given += [f"{name}={_text(value)}" for name, value in function.keywords.items()]
        return f"{name_of(function.func)}({', '.join(given)})"
    name = getattr(function, "__name__", None) or getattr(function, "__qualname__", None)
    if name:
        return str(name)
    told = _settings(function) if isinstance(function, nn.Module) else {}
    shown = ", ".join(f"{name}={text}" for name, text in told.items())
    return f"{type(function).__name__}({shown})" if told else repr(function)


def lasting_name(function: Any) -> str:
    """Return the name that a function has in another process too, without places in memory."""
    return _without_places(name_of(function))


def _settings(module: nn.Module) -> dict[str, str]:
    """Return what a module was made with but for defaults, as it keeps it, and its parts.

    Parameters are no settings: training moves them.
    """
    defaults: dict[str, Any] = {}
    for cls in type(module).__mro__:
        if issubclass(cls, nn.Module) and cls is not nn.Module and "__init__" in vars(cls):
            for argument in inspect.signature(cls).parameters.values():
                defaults.setdefault(argument.name, argument.default)
    kept = {name: getattr(module, name) for name in defaults if hasattr(module, name)}
    texts = {n: _text(value) for n, value in kept.items() if not isinstance(value, nn.Parameter)}
    told = {name: text for name, text in texts.items() if text != _text(defaults[name])}
    parts = {name: name_of(part) for name, part in module.named_children() if name not in kept}
    return told | parts


def _text(value: Any) -> str:
    """Return a setting in short."""
    if not isinstance(value, Tensor):
        return _without_places(name_of(value) if callable(value) else repr(value))
    if value.numel() <= _MOST:
        return f"[{', '.join(f'{entry:.6g}' for entry in value.flatten().tolist())}]"
    return f"{tuple(value.shape)} {digest_of(value)}"


def _without_places(text: str) -> str:
    """Return a text without addresses in memory."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", text)
