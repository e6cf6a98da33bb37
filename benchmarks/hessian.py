"""How many gradients do Hessian eigenvalues and densities cost, and are they right?

    python benchmarks/hessian.py [--quick | --full] [--only W1,W2] [--rounds 2] [--threads 1]
    python benchmarks/hessian.py --table-only    # the table again, from results that are there

| workload | |
|---|---|
| W1 | ResNet-20 (16, 32, 64 channels), 64 images of 32 x 32 x 3: 5 largest by magnitude |
| W2 | ViT (patch 4, dim 96, depth 6, 3 heads), the same |
| W3 | W1 over 8 batches of 64 |
| W4 | eigen-density on W1: 80 steps of 1 probe, 64 steps of 4 |
| W5 | W1's and W2's models, 10 mini-batches of 16: 5 largest of each mini-batch's own Hessian |

Weights after 200 training steps on Fashion-MNIST. Solvers take turns in one process (A B A B …),
each next to its own timings of one gradient on the same batch, the unit of cost: the mean of the
ratios over the turns is reported; each turn has a start vector of its own. References: see
`references.py`. `--quick` only shows that everything runs; the default gives the peers one turn,
and those that are too slow for W3, W4 and W5 a part of them, next to ours on the same part, which
the table says; `--full` gives everybody the whole. `--only` leaves the rows of other workloads as
they were. W1 and W2 are drawn too: cost against the largest error, `results/hessian.png`.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
import solvers
import torch
import workloads
from presets import PRESETS, Preset, Workload
from references import prepare, reference
from report import draw, table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from turns import Turns, compare, gradient, mean, take_turns, warm_up, worst
from workloads import Batch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "PyHessian",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
)
NAMES = ("W1", "W2", "W3", "W4", "W5")


def rows_of(workload: Workload, preset: Preset) -> list[dict[str, Any]]:
    """Time every solver of a workload and compare with the reference: a row a solver."""
    model = workloads.trained(workload.model, steps=preset.steps, **preset.sizes[workload.model])
    groups = workload.groups()
    data = [batch for group in groups for batch in group]
    exact = [reference(model, group, workload.k, workload.which) for group in groups]
    every = solvers.EIGENVALUES if workload.density is None else solvers.DENSITIES
    names = [n for n in every if n in workload.solvers and solvers.missing(n) is None]
    contenders = {name: contender(name, workload, model, groups) for name in names}
    warm_up(model, data)
    judge = eigenvalues_judged if workload.density is None else densities_judged
    label = f"{workload.title} {workload.model} {workload.size}"
    return [
        {
            "workload": workload.title,
            "part": workload.part,
            "model": workload.model,
            "images": workload.size,
            "solver": name,
            "status": "ok" if turns.error is None else turns.error,
            "gradients": mean(turns.ratios),
            "ratios": turns.ratios,
            "seconds": turns.seconds,
            "reference": [values.tolist() for values in exact],
        }
        | judge(turns, exact)
        for name, turns in take_turns(
            contenders, lambda: gradient(model, data), workload.turns, label
        ).items()
    ]


def contender(
    name: str, workload: Workload, model: nn.Module, groups: list[list[Batch]]
) -> Callable[[int], list[Any]]:
    """Return a function of the seed that solves a workload, an outcome a Hessian."""
    if workload.density is not None:
        estimate = solvers.DENSITIES[name]
        steps, probes = workload.density
        return lambda seed: [estimate(model, group, steps, probes, seed) for group in groups]
    if workload.each and name in solvers.IN_ONE_CALL:
        at_once = solvers.IN_ONE_CALL[name]
        return lambda seed: at_once(model, [group[0] for group in groups], workload.k, seed)
    solve = solvers.EIGENVALUES[name]
    return lambda seed: [solve(model, group, workload.k, seed) for group in groups]


def eigenvalues_judged(turns: Turns, exact: list[np.ndarray]) -> dict[str, Any]:
    """Return products a Hessian, how many eigenvalues are right on average, the largest error."""
    compared = [
        compare(outcome.values, values)
        for each in turns.outcomes
        for outcome, values in zip(each, exact, strict=True)
    ]
    return {
        "hvps": mean(outcome.num_hvps for each in turns.outcomes for outcome in each),
        "right": mean(right for right, _ in compared),
        "error": worst(error for _, error in compared),
        "values": [[outcome.values.tolist() for outcome in each] for each in turns.outcomes],
    }


def densities_judged(turns: Turns, exact: list[np.ndarray]) -> dict[str, Any]:
    """Return products, mass, and the largest error of the extreme nodes."""
    (ends,) = exact
    outcomes = [outcome for (outcome,) in turns.outcomes]
    compared = [compare(np.array(outcome.extremes), np.sort(ends)[::-1]) for outcome in outcomes]
    return {
        "hvps": mean(outcome.num_hvps for outcome in outcomes),
        "mass": mean(outcome.mass for outcome in outcomes),
        "error": worst(error for _, error in compared),
        "extremes": [list(map(float, outcome.extremes)) for outcome in outcomes],
    }


def joined(before: dict[str, Any], now: dict[str, Any], only: list[str]) -> dict[str, Any]:
    """Return an earlier result with the rows of some workloads measured again."""
    kept = [row for row in before["rows"] if row["workload"][:2] not in only]
    if not kept:
        return now
    rows = sorted([*kept, *now["rows"]], key=lambda row: str(row["workload"][:2]))
    described = before["machine"]
    again = [
        each | {"workloads": left}
        for each in described.get("again", [])
        if (left := [name for name in each["workloads"] if name not in only])
    ]
    again.append({"workloads": only} | {key: now["machine"][key] for key in ("commit", "began")})
    return before | {"machine": described | {"again": again}, "rows": rows}


def write_table(content: dict[str, Any], folder: Path) -> None:
    """Write the Markdown of a result into a folder."""
    (folder / "hessian.md").write_text(table(content["rows"], content["machine"], folder))


def main() -> None:
    """Run the workloads, print the table, write `results/hessian.json`, `.md` and `.png`."""
    parser = argparse.ArgumentParser(description="Cost and accuracy of Hessian spectra.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="tiny models; shows that it runs")
    size.add_argument("--full", action="store_true", help="every solver on every workload")
    parser.add_argument("--only", default=",".join(NAMES), help="workloads, comma-separated")
    parser.add_argument("--rounds", type=int, help="turns of each solver")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--table-only", action="store_true", help="from results that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = "quick" if arguments.quick else "full" if arguments.full else "default"
    preset, only = PRESETS[name], arguments.only.split(",")
    if unknown := set(only) - set(NAMES):
        parser.error(f"--only takes W1 to W5, got {', '.join(sorted(unknown))}")
    chosen = list(preset.only(only, arguments.rounds))
    output = arguments.output or (RESULTS if name != "quick" else RESULTS / "quick")
    output.mkdir(parents=True, exist_ok=True)
    described = machine.describe(PACKAGES) | {"preset": name}
    path = output / "hessian.json"
    before = json.loads(path.read_text()) if path.exists() else None
    if arguments.table_only:
        if before is None:
            parser.error(f"--table-only needs results, got none at {path}")
        write_table(before, output)
        return
    began = time.perf_counter()
    prepare(chosen, preset.steps, preset.sizes)
    tqdm.write(f"training and references: {time.perf_counter() - began:.0f} s")
    rows: list[dict[str, Any]] = []
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(action="ignore"):
        for workload in chosen:
            began = time.perf_counter()
            rows += rows_of(workload, preset)
            spent = time.perf_counter() - began
            tqdm.write(f"{workload.title} {workload.model} {workload.size}: {spent:.0f} s")
            described["ended"] = machine.now()
            content = {"machine": described, "unit": "one gradient", "rows": rows}
            if set(only) < set(NAMES) and before is not None:
                content = joined(before, content, only)
            path.write_text(json.dumps(content, indent=1) + "\n")
            write_table(content, output)
            draw(content["rows"], output / "hessian.png")
    print(table(rows, described, output))


if __name__ == "__main__":
    main()
