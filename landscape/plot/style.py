"""How the figures look: sizes, fonts and colours, as values to pass on and never as global state.

    with matplotlib.rc_context(style.rc()):
        figure = plot.figure1a(surfaces)
        figure.savefig("fig1a.pdf")

Colours are those of Okabe and Ito, told apart under every common colour blindness
(https://jfly.uni-koeln.de/color/). One colour belongs to one model family in every
figure of models; Figures 10 and 11 colour kinds of blocks.
"""

import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, cast

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

TEXT_WIDTH = 5.5
"""Width of the text of an ICLR page, in inches."""
COLUMN_WIDTH = 3.25
"""Width of one column of a two-column page (ICML), in inches."""
SEQUENTIAL = "viridis"
"""Colour map of quantities without a natural centre: even in lightness, safe in grey."""
MUTED = "0.45"
"""Grey of notes, marks of missing points and reference lines."""
NOTE_SIZE = 6.0
"""Smallest font in a figure, in points: notes inside the axes."""
OVER_DATA: dict[str, Any] = {"loc": "best", "frameon": True, "facecolor": "w", "edgecolor": "none"}
"""A legend that stands over what is drawn."""

_FAMILIES = {  # prefixes of the name in lower case without separators -> colour
    ("alternet", "alterresnet"): "#009E73",
    ("resnet", "preresnet", "resnext", "wideresnet"): "#0072B2",
    ("vit", "deit", "visiontransformer"): "#D55E00",
    ("swin",): "#CC79A7",
    ("pit",): "#E69F00",
}
_OTHERS = ("#333333", "#56B4E9", "#999999")
_LINES: tuple[Any, ...] = (
    "-", "--", ":", "-.",
    (0, (6, 1, 1, 1, 1, 1)), (0, (2, 1)), (0, (8, 3)), (0, (1, 3)),
)  # fmt: skip
_SIZE = 8.0  # points of a title
_SCALES = 0.9  # inches beside panels that scales and a colour bar take
_CHARACTER = 4.2  # points that a character of this size takes
_MOST_INSIDE = 4  # entries of a legend that has room inside of the axes
_LONGEST_NAME, _MOST_LINES = 30, 2  # characters of a line of a name, and lines
_LONGEST_BESIDE, _LONGEST_INSIDE = 40, 60  # characters of a line of a legend


def rc() -> dict[Any, Any]:
    """Return the settings of a paper figure, for `matplotlib.rc_context`.

    Fonts ship with matplotlib (STIX, close to the Times of the ICLR and ICML templates), so a
    figure looks the same on every machine. Text is 8 pt, ticks and legends 7 pt at final size.
    """
    return {
        "font.family": "STIXGeneral",
        "mathtext.fontset": "stix",
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "legend.handlelength": 1.2,
        "legend.handletextpad": 0.5,
        "legend.borderaxespad": 0.2,
        "axes.linewidth": 0.6,
        "axes.labelpad": 2.5,
        "axes.titlepad": 4,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
        "xtick.major.pad": 2,
        "ytick.major.pad": 2,
        "lines.linewidth": 1.2,
        "lines.markersize": 3,
        "grid.linewidth": 0.4,
        "grid.color": "0.85",
        "figure.dpi": 150,
        "savefig.dpi": 300,
        "pdf.fonttype": 42,  # TrueType: text in the PDF stays text
        "ps.fonttype": 42,
    }


def family_color(name: str) -> str | None:
    """Return the fixed colour of the model family that `name` starts with, `None` if unknown."""
    key = "".join(letter for letter in name.lower() if letter.isalnum())
    for prefixes, color in _FAMILIES.items():
        if key.startswith(prefixes):
            return color
    return None


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return `color` and `linestyle` of each name.

    A family keeps its colour whatever else is drawn; its second, third and fourth members are
    dashed, dotted and dash-dotted. Unknown names take the colours left over, in their order. No two
    are alike of up to eight names of a family and 24 others.

    Args:
        names: Names of models, or any labels.

    Returns:
        For each name the keyword arguments of a line.
    """
    seen: dict[str, int] = {}
    num_unknown = 0
    styles = {}
    for name in dict.fromkeys(names):
        color = family_color(name)
        if color is None:
            color = _OTHERS[num_unknown % len(_OTHERS)]
            num_unknown += 1
        styles[name] = {"color": color, "linestyle": _LINES[seen.get(color, 0) % len(_LINES)]}
        seen[color] = seen.get(color, 0) + 1
    return styles


def letter_panel(panel: FigureBase, letter: str) -> None:
    """Write the letter of a panel at its upper left."""
    panel.text(0.005, 0.995, letter, va="top", weight="bold", size=10)


def fresh_axes(projection: str | None = None) -> Axes:
    """Return the axes of a new figure, whose layout leaves no text off the page."""
    axes: Axes = plt.subplots(subplot_kw={"projection": projection}, layout="constrained")[1]
    return axes


def added_line(ax: Axes, name: str) -> dict[str, Any]:
    """Return `color` and `linestyle` of one more line on axes, unlike those that they hold.

    Args:
        ax: Axes with any number of lines in the styles of `line_styles`, labelled by their names.
        name: Name of the line; one that is there already keeps its style.

    Returns:
        The keyword arguments of a line.
    """
    labels = [
        label
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        if not isinstance(handle, Patch)  # a shade
        and not (isinstance(handle, Line2D) and handle.get_linestyle() == "None")  # a mark
    ]
    return line_styles([*labels, name])[name]


def labelled_line(ax: Axes, name: str) -> dict[str, Any]:
    """Return `added_line` with a label that a legend has room for.

    Args:
        ax: Axes with any number of lines.
        name: Name of the line.

    Returns:
        The keyword arguments of a line.
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
    if len(name) <= longest:
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


def draw_each(
    draw: Callable[..., Axes], results: Mapping[str, Any], ax: Axes | None, label: str | None
) -> Axes:
    """Draw results one after the other on the same axes.

    Args:
        draw: Draws one of them: `draw(result, ax=ax, label=label)`.
        results: Results by label.
        ax: Axes to draw on; those that `draw` makes by default.
        label: `None`: it is for a single result.

    Returns:
        The axes.

    Raises:
        ValueError: If `results` is empty, or there is a `label`.
    """
    for name, result in named(results, label=label).items():
        ax = draw(result, ax=ax, label=name)
    return cast(Axes, ax)


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
    return "\n".join(textwrap.wrap(shortened(name, 3 * line), line)) or name


def wrapped_entries(texts: Mapping[str, str]) -> dict[str, str]:
    """Return legend entries "name: text" in lines that a legend has room for.

    A name takes two lines of 30 characters, shortened in its middle where it is longer, and the
    text goes on to 60 inside of the axes, to 40 beside them; a text that its last line has no room
    for begins a new one.

    Args:
        texts: What is said of each name, in one line or several; "" is no name.

    Returns:
        The entry of each name.
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


def notes_of(ax: Axes) -> list[str]:
    """Return the lines that stand above axes."""
    notes = [text.get_text() for text in ax.texts if text.get_gid() == "note"]
    return [line for note in notes for line in note.split("\n")]


def named(
    result: Any,
    kind: str | None = None,
    *,
    label: str | None = None,
    argument: str = "result",
) -> dict[str, Any]:
    """Return results by label, a single one under an empty label.

    Args:
        result: One result, or several by label.
        kind: Name of their class, to be checked.
        label: Label of a single one.
        argument: What the caller calls `result`.

    Returns:
        The results by label.

    Raises:
        ValueError: If `result` is empty, or several come with a `label`.
        TypeError: If one of them is of another class.
    """
    several = isinstance(result, Mapping)
    if several and label is not None:
        raise ValueError(
            f"`label` must be None where results come with their labels, got {label!r}."
        )
    by_label = dict(result) if several else {label or "": result}
    if not by_label:
        raise ValueError(f"`{argument}` must hold at least one result, got an empty mapping.")
    for one in by_label.values():
        if kind is not None and not _is_a(one, kind):
            raise TypeError(
                f"`{argument}` must be a `{kind}`, or a mapping of labels to several, got "
                f"{type(one).__name__}."
            )
    return by_label


def check_result(result: object, kind: str) -> None:
    """Refuse what is no result of a class.

    Args:
        result: What is to be drawn.
        kind: Name of the class.

    Raises:
        TypeError: If `result` is of another.
    """
    if not _is_a(result, kind):
        raise TypeError(f"`result` must be a `{kind}`, got {type(result).__name__}.")


def _is_a(result: object, kind: str) -> bool:
    """Return whether a class or its base has that name: plots import no probes to ask."""
    return kind in (each.__name__ for each in type(result).__mro__)
