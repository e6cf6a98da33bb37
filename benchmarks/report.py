"""The table and the drawing of the Hessian benchmark."""

import itertools
import os
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from presets import OURS
from turns import RIGHT

GPU = Path(__file__).parent / "results" / "gpu.md"
K = 5


def _later(described: dict[str, Any]) -> str:
    """Say which workloads were measured again at a later commit, where some were."""
    return "".join(
        f" {' and '.join(again['workloads'])} again at commit {again['commit']}, {again['began']}."
        for again in described.get("again", [])
    )


def table(rows: list[dict[str, Any]], described: dict[str, Any], folder: Path) -> str:
    """Return the rows as Markdown, with links for a page in a folder."""
    versions = ", ".join(f"{k} {v or 'absent'}" for k, v in described["versions"].items())
    lines = [
        "# Hessian benchmark",
        "",
        f"{described['cpu']}, {described['cores']} cores, {described['threads']} thread(s); "
        f"{described['began']} to {described['ended']}; preset `{described['preset']}`.",
        f"Commit {described['commit']}, Python {described['python']}, {versions}."
        + _later(described),
        "",
        "Cost in gradients on the same data (mean over the turns), Hessian-vector products over "
        f"all of the data, how many of the {K} largest by magnitude are right to {RIGHT:g} (mean "
        "over turns and mini-batches), and the largest relative error against float64. W4: error "
        "of the extreme nodes, mass of the density. *Part*: fewer images, for peers that are too "
        "slow for the whole, next to ours on the same ones. "
        f"GPU: [gpu.md]({Path(os.path.relpath(GPU, folder)).as_posix()}).",
        "",
        "| workload | model | images | solver | gradients | products | right | largest error | "
        "turns |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["status"] != "ok":
            cells = [f"fails: {r['status']}", "", "", "", ""]
        else:
            right = f"{r['right']:.3g} of {K}" if "right" in r else f"mass {r['mass']:.3f}"
            right = right.replace("mass nan", "")
            error = "not given" if np.isnan(r["error"]) else f"{r['error']:.1e}"
            turns = str(len(r["ratios"]))
            cells = [f"{r['gradients']:.1f}", f"{r['hvps']:.1f}", right, error, turns]
        name = f"*part of* {r['workload']}" if r["part"] else r["workload"]
        lines.append(f"| {' | '.join([name, r['model'], r['images'], r['solver'], *cells])} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw cost against the largest error of W1 and W2; a hollow mark is a wrong set."""
    workload_rows = {w: [r for r in rows if r["workload"] == w] for w in ("W1", "W2")}
    titles = {"W1": "ResNet-20", "W2": "ViT, dim 96, depth 6"}
    names = list(dict.fromkeys(r["solver"] for each in workload_rows.values() for r in each))
    if not names:
        return
    markers = dict(zip(names, itertools.cycle("*Pos^vD"), strict=False))
    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.1), sharey=True, layout="constrained")
        for ax, (workload, each) in zip(axes, workload_rows.items(), strict=True):
            for r in each:
                if r["status"] != "ok" or not np.isfinite(r["error"]):
                    continue
                color = f"C{names.index(r['solver'])}"
                ax.plot(
                    r["gradients"],
                    r["error"],
                    marker=markers[r["solver"]],
                    ms=10 if r["solver"] in OURS else 6,
                    ls="",
                    color=color,
                    mfc=color if r["right"] == K else "none",
                )
            ax.axhline(RIGHT, color="0.6", lw=0.8, ls="--", zorder=0)
            ax.set(yscale="log", title=titles[workload], xlabel="Cost (gradients)")
            ax.set_xlim(left=0)
        axes[0].set_ylabel(f"Largest relative error, top {K}")
        handles = [
            Line2D([], [], ls="", marker=markers[n], color=f"C{i}", label=n)
            for i, n in enumerate(names)
        ]
        handles.append(
            Line2D(
                [], [], ls="", marker="o", mfc="none", color="0.4", label="hollow: not all 5 right"
            )
        )
        fig.legend(handles=handles, loc="outside right center", frameon=False, fontsize=7)
        fig.savefig(path, dpi=150)
        plt.close(fig)
