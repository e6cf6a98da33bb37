"""How much memory do the workloads take, ours next to the peers', and does any of it leak?

    python benchmarks/memory.py [--calls 100]

Peak resident memory of one solver on one workload, each in a process of its own on one thread, two
at once, less what the process holds with model and data loaded and one gradient taken. W1 and W2 as
in `hessian.py`, but for 2 eigenvalues, which need the same graphs; W4 is the density of 80 steps,
here of 20. For leaks, the same small calls are repeated in one process, and the growth of its
resident memory after the first fifth of them is reported.
"""

import argparse
import json
import resource
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import machine
import solvers
import torch
import turns
import workloads
from hessian import PACKAGES
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import landscape

OUTPUT = Path(__file__).parent / "results" / "memory.json"
K = 2
MODELS = {"W1": "resnet20", "W2": "vit_micro", "W4": "resnet20"}
EACH_KIND = (  # other settings of the same need the same graphs
    "landscape",
    "PyHessian",
    "curvlinops + eigsh, tol=1e-3",
    "hessian-eigenthings",
    "kept graph + eigsh",
)
JOBS = {
    "W1": EACH_KIND,
    "W2": EACH_KIND,
    "W4": ("landscape", "hessian-eigenthings"),
}


def resident() -> int:
    """Return the resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """Return the largest resident bytes so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def measure(workload: str, solver: str) -> dict[str, float]:
    """Run one solver in this process and return its megabytes."""
    model = workloads.trained(MODELS[workload], steps=200)
    data = workloads.batches(1, 64)
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(action="ignore"):
        turns.gradient(model, data)
        before, floor = resident(), peak()
        if workload == "W4":
            solvers.DENSITIES[solver](model, data, 20, 1, 0)
        else:
            solvers.EIGENVALUES[solver](model, data, K, 0)
    # A peak that is not above that of loading says only that the solver took no more.
    return {"megabytes": (peak() - before) / 1e6, "at_most": peak() == floor}


def leaks(calls: int) -> dict[str, Any]:
    """Return megabytes of growth over repeated calls of each probe, after the first fifth."""
    model = workloads.trained("vit_nano", steps=10, dim=24, depth=2, heads=3)
    data = workloads.batches(1, 8)
    every = {
        "hessian_max_spectrum": lambda: landscape.hessian_max_spectrum(model, data, k=1, tol=1e-2),
        "hessian_density": lambda: landscape.hessian_density(model, data, num_steps=10),
        "hessian_trace": lambda: landscape.hessian_trace(model, data, num_matvecs=9),
    }
    grown = {}
    for name, call in every.items():
        for index in range(calls):
            if index == calls // 5:
                before = resident()
            call()
        grown[name] = (resident() - before) / 1e6
    graph = landscape.HessianOperator(model, data).bytes_per_sample * len(data[0][1]) / 1e6
    return {"calls": calls, "grown": grown, "graph_of_one_call": graph}


def main() -> None:
    """Measure each in a process of its own, print, write `results/memory.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child is not None:
        found = measure(*arguments.child) if arguments.child else leaks(arguments.calls)
        print(json.dumps(found))
        return
    described = machine.describe(PACKAGES)
    for name in ("resnet20", "vit_micro"):
        workloads.trained(name, steps=200)
    workloads.trained("vit_nano", steps=10, dim=24, depth=2, heads=3)
    jobs = [(w, s) for w, each in JOBS.items() for s in each if solvers.missing(s) is None]
    with ThreadPoolExecutor(2) as pool:  # each waits for a process of its own
        leaking = pool.submit(child, arguments.calls)
        found = pool.map(lambda job: child(arguments.calls, *job), jobs)
        rows = [
            {"workload": workload, "solver": solver} | one
            for (workload, solver), one in zip(
                jobs, tqdm(found, desc="memory", total=len(jobs), leave=False), strict=True
            )
        ]
    leaked = leaking.result()
    summary = []
    for workload in JOBS:
        each = [r for r in rows if r["workload"] == workload]
        listed = ", ".join(
            f"{r['solver']} {r['megabytes']:.0f} MB" if "megabytes" in r else f"{r['solver']} fails"
            for r in each
        )
        summary.append(f"Peak memory above model, data and one gradient, {workload}: {listed}.")
    grown = ", ".join(f"{name} {mb:.1f} MB" for name, mb in leaked["grown"].items())
    summary.append(
        f"Growth from call {leaked['calls'] // 5} to {leaked['calls']}: {grown} (one call keeps a "
        f"graph of {leaked['graph_of_one_call']:.1f} MB)."
    )
    print("\n".join(summary))
    content = {"machine": described, "summary": summary, "rows": rows, "leaks": leaked}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


def child(calls: int, *job: str) -> dict[str, Any]:
    """Return what this script prints as a child."""
    command = [sys.executable, __file__, "--calls", str(calls), "--child", *job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
