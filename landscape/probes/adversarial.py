"""Robustness against the worst change of every image within a ball.

In pixel units (0 to 1 over full scale) an attack looks for δ with ‖δ‖ ≤ ε and x₀ + δ within 0 … 1
that makes the loss L(δ) = −log p_y of a sample large; with g = ∂L/∂δ:

- `"fgsm"`, one step from δ = 0: δ = ε · sign(g) in the L∞ ball (Goodfellow, Shlens & Szegedy,
  2015, section 4), δ = ε · g / ‖g‖₂ in the L2 ball, cut off at 0 and 1;
- `"pgd"`, steps of length α each followed by the projection on both sets: δ ← Π(δ + α · sign(g)),
  or Π(δ + α · g / ‖g‖₂) (Madry et al. 2018, section 2.1), from a random point by default.

The steps themselves are in `landscape.probes.attacks`.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from landscape._checks import (
    check_choice,
    check_count,
    check_differentiable,
    check_generator,
    check_positive,
)
from landscape.objective import predict
from landscape.probes.attacks import Target
from landscape.probes.pixels import Channels, PixelScale, split_image
from landscape.probes.scores import PairedResult, PairedScores, increasing, tracked_batches
from landscape.provenance import forward_provenance
from landscape.restore import untouched
from landscape.results import Provenance

Attack = Literal["fgsm", "pgd"]
Norm = Literal["linf", "l2"]
RADII = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
"""Radii of the L∞ ball up to the 8/255 of Madry et al. (2018) on CIFAR-10."""


@dataclass(frozen=True)
class AdversarialRobustness(PairedResult):
    """Accuracy and NLL under attack, by the radius of the ball.

    Differences are attacked minus clean on the same samples, and their standard errors those of
    paired differences over samples. Accuracies are between 0 and 1, NLL in nats. An attack is an
    upper bound of the worst-case accuracy, not that accuracy.

    Attributes:
        radii: `(r,)`: radii of the ball in pixel units (0 to 1 over full scale), ascending.
        accuracy: `(r,)`: share of samples that are right under attack, under every restart.
        accuracy_stderr: `(r,)`: its standard error over samples.
        delta_accuracy: `(r,)`: accuracy under attack minus clean accuracy.
        delta_accuracy_stderr: `(r,)`: its paired standard error.
        nll: `(r,)`: mean negative log-likelihood under attack, the largest of the restarts.
        nll_stderr: `(r,)`: its standard error over samples.
        delta_nll: `(r,)`: NLL under attack minus clean NLL.
        delta_nll_stderr: `(r,)`: its paired standard error.
        clean_accuracy: Accuracy without attack.
        clean_accuracy_stderr: Its standard error.
        clean_nll: NLL without attack.
        clean_nll_stderr: Its standard error.
        attack: `"fgsm"` or `"pgd"`.
        norm: `"linf"` or `"l2"`.
        steps: Gradients an attack takes: 1 for FGSM.
        random_start: Whether PGD started at random.
        restarts: Attacks of each sample.
        seed: Seed of the random starts.
        provenance: Where the result came from.
    """

    _plot: ClassVar[str | None] = "adversarial_robustness"

    radii: np.ndarray
    attack: str
    norm: str
    steps: int
    random_start: bool
    restarts: int
    seed: int
    provenance: Provenance


def adversarial_robustness(
    model: nn.Module,
    data: Iterable[Any],
    *,
    attack: Attack = "pgd",
    norm: Norm = "linf",
    radii: Sequence[float] = RADII,
    steps: int = 10,
    step_size: float | None = None,
    random_start: bool = True,
    restarts: int = 1,
    mean: Channels | None = None,
    std: Channels | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> AdversarialRobustness:
    """Accuracy and NLL under FGSM or PGD attacks (Goodfellow et al. 2015; Madry et al. 2018).

    The formulas stand at the top of this module. Every radius is attacked afresh; the i-th sample
    has the same random starts, relative to the radius, at each of them and for every model of the
    same seed, however the data are batched. PGD is scored at its last step. Cost: one clean forward
    pass over the data, and for each radius and restart one forward pass and `steps` gradients by
    the inputs.

    Inputs in half precision round as coarsely as small radii: attack a model in float32.

    Args:
        model: Any classifier of images, differentiable by them; left as it was found.
        data: Re-iterable of batches of normalised images `(n, c, h, w)` with labels or target
            probabilities.
        attack: `"fgsm"` (one step from the image; `steps`, `step_size`, `random_start` and
            `restarts` do not apply) or `"pgd"`.
        norm: `"linf"` for the largest change of a pixel of one channel, `"l2"` for the Euclidean
            norm of the change of the image.
        radii: Radii of the ball in pixel units (0 to 1 over full scale), increasing; of `"linf"` at
            most 1.
        steps: Steps of PGD.
        step_size: Length α of a step in pixel units; by default 2.5 · radius / steps, with which
            any point of the ball can be reached from any other (Madry et al. 2018).
        random_start: Whether PGD starts at a random point, uniform in the ball, or at the image.
        restarts: Attacks of each sample from different starts; the worst counts.
        mean: Mean of each channel that x was normalised with, in units of full scale; by default
            `data.mean` and `data.std` where there are such (`DeviceImages`), else 0 and 1.
        std: Standard deviation of each channel, likewise.
        generator: Its initial seed is that of the starts; what was drawn from it does not matter.
            `None` is seed 0.
        progress: Show a progress bar.

    Returns:
        Accuracy and NLL by radius, with the clean values inside.

    Raises:
        TypeError: If `data` cannot be iterated over twice.
        ValueError: If an argument is out of range, pixels are not in 0 … 1, `model` cannot be
            differentiated, or targets are not those of a classifier.
    """
    check_choice("attack", attack, get_args(Attack))
    check_choice("norm", norm, get_args(Norm))
    balls = increasing("radii", radii)
    if norm == "linf" and balls[-1] > 1:
        raise ValueError(f"`radii` must be at most 1, full scale; is {balls[-1]:g} in 1/255 of it?")
    check_count("steps", steps, 1)
    check_count("restarts", restarts, 1)
    if step_size is not None:
        check_positive("step_size", step_size)
    if attack == "fgsm":
        steps, step_size, random_start, restarts = 1, None, False, 1
    elif restarts > 1 and not random_start:
        raise ValueError("`restarts` must be 1 without `random_start`: all would be alike.")
    scale = PixelScale(data, mean, std)
    seed = check_generator(generator).initial_seed()
    generator = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    batches = tracked_batches(model, data, "Adversarial robustness", progress)
    paired = PairedScores(len(balls))
    check_differentiable(model)
    with untouched(model), torch.no_grad():
        for inputs, targets, _ in batches:
            scale.check(split_image(inputs)[0])
            truth = paired.add_clean(predict(model, inputs), targets)
            target = Target(model, inputs, truth, scale, norm)
            starts = target.starts(generator, restarts) if random_start else [None]
            for condition, radius in enumerate(balls.tolist()):
                length = _step_length(attack, radius, steps, step_size)
                scores = [target.attack(radius, steps, length, start) for start in starts]
                paired.add(condition, _worst(scores))
    scale.finish()
    attacks = len(balls) * restarts
    settings = {"attack": attack, "norm": norm, "radii": balls.tolist(), "steps": steps}
    settings |= {"step_size": step_size, "random_start": random_start, "restarts": restarts}
    return AdversarialRobustness(
        radii=balls,
        **paired.fields(),
        attack=attack,
        norm=norm,
        steps=steps,
        random_start=random_start,
        restarts=restarts,
        seed=seed,
        provenance=forward_provenance(
            model,
            num_samples=paired.count,
            seed=seed,
            seconds=time.perf_counter() - begin,
            num_forwards=1 + attacks * (steps + 1),
            settings=settings | {"num_gradients": attacks * steps} | scale.settings(),
        ),
    )


def _step_length(attack: str, radius: float, steps: int, step_size: float | None) -> float:
    if attack == "fgsm":
        return radius
    return 2.5 * radius / steps if step_size is None else step_size


def _worst(scores: list[Tensor]) -> Tensor:
    """Return for each sample the largest NLL, and 1 where it is right in every restart."""
    nll, right = torch.stack(scores).unbind(-1)
    return torch.stack([nll.amax(0), right.amin(0)], dim=1)
