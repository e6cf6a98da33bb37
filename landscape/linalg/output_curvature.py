"""Gauss-Newton and Fisher matrices of a frozen objective.

With J_n = ∂f(x_n; θ)/∂θ, p_n = softmax f(x_n; θ), the per-sample loss ℓ_n(f(x_n; θ)), and a_n the
weight of sample n in the mean that the loss takes (1, or by class weights and ignored labels):

    Gauss-Newton    G = Σ_n J_nᵀ (∂²L/∂f_n²) J_n + λI
    Fisher          F = Σ_n a_n J_nᵀ (diag p_n − p_n p_nᵀ) J_n / Σ_n a_n + λI
    empirical       E = Σ_n a_n ∇ℓ_n ∇ℓ_nᵀ / Σ_n a_n + λI
"""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.func import vmap

from landscape.batches import PreparedBatch
from landscape.linalg.gradient import (
    check_twice_differentiable,
    twice_differentiable,
    unchanged_gradients,
)
from landscape.linalg.hessian import CurvatureOperator, warn_independent
from landscape.linalg.layers import with_cheap_second_derivatives
from landscape.losses import is_probability, makes_no_softmax, sample_weights


class _OutputCurvature(CurvatureOperator):
    """Σ_n J_nᵀ C_n J_n with a small matrix C_n on the outputs of each sample.

    J v is taken by reverse mode twice: Jᵀu is linear in u, and its derivative along v is J v. So
    every model that has a Hessian has these matrices, whatever its forward-mode support.
    """

    _checked = False

    def _matmat(self, vectors: Tensor) -> Tensor:
        out = self._weight_decay * vectors  # the Hessian of (λ/2)‖θ‖² is λI
        watched = nullcontext() if self._checked else unchanged_gradients()
        with twice_differentiable(), watched:
            for batch in self.frozen.batches:
                product = self._multiplication(batch)
                if product is None:
                    warn_independent()
                    continue
                for column in range(vectors.shape[1]):
                    out[:, column].add_(product(vectors[:, column]), alpha=batch.weight)
                del product  # and its graph, before the next is made
        return out

    def _multiplication(self, batch: PreparedBatch) -> Callable[[Tensor], Tensor] | None:
        """Return what multiplies with the matrix of one batch, `None` where that is zero."""
        space = self.frozen.space
        leaves = {n: t.detach().requires_grad_() for n, t in space.values.items()}
        parameters = list(leaves.values())
        with torch.enable_grad():
            outputs = with_cheap_second_derivatives(
                partial(self._outputs, leaves, batch), of_outputs=True
            )
            if not outputs.requires_grad:
                return None
            dual = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                outputs, parameters, dual, create_graph=True, materialize_grads=True
            )
        if not self._checked:
            check_twice_differentiable([outputs, *pulled])
            self._checked = True

        def product(v: Tensor) -> Tensor:
            pairs = [
                (g, t)
                for g, t in zip(pulled, space.unflatten(v).values(), strict=True)
                if g.requires_grad
            ]
            (tangent,) = torch.autograd.grad(
                [g for g, _ in pairs], dual, [t for _, t in pairs], retain_graph=True
            )
            curved = self._output_product(batch, outputs.detach(), tangent)
            return space.flatten(
                torch.autograd.grad(
                    outputs, parameters, curved, retain_graph=True, materialize_grads=True
                )
            )

        return product

    def _outputs(self, leaves: dict[str, Tensor], batch: PreparedBatch) -> Tensor:
        """Return what C_n acts on: the logits, one row per sample."""
        return self.frozen.logits(leaves, batch.inputs)

    def _shares(self, batch: PreparedBatch) -> Tensor:
        """Return a_n over its sum in the batch, shape `(n,)`."""
        assert batch.targets is not None  # the set-up has taken the loss of both
        a = sample_weights(self.frozen.objective.loss, batch.targets)
        return (a / a.sum()).to(self.dtype)

    def _check_loss(self, of_what: str) -> None:
        """Refuse a loss that the model brings."""
        if self.frozen.objective.loss is None:
            raise ValueError(
                f"`loss` must be a function of {of_what}, got None; pass the loss that the model "
                "takes as `Objective(loss=…)`."
            )

    @abstractmethod
    def _output_product(self, batch: PreparedBatch, outputs: Tensor, tangent: Tensor) -> Tensor:
        """Return the curvature of the batch's mean loss in the outputs, times `tangent`."""


class GaussNewtonOperator(_OutputCurvature):
    """The generalised Gauss-Newton matrix; a product costs about 3 gradients.

    It equals the Hessian of the objective with the network linearised at θ, and is positive
    semi-definite where the loss is convex in the outputs (Schraudolph, 2002).

    Raises:
        ValueError: Besides what a `HessianOperator` raises, if the model brings its own loss.
    """

    def _setup(self) -> None:
        self._check_loss("the outputs for a Gauss-Newton matrix")
        super()._setup()

    def _output_product(self, batch: PreparedBatch, outputs: Tensor, tangent: Tensor) -> Tensor:
        logits = outputs.requires_grad_()
        with torch.enable_grad():
            loss = self.frozen.loss(logits, batch)
            (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
            if not gradient.requires_grad:
                return torch.zeros_like(logits)
            (product,) = torch.autograd.grad(gradient, logits, tangent, materialize_grads=True)
        return product


class FisherOperator(_OutputCurvature):
    """The true Fisher information of the softmax model, by exact expectation over the classes.

    E_{y∼p}[∇log p(y) ∇log p(y)ᵀ] = Jᵀ (diag p − p pᵀ) J: nothing is sampled, and labels only tell
    which samples the loss counts and how much (Martens, 2020, sec. 9). Outputs are logits of shape
    `(n, classes)`.

    Raises:
        ValueError: Besides what a `HessianOperator` raises, if the outputs have another shape, the
            model brings its own loss, it is one of PyTorch's that takes no softmax of them, or the
            targets are those of a regression.
    """

    def _setup(self) -> None:
        self._check_loss("the logits for a Fisher matrix")
        loss = self.frozen.objective.loss
        if makes_no_softmax(loss):
            raise ValueError(
                "`loss` must be that of a softmax for a Fisher matrix, got "
                f"{getattr(loss, '__name__', loss)}; see `GaussNewtonOperator`."
            )
        batch = next(iter(self.frozen.batches))
        with torch.no_grad():
            logits = self.frozen.logits(self.frozen.space.values, batch.inputs)
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(
                "`model` must return logits of shape (n, classes) of two or more classes for a "
                f"Fisher matrix, got {tuple(logits.shape)}; see `GaussNewtonOperator`."
            )
        targets = batch.targets
        assert targets is not None  # the set-up has taken the loss of both
        alike = targets.is_floating_point() and targets.shape == logits.shape
        if alike and not is_probability(targets):  # of a loss whose name does not tell
            raise ValueError(
                "`data` must have labels, or probabilities that sum to 1, for a Fisher matrix, got "
                "floating targets that are none, as of a regression; see `GaussNewtonOperator`."
            )
        super()._setup()

    def _output_product(self, batch: PreparedBatch, outputs: Tensor, tangent: Tensor) -> Tensor:
        p = outputs.softmax(-1)
        centred = tangent - (p * tangent).sum(-1, keepdim=True)
        return p * centred * self._shares(batch)[:, None]


class EmpiricalFisherOperator(_OutputCurvature):
    """Second moment of the per-sample gradients at the labels given.

    Not the Fisher information: it uses the labels of the data, and differs from the Hessian even
    at a minimum of a misspecified model (Kunstner et al., 2019).

    Raises:
        ValueError: Besides what a `HessianOperator` raises, if the model brings its own loss, or it
            is no mean over the samples of a batch, such as one that contrasts them.
    """

    def _setup(self) -> None:
        self._check_loss("outputs and targets for an empirical Fisher matrix")
        super()._setup()
        batch, values = next(iter(self.frozen.batches)), self.frozen.space.values
        with torch.no_grad():
            loss = float(self.frozen.data_term(values, batch))
            shares = self._shares(batch)
            mean = float((shares[shares > 0] * self._outputs(values, batch)).sum())
        if abs(mean - loss) > 1e-2 * max(abs(mean), abs(loss)):
            raise ValueError(
                "`loss` must be a mean over samples for an empirical Fisher matrix, got "
                f"{loss:.6g} for a batch whose samples average to {mean:.6g}; see "
                "`GaussNewtonOperator`."
            )

    def _outputs(self, leaves: dict[str, Tensor], batch: PreparedBatch) -> Tensor:
        loss, targets = self.frozen.objective.loss, batch.targets
        assert loss is not None  # the set-up has taken the loss of both
        assert targets is not None

        def one(logits: Tensor, target: Tensor) -> Tensor:
            return loss(logits[None], target[None])

        counted = self._shares(batch) > 0  # of an ignored label alone there is no mean
        logits = super()._outputs(leaves, batch)
        pairs = logits[counted], targets[counted]
        each: Tensor
        try:
            each = vmap(one)(*pairs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a loss that selects by its targets, for example
            each = torch.stack(list(map(one, *pairs)))
        return each

    def _output_product(self, batch: PreparedBatch, outputs: Tensor, tangent: Tensor) -> Tensor:
        shares = self._shares(batch)
        return tangent * shares[shares > 0]
