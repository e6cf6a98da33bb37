"""What a loss surface costs beside the forward passes it needs, and whether its values are right.

A surface of ResNet-20 (16/32/64 channels) and of a ViT (patch 4, dimension 96, depth 6), after some
training steps on Fashion-MNIST padded to 32×32×3, over a plane of two filter-normalised directions.
The unit is `points × plain forward`: the model called on the same batches of 128, nothing else, as
many times as there are points. Beside `landscape.loss_surface`, the same plane is evaluated by
loss-landscapes (`planar_interpolation`) where it is installed; its metric is the mean loss over all
batches in evaluation mode without gradients, written for it here. Everything runs in turn
(forward, ours, theirs, forward, ours, theirs, …); ratios of CPU time are taken in each round, and
their medians reported. Ours includes its set-up and checks, two and a half more batches: 14 % at
9 points of two batches, nothing at 441; what each further point costs is the difference to a
surface of a single point. Errors are against a plain loop in float64 over fresh copies of the
model, relative, and as a share of the range of the surface.

    python benchmarks/surface.py [--rounds 2] [--points 3] [--images 256] [--threads 1]
"""

import argparse
import copy
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import machine
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import train

from landscape import loss_surface, random_directions
from landscape.models import resnet20, vit_micro
from landscape.probes.directions import Directions
from landscape.training import load_images

Batches = list[tuple[Tensor, Tensor]]

OUTPUT = Path(__file__).parent / "results" / "surface.json"
BATCH_SIZE = 128


def shifted(model: nn.Module, directions: Directions, a: float, b: float) -> nn.Module:
    """Return a copy of the model at θ + a d₁ + b d₂."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            for step, vector in zip((a, b), directions.vectors, strict=True):
                if name in vector:
                    p.add_(torch.from_numpy(vector[name]).to(p.dtype), alpha=step)
    return moved


def mean_loss(forward: Callable[[Tensor], Tensor], batches: Batches) -> float:
    """Return the mean loss over all samples."""
    with torch.no_grad():
        sums = [F.cross_entropy(forward(x), y, reduction="sum") for x, y in batches]
    return float(torch.stack(sums).sum()) / sum(len(y) for _, y in batches)


def plain_loop(
    model: nn.Module, directions: Directions, batches: Batches, coordinates: np.ndarray
) -> np.ndarray:
    """Return the surface in float64, a fresh copy of the model at each point."""
    exact = copy.deepcopy(model).double()
    doubles = [(x.double(), y) for x, y in batches]
    return np.array(
        [
            [mean_loss(shifted(exact, directions, a, b), doubles) for b in coordinates]
            for a in coordinates
        ]
    )


def loss_landscapes_surface(
    model: nn.Module, directions: Directions, batches: Batches, steps: int
) -> np.ndarray:
    """Return the surface by loss-landscapes, at the coordinates −1 + 2 i / steps."""
    from loss_landscapes import planar_interpolation
    from loss_landscapes.metrics.metric import Metric

    class MeanLoss(Metric):
        def __call__(self, model_wrapper: Any) -> float:
            return mean_loss(model_wrapper.forward, batches)

    corners = [shifted(model, directions, a, b) for a, b in [(-1, -1), (1, -1), (-1, 1)]]
    return np.asarray(planar_interpolation(*corners, MeanLoss(), steps))


@contextmanager
def all_cores() -> Iterator[None]:
    """Use every core for what is not timed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds that some work takes, over all threads, and what it returns."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def compare(model: nn.Module, batches: Batches, steps: int, rounds: int) -> dict[str, Any]:
    """Return the costs and the errors of each way on one model."""
    directions = random_directions(model)
    coordinates = -1 + 2 * np.arange(steps) / steps

    def forward() -> None:
        with torch.no_grad():
            for _ in range(steps**2):
                for x, _ in batches:
                    model(x)

    def ours(count: int) -> np.ndarray:
        points = (coordinates[:count], coordinates[:count])
        return loss_surface(model, batches, directions=directions, points=points).nll

    ways: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "landscape": lambda: ours(steps),
        "one point": lambda: ours(1),
    }
    if importlib.util.find_spec("loss_landscapes"):
        ways["loss-landscapes"] = lambda: loss_landscapes_surface(model, directions, batches, steps)
    with all_cores():
        exact = plain_loop(model, directions, batches, coordinates)
    model(batches[0][0])  # warm up
    times: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for name, work in ways.items():
            took, values[name] = seconds(work)
            times[name].append(took)
    rows = {}
    alone = times.pop("one point")
    for name in times:
        ratios = [t / unit for t, unit in zip(times[name], times["forward"], strict=True)]
        rows[name] = {
            "cpu_seconds": round(median(times[name]), 3),
            "forwards_per_point": round(median(ratios), 3),
            "all_rounds": [round(ratio, 3) for ratio in ratios],
        }
        if name == "landscape":
            further = [
                (t - one) / unit * steps**2 / (steps**2 - 1)
                for t, one, unit in zip(times[name], alone, times["forward"], strict=True)
            ]
            rows[name]["forwards_per_further_point"] = round(median(further), 3)
            rows[name]["all_rounds_further_point"] = [round(ratio, 3) for ratio in further]
        if name != "forward":
            error = np.abs(values[name] - exact) / np.abs(exact)
            rows[name]["largest_relative_error"] = float(f"{error.max():.2g}")
            rows[name]["median_relative_error"] = float(f"{np.median(error):.2g}")
            share = np.abs(values[name] - exact).max() / np.ptp(exact)
            rows[name]["largest_error_over_range"] = float(f"{share:.2g}")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_range": [round(float(exact.min()), 4), round(float(exact.max()), 4)],
        "ways": rows,
    }


def main() -> None:
    """Measure both models, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--points", type=int, default=3, help="points along an axis")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30, help="training steps before")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    where = machine.describe(("torch", "numpy", "loss-landscapes"))
    images = load_images("fashion_mnist_mini", size=32, channels=3, batch_size=BATCH_SIZE)
    batches = list(images.subset(arguments.images))
    models = {"ResNet-20": resnet20(num_classes=10), "ViT": vit_micro(num_classes=10)}
    with all_cores():
        for model in models.values():
            train(model, images.with_(batch_size=64, shuffle=True), arguments.steps)
    results = {
        name: compare(model, batches, arguments.points, arguments.rounds)
        for name, model in models.items()
    }
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(
        f"{'model':10s} {'way':16s} {'CPU s':>8s} {'forwards/point':>15s} {'further point':>14s} "
        f"{'max error':>10s} {'of range':>9s}"
    )
    for name, result in results.items():
        for way, row in result["ways"].items():
            error = row.get("largest_relative_error", "")
            share = row.get("largest_error_over_range", "")
            print(
                f"{name:10s} {way:16s} {row['cpu_seconds']:8.2f} {row['forwards_per_point']:15.3f} "
                f"{row.get('forwards_per_further_point', '')!s:>14s} {error!s:>10s} {share!s:>9s}"
            )
    setting = {
        "points": arguments.points**2,
        "images": arguments.images,
        "batch_size": BATCH_SIZE,
        "rounds": arguments.rounds,
        "training_steps": arguments.steps,
    }
    content = {"machine": where, "setting": setting, "models": results}
    machine.write(arguments.output, content)


if __name__ == "__main__":
    main()
