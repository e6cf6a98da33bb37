"""What a figure says in words: titles, legends and notes, in lines that there is room for."""

import textwrap
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from landscape.plot.style import COLUMN_WIDTH, MUTED, NOTE_SIZE, TEXT_WIDTH, added_line

OVER_DATA: dict[str, Any] = {"loc": "best", "frameon": True, "facecolor": "w", "edgecolor": "none"}
"""A legend that stands over what is drawn."""

_SIZE = 8.0  # points of a title
_SCALES = 0.9  # inches beside panels that scales and a colour bar take
_CHARACTER = 4.2  # points that a character of this size takes
_MOST_INSIDE = 4  # entries of a legend that has room inside of the axes
_LONGEST_NAME, _MOST_LINES = 30, 2  # characters of a line of a name, and lines
_LONGEST_BESIDE, _LONGEST_INSIDE = 40, 60  # characters of a line of a legend


def labelled_line(ax: Axes, name: str) -> dict[str, Any]:
    """Return `added_line` with a label that a legend has room for.

    Args:
        ax: Axes with any number of lines.
        name: Name of the line.
    """
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


def entries_inside(entries: Collection[str]) -> int:
    """Return how many entries of a legend stand inside of the axes: 0 where it is beside them."""
    return len(entries) if len(entries) <= _MOST_INSIDE else 0


def wrapped_title(name: str, panels: int, size: float = _SIZE) -> str:
    """Return a title in lines that a panel has room for, shortened in its middle beyond three.

    Args:
        name: The title.
        panels: Number of panels side by side in a figure of the text's width, or in a column's
            width if it is one.
        size: Size of the font, in points.
    """
    room = ((COLUMN_WIDTH if panels == 1 else TEXT_WIDTH) - _SCALES) * 72 / panels
    line = max(8, int(room * _SIZE / size / _CHARACTER))
    if "$" in name:
        return name
    return "\n".join(textwrap.wrap(shortened(name, 3 * line), line)) or name


def wrapped_entries(texts: Mapping[str, str]) -> dict[str, str]:
    """Return legend entries "name: text" in lines that a legend has room for.

    A name takes two lines of 30 characters, shortened in its middle where it is longer, and the
    text goes on to 60 inside of the axes, to 40 beside them; a text that its last line has no room
    for begins a new one.

    Args:
        texts: What is said of each name, in one line or several; "" is no name.
    """
    longest = _LONGEST_INSIDE if entries_inside(texts) else _LONGEST_BESIDE
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


def lines_inside(entries: Collection[str]) -> int:
    """Return how many lines of a legend stand inside of the axes: 0 where it is beside them."""
    return sum(1 + entry.count("\n") for entry in entries) if entries_inside(entries) else 0


def place_legend(ax: Axes, loc: Literal["upper left", "upper right"], **inside: Any) -> None:
    """Add a legend inside of the axes, or beside them where there are too many entries.

    Args:
        ax: The axes, in a figure whose layout makes room for what is outside of them.
        loc: Corner inside of the axes.
        **inside: More settings of a legend inside.
    """
    if entries_inside(entries_of(ax)):
        ax.legend(loc=loc, **inside)
    else:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")


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
