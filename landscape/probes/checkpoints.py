"""Checkpoints of a training run as points in parameter space.

A checkpoint is a state dict, in memory or on disk. Its parameters move in training and so do some
of its buffers (the running statistics of batch normalisation), which are no coordinates of the loss
landscape. A state dict does not say which is which: with the model the parameters are known; else
every floating-point entry counts but for running statistics, and entries that share their memory
(tied weights) count once.
"""

import fnmatch
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from landscape._checks import check_module, check_type
from landscape._files import load_tensors

State = Mapping[str, Tensor]
Source = State | str | os.PathLike[str] | nn.Module
Checkpoints = str | os.PathLike[str] | Sequence[Source]

STATISTICS = ("*running_mean", "*running_var", "*num_batches_tracked")
"""Names of the running statistics of PyTorch's normalisation layers."""

_WRAPPERS = ("model", "state_dict", "model_state_dict", "net")
_SUFFIXES = (".pt", ".pth", ".ckpt", ".tar")
_CHUNK = 1 << 23  # numbers held in float64 at once


@dataclass(frozen=True)
class Trail:
    """Checkpoints in order, and the entries of them that are parameters.

    Attributes:
        states: One state dict a checkpoint; those on disk are mapped.
        steps: Epoch or step of each, or its index where none is known.
        names: Entries that are parameters, tied ones once.
        ignored: All other entries.
    """

    states: tuple[State, ...]
    steps: tuple[float, ...]
    names: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return sum(self.states[-1][name].numel() for name in self.names)

    def displacements(self, origin: State) -> Iterator[tuple[str, int, Tensor]]:
        """Yield θ_t − θ_origin in pieces that fit in memory.

        Args:
            origin: State dict of the origin.

        Yields:
            Name, offset in the raveled parameter, and a piece `(t, …)` in float64 that starts
            there.
        """
        width = max(1, _CHUNK // len(self.states))
        for name in self.names:
            base = origin[name].reshape(-1)
            rows = [state[name].reshape(-1) for state in self.states]
            for start in range(0, len(base), width):
                piece = slice(start, start + width)
                here = base[piece].double()
                yield name, start, torch.stack([r[piece].to(here) - here for r in rows])


def read_trail(
    checkpoints: Checkpoints, *, model: nn.Module | None = None, at_least: int = 2
) -> Trail:
    """Read checkpoints, oldest first.

    Args:
        checkpoints: State dicts, paths or modules, in order; or a folder, of which the files
            `epoch-*.pt` are taken, or else all checkpoint files but `resume-*`, in the order of
            the numbers in their names. A file holds a state dict, alone or under `"model"`,
            `"state_dict"`, `"model_state_dict"` or `"net"`, and is read without unpickling objects.
        model: Tells which entries are parameters.
        at_least: Number of checkpoints that are needed.

    Returns:
        The checkpoints.

    Raises:
        ValueError: If there are too few, or they are not of one model.
    """
    if model is not None:
        check_module(model)
    sources = _sources(checkpoints)
    if len(sources) < at_least:
        raise ValueError(
            f"`checkpoints` must hold at least {at_least}, got {len(sources)} in {checkpoints!r}."
            if isinstance(checkpoints, str | os.PathLike)
            else f"`checkpoints` must hold at least {at_least}, got {len(sources)}."
        )
    states, steps = zip(*(read_state(source) for source in sources), strict=True)
    names = _parameter_names(states[-1], model)
    if not names:
        raise ValueError(
            f"`checkpoints` must hold floating-point parameters, got only {list(states[-1])}."
        )
    expected: State = states[-1] if model is None else dict(model.named_parameters())
    for index, state in enumerate(states):
        own = () if model is not None else _parameter_names(state, None)
        for name in dict.fromkeys((*names, *own)):
            got, wanted = shape_in(state, name), shape_in(expected, name)
            if got != wanted:
                raise ValueError(
                    f"`checkpoints` must be of one model, got shape {got} for {name!r} in "
                    f"checkpoint {index} and {wanted} in "
                    f"{'the last' if model is None else 'the model'}; names begin with "
                    f"{next(iter(state))!r} here and {next(iter(expected))!r} there."
                )
    names = names if model is not None else _without_ties(names, states)
    known = all(a is not None and b is not None and a < b for a, b in itertools.pairwise(steps))
    known = known and steps[0] is not None  # numbers that do not rise are of something else
    return Trail(
        states=states,
        steps=tuple(float(s) for s in (steps if known else range(len(states)))),
        names=names,
        ignored=tuple(name for name in states[-1] if name not in names),
    )


def read_state(source: Source, name: str = "checkpoints") -> tuple[State, float | None]:
    """Return a state dict, and the epoch or step that it or its file's name tells.

    Args:
        source: State dict, module, or path of a file that `torch.save` wrote.
        name: Name of the argument that it came with.

    Raises:
        TypeError: If it is none of these.
        ValueError: If the file cannot be read safely or holds no tensors.
    """
    step: float | None = None
    content: Any = source
    if isinstance(source, nn.Module):
        content = source.state_dict()
    elif isinstance(source, str | os.PathLike):
        stem = Path(source).stem
        named = re.findall(r"(?:epoch|step|iter)[^\d]*(\d+)", stem, re.IGNORECASE)
        number = named[:1] or re.findall(r"\d+", stem)[-1:]
        step = float(number[0]) if number else None
        content = _load(Path(source), name)
    else:
        check_type(name, source, Mapping, "state dicts, paths or modules")
    if isinstance(content, Mapping):
        for key in ("step", "epoch"):
            if isinstance(content.get(key), int | float):
                step = float(content[key])
        wrapper = next((k for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        content = content if wrapper is None else content[wrapper]
    tensors = _tensors(content) if isinstance(content, Mapping) else {}
    if not tensors:
        raise ValueError(
            f"`{name}` must hold tensors by name, alone or under one of {_WRAPPERS}, got "
            f"{_describe(source)}."
        )
    return tensors, step


def _sources(checkpoints: Checkpoints) -> list[Source]:
    if isinstance(checkpoints, Mapping | nn.Module):
        raise TypeError("`checkpoints` must be a sequence, got a single one.")
    if not isinstance(checkpoints, str | os.PathLike):
        check_type("checkpoints", checkpoints, Iterable, "a folder or a sequence")
        return list(checkpoints)
    folder = Path(checkpoints)
    if not folder.is_dir():
        raise ValueError(f"`checkpoints` must be a folder or a sequence, got {str(folder)!r}.")
    files = list(folder.glob("epoch-*.pt")) or [
        file
        for file in folder.iterdir()
        if file.suffix in _SUFFIXES and not file.name.startswith("resume-")
    ]
    return [*sorted(files, key=_natural)]


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Return a key that sorts epoch-9 before epoch-10."""
    pieces = re.split(r"(\d+)", path.name)
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in pieces]


def _load(path: Path, name: str) -> Any:
    try:
        return load_tensors(path, mapped=True)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be files that `torch.load(…, weights_only=True)` reads, got "
            f"{str(path)!r} ({error}); save the state dict alone."
        ) from error


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}


def shape_in(state: State, name: str) -> tuple[int, ...] | str:
    """Return the shape of a tensor of a state, "none" where it is missing."""
    return tuple(state[name].shape) if name in state else "none"


def _parameter_names(state: State, model: nn.Module | None) -> tuple[str, ...]:
    if model is not None:
        return tuple(name for name, p in model.named_parameters() if p.is_floating_point())
    names, seen = [], set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if (
            not tensor.is_floating_point()
            or any(fnmatch.fnmatch(name, pattern) for pattern in STATISTICS)
            or (tensor.numel() and place in seen)
        ):
            continue
        seen.add(place)
        names.append(name)
    return tuple(names)


def _without_ties(names: Sequence[str], states: Sequence[State]) -> tuple[str, ...]:
    """Leave out what moves as an earlier entry does: a tied weight in state dicts of copies."""
    kept: dict[tuple[torch.Size, tuple[float, ...]], list[str]] = {}
    for name in names:
        sums = tuple(float(state[name].double().sum()) for state in states)
        alike = kept.setdefault((states[-1][name].shape, sums), [])
        moves = any(not torch.equal(state[name], states[-1][name]) for state in states)
        tied = (
            moves
            and states[-1][name].dim() > 1
            and any(
                all(torch.equal(state[name], state[other]) for state in states) for other in alike
            )
        )
        if not tied:
            alike.append(name)
    chosen = {name for group in kept.values() for name in group}
    return tuple(name for name in names if name in chosen)


def _describe(source: Source) -> str:
    return repr(str(source)) if isinstance(source, str | os.PathLike) else type(source).__name__
