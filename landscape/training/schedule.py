"""The paper's optimizer and its learning-rate schedule.

A schedule is a function of the position in training, counted in epochs (2.5 is the middle of the
third epoch), and returns the factor on the initial learning rate. It has no state, so it needs no
saving and can be drawn before training.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from landscape._checks import check_at_least

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from 0 to 1, then half a cosine down to 0 (Park & Kim, 2022, recipe).

    At position `t`, with `w` warm-up epochs of `E` in all: `t / w` for `t < w`, else
    `(1 + cos(π (t - w) / (E - w))) / 2`.

    Attributes:
        epochs: Epochs in all, those of the warm-up included: the paper's "5 + 300" is 305.
        warmup_epochs: Epochs of warm-up; 5 in the paper.
        per_epoch: Hold the factor during each epoch of the cosine, as the paper's code does, rather
            than change it at every step. The warm-up changes at every step either way.
    """

    epochs: int
    warmup_epochs: int = 5
    per_epoch: bool = False

    def __post_init__(self) -> None:
        check_at_least("warmup_epochs", self.warmup_epochs, 0)
        check_at_least("epochs", self.epochs, self.warmup_epochs + 1)

    def __call__(self, position: float) -> float:
        """Return the factor on the learning rate.

        Args:
            position: Epochs done, fractions included.

        Returns:
            Factor between 0 and 1.
        """
        if position < self.warmup_epochs:
            return position / self.warmup_epochs
        if self.per_epoch:
            position = math.floor(position)
        share = (position - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def adamw(
    model: nn.Module,
    *,
    lr: float = 1.25e-4,
    weight_decay: float = 0.05,
    decay_1d: bool = True,
) -> torch.optim.AdamW:
    """Return the paper's optimizer: AdamW, learning rate 1.25e-4, weight decay 0.05.

    The decay is decoupled: each step multiplies the parameters by `1 - lr · weight_decay`; it is no
    term of the loss. Like the authors' code this decays *every* parameter, biases, norms and
    tokens included, so that it belongs to the L2 term over all parameters which an `Objective`
    adds. timm's usual choice, no decay on 1-D parameters, is `decay_1d=False`.

    Args:
        model: Model whose trainable parameters are optimised.
        lr: Initial learning rate.
        weight_decay: Decoupled weight decay.
        decay_1d: Whether parameters of at most one dimension (biases, norms) decay too.

    Returns:
        AdamW over all trainable parameters.

    Raises:
        ValueError: If there is none, or a rate is negative.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "`model` must have a parameter that requires a gradient, got none; call "
            "`requires_grad_()` on the parts to train."
        )
    check_at_least("lr", lr, 0)
    check_at_least("weight_decay", weight_decay, 0)
    if decay_1d:
        return torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay)
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)
