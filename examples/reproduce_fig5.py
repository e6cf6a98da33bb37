"""Figure 5 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022).

    python examples/reproduce_fig5.py                  # two CPU cores, offline
    python examples/reproduce_fig5.py --quick          # the same path in little: a smoke test
    python examples/reproduce_fig5.py --preset paper   # the paper's setting, on a GPU

Do networks with a weak inductive bias overfit? Test error against the NLL of the augmented training
images (a) of several networks and (b) of a ResNet and a ViT that get a share of the images. In the
paper test error rises with the training NLL: a ViT fits its images worse, not too well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from claims import Claim, averaged
from comparisons import TEST, TRAIN, Arm, Results, Study, run
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from landscape.intervals import mean_interval
from landscape.plot import style

SHARES = (0.06, 0.1, 0.3)
NOTE = (
    "Intervals (95 %, Student's t) are those of the mean over runs with seeds of their own. The "
    "training NLL is that of the images each network was given, augmented as in training, of the "
    "trained network in evaluation mode. All train for as many epochs, as in the paper: a network "
    "that gets few images also takes few steps."
)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def arms(preset: str) -> Sequence[Arm]:
    """Return the networks with all images, then those with a share of them."""
    small_patches = {"patch_size": 4} if preset in {"gpu", "paper"} else {}  # as in Figure 7
    whole = [
        Arm("ResNet", "ResNet"),
        Arm("ViT", "ViT"),
        Arm("ViT, GAP", "ViT", {"pool": "gap"}),
        Arm("ViT, 3×3", "ViT", {"pool": "gap", "window": 3, **small_patches}),
    ]
    parts = [
        Arm(f"{name}, {_percent(share)}", name, share=share)
        for name in ("ResNet", "ViT")
        for share in SHARES
    ]
    return whole + parts


def draw(results: Results) -> Figure:
    """Draw test error against training NLL: networks, and shares of the images."""
    with mpl.rc_context(style.rc()):
        figure = Figure(figsize=(style.TEXT_WIDTH, 2.3))
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.09, right=0.985, top=0.93, bottom=0.18, wspace=0.25)
        networks = [label for label in results[TEST] if not label.endswith("%")]
        for label, marker in zip(networks, "sso^", strict=True):
            _draw_network(left, results, [label], label, marker=marker)
        for name in ("ResNet", "ViT"):
            shares = [f"{name}, {_percent(share)}" for share in SHARES]
            _draw_network(right, results, [*shares, name], name, marker="s")
            _label_shares(right, results, name, {**dict(zip(shares, SHARES, strict=True)), name: 1})
        right.margins(x=0.1)  # for the labels at the ends
        for ax, letter in ((left, "a"), (right, "b")):
            ax.set(xlabel="NLL, augmented training images (nats)", ylabel="Test error (%)")
            ax.legend(loc="best")
            ax.text(-0.2, 1.0, letter, transform=ax.transAxes, weight="bold", size=10)
        figure.draw_without_rendering()
    return figure


def _label_shares(ax: Axes, results: Results, name: str, shares: Mapping[str, float]) -> None:
    """Write its share of the images beside each point of a curve.

    The curves lie close: one is labelled above on the left, the other on the right, below but at
    its upper end.
    """
    left = name == "ResNet"
    look: dict[str, Any] = {
        "textcoords": "offset points",
        "ha": "right" if left else "left",
        "color": style.family_color(name),
        "size": style.NOTE_SIZE,
        "bbox": {"facecolor": "w", "edgecolor": "none", "pad": 0.4},  # over the bars
    }
    for label, share in shares.items():
        nll, error = (np.mean(values) for values in _runs(results, label))
        below = -3 if share == min(shares.values()) else 8
        offset = (-5, 5) if left else (5, -below)
        ax.annotate(_percent(share), (nll, error), xytext=offset, **look)


def _draw_network(
    ax: Axes, results: Results, labels: Sequence[str], name: str, *, marker: str
) -> None:
    """Draw runs as points, and means over them with intervals both ways, joined by a line."""
    color = style.family_color(name) or style.MUTED
    means = []
    for label in labels:
        nll, error = _runs(results, label)
        ax.plot(nll, error, marker, color=color, alpha=0.45, ms=2.5, mew=0)
        (x, *ends_x), (y, *ends_y) = mean_interval(nll), mean_interval(error)
        bars = [np.abs(np.array([ends]).T - at) for ends, at in ((ends_x, x), (ends_y, y))]
        look: dict[str, Any] = {"color": color, "ms": 4, "mec": "white", "mew": 0.4}
        ax.errorbar(x, y, xerr=bars[0], yerr=bars[1], fmt=marker, elinewidth=0.8, **look)
        means.append((x, y))
    line = "-" if len(means) > 1 else "none"
    ax.plot(*np.array(means).T, marker=marker, ls=line, lw=1, color=color, ms=4, label=name)


def _runs(results: Results, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Return training NLL in nats and test error in per cent of every run."""
    nll = np.array([evaluation.nll for evaluation in results[TRAIN][label]])
    return nll, np.array([100 * (1 - evaluation.accuracy) for evaluation in results[TEST][label]])


def claims(results: Results) -> list[Claim]:
    """Return the paper's claims next to what was measured."""
    nll = {label: averaged(_runs(results, label)[0]) for label in results[TEST]}
    error = {label: averaged(_runs(results, label)[1]) for label in results[TEST]}
    networks = [label for label in results[TEST] if not label.endswith("%")]
    quantity = "NLL, augmented training images"
    sides = [("ResNet", nll["ResNet"]), ("ViT", nll["ViT"])]
    found = [
        Claim("(a) ViT does not overfit: it fits worse than ResNet", quantity, *sides, about=6)
    ]
    best = min(networks, key=lambda label: nll[label].value)
    worst = max(networks, key=lambda label: nll[label].value)
    text = "(a) the network that fits best errs less than the one that fits worst"
    sides = [(best, error[best]), (worst, error[worst])]
    found.append(Claim(text, "test error [%]", *sides, about=6))
    for name in ("ResNet", "ViT"):
        few = f"{name}, {_percent(SHARES[0])}"
        text = f"(b) little data disturbs the training of {name} rather than being overfitted"
        sides = [(name, nll[name]), (few, nll[few])]
        found.append(Claim(text, quantity, *sides, about=6))
    return found


if __name__ == "__main__":
    run(Study("fig5", arms, (TEST, TRAIN), draw, claims, NOTE, {"default": 3}), __doc__)
