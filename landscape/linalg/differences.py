"""Products of a Hessian by differences of gradients, for a search whose pairs are checked.

    H v ≈ (∇L(θ + ε v) − ∇L(θ)) / ε

takes one plain gradient, where a product with a kept graph takes 1.5 to 2.5 and with another one
more. Its error is (ε/2) ∂³L[v, v] beside the rounding of the gradient over ε: 1e-3 to 1e-2 of ‖H‖
in float32. That is too much for an eigenvalue, and little for the space to look for its vector in.
The error of a Ritz value is of the order of the square of its vector's, so one accurate product a
pair at the end gives values, and residuals, as good as those of accurate products throughout. The
bound on a miss is one for the products of the search: what their error can hide, it does not see.

The gradient jumps at a kink, such as that of a ReLU, so kinks are held where they are at θ
(`landscape.linalg.kinks`). Convolutions get the memory format that they had in the graph.

ε is u^(3/4) ‖θ‖, with the unit roundoff u of the parameters, and more where that leaves too much of
the rounding, which the difference of two ways to compute ∇L(θ) tells. What the third derivative
does, or a kink that is not held, shows in products that are not those of a symmetric matrix.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from landscape.linalg.gram_schmidt import length
from landscape.linalg.kinks import Choice, Holding
from landscape.objective import FrozenObjective
from landscape.switches import eagerly, rounding

ROUNDED = 1e-3
"""Rounding over ‖H‖ that is left where a larger ε can have it so, a heuristic."""
LARGEST = 30
"""Largest ε over the usual one, a heuristic: the third derivative takes over."""


class GradientDifferences:
    """Multiplies with the Hessian of a frozen objective by differences of gradients.

    Attributes:
        scale: About ‖H‖, or 0 as long as it is not known.
    """

    def __init__(
        self,
        frozen: FrozenObjective,
        gradient: Tensor,
        choices: Sequence[list[Choice]] | None = None,
    ) -> None:
        """Take the gradient at the parameters; one plain gradient over all data.

        Args:
            frozen: The objective.
            gradient: Its gradient as the graph of the accurate products has it.
            choices: What is chosen at the kinks of each batch, if there are any.
        """
        self._frozen, self._choices = frozen, choices
        self._values = frozen.space.flatten(frozen.space.values)
        self._step = float(torch.finfo(self._values.dtype).eps ** 0.75 * length(self._values))
        self._gradient = self._gradient_at(self._values)
        decay = frozen.objective.weight_decay
        self._rounding = float(length((gradient - self._gradient).sub_(self._values, alpha=decay)))
        self.scale = 0.0

    def matvec(self, v: Tensor) -> Tensor:
        """Return about H v; one plain gradient over all data.

        Args:
            v: Unit vector of shape `(dim,)`, of any floating type.
        """
        step = self._step
        if self.scale:
            step = min(max(step, self._rounding / (ROUNDED * self.scale)), LARGEST * step)
        v = v.to(self._values)
        product = self._gradient_at(torch.add(self._values, v, alpha=step))
        product.sub_(self._gradient).div_(step)
        decay = self._frozen.objective.weight_decay
        return product.add_(v, alpha=decay) if decay else product

    def _gradient_at(self, vector: Tensor) -> Tensor:
        """Return the gradient of the loss, without weight decay, at other parameters."""
        space = self._frozen.space
        leaves = {name: t.requires_grad_() for name, t in space.unflatten(vector).items()}
        total = None
        with eagerly(), rounding("full"), torch.enable_grad():
            for i, batch in enumerate(self._frozen.batches):
                with Holding(self._choices[i]) if self._choices else nullcontext():
                    loss = self._frozen.data_term(leaves, batch)
                parts = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
                part = space.flatten(parts)
                if batch.weight != 1:
                    part *= batch.weight
                total = part if total is None else total.add_(part)
        assert total is not None  # there is no objective without data
        return total
