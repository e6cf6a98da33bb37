"""Error under corruptions: a table of colours, or the means of several models."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from landscape.plot import style, texts
from landscape.plot.robustness import percent

if TYPE_CHECKING:
    from landscape.probes.corruption import CorruptionRobustness

GROUPS = {  # of Hendrycks & Dietterich (2019, Fig. 1)
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
_MARKERS = "os^DvPX*"


def corruption_robustness(
    result: "CorruptionRobustness | Mapping[str, CorruptionRobustness]",
    *,
    ax: Axes | None = None,
    **artist: Any,
) -> Axes:
    """Draw the error under each corruption, in percent: a table of one model, points of several.

    Rows are in the groups of Hendrycks & Dietterich (2019): noise, blur, weather, digital. The
    table has a column a severity; the scale of its colours is 0 … 100 %, the same for all models,
    and the title gives the mean corruption error with its standard error, and the clean error.
    Of several models each row holds the means over the severities, with bars of two standard errors
    each side, below the clean error; the legend gives the mean corruption errors. Values that are
    not finite are gaps.

    Args:
        result: One table, or several of the same corruptions by label; model families decide the
            colours.
        ax: Axes to draw on; fresh ones by default.
        **artist: Passed to `Axes.imshow`, of several models to `Axes.errorbar`.

    Returns:
        The axes.

    Raises:
        TypeError: If a result is no `CorruptionRobustness`.
        ValueError: If `result` is empty, or mixes corruptions, severities or profiles.
    """
    named = style.named(result, "CorruptionRobustness")
    ax = ax if ax is not None else style.fresh_axes()
    if isinstance(result, Mapping):
        _draw_means(named, ax, artist)
    else:
        _draw_table(named[""], ax, artist)
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
    return f"Mean corruption error {_mean_in_words(result)}, clean {percent(result.clean_error)}"


def _mean_errors(
    result: "CorruptionRobustness",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the clean error and the means over severities, and their standard errors.

    Both are `(1 + corruptions,)`; standard errors are NaN in results saved before they were known.
    """
    means = np.asarray(result.error).mean(1)
    covariance = result.error_covariance
    known = np.full(len(means), np.nan) if covariance is None else np.diag(covariance)[1:] ** 0.5
    return (
        np.array([result.clean_error, *means]),
        np.array([result.clean_error_stderr, *known]),
    )


def _mean_label(severities: Sequence[int]) -> str:
    """Return the label of an axis of mean errors."""
    if len(severities) == 1:
        return f"Error at severity {severities[0]} (%)"
    first, last = severities[0], severities[-1]
    dense = list(severities) == list(range(first, last + 1))
    said = f"{first}–{last}" if dense else ", ".join(map(str, severities))
    return f"Error, mean over severities {said} (%)"


def _draw_table(result: "CorruptionRobustness", ax: Axes, artist: dict[str, Any]) -> None:
    """Draw the error at each severity as colours and numbers."""
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
    ax.set_yticks(range(len(rows)), row_names(result, rows))
    ax.set_xticks(range(len(result.severities)), [str(each) for each in result.severities])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="Severity", title=corruption_title(result))


def _draw_means(
    named: "Mapping[str, CorruptionRobustness]", ax: Axes, artist: dict[str, Any]
) -> None:
    """Draw the means over severities of several models side by side in each row."""
    first = next(iter(named.values()))
    for name, one in named.items():
        for what in ("corruptions", "severities", "profile"):
            if getattr(one, what) != getattr(first, what):
                raise ValueError(
                    f"`result` must share its {what}, got {getattr(one, what)!r} of {name!r} and "
                    f"{getattr(first, what)!r}; draw them separately."
                )
    rows, groups = grouped_rows(first.corruptions)
    labels = texts.wrapped_entries({n: f"mean {_mean_in_words(one)}" for n, one in named.items()})
    looks = style.line_styles(named)
    offsets = (np.arange(len(named)) - (len(named) - 1) / 2) * (0.6 / len(named))
    for number, (name, one) in enumerate(named.items()):
        order = np.array([0, *(1 + row for row in rows)])
        mean, stderr = (100 * each[order] for each in _mean_errors(one))
        look = {"color": looks[name]["color"], "label": labels[name], "elinewidth": 0.7}
        look |= {"linestyle": "none", "marker": _MARKERS[number % len(_MARKERS)], **artist}
        ax.errorbar(mean, np.arange(len(order)) + offsets[number], xerr=2 * stderr, **look)
    for group in dict.fromkeys(groups):
        ax.axhline(groups.index(group) + 0.5, color=style.MUTED, lw=0.4, gid="separator")
    ax.set_yticks(range(1 + len(rows)), ["clean", *row_names(first, rows)])
    ax.set_ylim(len(rows) + 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(-100 * style.EDGE, 100 * (1 + style.EDGE))
    ax.set_xlabel(_mean_label(first.severities))
    texts.place_legend(ax, **texts.OVER_DATA)


def row_names(result: "CorruptionRobustness", rows: Sequence[int]) -> list[str]:
    """Return the names of corruptions in the order of the rows."""
    return [result.corruptions[row].replace("_", " ") for row in rows]


def _mean_in_words(result: "CorruptionRobustness") -> str:
    return percent(result.mean_corruption_error, result.mean_corruption_error_stderr)


def _draw_groups(ax: Axes, groups: list[str]) -> None:
    """Separate the groups by lines and name them on the right."""
    for group in dict.fromkeys(groups):
        first, count = groups.index(group), groups.count(group)
        if first:
            ax.axhline(first - 0.5, color="w", lw=2, gid="separator")
        place: dict[str, Any] = {"rotation": 270, "ha": "left", "va": "center"}
        middle = first + (count - 1) / 2
        ax.text(1.02, middle, group, transform=ax.get_yaxis_transform(), gid="group", **place)
