"""How many gradients do Hessian eigenvalues and densities cost, and are they right?

    python benchmarks/hessian.py [--quick | --full] [--only W1,W2] [--rounds 2] [--threads 1]

| workload | |
|---|---|
| W1 | ResNet-20 (16, 32, 64 channels), 64 images of 32 x 32 x 3: 5 largest by magnitude |
| W2 | ViT (patch 4, dim 96, depth 6, 3 heads), the same |
| W3 | W1 over 8 batches of 64 |
| W4 | eigen-density on W1: 80 steps of 1 probe, 64 steps of 4 |
| W5 | W1's and W2's models, 10 mini-batches of 16: 5 largest of each mini-batch's own Hessian |

Weights after 200 training steps on Fashion-MNIST. Solvers take turns in one process (A B A B …),
each next to its own timings of one gradient on the same batch, the unit of cost: the mean of the
ratios over the turns is reported; each turn has a start vector of its own. Reference: `eigsh` at
1e-8 on float64 products of plain autograd. `--quick` only shows that everything runs; the default
gives peers fewer turns, and takes parts of W3 and W4; `--full` is the whole table. W1 and W2 are
drawn too: cost against the largest error, `results/hessian.png`.
"""

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import matplotlib.pyplot as plt
import numpy as np
import solvers
import torch
import torch.nn.functional as F
import workloads
from matplotlib.lines import Line2D
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from workloads import Batch

K = 5
RIGHT = 1e-3  # relative error of a value that counts as right
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "PyHessian",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
)


@dataclass(frozen=True)
class Preset:
    """What is run of each workload."""

    batch: int
    steps: int
    sizes: dict[str, dict[str, int]]  # model -> its sizes
    several: int  # batches of W3
    densities: tuple[tuple[int, int], ...]  # (steps, probes) of W4
    minibatches: int
    minibatch: int
    peers: dict[str, tuple[str, ...]]  # workload -> its solvers; all where it is not named
    rounds: dict[str, dict[str, int]]  # workload -> solver -> turns; 1 where it is not named


FULL_SIZES: dict[str, dict[str, int]] = {"resnet20": {}, "vit_micro": {}}
QUICK_SIZES = {"resnet20": {"width": 4}, "vit_nano": {"dim": 24, "depth": 2, "heads": 3}}
ALL = tuple(solvers.EIGENVALUES)
OURS = ("landscape", "landscape, certify=False")
DEFAULT = tuple(solver for solver in ALL if solver not in solvers.SLOW)
STARTS = {"landscape": 5, "landscape, certify=False": 3, "kept graph + eigsh": 2}
PRESETS = {
    "quick": Preset(
        batch=8,
        steps=10,
        sizes=QUICK_SIZES,
        several=2,
        densities=((12, 1),),
        minibatches=2,
        minibatch=4,
        peers={"W1": DEFAULT, "W2": DEFAULT, "W3": OURS, "W5": OURS},
        rounds={},
    ),
    "default": Preset(
        batch=64,
        steps=200,
        sizes=FULL_SIZES,
        several=2,
        densities=((80, 1),),
        minibatches=10,
        minibatch=16,
        peers={
            "W1": DEFAULT,
            "W2": DEFAULT,
            "W3": (*OURS, "kept graph + eigsh"),
            "W4": ("landscape", "products alone", "PyHessian"),
            "W5": ("landscape", "PyHessian"),
        },
        rounds={"W1": STARTS, "W2": STARTS, "W4": {"landscape": 3, "products alone": 3}},
    ),
    "full": Preset(
        batch=64,
        steps=200,
        sizes=FULL_SIZES,
        several=8,
        densities=((80, 1), (64, 4)),
        minibatches=10,
        minibatch=16,
        peers={},
        rounds={
            "W1": dict.fromkeys(ALL, 5),
            "W2": dict.fromkeys(ALL, 5),
            "W4": {"landscape": 3, "products alone": 3},
            "W5": dict.fromkeys(ALL, 2),
        },
    ),
}


def gradient(model: nn.Module, batches: list[Batch]) -> None:
    """One gradient of each batch: the unit of cost."""
    for x, y in batches:
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def warm_up(model: nn.Module, batches: list[Batch]) -> None:
    """One product, so that the first contender does not pay for what is done once a process."""
    operator = solvers.plain_operator(model, batches[:1])
    operator.matvec(np.ones(operator.shape[0], dtype=operator.dtype))
    gradient(model, batches)


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long `work` took, and what it returned."""
    began = time.perf_counter()
    out = work()
    return time.perf_counter() - began, out


def compare(values: np.ndarray, exact: np.ndarray) -> tuple[int, float]:
    """Return how many of `exact` are among `values` (each used once), and the largest error."""
    left = list(values)
    right = 0
    for value in exact:
        near = [v for v in left if abs(v - value) <= RIGHT * abs(value)]
        if near:
            left.remove(min(near, key=lambda v: abs(v - value)))
            right += 1
    if len(values) != len(exact):
        return right, float("nan")
    return right, float(np.max(np.abs(values - exact) / np.abs(exact)))


def take_turns(
    contenders: dict[str, Callable[[int], Any]],
    unit: Callable[[], None],
    rounds: dict[str, int],
    label: str,
) -> Iterator[tuple[str, list[float], list[float], list[Any], str | None]]:
    """Run every contender some times in turns; yield (name, ratios, seconds, outcomes, error).

    Args:
        contenders: Name to a function of the seed.
        unit: One gradient on the same data.
        rounds: How many turns each has; 1 where it is not named.
        label: Shown on the progress bar.
    """
    ratios: dict[str, list[float]] = {name: [] for name in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    outcomes: dict[str, list[Any]] = {name: [] for name in contenders}
    errors: dict[str, str] = {}
    turns = [
        (seed, name)
        for seed in range(max(rounds.get(name, 1) for name in contenders))
        for name in contenders
        if seed < rounds.get(name, 1)
    ]
    for seed, name in tqdm(turns, desc=label, leave=False):
        if name in errors:
            continue
        gc.collect()
        before = [seconds_of(unit)[0] for _ in range(2)]
        try:
            spent, outcome = seconds_of(lambda: contenders[name](seed))  # noqa: B023
        except Exception as error:  # a peer that fails is a row of the table
            errors[name] = f"{type(error).__name__}: {str(error).partition('. ')[0]}"[:160]
            continue
        after = [seconds_of(unit)[0] for _ in range(2)]
        ratios[name].append(spent / float(np.median(before + after)))
        seconds[name].append(spent)
        outcomes[name].append(outcome)
    for name in contenders:
        yield name, ratios[name], seconds[name], outcomes[name], errors.get(name)


def chosen(preset: Preset, workload: str, every: dict[str, Any]) -> dict[str, Any]:
    """Return the solvers of a workload, those that are installed."""
    names = preset.peers.get(workload, tuple(every))
    return {n: every[n] for n in every if n in names and solvers.missing(n) is None}


def eigenvalue_rows(
    preset: Preset, workload: str, name: str, batches: list[Batch]
) -> list[dict[str, Any]]:
    """Time the top eigenvalues over all of `batches` and compare with the reference."""
    model = workloads.trained(name, steps=preset.steps, **preset.sizes[name])
    exact = workloads.cached("LM", model, batches, lambda: solvers.reference(model, batches, K))

    def run(solve: solvers.Solve) -> Callable[[int], solvers.Outcome]:
        return lambda seed: solve(model, batches, K, seed)

    contenders = {
        n: run(solve) for n, solve in chosen(preset, workload, solvers.EIGENVALUES).items()
    }
    rows = []
    for solver, ratios, seconds, outcomes, error in take_turns(
        contenders,
        lambda: gradient(model, batches),
        preset.rounds.get(workload, {}),
        f"{workload} {name}",
    ):
        compared = [compare(outcome.values, exact) for outcome in outcomes]
        rows.append(
            row(workload, name, solver, ratios, seconds, error)
            | {
                "hvps": mean(outcome.num_hvps for outcome in outcomes),
                "right": mean(right for right, _ in compared),
                "error": worst(err for _, err in compared),
                "values": [outcome.values.tolist() for outcome in outcomes],
                "reference": exact.tolist(),
            }
        )
    return rows


def minibatch_rows(preset: Preset, name: str) -> list[dict[str, Any]]:
    """Time the top eigenvalues of every mini-batch by itself (W5)."""
    model = workloads.trained(name, steps=preset.steps, **preset.sizes[name])
    data = workloads.batches(preset.minibatches, preset.minibatch)
    exact = [
        workloads.cached("LM", model, [b], lambda b=b: solvers.reference(model, [b], K))
        for b in tqdm(data, desc="W5 reference", leave=False)
    ]

    def run(solve: solvers.Solve) -> Callable[[int], list[solvers.Outcome]]:
        return lambda seed: [solve(model, [batch], K, seed) for batch in data]

    def run_native(certify: bool) -> Callable[[int], list[solvers.Outcome]]:
        return lambda seed: solvers.native_each(certify)(model, data, K, seed)

    warm_up(model, data)
    contenders = {n: run(solve) for n, solve in chosen(preset, "W5", solvers.EIGENVALUES).items()}
    for name_of_ours, certify in zip(OURS, (True, False), strict=True):
        if name_of_ours in contenders:
            contenders[name_of_ours] = run_native(certify)
    rows = []
    for solver, ratios, seconds, outcomes, error in take_turns(
        contenders, lambda: gradient(model, data), preset.rounds.get("W5", {}), f"W5 {name}"
    ):
        compared = [
            compare(outcome.values, values)
            for each in outcomes
            for outcome, values in zip(each, exact, strict=True)
        ]
        rows.append(
            row("W5", name, solver, ratios, seconds, error)
            | {
                "hvps": mean(outcome.num_hvps for each in outcomes for outcome in each),
                "right": mean(right for right, _ in compared),
                "error": worst(err for _, err in compared),
                "values": [[outcome.values.tolist() for outcome in each] for each in outcomes],
                "reference": [values.tolist() for values in exact],
            }
        )
    return rows


def density_rows(preset: Preset) -> list[dict[str, Any]]:
    """Time eigen-densities (W4); the extreme nodes are compared with the reference."""
    name = "resnet20"
    model = workloads.trained(name, steps=preset.steps, **preset.sizes[name])
    data = workloads.batches(1, preset.batch)
    edges = np.array(
        [
            workloads.cached(
                end, model, data, lambda end=end: solvers.reference(model, data, 1, end)
            )
            for end in ("LA", "SA")
        ]
    ).ravel()

    def run(
        estimate: solvers.Estimate, steps: int, probes: int
    ) -> Callable[[int], solvers.Density]:
        return lambda seed: estimate(model, data, steps, probes, seed)

    warm_up(model, data)
    rows = []
    for steps, probes in preset.densities:
        contenders = {
            n: run(estimate, steps, probes)
            for n, estimate in chosen(preset, "W4", solvers.DENSITIES).items()
        }
        for solver, ratios, seconds, outcomes, error in take_turns(
            contenders,
            lambda: gradient(model, data),
            preset.rounds.get("W4", {}),
            f"W4 {steps} x {probes}",
        ):
            compared = [compare(np.array(outcome.extremes), edges) for outcome in outcomes]
            rows.append(
                row(f"W4 {steps} x {probes}", name, solver, ratios, seconds, error)
                | {
                    "hvps": mean(outcome.num_hvps for outcome in outcomes),
                    "mass": mean(outcome.mass for outcome in outcomes),
                    "error": worst(err for _, err in compared),
                    "extremes": [list(map(float, outcome.extremes)) for outcome in outcomes],
                    "reference": edges.tolist(),
                }
            )
    return rows


def row(
    workload: str,
    model: str,
    solver: str,
    ratios: list[float],
    seconds: list[float],
    error: str | None,
) -> dict[str, Any]:
    """Return the columns that every workload has."""
    return {
        "workload": workload,
        "model": model,
        "solver": solver,
        "status": "ok" if error is None else error,
        "gradients": mean(ratios),
        "ratios": ratios,
        "seconds": seconds,
    }


def mean(numbers: Any) -> float | None:
    """Return the mean, or None of nothing."""
    numbers = list(numbers)
    return float(np.mean(numbers)) if numbers else None


def worst(numbers: Any) -> float | None:
    """Return the largest, NaN included, or None of nothing."""
    numbers = list(numbers)
    return float(np.max(numbers)) if numbers else None


def table(rows: list[dict[str, Any]], described: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    versions = ", ".join(f"{k} {v or 'absent'}" for k, v in described["versions"].items())
    lines = [
        "# Hessian benchmark",
        "",
        f"{described['cpu']}, {described['cores']} cores, {described['threads']} thread(s); "
        f"{described['began']} to {described['ended']}; preset `{described['preset']}`.",
        f"Commit {described['commit']}, Python {described['python']}, {versions}.",
        "",
        "Cost in gradients on the same data (mean over the turns), Hessian-vector products over "
        f"all of the data, how many of the {K} largest by magnitude are right to {RIGHT:g} (mean "
        "over turns and mini-batches), and the largest relative error against float64. W4: error "
        "of the extreme nodes, mass of the density. GPU: not measured.",
        "",
        "| workload | model | solver | gradients | products | right | largest error | turns |",
        "|---|---|---|---|---|---|---|---|",
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
        lines.append("| " + " | ".join([r["workload"], r["model"], r["solver"], *cells]) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw cost against the largest error of W1 and W2; a hollow mark is a wrong set."""
    workload_rows = {w: [r for r in rows if r["workload"] == w] for w in ("W1", "W2")}
    titles = {"W1": "ResNet-20", "W2": "ViT, dim 96, depth 6"}
    names = list(dict.fromkeys(r["solver"] for each in workload_rows.values() for r in each))
    if not names:
        return
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
                    marker="*" if r["solver"] in OURS else "o",
                    ms=10 if r["solver"] in OURS else 6,
                    ls="",
                    color=color,
                    mfc=color if r["right"] == K else "none",
                )
            ax.axhline(RIGHT, color="0.6", lw=0.8, ls="--", zorder=0)
            ax.set(yscale="log", title=titles[workload], xlabel="Cost [gradients]")
            ax.set_xlim(left=0)
        axes[0].set_ylabel(f"Largest relative error, top {K}")
        handles = [
            Line2D([], [], ls="", marker="*" if n in OURS else "o", color=f"C{i}", label=n)
            for i, n in enumerate(names)
        ]
        handles.append(
            Line2D([], [], ls="", marker="o", mfc="none", color="0.4", label="not all 5 right")
        )
        fig.legend(handles=handles, loc="outside right center", frameon=False, fontsize=7)
        fig.savefig(path, dpi=150)
        plt.close(fig)


def main() -> None:
    """Run the workloads, print the table, write `results/hessian.json` and `.md`."""
    parser = argparse.ArgumentParser(description="Cost and accuracy of Hessian spectra.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="tiny models; shows that it runs")
    size.add_argument("--full", action="store_true", help="the whole table")
    parser.add_argument("--only", default="W1,W2,W3,W4,W5", help="workloads, comma-separated")
    parser.add_argument("--rounds", type=int, help="turns of each solver")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = "quick" if arguments.quick else "full" if arguments.full else "default"
    preset, only = PRESETS[name], arguments.only.split(",")
    if unknown := set(only) - {"W1", "W2", "W3", "W4", "W5"}:
        parser.error(f"--only takes W1 to W5, got {', '.join(sorted(unknown))}")
    if arguments.rounds:
        turns = dict.fromkeys((*ALL, *solvers.DENSITIES), arguments.rounds)
        preset.rounds.update(dict.fromkeys(("W1", "W2", "W3", "W4", "W5"), turns))
    output = arguments.output or (RESULTS if name != "quick" else RESULTS / "quick")
    described = machine.describe(PACKAGES) | {"preset": name}
    conv, vit = preset.sizes
    one = workloads.batches(1, preset.batch)
    several = workloads.batches(preset.several, preset.batch)
    jobs: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = [
        ("W1", lambda: eigenvalue_rows(preset, "W1", conv, one)),
        ("W2", lambda: eigenvalue_rows(preset, "W2", vit, one)),
        ("W3", lambda: eigenvalue_rows(preset, "W3", conv, several)),
        ("W4", lambda: density_rows(preset)),
        ("W5", lambda: minibatch_rows(preset, conv)),
        ("W5", lambda: minibatch_rows(preset, vit)),
    ]
    rows: list[dict[str, Any]] = []
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(action="ignore"):
        for workload, job in jobs:
            if workload in only:
                began = time.perf_counter()
                rows += job()
                tqdm.write(f"{workload}: {time.perf_counter() - began:.0f} s")
                described["ended"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
                output.mkdir(parents=True, exist_ok=True)
                content = {"machine": described, "unit": "one gradient", "rows": rows}
                (output / "hessian.json").write_text(json.dumps(content, indent=1) + "\n")
                (output / "hessian.md").write_text(table(rows, described))
                draw(rows, output / "hessian.png")
    print(table(rows, described))


if __name__ == "__main__":
    main()
