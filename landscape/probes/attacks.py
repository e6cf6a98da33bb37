"""Attacks on one batch: gradient steps within a ball around every image, in pixel units.

With δ the change of an image and g = ∂L/∂δ, a step of length α is

    δ ← Π(δ + α · sign(g))  in the L∞ ball,    δ ← Π(δ + α · g / ‖g‖₂)  in the L2 ball.

Π projects on the ball and then cuts off at pixels 0 and 1, which never leaves the ball because the
image itself lies between them. The gradient is taken by the inputs alone; of normalised inputs
x = (pixel − mean) / std it is g = (∂L/∂x) / std.

Only the direction of g counts. For a label y that of −log p_y = log(1 + e^a) is the direction of
∂a/∂δ with a = log Σ_{k≠y} e^{z_k} − z_y, which does not vanish where p_y rounds to 1, so a model is
not safe for being certain.
"""

from typing import Any

import torch
from torch import Tensor, nn

from landscape.batches import Inputs
from landscape.objective import predict
from landscape.probes.pixels import PixelScale, split_image
from landscape.probes.scores import Truth


class Target:
    """One batch under attack; changes of images are in pixel units."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, truth: Truth, scale: PixelScale, norm: str
    ) -> None:
        """Set what is attacked.

        Args:
            model: The model, in evaluation mode.
            inputs: Inputs of the batch.
            truth: Its labels or soft targets.
            scale: Normalisation of its images.
            norm: `"linf"` or `"l2"`.
        """
        self._model, self._truth, self._norm = model, truth, norm
        self._x, self._put = split_image(inputs)
        self._unit = scale.unit(self._x)
        self._low, self._high = scale.bounds(self._x)

    def starts(self, generator: torch.Generator, count: int) -> Tensor:
        """Return `(count, n, c, h, w)`: uniform points of the ball of radius 1.

        They are drawn one by one, sample after sample, so that they do not depend on batches.
        """
        points = torch.stack([self._point(generator) for _ in self._x for _ in range(count)])
        return points.view(-1, count, *self._x.shape[1:]).transpose(0, 1).to(self._x)

    def attack(self, radius: float, steps: int, length: float, start: Tensor | None) -> Tensor:
        """Return the scores `(n, 2)` of the images after the last step.

        Args:
            radius: Radius of the ball.
            steps: Number of steps.
            length: Length of a step.
            start: Where to start in the ball of radius 1; at the images by default.
        """
        x = self._x if start is None else self._moved(radius * start)
        for _ in range(steps):
            direction = self._steepest(self._gradient(x) * self._unit)
            # Where x was cut off at 0 and 1, delta is what is left of it.
            delta = self._project((x - self._x) / self._unit + length * direction, radius)
            x = self._moved(delta)
        with torch.no_grad():
            return self._truth.scores(predict(self._model, self._put(x)))

    def _moved(self, delta: Tensor) -> Tensor:
        return (self._x + delta * self._unit).clamp(self._low, self._high)

    def _gradient(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            # The sum: the gradient of a sample must not depend on the size of its batch.
            loss = self._climbed(predict(self._model, self._put(x))).sum()
            slope = None
            if loss.requires_grad:
                (slope,) = torch.autograd.grad(loss, x, allow_unused=True)
        if slope is None:
            raise ValueError(
                "`model` must be differentiable by its inputs, got outputs without a gradient; "
                "take out rounding, `detach` and `no_grad`, and leave `torch.inference_mode`."
            )
        return slope

    def _climbed(self, logits: Tensor) -> Tensor:
        if self._truth.soft is not None:
            return self._truth.nll(logits)
        own = self._truth.labels[:, None]
        others = logits.double().scatter(1, own, -torch.inf)
        return others.logsumexp(1) - logits.double().gather(1, own)[:, 0]

    def _steepest(self, slope: Tensor) -> Tensor:
        """Return the step of length 1 that raises the loss most; 0 where the slope is 0."""
        if self._norm == "linf":
            return slope.sign()
        # In float64, where squares of float32 numbers do not underflow.
        wide = slope.double()
        length = _lengths(wide)
        return torch.where(length > 0, wide / length, 0.0).to(slope.dtype)

    def _project(self, delta: Tensor, radius: float) -> Tensor:
        if self._norm == "linf":
            return delta.clamp(-radius, radius)
        length = _lengths(delta)
        return torch.where(length > radius, delta * (radius / length), delta)

    def _point(self, generator: torch.Generator) -> Tensor:
        shape = self._x.shape[1:]
        made: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        if self._norm == "linf":
            return 2 * torch.rand(shape, **made) - 1
        point = torch.randn(shape, **made)
        length = torch.rand((), **made) ** (1 / point.numel())
        point *= length / torch.linalg.vector_norm(point)
        return point


def _lengths(values: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(values, dim=(1, 2, 3), keepdim=True)
    return lengths
