"""Images in pixel units, 0 to 1 over full scale, whatever normalisation a model wants."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from landscape._checks import as_numbers
from landscape.batches import Inputs
from landscape.probes.scores import LargestSoFar

Channels = float | Sequence[float] | Tensor
_SLACK = 0.01  # for inputs rounded to 16 bits


class PixelScale:
    """The normalisation x = (pixel − mean) / std of images `(n, c, h, w)`.

    Attributes:
        mean: `(c,)` or `(1,)`: mean of each channel, in pixel units, float64.
        std: `(c,)` or `(1,)`: standard deviation of each channel, in pixel units, float64.
    """

    def __init__(self, data: Any, mean: Channels | None, std: Channels | None) -> None:
        """Take `mean` and `std`, by default those that `data` have as attributes, else 0 and 1.

        Args:
            data: The data.
            mean: Mean of each channel, or of all.
            std: Standard deviation of each channel, or of all.

        Raises:
            ValueError: If only one is given, or `std` is not positive.
        """
        if (mean is None) != (std is None):
            raise ValueError("`mean` and `std` must be given both or neither, got one of them.")
        if mean is None or std is None:
            found = [getattr(data, name, None) for name in ("mean", "std")]
            known = all(value is not None and not callable(value) for value in found)
            mean, std = found if known else (0.0, 1.0)
        wanted = "a number or one number per channel"
        self.mean = torch.from_numpy(as_numbers("mean", mean, wanted).reshape(-1))
        self.std = torch.from_numpy(as_numbers("std", std, wanted).reshape(-1))
        if not (self.std > 0).all() or not torch.cat([self.mean, self.std]).isfinite().all():
            raise ValueError(
                "`mean` and `std` must be finite and `std` positive, got "
                f"{self.mean.tolist()} and {self.std.tolist()}."
            )
        self._largest = LargestSoFar(self._check)

    def settings(self) -> dict[str, Any]:
        """Return mean and standard deviation for `Provenance`."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    def unit(self, x: Tensor) -> Tensor:
        """Return `(c, 1, 1)` of the type of `x`: the length of full scale in its channels."""
        return (1 / self.std).to(x)[:, None, None]

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest allowed values of inputs near `x`, as large as `x`.

        They are those of pixels 0 and 1, or `x` itself where rounding put it outside.
        """
        low, high = (-self.mean / self.std).to(x), ((1 - self.mean) / self.std).to(x)
        return torch.minimum(x, low[:, None, None]), torch.maximum(x, high[:, None, None])

    def check(self, x: Tensor) -> None:
        """Refuse images that are not in pixel units; `finish` at last.

        Args:
            x: Normalised images.

        Raises:
            ValueError: If their channels are not those of `mean` and `std`.
        """
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in {1, x.shape[1]}:
                raise ValueError(
                    f"`{name}` must have one value per channel ({x.shape[1]}), got {len(values)}."
                )
        mean, std = self.mean.to(x.device), self.std.to(x.device)
        low, high = (x.amin((0, 2, 3)).double(), x.amax((0, 2, 3)).double())
        ends = [-(low * std + mean).amin(), (high * std + mean).amax()]
        self._largest.add(torch.stack(ends))

    def finish(self) -> None:
        """Refuse the data if a pixel was outside 0 … 1."""
        self._largest.finish()

    def _check(self, largest: Sequence[float]) -> None:
        low, high = -largest[0], largest[1]
        if not (low >= -_SLACK and high <= 1 + _SLACK):
            raise ValueError(
                f"`data` must have pixels in 0 … 1 after x · std + mean, got {low:.3g} to "
                f"{high:.3g}; pass the `mean` and `std` that x was normalised with."
            )


def split_image(inputs: Inputs) -> tuple[Tensor, Callable[[Tensor], Inputs]]:
    """Return the images among the inputs, and what puts other images in their place.

    Args:
        inputs: A tensor, or a mapping with `pixel_values` or one floating-point tensor of four
            dimensions.

    Returns:
        Images `(n, c, h, w)`, and a function of images that returns inputs.

    Raises:
        ValueError: If there are no such images.
    """
    found = {"": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    found = {k: v for k, v in found.items() if isinstance(v, Tensor) and v.dim() == 4}
    images = {k: v for k, v in found.items() if v.is_floating_point()}
    key = "pixel_values" if "pixel_values" in images else next(iter(images), None)
    if key is None or (len(images) > 1 and key != "pixel_values"):
        raise ValueError(
            "`data` must yield floating-point images of shape (n, c, h, w), or a mapping with "
            f"`pixel_values`, got {_shapes(inputs)}."
        )
    if isinstance(inputs, Mapping):
        return images[key], lambda image: {**inputs, key: image}
    return images[key], lambda image: image


def _shapes(inputs: Inputs) -> str:
    named = inputs if isinstance(inputs, Mapping) else {"x": inputs}
    return ", ".join(
        f"{k}: {v.dtype} {tuple(v.shape)}" for k, v in named.items() if isinstance(v, Tensor)
    )
