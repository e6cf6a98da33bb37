"""How honest is the error that an adaptive loss surface reports, and how many points does it take?

Grids whose every value is known are given to the rule of `loss_surface(tol=…)`, which asks for a
part of the values, interpolates the others and reports the largest error that it expects there.
The true largest error is divided by the reported one: above 1 the report was too small. The grids:
the surfaces that Park & Kim published (their CSV files: those given, or those in the folder that
the environment variable LANDSCAPE_REFERENCE names, as for the tests), at 60 tolerances from 0.001
to 0.5; and random functions on grids of 11 to 41 points a side, each at a tolerance from 0.001 to
0.5 (log-uniform): sums of one to five bumps, waves or ridges of width 0.1 to 2 on [-1, 1]², on even
grids, on uneven ones (uniform coordinates, or powers of even ones), rounded to multiples of 1/64 as
an accuracy over 64 samples is, and with a pit three steps wide at the origin, where a loss is
sharpest and a grid is looked at first, or anywhere.

    python benchmarks/adaptive.py [--published VIT.csv RESNET.csv] [--functions 1000]
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
from tqdm import tqdm

from landscape import load_published_surface
from landscape.probes.adaptive import interpolate

OUTPUT = Path(__file__).parent / "results" / "adaptive.json"
Grid = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Coordinates `(p,)` and `(q,)`; values `(p, q)` to interpolate, and a part known beside."""
Axis = Callable[[np.random.Generator, int], np.ndarray]
"""Draws the coordinates of a given number of points."""


def judge(grid: Grid, tol: float) -> dict[str, float]:
    """Return the share of points measured, and the true over the reported error of the others."""
    x, y, values, known = grid

    def measure(wanted: np.ndarray) -> np.ndarray:
        return np.where(wanted, values, np.nan)[..., None]

    found = interpolate(x, y, measure, np.array([tol]), known[..., None])
    finite = np.isfinite(values)
    error = float(np.abs(found.values[..., 0][finite] - values[finite]).max())
    reported = float(found.error[0])
    ratio = error / reported if reported else float(error > 0)
    return {"tol": tol, "measured": float(found.measured.mean()), "ratio": ratio}


def published(path: Path) -> dict[str, Grid]:
    """Return the quantities of a published surface."""
    surface = load_published_surface(path)
    x, y, nothing = surface.x, surface.y, np.zeros_like(surface.nll)
    return {
        "NLL": (x, y, surface.nll, nothing),
        "NLL + L2": (x, y, surface.nll, surface.l2),
        "accuracy": (x, y, surface.accuracy, nothing),
    }


def even(rng: np.random.Generator, points: int) -> np.ndarray:
    """Return evenly spaced coordinates."""
    return np.linspace(-1, 1, points)


def uneven(rng: np.random.Generator, points: int) -> np.ndarray:
    """Return coordinates that are uniform or denser around the origin, which is one of them."""
    if rng.random() < 0.5:
        drawn = np.sort(rng.uniform(-1, 1, points))
        return drawn - drawn[np.abs(drawn).argmin()]
    plain = np.linspace(-1, 1, points)
    return np.sign(plain) * np.abs(plain) ** rng.uniform(1.5, 3)


def random_grid(rng: np.random.Generator, axis: Axis) -> Grid:
    """Return a sum of bumps, waves or ridges."""
    x, y = (axis(rng, int(rng.integers(11, 42))) for _ in range(2))
    across, along = np.meshgrid(x, y, indexing="ij")
    values = np.zeros_like(across)
    kind = rng.integers(3)
    for _ in range(rng.integers(1, 6)):
        (a, b), width, height = rng.uniform(-1, 1, 2), 10 ** rng.uniform(-1, 0.3), rng.normal()
        slanted = across * np.cos(3 * a) + along * np.sin(3 * a)
        if kind == 0:
            values += height * np.exp(-((across - a) ** 2 + (along - b) ** 2) / (2 * width**2))
        elif kind == 1:
            values += height * np.cos(slanted / width + 3 * b)
        else:
            values += abs(height) * np.logaddexp(0, (slanted - b) / (0.3 * width))
    return x, y, values, np.zeros_like(values)


def rounded(rng: np.random.Generator) -> Grid:
    """Return a random function between 0 and 1 in multiples of 1/64, on an even grid."""
    x, y, values, nothing = random_grid(rng, even)
    share = (values - values.min()) / max(np.ptp(values), 1e-12)
    return x, y, np.round(64 * share) / 64, nothing


def pitted(rng: np.random.Generator, at_origin: bool) -> Grid:
    """Return a random function on an even grid with a pit of three by three points."""
    x, y, values, nothing = random_grid(rng, even)
    depth = np.ptp(values) * rng.uniform(0.3, 2)
    row, column = (
        int(np.abs(ends).argmin() if at_origin else rng.integers(1, len(ends) - 1))
        for ends in (x, y)
    )
    slope = np.array([0.5, 1.0, 0.5])
    values[row - 1 : row + 2, column - 1 : column + 2] -= depth * np.outer(slope, slope)
    return x, y, values, nothing


FUNCTIONS: dict[str, Callable[[np.random.Generator], Grid]] = {
    "random, even grid": lambda rng: random_grid(rng, even),
    "random, uneven grid": lambda rng: random_grid(rng, uneven),
    "random, multiples of 1/64": rounded,
    "random, a pit at the origin": lambda rng: pitted(rng, True),
    "random, a pit anywhere": lambda rng: pitted(rng, False),
}


def cases(files: list[Path], functions: int) -> Iterator[tuple[str, Grid, float]]:
    """Yield the name of a family, a grid of it and a tolerance."""
    for path in files:
        for quantity, grid in published(path).items():
            for tol in np.geomspace(0.001, 0.5, 60):
                yield f"{path.stem}, {quantity}", grid, float(tol)
    for number, (name, draw) in enumerate(FUNCTIONS.items()):
        for seed in range(functions):
            rng = np.random.default_rng([seed, number])
            tol = 10 ** rng.uniform(-3, np.log10(0.5))
            yield name, draw(rng), tol


def summarise(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Return what the table says of a family; grids measured as a whole have no error."""
    partly = [row for row in rows if row["measured"] < 1]
    ratios = np.array([row["ratio"] for row in partly])
    return {
        "grids": len(rows),
        "interpolated": len(partly),
        "measured": float(np.median([row["measured"] for row in rows])),
        "above": int((ratios > 1).sum()),
        "median": float(np.median(ratios)) if len(ratios) else None,
        "largest": float(ratios.max()) if len(ratios) else None,
        "tol of the largest": partly[int(ratios.argmax())]["tol"] if len(ratios) else None,
    }


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Return the families as Markdown."""
    lines = [
        "| values | grids × tolerances | points measured, median | interpolated in part "
        "| of these: true error above the reported one | true / reported, median | largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in summary.items():
        number = "{:.2f}".format if row["interpolated"] else str
        lines.append(
            f"| {name} | {row['grids']} | {100 * row['measured']:.0f} % | {row['interpolated']} "
            f"| {row['above']} | {number(row['median'])} | {number(row['largest'])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Judge all grids, print a table, write `results/adaptive.json` and its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = os.environ.get("LANDSCAPE_REFERENCE")
    files = sorted(Path(folder).glob("*_losslandscape.csv")) if folder else []
    parser.add_argument("--published", type=Path, nargs="*", default=files, help="CSV files")
    parser.add_argument("--functions", type=int, default=1000, help="of each family")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    described = machine.describe(("numpy",))
    found: dict[str, list[dict[str, float]]] = {}
    for name, grid, tol in tqdm(list(cases(arguments.published, arguments.functions))):
        found.setdefault(name, []).append(judge(grid, tol))
    summary = {name: summarise(rows) for name, rows in found.items()}
    print(table(summary))
    machine.write(arguments.output, {"machine": described, "families": summary}, table(summary))


if __name__ == "__main__":
    main()
