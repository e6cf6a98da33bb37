"""Which package gives right answers where published ones have been seen to fail?

    python benchmarks/correctness.py [--only dropout,no_ghosts] [--limit 60]

Every check of `checks_curvature.py` and `checks_surface.py` runs on this package and on every peer
that is installed, each in a process of its own with a time limit, two at once, on small float32
models on the CPU. The table says for each: right; wrong; error (it raised); refuses (it says, as
documented, that it cannot); outside its scope (it does not claim to); timeout; not installed.
"""

import argparse
import json
import multiprocessing
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import machine
import torch
from checks_curvature import CURVATURE, Wrong
from checks_surface import SURFACES
from peers import PEERS, OutsideScope, Refuses, installed

CHECKS = {**CURVATURE, **SURFACES}
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "scipy",
    "PyHessian",
    "hessian-eigenthings",
    "curvlinops-for-pytorch",
    "loss-landscapes",
)
MARKS = {"right": "✓", "wrong": "**wrong**", "outside its scope": "–", "not installed": ""}


def judge(check: str, name: str, answer: Connection) -> None:
    """Run one check on one package and send (verdict, detail)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # some peers draw start vectors from the global state
    warnings.simplefilter("ignore")
    peer = PEERS[name][1]()
    try:
        CHECKS[check](peer)
        answer.send(("right", ""))
    except Wrong as error:
        reason = getattr(type(peer), "scope", {}).get(check)
        answer.send(("outside its scope", reason) if reason else ("wrong", _first_line(error)))
    except OutsideScope as error:
        answer.send(("outside its scope", _first_line(error)))
    except Refuses as error:
        answer.send(("refuses", _first_line(error)))
    except BaseException as error:
        answer.send(("error", f"{type(error).__name__}: {_first_line(error)}"))


def run(check: str, name: str, limit: float) -> dict[str, object]:
    """Return verdict, detail and seconds of one check on one package."""
    if not installed(name):
        return {"verdict": "not installed", "detail": "", "seconds": 0.0}
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    started = time.perf_counter()
    process = context.Process(target=judge, args=(check, name, theirs), daemon=True)
    process.start()
    theirs.close()
    verdict, detail = "timeout", f"longer than {limit:g} s"
    try:
        if ours.poll(limit):
            verdict, detail = ours.recv()
    except EOFError:
        verdict, detail = "error", "the process ended without an answer"
    process.join(5 if verdict != "timeout" else 0)
    process.kill()
    process.join()
    seconds = round(time.perf_counter() - started, 2)
    return {"verdict": verdict, "detail": detail, "seconds": seconds}


def table(results: dict[str, dict[str, dict[str, object]]]) -> str:
    """Return the verdicts as Markdown."""
    lines = []
    for title, checks in (("Curvature", CURVATURE), ("Surfaces", SURFACES)):
        rows = [check for check in checks if check in results]
        if not rows:
            continue
        names = [
            name
            for name in PEERS
            if any(results[c][name]["verdict"] in ("right", "wrong", "error") for c in rows)
        ]
        lines += [f"| {title} | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for check in rows:
            verdicts = [str(results[check][name]["verdict"]) for name in names]
            said = (CHECKS[check].__doc__ or check).splitlines()[0]
            lines.append(f"| {said} | {' | '.join(MARKS.get(v, v) for v in verdicts)} |")
        lines.append("")
    absent = [name for name in PEERS if not installed(name)]
    lines.append(
        "✓ right; error: it raises; refuses: it says that it cannot, or that it has not converged; "
        "– outside what it claims to do. Answers and messages are in `correctness.json`."
    )
    if absent:
        lines.append(f"Not installed: {', '.join(absent)}.")
    return "\n".join(lines) + "\n"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def main() -> None:
    """Run every check on every package, print the table and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(CHECKS))
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a check")
    parser.add_argument("--output", type=Path, default=RESULTS / "correctness.json")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    modules = ["torch", "landscape", *(module for module, _ in PEERS.values())]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    started, where = time.perf_counter(), machine.describe(PACKAGES)
    with ThreadPoolExecutor(2) as pool:  # each waits for a process of its own
        verdicts = {
            check: {name: pool.submit(run, check, name, arguments.limit) for name in PEERS}
            for check in arguments.only
        }
        results = {
            check: {name: answer.result() for name, answer in each.items()}
            for check, each in verdicts.items()
        }
    seconds = round(time.perf_counter() - started, 1)
    text = table(results)
    print(text, f"{seconds} s", sep="\n")
    content = {"machine": where, "seconds": seconds, "results": results}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    arguments.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
