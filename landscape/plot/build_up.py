"""The build-up of an AlterNet: what each added MSA did."""

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from landscape.plot import style

if TYPE_CHECKING:
    from landscape.training.build_up_table import BuildUp

SCORE_LABELS = {"accuracy": "Validation accuracy (%)", "nll": "Validation NLL (nats)"}


def build_up(result: "BuildUp", *, ax: Axes | None = None, **line: Any) -> Axes:
    """Draw the validation score of every network that was tried (Park & Kim, 2022, Fig. 12a).

    A line joins the networks that were kept; those refused are open, on a dotted way from the
    network that they were to improve. Bars are two standard errors each side. Below each step
    stand the MSAs per stage of its network.

    Args:
        result: The table.
        ax: Axes to draw on; fresh ones by default.
        **line: Passed to `Axes.plot` for the line of the kept networks.

    Returns:
        The axes.

    Raises:
        TypeError: If `result` is no `BuildUp`.
    """
    style.check_result(result, "BuildUp")
    ax = ax if ax is not None else style.fresh_axes()
    accuracy = result.criterion == "accuracy"
    value = 100 * result.accuracy if accuracy else result.nll
    error = 200 * result.accuracy_stderr if accuracy else 2 * result.nll_stderr
    step, kept = np.arange(len(value)), result.kept
    look: dict[str, Any] = {"color": style.family_color("alternet"), "marker": "o", "label": "kept"}
    (drawn,) = ax.plot(step[kept], value[kept], **{**look, **line})
    for i in step[~kept]:
        best = step[kept & (step < i)][-1]
        ends = [best, i], [value[best], value[i]]
        ax.plot(*ends, color=style.MUTED, lw=0.6, ls=":", zorder=1, gid="way")
    if not kept.all():
        refused: dict[str, Any] = {"ls": "", "marker": "o", "mec": style.MUTED, "label": "refused"}
        ax.plot(step[~kept], value[~kept], mfc=ax.get_facecolor(), **refused)
    for chosen, shade in ((kept, drawn.get_color()), (~kept, style.MUTED)):
        bars: dict[str, Any] = {"fmt": "none", "ecolor": shade, "elinewidth": 0.6, "zorder": 1}
        ax.errorbar(step[chosen], value[chosen], yerr=error[chosen], **bars)
    ax.set_xticks(step, labels=["\n".join(map(str, reversed(row))) for row in result.msas.tolist()])
    ax.set(xlim=(-0.5, len(step) - 0.5), ylabel=SCORE_LABELS[result.criterion])
    ax.set_xlabel("MSAs per stage, the last stage on top")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.16 * (high - low))  # room for the legend above every bar
    ax.legend(loc="upper left", ncols=2)
    return ax
