"""One batch is tried before anything is measured, and what could not be measured is refused."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm

from landscape.losses import (
    Loss,
    amount_averaged,
    is_binary,
    is_classification,
    is_elementwise,
    loss_settings,
)

FEW = 16
"""Samples that show whether a model gives the same outputs again, and whether a loss is a mean."""


@contextmanager
def explained(what: str, *arguments: Any) -> Iterator[None]:
    """Note on an error of the user's code what it was called with."""
    try:
        yield
    except Exception as error:
        shown = [
            f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            for t in arguments
        ]
        error.add_note(f"It came from {what} the first batch of `data`: {', '.join(shown)}.")
        if not torch.is_grad_enabled() and "does not require grad" in str(error):
            error.add_note(
                "Probes need no gradients of most passes; a model that takes one in its forward "
                "pass, or a loss, must do so within `torch.enable_grad()`."
            )
        raise


def check_same(once: Tensor, again: Tensor) -> None:
    """Refuse a model that is random, whatever the size of its outputs.

    Raises:
        ValueError: If two outputs for one batch differ by more than rounding.
    """
    finite = once.double()[once.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    precision = torch.finfo(once.dtype).eps if once.is_floating_point() else 0.0
    # A GPU may round the factors of products, and take another kernel where a graph is wanted.
    relative = max(1e-4 if once.device.type == "cpu" else 1e-3, 4 * precision)
    atol = relative * scale + 1e-7  # a loss near zero is the rounding of larger numbers
    if not torch.allclose(once, again, rtol=relative, atol=atol, equal_nan=True):
        raise ValueError(
            "`model` must be deterministic in evaluation mode, got two different outputs for one "
            "batch; switch off its functional dropout or sampling."
        )


def check_reached(
    model: nn.Module,
    chosen: Collection[str],
    outputs: Tensor,
    lent: Iterable[tuple[str, Tensor]] = (),
) -> None:
    """Refuse a model that uses a chosen parameter of its own, not what stands in its place.

    Args:
        model: The model.
        chosen: Names of the chosen parameters.
        outputs: Of a call with other tensors in their place.
        lent: Names and tensors of earlier calls.
    """
    before = {id(tensor): name for name, tensor in lent}
    known = {id(p): name for name, p in model.named_parameters()}
    for node in nodes_behind([outputs]):  # none where nothing that stands in requires a gradient
        variable = id(getattr(node, "variable", None))
        if (name := before.get(variable)) in chosen:
            raise ValueError(
                "`model` must compute what it keeps of its parameters where that can be found (a "
                f"plain attribute), but it keeps something made of {name!r} from one call to the "
                "next elsewhere (a closure, an `lru_cache`, an object); compute it at every call."
            )
        if (name := known.get(variable)) in chosen:
            raise ValueError(
                f"`model` must read its parameters from attributes of its modules, but {name!r} "
                "was reached another way (a list, a `partial`, a view made before) and cannot be "
                "replaced; look it up in the forward pass, or exclude it with "
                "`Objective(parameters=…)`."
            )


def nodes_behind(tensors: Iterable[Tensor]) -> Iterator[Node]:
    """Yield the nodes of the graphs that end in some tensors, each once."""
    nodes = list(dict.fromkeys(t.grad_fn for t in tensors if t.grad_fn is not None))
    seen = set(nodes)
    for node in nodes:  # grows
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                nodes.append(below)


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether a batch norm keeps no statistics, and so sees the batch in evaluation mode too."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return any(norm.running_mean is None for norm in norms)


def check_targets(loss: Loss | None, logits: Tensor, targets: Tensor | None) -> None:
    """Refuse targets of a shape or type that the loss would broadcast, or take for others."""
    if targets is None:
        return
    if is_binary(loss) and not targets.is_floating_point():
        raise ValueError(
            f"`data` must have floating targets for this loss, got {targets.dtype}; convert "
            "them with `.float()`."
        )
    expected, labels = logits.shape, logits.shape[:1] + logits.shape[2:]
    if is_classification(loss):
        if not targets.is_floating_point():
            expected = labels
        elif targets.shape == labels != expected:
            raise ValueError(
                f"`data` must have labels of an integer type, got {targets.dtype} "
                f"{tuple(targets.shape)} for outputs {tuple(logits.shape)} of `model`; convert "
                "them with `.long()`."
            )
    elif not is_elementwise(loss):
        return
    if targets.shape != expected:
        last = logits.dim() > 2 and targets.shape == logits.shape[:-1] and is_classification(loss)
        remedy = "; return the classes as dimension 1, by `outputs.movedim(-1, 1)`" if last else ""
        raise ValueError(
            f"`data` must have targets of shape {tuple(expected)} for outputs "
            f"{tuple(logits.shape)} of `model` and this loss, got {targets.dtype} "
            f"{tuple(targets.shape)}{remedy}."
        )


def check_labels(loss: Loss | None, logits: Tensor, label_range: tuple[int, int] | None) -> None:
    """Refuse labels that the model has no output for."""
    if label_range is None or not is_classification(loss):
        return
    low, high = label_range
    classes = logits.shape[1] if logits.dim() > 1 else 1
    if high >= classes or low < 0:
        got = f"label {low}" if low == high else f"labels from {low} to {high}"
        raise ValueError(
            f"`data` must have labels in 0 … {classes - 1} for the {classes} outputs of "
            f"`model`, got {got}; name a label that does not count, as in "
            "`nn.CrossEntropyLoss(ignore_index=…)`."
        )


@contextmanager
def labels_named(loss: Loss, logits: Tensor) -> Iterator[None]:
    """Name the label that there is no output for where a loss says so: on a CPU.

    Raises:
        ValueError: If there is one.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:  # the latter under `vmap`
        found = re.search(r"(-?\d+) is out of bounds", str(error))
        if found is not None:
            check_labels(loss, logits, (int(found[1]), int(found[1])))
        raise


@contextmanager
def left_as_found(loss: Loss | None) -> Iterator[None]:
    """Refuse a loss module that keeps something of what it sees, and put that back."""
    if not isinstance(loss, nn.Module):
        yield
        return
    before = {name: (buffer, buffer.clone()) for name, buffer in loss.named_buffers()}
    try:
        yield
    finally:
        now, changed = dict(loss.named_buffers()), False
        for name, (buffer, value) in before.items():
            for holder in {id(t): t for t in (buffer, now.get(name, buffer))}.values():
                if not _is_same(holder, value):
                    changed = True
                    holder.copy_(value)
        if changed:
            raise ValueError(
                "`loss` must not have a state of its own, got a module that changes its buffers; "
                "put it in evaluation mode."
            )


def settled(loss: Callable[[], Tensor]) -> float:
    """Return the value of a loss that is a scalar, and the same twice.

    Raises:
        ValueError: If it is not.
    """
    value, again = loss(), loss()
    if not isinstance(value, Tensor):
        raise ValueError(f"`loss` must return a tensor, got a {type(value).__name__}.")
    # A GPU may add up in another order.
    if not torch.allclose(value, again, rtol=1e-4, atol=0, equal_nan=True):
        raise ValueError(
            "`loss` must be deterministic, got two different values for one batch; put a "
            "loss module in evaluation mode."
        )
    if value.dim() != 0:
        raise ValueError(f"`loss` must return a scalar mean, got shape {tuple(value.shape)}.")
    return float(value)


def check_mean(
    loss: Loss,
    outputs: Tensor,
    targets: Tensor,
    value: float,
    others: Callable[[], tuple[Tensor, Tensor]],
) -> None:
    """Refuse a loss that is no mean: over two parts of a batch, and over single samples.

    Those are of two batches: one may hold a single class, which hides its weight.

    Args:
        loss: The loss.
        outputs: Outputs for a batch, as the loss takes them.
        targets: Its targets.
        value: Its loss.
        others: Returns outputs and targets of a few samples of another batch.
    """
    cut = len(targets) // 3 or 1
    parts = [(outputs[:cut], targets[:cut]), (outputs[cut:], targets[cut:])]
    try:
        values = [float(loss(*part)) for part in parts]
    except Exception as error:  # as of one that pairs the samples of a whole batch
        error.add_note(f"It came from `loss`, which must be a mean, on part of a batch; {_REMEDY}.")
        raise
    _compare_mean(loss, parts, value, values)
    rows = _samples(outputs[:FEW], targets[:FEW])
    with suppress(Exception):  # a loss that needs samples of one size, or several, is spared
        more = _samples(*others())
        torch.cat([rows[0][0], more[0][0]]), torch.cat([rows[0][1], more[0][1]])
        rows += more
    whole = torch.cat([o for o, _ in rows]), torch.cat([t for _, t in rows])
    try:
        total = float(loss(*whole))
        values = [float(loss(o, t)) for o, t in rows]
    except Exception:
        return
    _compare_mean(loss, rows, total, values)
    amounts = [float(amount_averaged(loss, t, 1)) for _, t in rows]
    try:
        gradient = _gradient(loss, *whole)
        each = [a * _gradient(loss, *row) for a, row in zip(amounts, rows, strict=True)]
    except Exception:  # a loss that has none
        return
    if _differ(gradient, torch.cat(each) / sum(amounts), _norm(gradient)):
        raise ValueError(
            "`loss` must be a mean over samples, got one whose gradient is not the mean of those "
            f"of single samples; {_REMEDY}."
        )


def check_own_mean(whole: float, parts: Sequence[float], sizes: Sequence[int]) -> None:
    """Refuse a model's own loss that is not the mean of what its parts give.

    Args:
        whole: The loss of some samples.
        parts: That of two parts of them.
        sizes: Samples in each.
    """
    mean = sum(n * v for n, v in zip(sizes, parts, strict=True)) / sum(sizes)
    if math.isfinite(whole) and not abs(mean - whole) <= 1e-2 * max(abs(mean), abs(whole)):
        raise ValueError(
            f"`model` must return a `.loss` that is a mean over samples, got {whole:.6g} for some "
            f"whose parts average to {mean:.6g}; {_OWN_REMEDY}."
        )


def check_own_gradient(whole: Tensor, parts: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Refuse a model's own loss whose gradient is not the mean of what its parts give.

    Args:
        whole: The gradient of some samples, in the parameters.
        parts: That of two parts of them.
        sizes: Samples in each.
    """
    shares = [n / sum(sizes) for n in sizes]
    mean = sum((share * g for share, g in zip(shares, parts, strict=True)), 0 * whole)
    # At a minimum the parts cancel, and rounding is that of the parts.
    if _differ(whole, mean, sum(a * _norm(g) for a, g in zip(shares, parts, strict=True))):
        raise ValueError(
            "`model` must return a `.loss` that is a mean over samples, got one whose gradient is "
            f"not the mean of those of its parts; {_OWN_REMEDY}."
        )


def _differ(gradient: Tensor, mean: Tensor, size: float) -> bool:
    """Whether two gradients differ by more than rounding, beside a size.

    They tell means over tokens and over samples apart where the values do not: before training all
    tokens have about the loss log(classes), so that all means are alike.
    """
    difference, precision = _norm(gradient - mean), torch.finfo(gradient.dtype)
    allowed = max(1e-2, 4 * precision.eps) * size + precision.tiny
    return math.isfinite(difference) and difference > allowed


def _norm(gradient: Tensor) -> float:
    return float(gradient.to(torch.promote_types(gradient.dtype, torch.float64)).norm())


def _gradient(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(loss(leaf, targets), leaf)[0]


def _samples(outputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(outputs, 1), torch.split(targets, 1), strict=True))


def _compare_mean(
    function: Loss,
    parts: Sequence[tuple[Tensor, Tensor]],
    loss: float,
    values: Sequence[float],
) -> None:
    amounts = [float(amount_averaged(function, t, len(t))) for _, t in parts]
    counted = [(a, v) for a, v in zip(amounts, values, strict=True) if a > 0]
    # With label smoothing, samples of weight 0 add to the sum, and have no mean of their own.
    weighted = loss_settings(function)[0] is not None
    if len(counted) < 2 or (weighted and len(counted) < len(amounts)):
        return
    mean = sum(a * v for a, v in counted) / sum(a for a, _ in counted)
    if math.isfinite(loss) and not abs(mean - loss) <= 1e-2 * max(abs(mean), abs(loss)):
        raise ValueError(
            f"`loss` must be a mean over samples, got {loss:.6g} for a batch whose parts "
            f"average to {mean:.6g}; {_REMEDY}."
        )


_REMEDY = (
    "pass class weights and an ignored label as `nn.CrossEntropyLoss(weight=…, ignore_index=…)`, "
    "or all samples as one batch"
)
_OWN_REMEDY = (
    "pass `Objective(loss=…)` with a function of outputs and targets (`nn.CrossEntropyLoss()` of "
    "logits (n, classes, tokens) weighs batches by the labels that count), or all samples as one "
    "batch"
)


def _is_same(now: Tensor, before: Tensor) -> bool:
    """Whether a buffer has the values that it had, wherever and in whatever precision it is."""
    return now.shape == before.shape and torch.allclose(
        now.to(before), before, rtol=0, atol=0, equal_nan=True
    )
