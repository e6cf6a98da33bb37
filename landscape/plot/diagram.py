"""A model as a diagram of its blocks, drawn from the model itself (Park & Kim, 2022, Fig. 11)."""

import functools
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch, Rectangle
from matplotlib.textpath import TextPath

from landscape.plot import style, texts
from landscape.plot.style import KIND_ALPHA, KIND_COLORS, KIND_NAMES

if TYPE_CHECKING:
    from landscape.probes.architecture import Architecture

_LINE = 8.5  # points from one box to the next, for text of 6 points
_GAP = 0.4  # boxes between two stages
_STRIP = 10.0  # points: width of the strip with the number of the stage
_PAD = 3.0  # points beside text
_LONGEST = 34  # blocks in one column of a figure of our own


@dataclass(frozen=True)
class _Place:
    """Where a block is: its column, and the top of its box in boxes from the top."""

    column: int
    top: float


def block_diagram(
    result: "Architecture",
    *,
    ax: Axes | None = None,
    columns: int | None = None,
    legend: bool = True,
    **box: Any,
) -> Axes:
    """Draw a box for each block, from the input at the top left down, stage by stage.

    A box says the name of the block and its output, channels × rows × columns, behind an arrow
    where the map gets smaller; its colour says the kind. Names too long for it lose their start.

    Args:
        result: The blocks.
        ax: Axes to draw on; by default fresh ones, a column wide and as high as the text needs.
        columns: Columns of boxes; by default as many as the height of the axes asks for.
        legend: Whether to name the colours above the axes.
        **box: Passed to the `Rectangle` of every box.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `Architecture`.
        ValueError: If `columns` is below 1.
    """
    style.check_result(result, "Architecture")
    if columns is not None and columns < 1:
        raise ValueError(f"`columns` must be at least 1, got {columns}.")
    if ax is None:
        columns = columns or math.ceil(len(result.names) / _LONGEST)
        height = diagram_rows(result, columns) * _LINE + 17
        ax = plt.subplots(figsize=(style.COLUMN_WIDTH, height / 72))[1]
        ax.set_position((0.005, 1 / height, 0.99, 1 - 17 / height))
    width, height = texts.size_of(ax)
    if columns is None:
        columns = 1
        while diagram_rows(result, columns) * _LINE > height and columns < len(result.names):
            columns += 1
    places = _places(result, columns)
    points = width / columns  # one column in points; it is 1 wide in data
    kinds = [kind if kind in KIND_COLORS else "other" for kind in result.kinds]
    for i, place in enumerate(places):
        left = place.column + _STRIP / points
        color = KIND_COLORS[kinds[i]]
        pad, size = _PAD / points, output_text(result, i)
        room = place.column + 1 - pad - left
        look: dict[str, Any] = {"facecolor": to_rgba(color, KIND_ALPHA), "edgecolor": color}
        look |= {"lw": 0.5, "gid": result.names[i], **box}
        ax.add_patch(Rectangle((left, place.top + 0.07), room, 0.86, **look))
        middle = place.top + 0.5
        name = _fitting(result.names[i], room * points - 3 * _PAD - _width(size))
        text: dict[str, Any] = {"va": "center_baseline", "size": style.NOTE_SIZE, "clip_on": True}
        ax.text(left + pad, middle, name, ha="left", gid="name", **text)
        ax.text(left + room - pad, middle, size, ha="right", gid="output", **text)
    _draw_stages(ax, result, places, points)
    ax.set(xlim=(0, columns), ylim=(max(p.top for p in places) + 1, 0))
    ax.set_axis_off()
    if legend:
        place_legend: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
        ax.legend(handles=kind_handles(kinds), ncols=5, **place_legend, **_LEGEND)
    return ax


def figure11(results: "Mapping[str, Architecture]") -> Figure:
    """Draw the blocks of several models side by side in the style of a paper.

    Args:
        results: Blocks of each model by its name.

    Returns:
        The figure, 5.5 in wide (3.25 in for one model), as high as the deepest model needs.

    Raises:
        ValueError: If `results` is empty.
    """
    results = style.named(results, argument="results")
    with mpl.rc_context(style.rc()):
        rows = max(diagram_rows(result, 1) for result in results.values())
        width = style.COLUMN_WIDTH if len(results) == 1 else style.TEXT_WIDTH
        titles = [texts.wrapped_title(name, len(results)) for name in results]
        top = 30 + 10 * max(title.count("\n") for title in titles)
        height = rows * _LINE + top + 2
        figure = Figure(figsize=(width, height / 72))
        axes = figure.subplots(1, len(results), squeeze=False)[0]
        figure.subplots_adjust(
            left=0.005, right=0.995, bottom=2 / height, top=1 - top / height, wspace=0.04
        )
        for ax, title, result in zip(axes, titles, results.values(), strict=True):
            block_diagram(result, ax=ax, columns=1, legend=False)
            ax.set_ylim(rows, 0)
            ax.set_title(title)
        kinds = [kind for result in results.values() for kind in result.kinds]
        figure.legend(handles=kind_handles(kinds), loc="upper center", ncols=5, **_LEGEND)
    return figure


def diagram_rows(result: "Architecture", columns: int) -> float:
    """Return the height of the diagram in boxes, gaps included."""
    return max(place.top for place in _places(result, columns)) + 1


def kind_handles(kinds: "list[str]") -> list[Patch]:
    """Return an entry of a legend for each kind that is there, in a fixed order."""
    present = {kind if kind in KIND_COLORS else "other" for kind in kinds}
    return [
        Patch(facecolor=to_rgba(color, KIND_ALPHA), edgecolor=color, lw=0.5, label=KIND_NAMES[kind])
        for kind, color in KIND_COLORS.items()
        if kind in present
    ]


def output_text(result: "Architecture", index: int) -> str:
    """Return channels, rows and columns of a block's output, with an arrow where it shrinks."""
    sides = [int(result.channels[index]), *(int(side) for side in result.grid[index] if side)]
    return ("↓ " if result.subsamples[index] else "") + " × ".join(map(str, sides))


_LEGEND: dict[str, Any] = {"fontsize": style.NOTE_SIZE, "frameon": False, "handlelength": 1.2}
_LEGEND |= {"handletextpad": 0.5, "columnspacing": 1.0, "borderaxespad": 0.3}


def _places(result: "Architecture", columns: int) -> list[_Place]:
    """Return the place of each block, the blocks dealt out to the columns in equal numbers."""
    each = math.ceil(len(result.names) / columns)
    places: list[_Place] = []
    for i in range(len(result.names)):
        if i % each == 0:
            places.append(_Place(i // each, 0.0))
        else:
            gap = _GAP if _group(result, i) != _group(result, i - 1) else 0.0
            places.append(_Place(i // each, places[-1].top + 1 + gap))
    return places


def _group(result: "Architecture", index: int) -> int:
    """Return the stage of a block, -1 for the head, which belongs to none."""
    return -1 if result.kinds[index] == "head" else int(result.stage[index])


def _draw_stages(ax: Axes, result: "Architecture", places: list[_Place], points: float) -> None:
    """Draw the strip with the number of the stage beside its blocks in each column."""
    groups: dict[tuple[int, int], list[float]] = {}
    for i, place in enumerate(places):
        if _group(result, i) >= 0:
            groups.setdefault((place.column, _group(result, i)), []).append(place.top)
    for (column, stage), tops in groups.items():
        low, high = min(tops) + 0.07, max(tops) + 0.93
        width = (_STRIP - 1.5) / points
        ax.add_patch(Rectangle((column, low), width, high - low, fc="0.92", ec="none", gid="stage"))
        upright = len(tops) < 3  # no room for the word
        label = f"{stage + 1}" if upright else f"Stage {stage + 1}"
        middle: dict[str, Any] = {"ha": "center", "va": "center", "color": style.MUTED}
        rotation = 0 if upright else 90
        ax.text(column + width / 2, (low + high) / 2, label, rotation=rotation,
                size=style.NOTE_SIZE, gid="stage", **middle)  # fmt: skip


def _fitting(name: str, room: float) -> str:
    """Return the name, without its start where it is wider than `room` points."""
    if _width(name) <= room:
        return name
    cut = [f"…{name[start:]}" for start in range(1, len(name) + 1)]  # ever narrower
    return cut[min(bisect_left(cut, -room, key=lambda text: -_width(text)), len(cut) - 1)]


def _width(text: str) -> float:
    """Return the width of a text of the smallest size in points."""
    return _measure(text, tuple(mpl.rcParams["font.family"]))


@functools.lru_cache(maxsize=4096)
def _measure(text: str, family: tuple[str, ...]) -> float:
    font = FontProperties(family=family, size=style.NOTE_SIZE)
    return float(TextPath((0, 0), text, prop=font).get_extents().width)
