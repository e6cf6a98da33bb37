"""How long the 15 corruptions at five severities take: batched tensors against one image at a time.

`landscape.corruptions.corrupt` on all images at once against `imagecorruptions-imaug`, the package
that does the same (frost excepted: its textures are photographs, ours procedural), image by image,
on 32×32 RGB images. One thread for PyTorch and OpenCV, same process, timed in turn A B A B …,
medians over the rounds.

    python benchmarks/corruptions.py [--quick]

The package is needed: `pip install imagecorruptions-imaug`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import describe, write
from torch import Tensor

from landscape.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from landscape.training import load_images

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "numba",
    "scikit-image",
    "pillow",
    "opencv-python",
    "imagecorruptions-imaug",
)


def pictures(count: int) -> Tensor:
    """Return clothes in colour, bytes `(count, 3, 32, 32)`: each channel its own brightness."""
    data = load_images("fashion_mnist_mini", split="test", size=32, channels=3)
    images = data.images[torch.arange(count) % data.num_samples].float()
    generator = torch.Generator().manual_seed(0)
    factor, offset = torch.rand(2, count, 3, 1, 1, generator=generator)
    return (images * (0.4 + 0.5 * factor) + 60 * offset).clamp(0, 255).to(torch.uint8)


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(images: Tensor, rounds: int) -> dict[str, dict[str, list[list[float]]]]:
    """Return the seconds of each corruption, severity and round, of ours (A) and theirs (B)."""
    import cv2
    import imagecorruptions

    cv2.setNumThreads(1)
    arrays = list(np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()))
    few = min(8, len(arrays))
    taken: dict[str, dict[str, list[list[float]]]] = {}
    for name in CORRUPTIONS:
        taken[name] = {"batched": [], "package": []}
        for severity in SEVERITIES:

            def ours(count: int, name: str = name, severity: int = severity) -> object:
                return corrupt(images[:count], name, severity)

            def theirs(count: int, name: str = name, severity: int = severity) -> object:
                return [imagecorruptions.corrupt(a, severity, name) for a in arrays[:count]]

            ours(few), theirs(few)  # tables and compilation
            pairs = [
                (seconds(lambda: ours(len(arrays))), seconds(lambda: theirs(len(arrays))))
                for _ in range(rounds)
            ]
            taken[name]["batched"].append([pair[0] for pair in pairs])
            taken[name]["package"].append([pair[1] for pair in pairs])
    return taken


def summary(taken: dict[str, dict[str, list[list[float]]]], count: int) -> dict[str, Any]:
    """Return microseconds an image (mean over severities of medians over rounds) and ratios."""
    rows: dict[str, Any] = {}
    for name, sides in taken.items():
        means = {
            side: sum(median(times) for times in levels) / len(levels) / count * 1e6
            for side, levels in sides.items()
        }
        ratios = [
            sum(level[i] for level in sides["package"])
            / sum(level[i] for level in sides["batched"])
            for i in range(len(sides["batched"][0]))
        ]
        rows[name] = {
            "batched_us": round(means["batched"], 1),
            "package_us": round(means["package"], 1),
            "ratio": round(means["package"] / means["batched"], 1),
            "ratio_of_each_round": [round(ratio, 1) for ratio in ratios],
        }
    return rows


def overall(rows: dict[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    """Return the mean microseconds an image over corruptions, and their ratio."""
    batched = sum(rows[name]["batched_us"] for name in names) / len(names)
    package = sum(rows[name]["package_us"] for name in names) / len(names)
    return {
        "batched_us": round(batched, 1),
        "package_us": round(package, 1),
        "ratio": round(package / batched, 1),
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    machine = result["machine"]
    lines = [
        "# Corruptions",
        "",
        f"{result['images']} RGB images of 32×32 pixels, five severities, {result['rounds']} "
        f"rounds, one thread of {machine['cpu']} ({machine['cores']} cores, load {machine['load']} "
        f"at the start), {machine['began']}, commit {machine['commit']}, PyTorch "
        f"{machine['versions']['torch']}, imagecorruptions-imaug "
        f"{machine['versions']['imagecorruptions-imaug']}. Microseconds an image: mean over "
        "severities of the medians over rounds. Our frost textures are procedural; the package "
        "reads and enlarges a photograph for every image, so the total is given without frost too.",
        "",
        "| corruption | batched, µs | package, µs | ratio | each round |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["corruptions"].items():
        rounds = ", ".join(str(ratio) for ratio in row["ratio_of_each_round"])
        lines.append(
            f"| {name} | {row['batched_us']} | {row['package_us']} | {row['ratio']} | {rounds} |"
        )
    for name in ("all", "all but frost"):
        row = result[name]
        lines.append(
            f"| **{name}** | {row['batched_us']} | {row['package_us']} | {row['ratio']} | |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="20 images, one round")
    parser.add_argument("--output", type=Path, help="JSON; Markdown beside it")
    arguments = parser.parse_args()
    if find_spec("imagecorruptions") is None:
        parser.error("nothing to compare with here: `pip install imagecorruptions-imaug`")
    count, rounds = (20, 1) if arguments.quick else (arguments.images, arguments.rounds)
    folder = "quick" if arguments.quick else ""
    output = arguments.output or RESULTS / folder / "corruptions.json"
    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: NPY002 (the package draws from the global state)
    result: dict[str, Any] = {
        "machine": describe(PACKAGES),
        "images": count,
        "size": [32, 32],
        "rounds": rounds,
    }
    rows = summary(measure(pictures(count), rounds), count)
    result["corruptions"] = rows
    result["all"] = overall(rows, CORRUPTIONS)
    result["all but frost"] = overall(rows, tuple(n for n in CORRUPTIONS if n != "frost"))
    print(markdown(result))
    write(output, result, markdown(result))


if __name__ == "__main__":
    main()
