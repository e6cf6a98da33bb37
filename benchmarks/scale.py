"""How does the cost of a Hessian grow with data and with parameters, and does a large model fit?

    python benchmarks/scale.py [--rounds 3] [--threads 1]

Time of one product over 1, 2, 4 and 8 batches of 32 images (ResNet-20), and over one such batch for
four widths of ResNet-20; each with its graphs kept and without. Then both edges of the spectrum of
ResNet-50 (23.7 M parameters, 32 x 32) with one eigenvalue each, in a process of its own with its
peak memory. Times are process times, medians over the rounds; the line through them is fitted.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
import matplotlib.pyplot as plt
import numpy as np
import torch
import workloads

import landscape
from landscape import HessianOperator
from landscape.models import create_model

RESULTS = Path(__file__).parent / "results"
COUNTS = (1, 2, 4, 8)
WIDTHS = (8, 16, 24, 32)
SIZE = 32


def seconds(operator: HessianOperator, rounds: int) -> float:
    """Return the median time of a product."""
    v = torch.ones(operator.dim)
    operator.matvec(v)
    times = []
    for _ in range(rounds):
        began = time.process_time()
        operator.matvec(v)
        times.append(time.process_time() - began)
    return float(np.median(times))


def growth(rounds: int) -> list[dict[str, Any]]:
    """Return the time of a product for every size."""
    rows = []
    model = workloads.trained("resnet20", steps=200)
    data = workloads.batches(max(COUNTS), SIZE)
    for count in COUNTS:
        for memory in (0, "auto"):
            operator = HessianOperator(model, data[:count], memory=memory)
            rows.append(
                {"over": "samples", "size": count * SIZE, "kept": operator.num_kept}
                | {"seconds": seconds(operator, rounds)}
            )
    for width in WIDTHS:
        model = create_model("resnet20", width=width).eval()
        for memory in (0, "auto"):
            operator = HessianOperator(model, data[:1], memory=memory)
            rows.append(
                {"over": "parameters", "size": operator.dim, "kept": operator.num_kept}
                | {"seconds": seconds(operator, rounds)}
            )
    return rows


def large() -> dict[str, Any]:
    """Return what the spectrum of ResNet-50 took in this process."""
    torch.manual_seed(0)
    model = create_model("resnet50").eval()
    data = workloads.batches(1, 8)
    began = time.perf_counter()
    spectrum = landscape.hessian_spectrum(
        model, data, k=1, density=False, max_iter=40, max_basis=16, tol=1e-2,
        basis_dtype=torch.float32, memory=1 << 30,
    )  # fmt: skip
    return {
        "parameters": spectrum.dim,
        "samples": spectrum.provenance.num_samples,
        "largest": spectrum.largest.values.tolist(),
        "smallest": spectrum.smallest.values.tolist(),
        "residuals": [*spectrum.largest.residuals, *spectrum.smallest.residuals],
        "converged": bool(spectrum.largest.converged.all() and spectrum.smallest.converged.all()),
        "num_hvps": spectrum.num_hvps,
        "settings": spectrum.provenance.settings,
        "seconds": time.perf_counter() - began,
        "peak_gigabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) / 1e9,
    }


def draw(rows: list[dict[str, Any]], path: Path) -> dict[str, float]:
    """Draw the times with a line through each series; return R² of the lines."""
    quality = {}
    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        fig, axes = plt.subplots(1, 2, figsize=(6, 2.6), layout="constrained")
        for ax, over in zip(axes, ("samples", "parameters"), strict=True):
            for kept in (True, False):
                each = [r for r in rows if r["over"] == over and bool(r["kept"]) is kept]
                x = np.array([r["size"] for r in each]) / (1000 if over == "parameters" else 1)
                y = np.array([r["seconds"] for r in each])
                slope, intercept = np.polyfit(x, y, 1)
                fit = slope * x + intercept
                label = "graphs kept" if kept else "graphs rebuilt"
                quality[f"{over}, {label}"] = float(1 - ((y - fit) ** 2).sum() / y.var() / len(y))
                (marks,) = ax.plot(x, y, "o", label=label)
                ax.plot(x, fit, lw=1, color=marks.get_color())
            unit = " (thousands)" if over == "parameters" else ""
            ax.set(xlim=(0, None), ylim=(0, None), xlabel=over.capitalize() + unit)
            ax.set_ylabel("One product (s)")
        axes[0].legend(frameon=False)
        fig.savefig(path, dpi=120)
        plt.close(fig)
    return quality


def main() -> None:
    """Measure, print, write `results/scale.json` and `scale.png`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(large()))
        return
    described = machine.describe(("torch", "numpy"))
    rows = growth(arguments.rounds)
    quality = draw(rows, arguments.output / "scale.png")
    command = [sys.executable, __file__, "--child", "--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    lines = ", ".join(f"{name} {value:.3f}" for name, value in quality.items())
    summary = [
        f"One product against size, R² of a straight line: {lines}.",
        f"ResNet-50 ({found['parameters'] / 1e6:.1f} M parameters), both edges, "
        f"{found['num_hvps']} products on {found['samples']} images: peak memory "
        f"{found['peak_gigabytes']:.1f} GB, {found['seconds']:.0f} s, "
        f"{'converged' if found['converged'] else 'not converged'} to {found['settings']['tol']}.",
    ]
    print("\n".join(summary))
    content = {"machine": described, "summary": summary, "rows": rows, "resnet50": found}
    (arguments.output / "scale.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
