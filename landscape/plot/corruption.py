"""Error under corruptions as a table of colours."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from landscape.plot import style
from landscape.plot.robustness import percent

if TYPE_CHECKING:
    from landscape.probes.corruption import CorruptionRobustness

GROUPS = {  # of Hendrycks & Dietterich (2019, Fig. 1)
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}


def corruption_robustness(
    result: "CorruptionRobustness", *, ax: Axes | None = None, **artist: Any
) -> Axes:
    """Draw the error under each corruption and severity as a table of colours, in percent.

    Rows are in the groups of Hendrycks & Dietterich (2019): noise, blur, weather, digital. The
    scale of the colours is 0 … 100 %, the same for all models; the title gives the mean corruption
    error with its standard error, and the clean error.

    Args:
        result: The table.
        ax: Axes to draw on; fresh ones by default.
        **artist: Passed to `Axes.imshow`.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `CorruptionRobustness`.
    """
    style.check_result(result, "CorruptionRobustness")
    ax = ax if ax is not None else style.fresh_axes()
    rows, groups = grouped_rows(result.corruptions)
    values = 100 * np.asarray(result.error)[rows]
    image = ax.imshow(
        np.ma.masked_invalid(values),
        **{"cmap": style.SEQUENTIAL, "vmin": 0, "vmax": 100, "aspect": "auto", **artist},
    )
    for (row, column), value in np.ndenumerate(values):
        known = np.isfinite(value)
        below = image.to_rgba(value) if known else to_rgb(ax.get_facecolor())
        dark = np.dot(below[:3], (0.299, 0.587, 0.114)) < 0.5  # luma (ITU-R BT.601)
        text = f"{value:.0f}" if known else "–"
        place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": style.NOTE_SIZE}
        ax.text(column, row, text, color="w" if dark else "k", gid="cell", **place)
    _draw_groups(ax, groups)
    names = [result.corruptions[row].replace("_", " ") for row in rows]
    ax.set_yticks(range(len(rows)), names)
    ax.set_xticks(range(len(result.severities)), [str(each) for each in result.severities])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="Severity", title=corruption_title(result))
    return ax


def grouped_rows(corruptions: Iterable[str]) -> tuple[list[int], list[str]]:
    """Return the order of the rows, group by group, and the group of each; others come last."""
    groups = [
        next((group for group, names in GROUPS.items() if name in names), "other")
        for name in corruptions
    ]
    order = [*GROUPS, "other"]
    rows = sorted(range(len(groups)), key=lambda row: order.index(groups[row]))
    return rows, [groups[row] for row in rows]


def corruption_title(result: "CorruptionRobustness") -> str:
    """Return mean corruption error with its standard error, and clean error in words."""
    mean = percent(result.mean_corruption_error).removesuffix(" %")
    stderr, clean = percent(result.mean_corruption_error_stderr), percent(result.clean_error)
    return f"Mean corruption error {mean} ± {stderr}, clean {clean}"


def _draw_groups(ax: Axes, groups: list[str]) -> None:
    """Separate the groups by lines and name them on the right."""
    for group in dict.fromkeys(groups):
        first, count = groups.index(group), groups.count(group)
        if first:
            ax.axhline(first - 0.5, color="w", lw=2, gid="separator")
        place: dict[str, Any] = {"rotation": 270, "ha": "left", "va": "center"}
        middle = first + (count - 1) / 2
        ax.text(1.02, middle, group, transform=ax.get_yaxis_transform(), gid="group", **place)
