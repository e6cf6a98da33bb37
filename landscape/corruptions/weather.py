"""Weather: snow, frost, fog and brightness. Kernels as in `noise.py`.

Frost is matched in kind only: the original blends in crops of six photographs of frost, which are
not ours to ship, so its textures are procedural here (`frost.py`). Everything else follows the
original.
"""

import torch
from torch import Tensor

from landscape.corruptions.blur import blur_along
from landscape.corruptions.frost import frost_texture
from landscape.corruptions.linear import separable, zoom_matrix, zoom_source
from landscape.corruptions.streams import Streams

_LUMINANCE = (0.299, 0.587, 0.114)


def snow(
    x: Tensor,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: int,
    sigma: float,
    share: float,
    streams: Streams,
    *,
    cifar: bool = False,
) -> Tensor:
    """Whiten, and add blurred flakes and the same flakes turned by 180°.

    Flakes are magnified normal noise, 0 below a threshold, blurred along a line at an angle that is
    uniform on (−135°, −45°), and rounded to bytes. For CIFAR-C they are magnified about the centre
    of the image, and cut to bytes before the blur as well.
    """
    h, w = x.shape[2:]
    drawn = (zoom_source(size, zoom)[1] for size in (h, w))  # no more than what is magnified
    flakes = streams.normal(1, *drawn).mul_(deviation).add_(mean)
    flakes = separable(flakes, *(zoom_matrix(size, zoom, cifar) for size in (h, w)))
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp_(0, 1).mul_(255)
    if cifar:
        flakes.floor_()
    angle = streams.uniform().mul_(90).sub_(135)
    flakes = blur_along(flakes, radius, sigma, angle, leave=not cifar)
    flakes = flakes.round_()[:, :, :h, :w]
    white = torch.maximum(x, luminance(x) * 1.5 + 127.5)
    return torch.lerp(white, x, share) + flakes + flakes.flip(2, 3)


def luminance(x: Tensor) -> Tensor:
    """Return 0.299 red + 0.587 green + 0.114 blue, `(n, 1, h, w)`; grey images as they are."""
    if x.shape[1] == 1:
        return x
    weight = torch.tensor(_LUMINANCE, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    return (x * weight).sum(1, keepdim=True)


def frost(x: Tensor, image: float, ice: float, streams: Streams, *, cifar: bool = False) -> Tensor:
    """Add a texture of frost, for CIFAR-C at a fifth of its size; grey images its luminance."""
    texture = frost_texture(x.shape[2], x.shape[3], streams, small=cifar)
    if x.shape[1] == 1:
        texture = luminance(texture)
    return image * x + ice * texture


def fog(x: Tensor, strength: float, decay: float, streams: Streams) -> Tensor:
    """Add a plasma fractal, and scale so that the brightest value stays as bright as it was."""
    h, w = x.shape[2:]
    size = 1 << (max(h, w) - 1).bit_length()
    brightest = x.amax((1, 2, 3), keepdim=True)
    layer = plasma(size, decay, streams)[:, None, :h, :w] * (255 * strength)
    return (x + layer) * (brightest / (brightest + 255 * strength))


def plasma(size: int, decay: float, streams: Streams) -> Tensor:
    """Return height maps by the diamond-square algorithm on a torus, each from 0 to 1.

    From step `size` down to 2: the middle of every square gets the mean of its four corners plus
    r · u, u uniform on (−r, r), then so do the middles of its sides from their four neighbours; the
    step is halved, and r, at first 100, is divided by `decay`.

    Args:
        size: Side, a power of two.
        decay: Divisor of the roughness r from scale to scale.
        streams: Streams of the samples.

    Returns:
        Tensor `(n, size, size)`.
    """
    heights = torch.zeros(len(streams), size, size, dtype=torch.float32, device=streams.device)
    step, rough = size, 100.0

    def middle(total: Tensor) -> Tensor:
        drawn = streams.uniform(*total.shape[1:]).mul_(2).sub_(1)
        return (total / 4).add_(drawn, alpha=rough**2)

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        heights[:, half::step, half::step] = middle(pairs + pairs.roll(-1, 2))
        centres = heights[:, half::step, half::step]
        across = (centres + centres.roll(1, 1)) + (corners + corners.roll(-1, 2))
        heights[:, ::step, half::step] = middle(across)
        down = (centres + centres.roll(1, 2)) + (corners + corners.roll(-1, 1))
        heights[:, half::step, ::step] = middle(down)
        step, rough = half, rough / decay
    heights -= heights.amin((1, 2), keepdim=True)
    return heights / heights.amax((1, 2), keepdim=True)


def brightness(x: Tensor, added: float, streams: Streams) -> Tensor:
    """Add to the value of HSV, the largest channel; hue and saturation stay.

    All channels are multiplied by what multiplies the largest; black becomes grey.
    """
    value = x.amax(1, keepdim=True)
    brighter = (value + 255 * added).clamp(max=255)
    return torch.where(value > 0, x * (brighter / value.clamp(min=1)), brighter)
