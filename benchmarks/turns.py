"""Contenders in turns, each next to its own timings of one gradient, the unit of cost."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import solvers
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from workloads import Batch

RIGHT = 1e-3  # relative error of a value that counts as right


@dataclass
class Turns:
    """What one contender took: ratios to a gradient, seconds, outcomes; or why it failed."""

    ratios: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    outcomes: list[Any] = field(default_factory=list)
    error: str | None = None


def gradient(model: nn.Module, batches: list[Batch]) -> None:
    """One gradient of each batch: the unit of cost."""
    for x, y in batches:
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def warm_up(model: nn.Module, batches: list[Batch]) -> None:
    """One product, so that the first contender does not pay for what is done once a process."""
    operator = solvers.plain_operator(model, batches[:1])
    operator.matvec(np.ones(operator.shape[0], dtype=operator.dtype))
    gradient(model, batches)


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long `work` took, and what it returned."""
    began = time.perf_counter()
    out = work()
    return time.perf_counter() - began, out


def compare(values: np.ndarray, exact: np.ndarray) -> tuple[int, float]:
    """Return how many of `exact` are among `values` (each used once), and the largest error."""
    left = list(values)
    right = 0
    for value in exact:
        near = [v for v in left if abs(v - value) <= RIGHT * abs(value)]
        if near:
            left.remove(min(near, key=lambda v: abs(v - value)))
            right += 1
    if len(values) != len(exact):
        return right, float("nan")
    return right, float(np.max(np.abs(values - exact) / np.abs(exact)))


def take_turns(
    contenders: dict[str, Callable[[int], Any]],
    unit: Callable[[], None],
    rounds: dict[str, int],
    label: str,
) -> dict[str, Turns]:
    """Run every contender some times in turns.

    Args:
        contenders: Name to a function of the seed.
        unit: One gradient on the same data.
        rounds: How many turns each has; 1 where it is not named.
        label: Shown on the progress bar.
    """
    taken = {name: Turns() for name in contenders}
    turns = [
        (seed, name)
        for seed in range(max((rounds.get(name, 1) for name in contenders), default=0))
        for name in contenders
        if seed < rounds.get(name, 1)
    ]
    for seed, name in tqdm(turns, desc=label, leave=False):
        if taken[name].error is not None:
            continue
        gc.collect()
        before = [seconds_of(unit)[0] for _ in range(2)]
        try:
            spent, outcome = seconds_of(lambda: contenders[name](seed))  # noqa: B023
        except Exception as error:  # a peer that fails is a row of the table
            taken[name].error = f"{type(error).__name__}: {str(error).partition('. ')[0]}"[:160]
            continue
        after = [seconds_of(unit)[0] for _ in range(2)]
        taken[name].ratios.append(spent / float(np.median(before + after)))
        taken[name].seconds.append(spent)
        taken[name].outcomes.append(outcome)
    return taken


def mean(numbers: Any) -> float | None:
    """Return the mean, or None of nothing."""
    numbers = list(numbers)
    return float(np.mean(numbers)) if numbers else None


def worst(numbers: Any) -> float | None:
    """Return the largest, NaN included, or None of nothing."""
    numbers = list(numbers)
    return float(np.max(numbers)) if numbers else None
