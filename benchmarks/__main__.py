"""Run the comparisons, one script after the other, and write the README's performance table.

    python -m benchmarks [--all | --only hessian,surface] [--table-only]

By default the comparisons of curvature and surfaces with their peers, models and float64 references
included; `--all` adds the scripts that compare with nothing or with other kinds of packages, but
not `gpu`, which needs a GPU. Each script runs in a process of its own and writes
`results/<name>.json`; one that fails is reported and the others still run. The table is
`results/README_TABLE.md`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PEERS = ("hessian", "surface", "correctness", "memory")
OTHERS = (
    "warm_start",
    "precision",
    "scale",
    "adaptive",
    "zoo",
    "probes",
    "corruptions",
    "augmentation",
    "training",
)
SCRIPTS = (*PEERS, *OTHERS)
MODELS = {"resnet20": "ResNet-20", "vit_micro": "ViT (dim 96, depth 6)"}


def main() -> None:
    """Run the scripts, then write the table."""
    parser = argparse.ArgumentParser(description="Run all benchmarks and write the table.")
    parser.add_argument("--only", default=",".join(PEERS), help="scripts, comma-separated")
    parser.add_argument("--all", action="store_true", help="every script but gpu")
    parser.add_argument("--table-only", action="store_true", help="from results that are there")
    arguments = parser.parse_args()
    chosen = list(SCRIPTS) if arguments.all else arguments.only.split(",")
    if unknown := set(chosen) - set(SCRIPTS):
        parser.error(f"--only takes {', '.join(SCRIPTS)}, got {', '.join(sorted(unknown))}")
    failed = []
    started = time.perf_counter()
    for name in () if arguments.table_only else chosen:
        script = HERE / f"{name}.py"
        began = time.perf_counter()
        print(f"== {name}", flush=True)
        code = subprocess.run(
            [sys.executable, str(script)], cwd=HERE.parent, check=False
        ).returncode
        print(f"== {name}: {time.perf_counter() - began:.0f} s, exit status {code}", flush=True)
        if code:
            failed.append(name)
    text = table()
    (RESULTS / "README_TABLE.md").write_text(text)
    print(text)
    print(f"{time.perf_counter() - started:.0f} s in all")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def table() -> str:
    """Return the performance table from the results on disk, as Markdown."""
    hessian = _read("hessian")
    if hessian is None:
        return "No results yet: run `python -m benchmarks`.\n"
    machine = hessian["machine"]
    lines = [
        "Cost of the 5 Hessian eigenvalues largest by magnitude, in gradients on the same data "
        "(mean over start vectors), and how many are right to 1e-3; "
        f"{machine['cpu']}, {machine['threads']} thread(s), {machine['began'][:10]}. GPU: "
        "[gpu.md](gpu.md).",
        "",
        "| workload | solver | gradients | products | right of 5 | largest error |",
        "|---|---|---|---|---|---|",
    ]
    for row in hessian["rows"]:
        if row["workload"].startswith("W4"):
            continue
        model = MODELS.get(row["model"], row["model"])
        title = f"{row['workload']}: {model}, {row['images']} images"
        if row["part"]:
            title += ", a part for slow peers"
        if row["status"] == "ok":
            numbers = f"{row['gradients']:.1f} | {row['hvps']:.1f} | {row['right']:.3g}"
            lines.append(f"| {title} | {row['solver']} | {numbers} | {row['error']:.1e} |")
        else:
            lines.append(f"| {title} | {row['solver']} | fails | | | |")
    lines.append("")
    density = [r for r in hessian["rows"] if r["workload"] == "W4 80 x 1" and not r["part"]]
    cost = {r["solver"]: r["gradients"] for r in density if r["status"] == "ok"}
    if {"landscape", "products alone"} <= cost.keys():
        ratio = cost["landscape"] / cost["products alone"]
        lines.append(f"- Density of 80 steps: {ratio:.2f} times the time of 80 products.")
    for name in ("warm_start", "scale", "memory"):
        found = _read(name)
        if found is not None:
            lines += [f"- {sentence}" for sentence in found["summary"]]
    return "\n".join(lines) + "\n"


def _read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    return content


if __name__ == "__main__":
    main()
