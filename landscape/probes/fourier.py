"""Feature maps in Fourier space: which frequencies a block amplifies or removes.

The two-dimensional transform F of a map of h × w positions has the frequencies 2πk/h down and
2πl/w across, up to π, where neighbours alternate. With m = min(h, w) a curve has m//2 + 1 points,

    frequency_j = 2j/m in units of π,    j = 0 … m//2,

from the mean of the map (0) to its finest pattern: exactly π where m is even, π(m − 1)/m where it
is odd. At each point, two choices:

- the diagonal: F at k = j·h/m, l = j·w/m, half of the diagonal of a shifted transform from its
  centre to the corner that holds the highest frequency. Where h ≠ w, the bins nearest to those
  two, the lower of two equally near.
- the radial mean: over all k, l whose radius √((2k/h)² + (2l/w)²) is nearest to frequency_j; at
  frequency 0 the mean of the map alone, while the first ring has all others up to its outer edge
  (those of long maps may lie nearer to 0). Radii beyond the last ring, up to √2 π in the corners,
  belong to none.

Beware of the ends: there F is real, and the mean log amplitude of noise is ½ log 2 ≈ 0.35 lower
than that of complex F of the same power. The curve of white noise is 0.35 between the ends, and 0
at π. Differences between blocks whose maps have even sides are free of that.

The authors' notebook takes the other half of the diagonal, whose last point on maps of even side m
is (m − 2)/m of π, and labels it π. Their numbers for m = 14 are at our 6/7 of π.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from landscape._checks import check_choice
from landscape.blocks import Blocks
from landscape.probes.feature_maps import BlockTable, average_maps, table_fields
from landscape.results import Provenance
from landscape.switches import rounding

_OFFSET = 1e-6  # of the authors' notebook; keeps the logarithm of a zero finite

Window = Literal["hann"]


@dataclass(frozen=True)
class FourierAmplitude(BlockTable):
    """Relative log amplitude of the feature maps of `b` blocks; a curve has `l` points of its own.

    Attributes:
        names: Name of each block.
        kinds: Kind of each.
        depth: `(b,)`: relative depth, from 0 (first) to 1 (last).
        subsamples: `(b,)`: whether the map is smaller than the one before.
        stage: `(b,)`: number of the stage.
        frequency: `b` arrays `(l,)`: frequencies in units of π, 0 … 1.
        delta_log_amplitude: `b` arrays `(l,)`: mean log amplitude minus that at frequency 0,
            natural logarithm.
        stderr: `b` arrays `(l,)`: its standard error over samples; 0 at frequency 0.
        sizes: `(b, 2)`: height and width of the maps.
        window: Window on the maps, or `None`.
        radial: Whether amplitudes are means over rings instead of those on the diagonal.
        provenance: Where the result came from.
    """

    _plot: ClassVar[str | None] = "fourier_amplitude"

    frequency: tuple[np.ndarray, ...]
    delta_log_amplitude: tuple[np.ndarray, ...]
    stderr: tuple[np.ndarray, ...]
    sizes: np.ndarray
    window: Window | None
    radial: bool
    provenance: Provenance

    @property
    def highest(self) -> np.ndarray:
        """`(b,)`: value at the highest frequency (Fig. 8), NaN for maps of one column or row."""
        return self._last(self.delta_log_amplitude)

    @property
    def highest_stderr(self) -> np.ndarray:
        """`(b,)`: standard error of `highest`."""
        return self._last(self.stderr)

    def _last(self, curves: tuple[np.ndarray, ...]) -> np.ndarray:
        return np.array([curve[-1] if len(curve) > 1 else np.nan for curve in curves])


def fourier_amplitude(
    model: nn.Module,
    data: Iterable[Any],
    *,
    blocks: Blocks | None = None,
    window: Window | None = None,
    radial: bool = False,
    progress: bool = False,
) -> FourierAmplitude:
    """Relative log amplitude of the feature map of every block (Park & Kim 2022, Fig. 2a, 8, D.2).

    For the map x (n, c, h, w) of a block and its two-dimensional transform F,

        A(f) = (1 / nc) Σ_nc log(|F_nc(f)| + 10⁻⁶),    Δ log amplitude(f) = A(f) − A(0),

    with the frequencies f of the top of this module, over all samples. Low-pass filters lower the
    curve at high frequencies. The standard error is over samples, of the means over channels.

    Cost: one forward pass over the data, in evaluation mode, and one real transform of every map
    in float32 (float64 for such a model); one map is held at a time.

    Args:
        model: Any vision model; it is left as found.
        data: Re-iterable of batches, each `(x, y)` or a mapping.
        blocks: Blocks of the model; found with the first batch by default. Those without a map
            (the head) are left out.
        window: `"hann"` multiplies the maps with a periodic Hann window in both directions, so
            that the jump between opposite edges does not leak into high frequencies; it spreads
            the mean of the map over the lowest two. The paper uses none.
        radial: Mean log amplitude over rings of frequencies instead of the diagonal.
        progress: Show a progress bar.

    Returns:
        A curve for each block.

    Raises:
        TypeError: If `data` cannot be iterated over twice, or `blocks` is no `Blocks`.
        ValueError: If `window` is unknown, `data` is empty or holds images of different sizes, no
            block has a map, or `blocks` are those of another model.
    """
    check_choice("window", window, (None, "hann"))
    means = average_maps(
        model,
        data,
        functools.partial(_curves, window=window, radial=radial),
        blocks=blocks,
        description="Fourier amplitude",
        progress=progress,
        settings={"window": window, "radial": radial},
    )
    sides = [min(size) for size in means.sizes]
    return FourierAmplitude(
        **table_fields(means.blocks),
        frequency=tuple(2 * np.arange(m // 2 + 1) / m for m in sides),
        delta_log_amplitude=means.means,
        stderr=means.stderrs,
        sizes=np.array(means.sizes),
        window=window,
        radial=radial,
        provenance=means.provenance,
    )


def _curves(maps: Tensor, window: Window | None, radial: bool) -> Tensor:
    """Return Δ log amplitude, mean over channels, of each sample `(n, l)`, in float64."""
    height, width = maps.shape[-2:]
    if window is not None:
        down, across = (_hann(side, maps) for side in (height, width))
        maps = maps * down[:, None] * across
    if radial:
        spectrum = torch.fft.rfft2(maps)  # of a real map: the other half mirrors this one
        logs = _log(spectrum.abs()).mean(1).double()
        curves = logs.flatten(1) @ _rings(height, width).to(logs.device)
    else:
        with rounding("full"):  # TF32 has too few digits beside the mean of a map
            parts = maps.flatten(2) @ _waves(height, width, maps.dtype, maps.device)
        curves = _log(torch.hypot(*parts.chunk(2, dim=2))).double().mean(1)
    return curves - curves[:, :1]


def _log(amplitudes: Tensor) -> Tensor:
    return amplitudes.add_(_OFFSET).log_()


def _hann(side: int, like: Tensor) -> Tensor:
    return torch.hann_window(side, dtype=like.dtype, device=like.device)


@functools.cache
def _diagonal(height: int, width: int) -> tuple[list[int], list[int]]:
    """Return rows and columns of the transform next to half of its diagonal."""
    m = min(height, width)
    rows, columns = (
        [(2 * j * side + m - 1) // (2 * m) for j in range(m // 2 + 1)]  # ⌈j·side/m − 1/2⌉
        for side in (height, width)
    )
    return rows, columns


@functools.lru_cache(maxsize=8)  # of one network; up to 50 MB for maps of 224 × 224
def _waves(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return cosines and sines of the frequencies of `_diagonal`, `(h · w, 2l)`.

    On a CPU the product with them takes a quarter to three quarters of the time of all frequencies,
    and has a half of their rounding errors or less.
    """
    rows, columns = map(np.array, _diagonal(height, width))
    down = np.arange(height)[:, None] * rows % height / height
    across = np.arange(width)[:, None] * columns % width / width
    angles = 2 * np.pi * (down[:, None] + across).reshape(height * width, -1)
    waves = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
    return waves.to(device, dtype)


@functools.cache
def _rings(height: int, width: int) -> Tensor:
    """Return weights `(h · (w//2 + 1), l)` of the frequencies of `rfft2` in the mean of each ring.

    A column stands for its mirror image too, but for those of frequency 0 and π.
    """
    m = min(height, width)
    made: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    down = 2 * torch.fft.fftfreq(height, **made)
    across = 2 * torch.fft.rfftfreq(width, **made)
    radius = (down[:, None].square() + across.square()).sqrt()
    ring = (radius * m / 2 - 1e-9).round().clamp_min(1)  # the lower of two equally near
    ring[0, 0] = 0
    count = torch.full((width // 2 + 1,), 2.0, **made)
    count[0] = 1
    if width % 2 == 0:
        count[-1] = 1
    of_ring = ring.reshape(-1, 1) == torch.arange(m // 2 + 1, **made)
    members = of_ring * count.repeat(height)[:, None]
    weights: Tensor = members / members.sum(0)
    return weights
