"""Values, scales and colour bars that several drawings of a loss share."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import FigureBase
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

from landscape._checks import check_choice
from landscape.plot import style, texts

if TYPE_CHECKING:
    from landscape.probes.surface import LossLine, LossSurface

Quantity = Literal["loss", "nll", "l2", "accuracy", "ece"]
LABELS: dict[str, str] = {
    "loss": "Loss: NLL + L2 (nats)",
    "nll": "NLL (nats)",
    "l2": "L2 term (nats)",
    "accuracy": "Accuracy (fraction)",
    "ece": "ECE (fraction)",
}


def shared_limits(
    results: Iterable["LossSurface | LossLine"], quantity: Quantity = "loss"
) -> tuple[float, float]:
    """Return the smallest and the largest finite value over `results`, for `vmin` and `vmax`.

    Args:
        results: Surfaces or lines to draw on one scale.
        quantity: What will be drawn.

    Returns:
        The two limits; 0 and 1 where no value is finite.
    """
    values = np.concatenate([finite_values(result, quantity).compressed() for result in results])
    return (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)


def finite_values(
    result: "LossSurface | LossLine", quantity: Quantity, *, log: bool = False
) -> np.ma.MaskedArray:
    """Return the values of a quantity with what is not finite masked.

    Args:
        result: The surface or line.
        quantity: What to read.
        log: Whether it will be drawn on a logarithmic scale.

    Raises:
        ValueError: If `quantity` was not evaluated, or `log` meets values that are not positive.
    """
    evaluated = [name for name in LABELS if getattr(result, name) is not None]
    check_choice("quantity", quantity, evaluated)
    values = np.ma.masked_invalid(getattr(result, quantity))
    if log and values.count() and values.min() <= 0:
        raise ValueError(
            f"`log` must be False for values that are not positive, got a smallest {quantity} "
            f"of {values.min():g}."
        )
    return values


def color_bar(figure: FigureBase, norm: Normalize, label: str, **place: Any) -> None:
    """Add a colour bar with plainly written ticks, logarithmic where `norm` is.

    Args:
        figure: The figure of the axes.
        norm: Scale of the colours.
        label: Quantity and unit.
        **place: Passed to `Figure.colorbar`; `cmap` names the colour map.
    """
    bar = figure.colorbar(ScalarMappable(norm, place.pop("cmap", style.SEQUENTIAL)), **place)
    bar.set_label(label)
    if isinstance(norm, LogNorm):
        bar.set_label(log_label(label))
    ticks = nice_ticks(norm)
    bar.set_ticks(ticks, labels=tick_texts(ticks))
    bar.minorticks_off()


def make_norm(low: float, high: float, *, log: bool | None = None) -> Normalize:
    """Return the scale from `low` to `high`, a little more where they are equal.

    Args:
        low: Lower end.
        high: Upper end.
        log: Whether it is logarithmic; by default where `high` is over ten times a positive
            `low`, a heuristic.

    Raises:
        ValueError: If `low` is above `high`, or not positive on a logarithmic scale.
    """
    if low > high:
        raise ValueError(f"`vmin` must be at most `vmax`, got {low:g} and {high:g}.")
    if log and low <= 0:
        raise ValueError(f"`vmin` must be positive on a logarithmic scale, got {low:g}.")
    if low == high:  # a constant surface
        low, high = low - 0.01 * abs(low or 1.0), high + 0.01 * abs(high or 1.0)
    log = 0 < 10 * low < high if log is None else log
    return LogNorm(low, high) if log else Normalize(low, high)


def nice_ticks(norm: Normalize) -> list[float]:
    """Return ticks within `norm`; on a logarithmic scale 1, 2, 5 times powers of ten, or 3.

    Args:
        norm: The scale.

    Returns:
        At least two ticks, in ascending order.
    """
    low, high = norm_ends(norm)
    locator: Locator = MaxNLocator(4)
    if isinstance(norm, LogNorm):
        if high >= 300 * low:  # over many decades a few powers of ten alone
            first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
            step = math.ceil((last - first + 1) / _MOST_POWERS)
            return [10.0**power for power in range(first, last + 1, step)]
        locator = LogLocator(subs=(1, 2, 3, 5) if high < 20 * low else (1, 2, 5))
    ticks = [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]
    return ticks if len(ticks) > 1 else [low, high]


def tick_texts(ticks: Sequence[float], power: str = "$10^{{{}}}$") -> list[str]:
    """Return ticks in words, as powers where some have many digits and all are powers of ten.

    Others have the digits, six at most where these will do, that tell each from the next.

    Args:
        ticks: Values, in ascending order.
        power: How 10 to the power of `{}` is written.
    """
    exact, digits = 0.01 * np.diff(ticks).min(), 6
    plain = [f"{tick:g}" for tick in ticks]
    while digits < 17 and np.abs(np.subtract([*map(float, plain)], ticks)).max() > exact:
        digits += 1
        plain = [f"{tick:.{digits}g}" for tick in ticks]
    if min(ticks) <= 0 or max(map(len, plain)) <= _LONGEST:
        return plain
    powers = [round(math.log10(tick)) for tick in ticks]
    if not all(math.isclose(tick, 10.0**p) for tick, p in zip(ticks, powers, strict=True)):
        return plain
    return [power.format(p) for p in powers]


_MOST_POWERS = 5  # on a scale, and ...
_LONGEST = 5  # ... characters of a tick that is written plainly, as the widths of figures allow


class SignedDecades(Locator):
    """Ticks of a `symlog` axis: 0 and powers of ten of both signs, as many as their labels fit."""

    def __call__(self) -> list[float]:
        """Return the ticks in what the axis shows."""
        return self.tick_values(*cast(Axis, self.axis).get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """Return the ticks between two values, evenly spaced from 0 outwards.

        Args:
            vmin: Lower end.
            vmax: Upper end.
        """
        axis: Any = self.axis
        scale = axis.get_transform()
        smallest = scale.linthresh
        low, high = scale.transform([vmin, vmax])
        first, second = scale.transform([smallest, 10 * smallest])
        # `Axis.get_tick_space` would ask the settings at drawing for the size, not the labels
        label = 3.4 * axis.get_major_ticks(1)[0].label1.get_size()  # points of "-10^-8" and a gap
        closest = (high - low) * label / texts.size_of(axis.axes)[0]
        top = int(np.log10(max(-vmin, vmax) / smallest) + 1e-9)
        decade = second - first
        step = max(np.ceil(closest / decade), np.ceil((0.65 * closest - first) / decade) + 1)
        step = int(np.clip(step, 1, max(top, 1)))  # the label of 0 is short
        powers = 10.0 ** (round(np.log10(smallest)) + np.arange(step - 1, top + 1, step))
        ticks = [*-powers[::-1], 0.0, *powers]
        return [float(tick) for tick in ticks if vmin <= tick <= vmax]


def norm_ends(norm: Normalize) -> tuple[float, float]:
    """Return the lower and the upper end of a scale that has both."""
    return cast(float, norm.vmin), cast(float, norm.vmax)


def log_label(label: str) -> str:
    """Return `label` with a word on its logarithmic scale beside the unit."""
    return label.replace(")", ", log scale)")
