"""What a figure says in words: titles, legends and notes, in lines that there is room for."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from landscape.plot.style import COLUMN_WIDTH, MUTED, NOTE_SIZE, TEXT_WIDTH, added_line

OVER_DATA: dict[str, Any] = {
    "loc": "best", "frameon": True, "facecolor": "inherit", "edgecolor": "none",
}  # fmt: skip
"""A legend that stands over what is drawn."""

_SIZE = 8.0  # points of a title
_SCALES = 0.9  # inches beside panels that scales and a colour bar take
_CHARACTER = 4.2  # points that a character of this size takes
MOST_IN_FULL = 4
"""Entries of a legend that are written in full; of more each is brief."""
MOST_BELOW = 0.5
"""Share of the height of a figure that a legend below its axes may take."""
_MOST_INSIDE = 0.5  # share of the height of axes that a legend inside of them may take
_LEAST_BESIDE = (
    1.6  # inches of width that a legend beside axes leaves them, where there is a choice
)
_LONGEST_NAME, _MOST_LINES = 30, 2  # characters of a line of a name, and lines
_LONGEST, _LONGEST_OF_MANY = 60, 40  # characters of a line of a legend


def labelled_line(ax: Axes, name: str | None) -> dict[str, Any]:
    """Return `added_line` with a label that a legend has room for.

    Args:
        ax: Axes with any number of lines.
        name: Name of the line; `None` leaves its look to `Axes.plot`.
    """
    if name is None:
        return {}
    label = "\n".join(_name_lines(name))
    alike = sum(entry.startswith(label) for entry in entries_of(ax))
    if "…" in label and alike:  # of another name, as far as one can see
        label = f"{label} ({alike + 1})"
    return {**added_line(ax, label), "label": label}


def shortened(name: str, longest: int) -> str:
    """Return a name with an ellipsis for its middle where it is longer than `longest`.

    Args:
        name: The name; families stand at its start, versions at its end.
        longest: Characters that there is room for.
    """
    if len(name) <= longest or "$" in name:  # half a formula is none
        return name
    end = (longest - 1) // 2
    return f"{name[: longest - 1 - end]}…{name[len(name) - end :]}"


def short_names(names: Iterable[str], longest: int) -> dict[str, str]:
    """Return `shortened` names that differ: those that would not are numbered."""
    short: dict[str, str] = {}
    for name in dict.fromkeys(names):
        taken, number = set(short.values()), 1
        short[name] = shortened(name, longest)
        while short[name] in taken:
            number += 1
            short[name] = f"{shortened(name, longest - 4)} ({number})"
    return short


def _name_lines(name: str) -> list[str]:
    """Return the lines of a name in a legend."""
    short = shortened(name, _LONGEST_NAME * _MOST_LINES)
    return textwrap.wrap(short, _LONGEST_NAME) if len(name) > _LONGEST_NAME else [name]


def room_for(inches: float, size: float) -> int:
    """Return how many characters of a size in points a width has room for, 8 at least."""
    return max(8, int(inches * 72 * _SIZE / size / _CHARACTER))


def wrapped_title(name: str, panels: int, size: float = _SIZE) -> str:
    """Return a title in lines that a panel has room for, shortened in its middle beyond three.

    Args:
        name: The title.
        panels: Number of panels side by side in a figure of the text's width, or in a column's
            width if it is one.
        size: Size of the font, in points.
    """
    line = room_for(((COLUMN_WIDTH if panels == 1 else TEXT_WIDTH) - _SCALES) / panels, size)
    if "$" in name:
        return name
    return "\n".join(textwrap.wrap(shortened(name, 3 * line), line)) or name


def wrapped_entries(texts: Mapping[str, str]) -> dict[str, str]:
    """Return legend entries "name: text" in lines that a legend has room for.

    A name takes two lines of 30 characters, shortened in its middle where it is longer, and the
    text goes on to 60, of more than four entries to 40; a text that its last line has no room for
    begins a new one.

    Args:
        texts: What is said of each name, in one line or several; "" is no name.
    """
    longest = _LONGEST if len(texts) <= MOST_IN_FULL else _LONGEST_OF_MANY
    short = short_names(texts, _LONGEST_NAME * _MOST_LINES)
    entries = {}
    for name, text in texts.items():
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, longest)]
        if name:
            *above, last = _name_lines(short[name])
            start = [f"{last}: {lines[0]}"]
            if len(start[0]) > longest:
                start = [f"{last}:", lines[0]]
            lines = [*above, *start, *lines[1:]]
        entries[name] = "\n".join(lines)
    return entries


def place_legend(
    ax: Axes, loc: Literal["best", "upper left", "upper right"], **inside: Any
) -> None:
    """Add a legend inside of the axes, or outside where it would take too much of their height.

    Outside it stands beside the axes, or below them where these are narrow; of more entries than a
    figure has room for it shows the first and counts the others.

    Args:
        ax: The axes, in a figure whose layout makes room for what is outside of them.
        loc: Place inside of the axes.
        **inside: More settings of a legend inside; `handles` are those of any.
    """
    if share_of_legend(ax) <= _MOST_INSIDE:
        ax.legend(loc=loc, **inside)
        return
    lines = [line for entry in entries_of(ax) for line in entry.split("\n")]
    size = points("small")
    entry, line = (0.55 * max(map(len, lines)) + 3) * size, 1.45 * size
    width, height = size_of(ax)
    columns = max(1, int(1.2 * width / entry))  # the scale at the left is a fifth of narrow axes
    beside = (width - entry) * height
    below = width * (height - line * np.ceil(len(lines) / columns))
    look: dict[str, Any] = {"frameon": False, "fontsize": size}
    handles = inside.get("handles") or ax.get_legend_handles_labels()[0]
    page = ax.figure.bbox.height * 72 / ax.figure.dpi
    if width - entry > 72 * _LEAST_BESIDE or beside > below:
        look |= fitting_entries(handles, page, size)
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), **look)
        return
    look |= fitting_entries(handles, page * MOST_BELOW, size, columns)
    rc = mpl.rcParams
    ticks = rc["xtick.major.size"] + rc["xtick.major.pad"] + 1.3 * points(rc["xtick.labelsize"])
    label = rc["axes.labelpad"] + 1.3 * points(rc["axes.labelsize"])
    look["bbox_transform"] = ax.transAxes + ScaledTranslation(
        0, -(ticks + label) / 72, ax.figure.dpi_scale_trans
    )
    look |= {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "columnspacing": 1}
    ax.legend(ncols=columns, **look)


def fitting_entries(
    handles: Sequence[Any], height: float, size: float, columns: int = 1
) -> dict[str, list[Any]]:
    """Return `handles` and `labels` that a legend has room for; the last one counts the others.

    Args:
        handles: Handles of all entries.
        height: Room in points.
        size: Size of the font, in points.
        columns: Columns of the legend.
    """
    labels = [str(handle.get_label()) for handle in handles]
    tallest = max(1 + label.count("\n") for label in labels)
    room = columns * max(int((height - size) / ((1.2 * tallest + 0.5) * size)), 1)
    if len(labels) <= room:
        return {"handles": list(handles), "labels": labels}
    others = f"… and {len(labels) - room + 1} more"
    blank = Line2D([], [], ls="none")
    return {"handles": [*handles[: room - 1], blank], "labels": [*labels[: room - 1], others]}


def share_of_legend(ax: Axes) -> float:
    """Return the share of the height of axes that their legend would take inside of them."""
    lines = sum(1 + entry.count("\n") for entry in entries_of(ax))
    return (1.5 * lines + 1) * points(mpl.rcParams["legend.fontsize"]) / size_of(ax)[1]


def room_for_legend(ax: Axes) -> float:
    """Return the height that a legend takes above what is drawn, in units of the latter's."""
    share = share_of_legend(ax)
    return share / (1 - share) if share <= _MOST_INSIDE else 0.0


def size_of(ax: Axes) -> tuple[float, float]:
    """Return width and height of axes in points."""
    box, dpi = ax.get_window_extent(), ax.figure.dpi
    return box.width * 72 / dpi, box.height * 72 / dpi


def points(size: float | str) -> float:
    """Return the points of a size of fonts."""
    return float(FontProperties(size=size).get_size_in_points())


def entries_of(ax: Axes) -> list[str]:
    """Return the entries of the legend of axes, in the order in which they were drawn."""
    return list(ax.get_legend_handles_labels()[1])


def add_note(ax: Axes, *lines: str) -> None:
    """Write lines at the right above axes, below those that stand there; none of them twice.

    Args:
        ax: The axes.
        *lines: What to say; "" says nothing.
    """
    told = notes_of(ax)
    said = [line for line in dict.fromkeys(lines) if line and line not in told]
    if not said:
        return
    for note in [text for text in ax.texts if text.get_gid() == "note"]:
        note.remove()
    look: dict[str, Any] = {"fontsize": NOTE_SIZE, "color": MUTED, "gid": "note"}
    place: dict[str, Any] = {"ha": "right", "va": "bottom", "transform": ax.transAxes}
    ax.text(1.0, 1.01, "\n".join([*told, *said]), **look, **place)


def mark_missing(ax: Axes, x: NDArray[Any], missing: NDArray[np.bool_], color: Any) -> None:
    """Mark values that cannot be drawn by crosses at the lower edge of axes.

    Args:
        ax: The axes.
        x: Where the values are, `(n,)`.
        missing: Which of them are missing, `(n,)`.
        color: Colour of their curve.
    """
    if missing.any():
        mark: dict[str, Any] = {"ms": 3, "color": color, "clip_on": False, "gid": "missing"}
        at = np.full(int(missing.sum()), 0.02)
        ax.plot(x[missing], at, "x", transform=ax.get_xaxis_transform(), **mark)


def missing_note(
    missing: NDArray[np.bool_], label: str | None = None, why: str = "not finite"
) -> str:
    """Return a note of how many values are marked by crosses, "" for none.

    Args:
        missing: Which values are missing.
        label: Name of their model.
        why: What they are.
    """
    of_model = f"{shortened(label, 30)}, " if label else ""
    return f"{of_model}×: {missing.sum()} of {missing.size} {why}" if missing.any() else ""


def notes_of(ax: Axes) -> list[str]:
    """Return the lines that stand above axes."""
    notes = [text.get_text() for text in ax.texts if text.get_gid() == "note"]
    return [line for note in notes for line in note.split("\n")]
