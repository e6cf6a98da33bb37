"""Curves of a training run."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from landscape._checks import check_choice
from landscape.plot import style, texts

if TYPE_CHECKING:
    from landscape.training import FitResult

Column = Literal["loss", "accuracy"]
COLUMNS = ("loss", "accuracy")
PALE = 0.4
"""Opacity of what was measured on the training data."""


def training_history(
    result: "FitResult | Mapping[str, FitResult]",
    *,
    ax: Axes | None = None,
    label: str | None = None,
    quantity: Column = "loss",
    log: bool = False,
    **line: Any,
) -> Axes:
    """Draw loss or accuracy after every epoch of a training run.

    Validation is a line with a point an epoch; training, whose numbers are means over the epoch on
    transformed batches, a pale line, or the only one where there was no validation.

    Args:
        result: The history of one run, or of several by label.
        ax: Axes to draw on; fresh ones by default.
        label: Name of one run in the legend; its model family decides the colour.
        quantity: `"loss"` or `"accuracy"`.
        log: Logarithmic height.
        **line: Passed to `Axes.plot`.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `FitResult`.
        ValueError: If `quantity` is unknown, `result` is an empty mapping, or a mapping comes with
            a `label`.
    """
    check_choice("quantity", quantity, COLUMNS)
    if isinstance(result, Mapping):
        draw = partial(training_history, quantity=quantity, log=log, **line)
        return style.draw_each(draw, result, ax, label)
    style.check_result(result, "FitResult")
    ax = ax if ax is not None else style.fresh_axes()
    look = {"marker": "o", "ms": 2, **texts.labelled_line(ax, label), **line}
    training, validation = curves(result, quantity)
    if validation is None:
        ax.plot(result.epoch, training, **look)
        texts.add_note(ax, "on training data")
    else:
        (drawn,) = ax.plot(result.epoch, validation, **look)
        pale: dict[str, Any] = {"color": drawn.get_color(), "ls": drawn.get_linestyle()}
        ax.plot(result.epoch, training, lw=0.8, alpha=PALE, **pale)
        texts.add_note(ax, "pale: on training data")
    ax.set(xlabel="Epoch", ylabel=height_label(result, quantity))
    if log and any((np.asarray(each.get_ydata()) > 0).any() for each in ax.lines):
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if label is not None:
        texts.place_legend(ax, **texts.OVER_DATA)
    return ax


def curves(result: "FitResult", quantity: Column) -> tuple[np.ndarray, np.ndarray | None]:
    """Return what was measured on training and on validation data, in the unit of the label."""
    scale = 100 if quantity == "accuracy" else 1
    training = scale * np.asarray(getattr(result, f"train_{quantity}"))
    validation = scale * np.asarray(getattr(result, f"validation_{quantity}"))
    return training, validation if np.isfinite(validation).any() else None


def height_label(result: "FitResult", quantity: Column) -> str:
    """Return the quantity with its unit, where that is known."""
    if quantity == "accuracy":
        return "Accuracy (%)"
    entropy = "entropy" in str(result.provenance.settings.get("loss", "")).lower()
    return "Loss (nats)" if entropy else "Loss"
