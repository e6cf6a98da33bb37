"""Robustness against noise by frequency and against attacks, and calibration."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from landscape.plot import style, texts

if TYPE_CHECKING:
    from landscape.probes.adversarial import AdversarialRobustness
    from landscape.probes.evaluate import Evaluation
    from landscape.probes.frequency import RobustnessCurve

FREQUENCY_LABEL = "Noise frequency (units of π)"
DELTA_LABEL = "Δ accuracy (percentage points)"
RADIUS_LABELS = {
    "linf": "Radius of the L∞ ball (1/255 of full scale)",
    "l2": "Radius of the L2 ball (1/255 of full scale)",
}
CONFIDENCE_LABEL = "Confidence (fraction)"
RELIABILITY_LABEL = "Accuracy, share of samples (fraction)"


def frequency_robustness(
    result: "RobustnessCurve | Mapping[str, RobustnessCurve]",
    *,
    ax: Axes | None = None,
    label: str | None = None,
    **line: Any,
) -> Axes:
    """Draw the change of accuracy under noise by its frequency (Park & Kim, 2022, Fig. 2b).

    Bars are two paired standard errors each side. The legend gives clean accuracies, a note the
    noise. Values that are not finite are gaps, marked by crosses and counted.

    Args:
        result: One curve, or several by label; model families decide the colours.
        ax: Axes to draw on; fresh ones by default.
        label: Name of one model in the legend; its family decides the colour.
        **line: Passed to `Axes.errorbar`.

    Returns:
        The axes.

    Raises:
        ValueError: If `result` is empty, or a mapping comes with a `label`.
    """
    named = style.named(result, "RobustnessCurve", label=label)
    ax = ax if ax is not None else style.fresh_axes()
    common, labels = legend_entries(named, clean_entry, noise_of, wrap=True)
    ax.axhline(0, color=style.MUTED, lw=0.6, zorder=0, gid="clean")
    for name, one in named.items():
        look = {**style.added_line(ax, labels[name] if name else ""), "label": labels[name], **line}
        change, error = 100 * one.delta_accuracy, 200 * one.delta_accuracy_stderr
        _draw_curve(ax, one.frequencies, change, error, look)
    ax.set(xlabel=FREQUENCY_LABEL, ylabel=DELTA_LABEL)
    ax.set_autoscaley_on(True)  # to what was drawn before, too
    ax.autoscale_view()
    low, high = ax.get_ylim()
    ax.set_ylim(low, max(high, 0) + texts.room_for_legend(ax) * (high - low))
    _note(ax, [one.delta_accuracy for one in named.values()], common, label)
    texts.place_legend(ax, "upper right")
    return ax


def adversarial_robustness(
    result: "AdversarialRobustness | Mapping[str, AdversarialRobustness]",
    *,
    ax: Axes | None = None,
    label: str | None = None,
    **line: Any,
) -> Axes:
    """Draw accuracy under attack by the radius of the ball, from the clean accuracy at 0.

    Bars are two standard errors each side. A note, or the legend where they differ, gives the
    attacks. Values that are not finite are gaps, marked by crosses and counted.

    Args:
        result: One result, or several of one norm by label; model families decide the colours.
        ax: Axes to draw on; fresh ones by default.
        label: Name of one model in the legend; its family decides the colour.
        **line: Passed to `Axes.errorbar`.

    Returns:
        The axes.

    Raises:
        ValueError: If `result` is empty or mixes norms, or a mapping comes with a `label`.
    """
    named = style.named(result, "AdversarialRobustness", label=label)
    norm = common_norm(named)
    ax = ax if ax is not None else style.fresh_axes()
    common, labels = legend_entries(named, clean_entry, attack_of, wrap=True)
    for name, one in named.items():
        look = {**style.added_line(ax, labels[name] if name else ""), "label": labels[name], **line}
        radii, accuracy, error = attacked_accuracy(one)
        _draw_curve(ax, 255 * radii, 100 * accuracy, 200 * error, look)
    ax.set_autoscale_on(True)  # to what was drawn before, too
    ax.autoscale_view()
    ax.set(xlabel=RADIUS_LABELS[norm], ylabel="Accuracy (%)")
    style.begin_at_zero(ax)
    _note(ax, [one.accuracy for one in named.values()], common, label)
    texts.place_legend(ax, "upper right")
    return ax


def reliability_diagram(
    result: "Evaluation | Mapping[str, Evaluation]",
    *,
    ax: Axes | None = None,
    label: str | None = None,
    **line: Any,
) -> Axes:
    """Draw the accuracy of each bin of the confidence against its mean confidence.

    The vertical lines from the diagonal are the gaps that the calibration error (ECE) averages.
    Bars are Wilson's intervals of two standard errors. The steps below are the share of samples in
    each bin. The legend gives the ECE with its standard error, and as its noise what a perfectly
    calibrated model would show on as many samples.

    Args:
        result: One evaluation, or several by label; model families decide the colours.
        ax: Axes to draw on; fresh ones by default.
        label: Name of one model in the legend; its family decides the colour.
        **line: Passed to `Axes.errorbar`.

    Returns:
        The axes.

    Raises:
        ValueError: If `result` is empty, or a mapping comes with a `label`.
    """
    named = style.named(result, "Evaluation", label=label)
    ax = ax if ax is not None else style.fresh_axes()
    common, labels = legend_entries(named, ece_entry, sample_size, wrap=True)
    ax.plot([0, 1], [0, 1], color=style.MUTED, lw=0.6, ls="--", zorder=0, gid="diagonal")
    for name, one in named.items():
        look = {**style.added_line(ax, labels[name] if name else ""), "label": labels[name], **line}
        color = look["color"]
        share = one.bin_count / max(one.num_samples, 1)
        steps: dict[str, Any] = {"color": color, "alpha": 0.2, "fill": True, "lw": 0, "zorder": 0}
        ax.stairs(share, one.bin_edges, baseline=0, gid="share", **steps)
        x, y = one.bin_confidence, one.bin_accuracy
        ax.vlines(x, x, y, color=color, lw=2.5, alpha=0.35, gid="gap", zorder=1)
        low, high = wilson_interval(y, one.bin_count)
        bars = np.clip([y - low, high - y], 0, None)
        ax.errorbar(x, y, yerr=bars, **{"marker": "o", "elinewidth": 0.7, **look})
    ax.set(
        xlim=(-style.EDGE, 1 + style.EDGE),
        ylim=(-style.EDGE, (1 + style.EDGE) * (1 + texts.room_for_legend(ax))),
        yticks=np.linspace(0, 1, 6),
    )
    ax.set(xlabel=CONFIDENCE_LABEL, ylabel=RELIABILITY_LABEL)
    setting = "noise: the ECE of a calibrated model" + (f", {common}" if common else "")
    _note(ax, [], setting, label)
    texts.place_legend(ax, "upper left")
    return ax


def legend_entries(
    named: Mapping[str, Any],
    entry: Callable[[Any], str],
    setting: Callable[[Any], str],
    *,
    wrap: bool = False,
) -> tuple[str, dict[str, str]]:
    """Return the setting that all results share ("" if none), and a legend entry for each.

    The setting is part of the entries where it is not shared; `wrap` breaks them into lines.
    """
    settings = {name: setting(result) for name, result in named.items()}
    shared = len(set(settings.values())) == 1
    said = {
        name: entry(result) if shared else f"{entry(result)}, {settings[name]}"
        for name, result in named.items()
    }
    common = next(iter(settings.values())) if shared else ""
    if wrap:
        return common, texts.wrapped_entries(said)
    return common, {name: f"{name}: {text}" if name else text for name, text in said.items()}


def clean_entry(result: "RobustnessCurve | AdversarialRobustness") -> str:
    """Return the clean accuracy in words."""
    return f"clean {percent(result.clean_accuracy)}"


def noise_of(result: "RobustnessCurve") -> str:
    """Return strength and width of the noise in words."""
    clipped = ", clipped" if result.clip else ""
    return f"noise RMS {result.norm:g} of full scale, rings {result.width:g}π wide{clipped}"


def attack_of(result: "AdversarialRobustness") -> str:
    """Return the attack in words."""
    if result.attack == "fgsm":
        return "FGSM"
    restarts = f" × {result.restarts} restarts" if result.restarts > 1 else ""
    return f"PGD, {result.steps} steps{restarts}"


def attacked_accuracy(result: "AdversarialRobustness") -> tuple[NDArray[np.float64], ...]:
    """Return radii, accuracy and its standard error, the clean ones in front at radius 0."""
    keep = np.asarray(result.radii) > 0
    columns = (
        (0.0, result.radii),
        (result.clean_accuracy, result.accuracy),
        (result.clean_accuracy_stderr, result.accuracy_stderr),
    )
    return tuple(np.concatenate([[clean], np.asarray(each)[keep]]) for clean, each in columns)


def common_norm(named: "Mapping[str, AdversarialRobustness]") -> str:
    """Return the norm of the balls.

    Raises:
        ValueError: If there are several.
    """
    norms = sorted({result.norm for result in named.values()})
    if len(norms) > 1:
        raise ValueError(f"`result` must share one norm, got {norms}; draw them separately.")
    return norms[0]


def ece_entry(result: "Evaluation") -> str:
    """Return calibration error, its standard error, and that of a calibrated model in words."""
    ece, noise = percent(result.ece, result.ece_stderr), percent(result.ece_noise)
    return f"ECE {ece} (noise {noise})"


def sample_size(result: "Evaluation") -> str:
    """Return the number of samples in words."""
    return f"n = {result.num_samples}"


def wilson_interval(
    share: NDArray[np.float64], count: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the interval of 2 standard errors of shares of `count` samples (Wilson, 1927)."""
    n = np.where(count > 0, count, np.nan)
    center = (share + 2 / n) / (1 + 4 / n)
    half = 2 / (1 + 4 / n) * np.sqrt(share * (1 - share) / n + 1 / n**2)
    return center - half, center + half


def percent(*values: float) -> str:
    """Return a fraction, or one ± its error, in percent with one decimal; "–" is not finite."""
    digits = [f"{100 * value:.1f}" if np.isfinite(value) else "–" for value in values]
    return " ± ".join(digits) + (" %" if np.isfinite(values[-1]) else "")


def _draw_curve(
    ax: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    error: NDArray[np.float64],
    look: dict[str, Any],
) -> None:
    drawn = ax.errorbar(x, y, yerr=error, **{"marker": "o", "elinewidth": 0.7, **look})
    texts.mark_missing(ax, x, ~np.isfinite(y), drawn.lines[0].get_color())


def _note(ax: Axes, drawn: Iterable[NDArray[np.float64]], setting: str, label: str | None) -> None:
    """Write above the axes what was done and how many of the drawn values are missing."""
    values = np.concatenate([*drawn, np.empty(0)])
    told = texts.notes_of(ax)
    if label and setting and setting not in told and told:  # it holds for this model alone
        setting = f"{texts.shortened(label, 30)}: {setting}"
    texts.add_note(ax, texts.missing_note(~np.isfinite(values), label), setting)
