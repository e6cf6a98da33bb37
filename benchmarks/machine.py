"""The machine and the versions that a benchmark ran on, and the files of what it found."""

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def describe(packages: tuple[str, ...]) -> dict[str, object]:
    """Return CPU, cores, threads, commit, versions of the packages installed, and the time."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "began": now(),
    }


def write(path: Path, result: dict[str, Any], table: str = "") -> None:
    """Write what was measured as JSON, and its table, if there is one, as Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    if table:
        path.with_suffix(".md").write_text(table)


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Return the commit of the checkout, with a `+` where its package or benchmarks differ."""
    here = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "landscape", "benchmarks/*.py")
    return (git("rev-parse", "--short", "HEAD") + ("+" if changed else "")) or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
