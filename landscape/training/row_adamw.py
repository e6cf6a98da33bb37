"""AdamW of several models at once, on matrices with a row per model.

With gradient g, first and second moment m and s, step t, learning rate η and weight decay λ
(Loshchilov & Hutter, 2019, Algorithm 2):

    m ← β₁ m + (1 - β₁) g,  s ← β₂ s + (1 - β₂) g²,
    θ ← (1 - η λ) θ - η / (1 - β₁ᵗ) · m / (√(s / (1 - β₂ᵗ)) + ε),

elementwise; η and λ are those of the row's optimizer, its parameter groups included. One step costs
ten operations, however many parameters and models there are.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_COMMON = ("eps", "amsgrad", "maximize", "capturable", "differentiable", "fused")


class RowAdamW:
    """AdamW on the rows of a matrix, whose state is that of one `torch.optim.AdamW` a row."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        parameters: Sequence[Sequence[nn.Parameter]],
        rows: Tensor,
    ) -> None:
        """Take over the optimizers' state, and make it views of matrices.

        Args:
            optimizers: One a row, for which `fits` holds.
            parameters: Trained parameters of each row, in the order of its columns.
            rows: Their values `(members, parameters)`, changed in place by `step`.
        """
        self._optimizers, self._parameters, self._rows = optimizers, parameters, rows
        self._moments = {key: torch.zeros_like(rows) for key in ("exp_avg", "exp_avg_sq")}
        self._counts = torch.zeros(len(parameters), len(parameters[0]), device="cpu")
        sizes = [p.numel() for p in parameters[0]]
        group_of = {
            p: index
            for index, group in enumerate(optimizers[0].param_groups)
            for p in group["params"]
        }
        groups = torch.tensor([group_of[p] for p in parameters[0]], device="cpu")
        self._group = groups.repeat_interleave(torch.tensor(sizes, device="cpu")).to(rows.device)
        for row, (optimizer, own) in enumerate(zip(optimizers, parameters, strict=True)):
            pieces = {key: torch.split(m[row], sizes) for key, m in self._moments.items()}
            for index, parameter in enumerate(own):
                before = optimizer.state.get(parameter, {})
                state = {"step": self._counts[row, index]}
                state |= {key: piece[index].view_as(parameter) for key, piece in pieces.items()}
                for key, value in before.items():
                    state[key].copy_(value)
                optimizer.state[parameter] = state

    @staticmethod
    def fits(optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Return whether all are plain AdamW that differ in learning rate and decay alone."""
        if {type(optimizer) for optimizer in optimizers} != {torch.optim.AdamW}:
            return False
        if any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in optimizers):
            return False
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        common = {(*group["betas"], *(group.get(name) for name in _COMMON)) for group in groups}
        layouts = {tuple(len(g["params"]) for g in each.param_groups) for each in optimizers}
        return len(common) == len(layouts) == 1 and not any(
            groups[0].get(name) for name in _COMMON[1:]
        )

    def in_step(self) -> bool:
        """Return whether the next step is one for all; needs no device.

        That is, all parameters have taken equally many, and no scheduler has set other settings.
        """
        return bool((self._counts == self._counts[0, 0]).all()) and self.fits(self._optimizers)

    def step(self, gradient: Tensor) -> None:
        """Take one step.

        Args:
            gradient: Gradient of every row `(members, parameters)`.
        """
        group = self._optimizers[0].param_groups[0]
        (beta1, beta2), eps = group["betas"], group["eps"]
        for optimizer in self._optimizers:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask for it
        self._counts += 1
        count = float(self._counts[0, 0])
        mean, square = self._moments["exp_avg"], self._moments["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = square.sqrt().div_(math.sqrt(1 - beta2**count)).add_(eps)
        rates, decays = self._by_column("lr"), self._by_column("weight_decay")
        self._rows.mul_(1 - rates * decays)
        self._rows.sub_(spread.reciprocal_().mul_(mean).mul_(rates / (1 - beta1**count)))

    def unlink(self) -> None:
        """Give every optimizer tensors of its own."""
        for optimizer, own in zip(self._optimizers, self._parameters, strict=True):
            for parameter in own:
                state = optimizer.state[parameter]
                optimizer.state[parameter] = {key: value.clone() for key, value in state.items()}

    def _by_column(self, name: str) -> Tensor:
        """Return a setting of every row, `(members, 1)` or, with several groups, by column."""
        values = torch.tensor(
            [[float(group[name]) for group in each.param_groups] for each in self._optimizers],
            dtype=self._rows.dtype,
            device="cpu",
        ).to(self._rows.device, non_blocking=True)
        return values if values.shape[1] == 1 else values[:, self._group]
