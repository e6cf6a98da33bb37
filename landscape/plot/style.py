"""How the figures look: sizes, fonts and colours, as values to pass on and never as global state.

    with matplotlib.rc_context(style.rc()):
        figure = plot.figure1a(surfaces)
        figure.savefig("fig1a.pdf")

Colours are those of Okabe and Ito, told apart under every common colour blindness
(https://jfly.uni-koeln.de/color/). One colour belongs to one model family in every
figure; kinds of blocks have colours of their own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, FigureBase
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
EDGE = 0.03
"""Share of an axis beyond the end of a range: half a mark, a heuristic."""
NOTE_SIZE = 6.0
"""Smallest font in a figure, in points: notes inside the axes."""

_FAMILIES = {  # prefixes of the name in lower case without separators -> colour
    ("alternet", "alterresnet"): "#009E73",
    ("resnet", "preresnet", "resnext", "wideresnet"): "#0072B2",
    ("vit", "deit", "visiontransformer"): "#D55E00",
    ("swin",): "#CC79A7",
    ("pit",): "#E69F00",
}
KIND_COLORS = {
    "conv": "#BBAA55", "msa": "#8855DD", "mlp": "#995544", "pool": "#F0E442", "other": "#CCCCCC",
}  # fmt: skip
"""Colour of each kind of block, none of them a family's; `pool` is what subsamples."""
KIND_NAMES = {"conv": "Conv", "msa": "MSA", "mlp": "MLP", "pool": "subsampling", "other": "other"}
KIND_ALPHA = 0.3
"""Opacity of the areas behind text and curves in these colours."""
_OTHERS = ("#333333", "#56B4E9", "#999999")
_PALE = "#DDDDDD"  # stands for the first of them on dark axes
_LINES: tuple[Any, ...] = (
    "-", "--", ":", "-.",
    (0, (6, 1, 1, 1, 1, 1)), (0, (2, 1)), (0, (8, 3)), (0, (1, 3)),
)  # fmt: skip


def rc() -> dict[Any, Any]:
    """Return the settings of a paper figure, for `matplotlib.rc_context`.

    Fonts ship with matplotlib (STIX, close to the Times of the ICLR and ICML templates), so a
    figure looks the same on every machine. Text is 8 pt, ticks and legends 7 pt at final size,
    which is left to `figsize`: `COLUMN_WIDTH` or `TEXT_WIDTH` wide.
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


@contextmanager
def paper_figure(
    results: Mapping[str, Any], width: float, height: float, **settings: Any
) -> Iterator[Figure]:
    """Yield a figure of a size in inches to draw results on, one at least, as in a paper."""
    named(results, argument="results")
    with mpl.rc_context(rc()):
        figure = Figure(figsize=(width, height), **settings)
        yield figure
        figure.draw_without_rendering()  # ticks are made now, in this style


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


def begin_at_zero(ax: Axes) -> None:
    """Let the vertical axis of what is not negative begin at 0, a mark there in full."""
    high = ax.get_ylim()[1]
    ax.set_ylim(-EDGE * high, high)


LETTER: dict[str, Any] = {"weight": "bold", "size": 10}
"""Look of the letter of a panel."""


def letter_panel(panel: FigureBase, letter: str) -> None:
    """Write the letter of a panel at its upper left."""
    panel.text(0.005, 0.995, letter, va="top", **LETTER)


PROJECTIONS = {"loss_surface": "3d", "polar_trajectory": "polar"}
"""Axes that a drawing needs by default, where these are not flat ones."""


def fresh_axes(projection: str | None = None) -> Axes:
    """Return the axes of a new figure, whose layout leaves no text off the page."""
    axes: Axes = plt.subplots(subplot_kw={"projection": projection}, layout="constrained")[1]
    return axes


def added_line(ax: Axes, name: str) -> dict[str, Any]:
    """Return `color` and `linestyle` of one more line on axes, unlike those that they hold.

    A line without a name has the next colour of the axes, as one of `Axes.plot` would.

    Args:
        ax: Axes with any number of lines in the styles of `line_styles`, labelled by their names.
        name: Name of the line; one that is there already keeps its style.
    """
    if not name:
        (next_line,) = ax.plot([], [])
        next_line.remove()
        return {"color": next_line.get_color(), "linestyle": "-"}
    labels = [
        label
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        if not isinstance(handle, Patch)  # a shade
        and not (isinstance(handle, Line2D) and handle.get_linestyle() == "None")  # a mark
    ]
    look = line_styles([*labels, name])[name]
    dark = np.dot(to_rgb(ax.get_facecolor()), (0.299, 0.587, 0.114)) < 0.5  # luma (BT.601)
    return {**look, "color": _PALE} if dark and look["color"] == _OTHERS[0] else look


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


def named(
    result: Any,
    kind: str | None = None,
    *,
    label: str | None = None,
    argument: str = "result",
) -> dict[str, Any]:
    """Return results by label, which becomes a text, a single one under an empty label.

    Args:
        result: One result, or several by label.
        kind: Name of their class, to be checked.
        label: Label of a single one.
        argument: What the caller calls `result`.

    Raises:
        ValueError: If `result` is empty, or several come with a `label`.
        TypeError: If one of them is of another class.
    """
    several = isinstance(result, Mapping)
    if several and label is not None:
        raise ValueError(
            f"`label` must be None where results come with their labels, got {label!r}."
        )
    by_label = {str(n): r for n, r in result.items()} if several else {label or "": result}
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
    """
    if not _is_a(result, kind):
        raise TypeError(f"`result` must be a `{kind}`, got {type(result).__name__}.")


def _is_a(result: object, kind: str) -> bool:
    """Return whether a class or its base has that name: plots import no probes to ask."""
    return kind in (each.__name__ for each in type(result).__mro__)
