"""Appendix C of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022).

    python examples/reproduce_appendix_c.py                  # two CPU cores, offline
    python examples/reproduce_appendix_c.py --quick          # the same path in little
    python examples/reproduce_appendix_c.py --preset paper   # the paper's setting, on a GPU

NEP and APE of a ViT at the end of warm-up against the number of heads, depth, width and patch size.
More heads and a higher dimension are to make the loss more convex and flatter; depth and patch size
are drawn without a claim.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from claims import Claim
from comparisons import WARMUP, Arm, Results, Study, run
from hessian_claims import NOTE, smaller_ape, smaller_nep
from matplotlib.figure import Figure

from landscape.plot import style
from landscape.plot.seeds import run_curves

Axis = tuple[str, str, tuple[int, ...]]  # what varies, its name in the constructor, its values

SMALL: tuple[Axis, ...] = (
    ("heads", "heads", (1, 3, 12)),
    ("depth", "depth", (2, 4, 8)),
    ("width", "dim", (24, 48, 96)),
    ("patch size", "patch_size", (4, 7, 14)),
)
LARGE: tuple[Axis, ...] = (
    ("heads", "heads", (1, 3, 6, 12)),
    ("depth", "depth", (4, 8, 12)),
    ("width", "dim", (48, 96, 192, 384)),
    ("patch size", "patch_size", (2, 4, 8)),
)
QUICK: tuple[Axis, ...] = (
    ("heads", "heads", (1, 3)),
    ("depth", "depth", (2, 4)),
    ("width", "dim", (24, 48)),
    ("patch size", "patch_size", (4, 7)),
)
AXES: Mapping[str, tuple[Axis, ...]] = {
    "quick": QUICK, "default": SMALL, "gpu": LARGE, "paper": LARGE
}  # fmt: skip


USUAL: Mapping[str, int] = {"heads": 3, "depth": 4, "dim": 48, "patch_size": 4}
LARGE_USUAL: Mapping[str, int] = {"heads": 3, "depth": 12, "dim": 192, "patch_size": 2}
"""What the protocol's ViT has; one run of it is on every axis."""


def arms(preset: str) -> Sequence[Arm]:
    """Return a network for every value of every axis."""
    usual = LARGE_USUAL if AXES[preset] is LARGE else USUAL
    return [
        Arm(f"{name} {value}", "ViT", {} if value == usual[key] else {key: value})
        for name, key, values in AXES[preset]
        for value in values
    ]


def draw(results: Results) -> Figure:
    """Draw NEP above APE, a column per axis."""
    axes = axes_of(results)
    with mpl.rc_context(style.rc()):
        figure = Figure(figsize=(style.TEXT_WIDTH, 2.9))
        grid: Any = figure.subplots(2, len(axes), sharex="col", sharey="row")
        figure.subplots_adjust(left=0.09, right=0.99, top=0.97, bottom=0.14, wspace=0.1, hspace=0.1)
        for column, (name, points) in zip(grid.T, axes.items(), strict=True):
            values, runs = list(points), list(points.values())
            for ax, field in zip(column, ("nep", "ape"), strict=True):
                heights = [[getattr(spectrum, field) for spectrum in of_value] for of_value in runs]
                run_curves(range(len(values)), heights, label="ViT", ax=ax)
                ax.set_xticks(range(len(values)), values)
            unit = " (pixels)" if name == "patch size" else ""
            column[1].set_xlabel(name.capitalize() + unit)
        grid[0, 0].set_ylabel("NEP")
        grid[1, 0].set_ylabel("APE (nats, log scale)")
        runs = [spectrum.ape for of_axis in axes.values() for each in of_axis.values()
                for spectrum in each]  # fmt: skip
        grid[1, 0].set_yscale("log", nonpositive="clip")
        grid[1, 0].set_ylim(min(runs) / 1.5, max(runs) * 1.5)  # one run may lie far from all
        low, high = grid[0, 0].get_ylim()
        grid[0, 0].set_ylim(max(low, -0.02), min(high, 1.02))
        figure.draw_without_rendering()
    return figure


def claims(results: Results) -> list[Claim]:
    """Return the paper's claims next to what was measured, on the ends of their axes."""
    texts = {"heads": "more heads make ViT {}", "width": "a higher dimension makes ViT {}"}
    axes = axes_of(results)
    found = []
    for name, text in texts.items():
        low, *_, high = [(f"{name} {value}", runs) for value, runs in axes[name].items()]
        for word, claim in (("more convex", smaller_nep), ("flatter", smaller_ape)):
            found.append(claim(text.format(word), high, low))
    return found


def axes_of(results: Results) -> dict[str, dict[int, Sequence[Any]]]:
    """Return the spectra by axis and value."""
    axes: dict[str, dict[int, Sequence[Any]]] = {}
    for label, runs in results[WARMUP].items():
        name, value = label.rsplit(" ", 1)
        axes.setdefault(name, {})[int(value)] = runs
    return axes


if __name__ == "__main__":
    seeds = {"default": 3}
    run(Study("appendix_c", arms, (WARMUP,), draw, claims, NOTE, seeds), __doc__)
