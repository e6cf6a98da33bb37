"""Robustness against noise of one band of frequencies (Park & Kim, 2022, section 2.3, Fig. 2b).

    x_noise = x₀ + F⁻¹(F(δ) ⊙ M_f)

in pixel units, with Gaussian δ, F the discrete Fourier transform over height and width of each
channel, and M_f the ring f − w/2 ≤ |ω| < f + w/2 around frequency f. The frequency of the
coefficient (k, l) of an image of height h and width v is |ω| = 2π √((k/h)² + (l/v)²): π is the
Nyquist frequency along an axis, √2 π that of a corner.

The paper does not state how strong the noise is. Here the filtered noise of every image is scaled
so that its root mean square over pixels and channels is exactly `norm`, in units of full scale and
the same at every frequency; its L2 norm over an image of c channels is then norm · √(c·h·v).
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from landscape._checks import check_generator, check_positive
from landscape.objective import predict
from landscape.probes.pixels import Channels, PixelScale, split_image
from landscape.probes.scores import PairedResult, PairedScores, increasing, tracked_batches
from landscape.provenance import forward_provenance
from landscape.restore import untouched
from landscape.results import Provenance

FREQUENCIES = tuple(i / 10 for i in range(1, 10))
"""Centres of the rings in units of π, as in Fig. 2b."""
WIDEST = 3.0
"""Width in units of π of a ring that holds all frequencies from any centre: above 2 √2."""


@dataclass(frozen=True)
class RobustnessCurve(PairedResult):
    """Accuracy and NLL under noise, by its frequency.

    Differences are noisy minus clean on the same samples, and their standard errors those of
    paired differences over samples. Accuracies are between 0 and 1, NLL in nats.

    Attributes:
        frequencies: `(f,)`: centres of the rings in units of π, ascending.
        accuracy: `(f,)`: accuracy under noise.
        accuracy_stderr: `(f,)`: its standard error over samples.
        delta_accuracy: `(f,)`: accuracy under noise minus clean accuracy.
        delta_accuracy_stderr: `(f,)`: its paired standard error.
        nll: `(f,)`: mean negative log-likelihood under noise.
        nll_stderr: `(f,)`: its standard error over samples.
        delta_nll: `(f,)`: NLL under noise minus clean NLL.
        delta_nll_stderr: `(f,)`: its paired standard error.
        clean_accuracy: Accuracy without noise.
        clean_accuracy_stderr: Its standard error.
        clean_nll: NLL without noise.
        clean_nll_stderr: Its standard error.
        width: Width of a ring in units of π.
        norm: Root mean square of the noise over the pixels and channels of each image, before
            clipping, in units of full scale.
        clip: Whether noisy pixels were clipped to 0 … 1.
        seed: Seed of the noise.
        provenance: Where the result came from.
    """

    _plot: ClassVar[str | None] = "frequency_robustness"

    frequencies: np.ndarray
    width: float
    norm: float
    clip: bool
    seed: int
    provenance: Provenance


def frequency_robustness(
    model: nn.Module,
    data: Iterable[Any],
    *,
    frequencies: Sequence[float] = FREQUENCIES,
    width: float = 0.1,
    norm: float = 0.1,
    clip: bool = False,
    mean: Channels | None = None,
    std: Channels | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> RobustnessCurve:
    """Accuracy and NLL under noise of one frequency at a time (Park & Kim, 2022, Fig. 2b).

    The formulas stand at the top of this module. The i-th sample of the data has the same δ at
    every frequency and for every model of the same seed, however the data are batched, so curves
    of several models on the same data differ by the models alone. Cost: one forward pass over the
    data a frequency, and one clean.

    Args:
        model: Any classifier of images; left as it was found.
        data: Re-iterable of batches of normalised images `(n, c, h, w)` with labels or target
            probabilities; in one order for all models.
        frequencies: Centres of the rings in units of π, increasing.
        width: Width of a ring in units of π, at most 3.
        norm: Root mean square of the noise over the pixels and channels of an image, in units of
            full scale (0 to 1). The default is a heuristic: the paper states none.
        clip: Whether to clip noisy pixels to 0 … 1, which spreads the noise over other frequencies
            and makes it weaker than `norm`; the paper's formula does not.
        mean: Mean of each channel that x was normalised with, in units of full scale; by default
            `data.mean` and `data.std` where there are such (`DeviceImages`), else 0 and 1.
        std: Standard deviation of each channel, likewise.
        generator: Its initial seed is that of the noise; what was drawn from it does not matter.
            `None` is seed 0.
        progress: Show a progress bar.

    Returns:
        The curve, with the clean values inside.

    Raises:
        TypeError: If `data` cannot be iterated over twice.
        ValueError: If an argument is out of range, a ring holds no frequency of the images, pixels
            are not in 0 … 1, or targets are not those of a classifier.
    """
    centres = increasing("frequencies", frequencies)
    check_positive("width", width)
    if width > WIDEST:
        raise ValueError(f"`width` must be at most {WIDEST}, all frequencies, got {width}.")
    check_positive("norm", norm)
    scale = PixelScale(data, mean, std)
    noise = _RingNoise(centres, width, norm, check_generator(generator).initial_seed())
    start = time.perf_counter()
    batches = tracked_batches(model, data, "Frequency robustness", progress)
    paired = PairedScores(len(centres))
    with untouched(model), torch.no_grad():
        for inputs, targets, _ in batches:
            x, put = split_image(inputs)
            scale.check(x)
            noises = noise.draw(x)
            truth = paired.add_clean(predict(model, inputs), targets)
            low, high = scale.bounds(x)
            for condition, each in enumerate(noises):
                noisy = (x + each * scale.unit(each)).to(x.dtype)
                noisy = noisy.clamp(low, high) if clip else noisy
                paired.add(condition, truth.scores(predict(model, put(noisy))))
    scale.finish()
    settings = {"frequencies": centres.tolist(), "width": width, "norm": norm, "clip": clip}
    return RobustnessCurve(
        frequencies=centres,
        **paired.fields(),
        width=width,
        norm=norm,
        clip=clip,
        seed=noise.seed,
        provenance=forward_provenance(
            model,
            num_samples=paired.count,
            seed=noise.seed,
            seconds=time.perf_counter() - start,
            num_forwards=1 + len(centres),
            settings=settings | scale.settings(),
        ),
    )


class _RingNoise:
    """Noise of each ring for one sample after the other, from one stream on the CPU."""

    def __init__(self, centres: np.ndarray, width: float, norm: float, seed: int) -> None:
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._centres, self._width, self._norm = centres, float(width), float(norm)
        self._rings: dict[tuple[int, ...], Tensor] = {}

    def draw(self, x: Tensor) -> "Iterable[Tensor]":
        """Yield noise like `x` in pixel units for each ring, from one draw; at least float32."""
        # A draw a sample: numbers drawn together would depend on how many they are.
        made: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        one = partial(torch.randn, generator=self._generator, **made)
        delta = torch.stack([one(x.shape[1:]) for _ in x])
        dtype = torch.promote_types(x.dtype, torch.float32)
        spectrum = torch.fft.rfft2(delta.to(x.device, dtype))
        size = tuple(x.shape[2:])
        if size not in self._rings:
            masks = [ring(size, float(f), self._width) for f in self._centres]
            self._rings[size] = torch.stack(masks).to(x.device)
        return (self._filtered(spectrum, mask, size) for mask in self._rings[size])

    def _filtered(self, spectrum: Tensor, mask: Tensor, size: tuple[int, ...]) -> Tensor:
        noise: Tensor = torch.fft.irfft2(spectrum * mask, s=size)
        return noise * (self._norm / noise.square().mean((1, 2, 3), keepdim=True).sqrt())


def ring(size: tuple[int, ...], frequency: float, width: float) -> Tensor:
    """Return which coefficients of `torch.fft.rfft2` lie in a ring.

    Rings whose centres are `width` apart do not overlap and leave no gap.

    Args:
        size: Height and width of the images.
        frequency: Centre of the ring in units of π.
        width: Width of the ring in units of π.

    Returns:
        Booleans `(height, width // 2 + 1)`.

    Raises:
        ValueError: If no coefficient does.
    """
    rows, columns = 2 * np.fft.fftfreq(size[0]), 2 * np.fft.rfftfreq(size[1])
    radius = np.round(np.hypot(rows[:, None], columns), 9)  # an edge is met whatever its rounding
    low, high = round(frequency - width / 2, 9), round(frequency + width / 2, 9)
    inside = (radius >= low) & (radius < high)
    if not inside.any():
        raise ValueError(
            f"`frequencies` must be those of rings that {size[0]} × {size[1]} images have a "
            f"frequency in, got none in {low:g}π … {high:g}π; the nearest is "
            f"{radius.flat[np.abs(radius - frequency).argmin()]:.3g}π."
        )
    return torch.from_numpy(inside)
