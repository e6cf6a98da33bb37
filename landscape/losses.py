"""What a loss averages over: the weight of a batch in the mean over all data.

`F.cross_entropy` with class weights or ignored labels divides by the weight of the labels that it
counts, not by the number of samples; the mean over all data must divide by the sum of these.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Any, Tensor], Tensor]
"""`loss(outputs, targets)`."""

_ELEMENTWISE = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
_ELEMENTWISE_MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


def loss_settings(loss: Any) -> tuple[Tensor | None, int, str]:
    """Return (class weights, ignored label, reduction) of the losses whose mean is weighted."""
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return loss.weight, loss.ignore_index, loss.reduction
    if isinstance(loss, functools.partial):
        keywords, known = loss.keywords, loss.func in (F.cross_entropy, F.nll_loss)
        return (
            keywords.get("weight") if known else None,
            keywords.get("ignore_index", -100) if known else -100,
            keywords.get("reduction", getattr(loss.func, "reduction", "mean")),
        )
    return None, -100, str(getattr(loss, "reduction", "mean"))


def check_reduction(loss: Any) -> None:
    """Refuse a loss that says of itself that it takes no mean.

    Raises:
        ValueError: If its `reduction` is another. The user's own module may keep such a setting and
            take the mean itself.
    """
    reduction = loss_settings(loss)[2]
    own = isinstance(loss, nn.Module) and not type(loss).__module__.startswith("torch.")
    if reduction not in ("mean", "batchmean") and not own:
        raise ValueError(
            f"`loss` must reduce by 'mean' over samples, got reduction={reduction!r}; leave it out."
        )


def is_classification(loss: Any) -> bool:
    """Whether `loss` is a cross-entropy, whose integer targets are class labels."""
    loss = _bare(loss)
    return loss in (F.cross_entropy, F.nll_loss) or isinstance(
        loss, nn.CrossEntropyLoss | nn.NLLLoss
    )


def is_elementwise(loss: Any) -> bool:
    """Whether `loss` compares outputs and targets entry by entry, and broadcasts other shapes."""
    loss = _bare(loss)
    return loss in _ELEMENTWISE or isinstance(loss, _ELEMENTWISE_MODULES)


def is_binary(loss: Any) -> bool:
    """Whether `loss` is a binary cross-entropy, entry by entry."""
    loss = _bare(loss)
    functions = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
    return loss in functions or isinstance(loss, nn.BCELoss | nn.BCEWithLogitsLoss)


def makes_no_softmax(loss: Any) -> bool:
    """Whether `loss` is one of PyTorch's, and not a cross-entropy of a softmax."""
    loss = _bare(loss)
    named = getattr(F, getattr(loss, "__name__", ""), None)
    own = type(loss).__module__.startswith("torch.nn.") if isinstance(loss, nn.Module) else False
    return (own or loss is named) and not is_classification(loss)


def is_probability(targets: Tensor) -> Tensor:
    """Whether all rows `(n, classes, …)` are probabilities up to rounding; a boolean scalar."""
    off = (targets.sum(1, dtype=torch.float64) - 1).abs()
    return (targets >= 0).all() & (off <= 1e-2).all()


def takes_float32(loss: Any) -> bool:
    """Whether `for_loss` gives the loss outputs of half precision in float32."""
    weight = loss_settings(loss)[0]
    known = is_classification(loss) or is_elementwise(loss)
    return known and (weight is None or weight.dtype.itemsize >= 4)


def for_loss(loss: Any, outputs: Tensor) -> Tensor:
    """Return outputs of half precision in float32, which `loss` then takes its mean in.

    So do all losses of PyTorch above; others, and class weights in half precision, may want the
    outputs as they are.
    """
    is_half = outputs.is_floating_point() and outputs.dtype.itemsize < 4
    return outputs.float() if is_half and takes_float32(loss) else outputs


def _bare(loss: Any) -> Any:
    """Return a loss without the arguments that are fixed by a `functools.partial`."""
    return loss.func if isinstance(loss, functools.partial) else loss


def amount_averaged(loss: Any, targets: Tensor | None, size: int) -> Tensor | float:
    """Return the denominator of the mean that `loss` takes over a batch."""
    if targets is None or not counts_labels(loss, targets):
        return float(size)
    return sample_weights(loss, targets).sum()


def amount_of_all(loss: Any, targets: Tensor | None, size: int) -> Tensor | float:
    """Return `amount_averaged` of a batch that is one of several in a mean.

    Raises:
        ValueError: If the batch adds to the sum though its labels weigh nothing, as it does with
            label smoothing: it has no mean that could be weighed.
    """
    amount = amount_averaged(loss, targets, size)
    weight, ignore, _ = loss_settings(loss)
    if weight is None or targets is None or amount > 0 or not (targets != ignore).any():
        return amount
    settings = loss.keywords if isinstance(loss, functools.partial) else vars(loss)
    if settings.get("label_smoothing"):
        raise ValueError(
            "`data` must have a label of positive class weight in every batch where `loss` smooths "
            "labels, got one without; pass larger batches, or leave these labels out by "
            "`ignore_index`."
        )
    return amount


def sample_weights(loss: Any, targets: Tensor) -> Tensor:
    """Return the weight `(n,)` of each sample in the mean that `loss` takes, in float64."""
    if not counts_labels(loss, targets):
        return torch.ones(len(targets), dtype=torch.float64, device=targets.device)
    weight, ignore, _ = loss_settings(loss)
    counted = (targets != ignore).double()
    if weight is not None:
        known = targets.clamp(0, len(weight) - 1)
        counted = counted * weight.to(targets.device)[known].double()
    return counted.flatten(1).sum(1) if counted.dim() > 1 else counted


def counts_labels(loss: Any, targets: Tensor) -> bool:
    """Whether the mean that `loss` takes is over class labels, and not over samples."""
    return is_classification(loss) and not targets.is_floating_point()
