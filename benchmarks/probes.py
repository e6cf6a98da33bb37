"""What the probes of features and robustness cost beside the forward passes that they are made of.

Unit: one plain forward pass over the same 128 images in batches of 32, without gradients, timed
before and after each call, turns A B A B …. A probe needs by definition as many passes as
`needed` says; for a lesion study, where passes share what lies before the lesion, half of one per
unit and the clean one are entered. Models are those of W1 and W2, and with `timm` a ResNet-50 and
a ViT-Ti on images of 96 pixels.

    python benchmarks/probes.py [--quick]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import describe, write
from torch import nn
from turns import seconds_of
from workloads import Batch, batches, trained

import landscape
from landscape import Blocks

RESULTS = Path(__file__).parent / "results"
SOME = ("gaussian_noise", "contrast", "pixelate")
IMAGES, BATCH, SIDE = 128, 32, 96


def subjects(images: int) -> dict[str, tuple[nn.Module, list[Batch]]]:
    """Return the models, each with its batches."""
    small = batches(images // BATCH, BATCH)
    found = {
        "ResNet-20": (trained("resnet20", steps=200), small),
        "ViT (dim 96, depth 6)": (trained("vit_micro", steps=200), small),
    }
    try:
        import timm
    except ImportError:
        return found
    for label, name in (
        ("ResNet-50, 96 px", "resnet50"),
        ("ViT-Ti, 96 px", "vit_tiny_patch16_224"),
    ):
        sizes = {"img_size": SIDE} if name.startswith("vit") else {}
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10, **sizes).eval()
        large = [(nn.functional.interpolate(x, (SIDE, SIDE)), y) for x, y in small]
        found[label] = (model, large)
    return found


def probes(model: nn.Module, data: list[Batch]) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Return the passes over the data that each probe needs, and the probe."""
    blocks = Blocks(model, example=data[0][0])
    units = len(landscape.lesion_study(model, data[:1], blocks=blocks).names)
    pixels = [(torch.rand_like(x), y) for x, y in data]
    return {
        "evaluate": (1, lambda: landscape.evaluate(model, data)),
        "fourier_amplitude": (1, lambda: landscape.fourier_amplitude(model, data, blocks=blocks)),
        "feature_variance": (1, lambda: landscape.feature_variance(model, data, blocks=blocks)),
        "cka": (1, lambda: landscape.cka(model, data, blocks_a=blocks)),
        "lesion_study": (
            1 + units / 2,
            lambda: landscape.lesion_study(model, data, blocks=blocks),
        ),
        "frequency_robustness": (
            4,
            lambda: landscape.frequency_robustness(model, pixels, frequencies=(0.1, 0.5, 0.9)),
        ),
        "corruption_robustness": (
            1 + len(SOME),
            lambda: landscape.corruption_robustness(
                model, pixels, corruptions=SOME, severities=(3,)
            ),
        ),
    }


def measure(model: nn.Module, data: list[Batch], rounds: int) -> dict[str, dict[str, float]]:
    """Return what each probe needs and costs, in forward passes over the data."""

    def unit() -> None:
        with torch.no_grad():
            for x, _ in data:
                model(x)

    unit()
    rows = {}
    for name, (needed, probe) in probes(model, data).items():
        probe()
        ratios = []
        for _ in range(rounds):
            before = seconds_of(unit)[0]
            spent = seconds_of(probe)[0]
            ratios.append(2 * spent / (before + seconds_of(unit)[0]))
        cost = median(ratios)
        rows[name] = {"needed": needed, "cost": round(cost, 2), "ratio": round(cost / needed, 2)}
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    machine = result["machine"]
    names = list(result["models"])
    lines = [
        "# Probes of features and robustness",
        "",
        f"{result['images']} images in batches of {BATCH}, {machine['cpu']}, "
        f"{machine['threads']} thread(s), {machine['began']}, commit {machine['commit']}, PyTorch "
        f"{machine['versions']['torch']}; medians of {result['rounds']} rounds. Cost in plain "
        "forward passes over the same images, beside the passes that the probe needs.",
        "",
        f"| probe | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for probe in result["models"][names[0]]:
        rows = [result["models"][name][probe] for name in names]
        cells = " | ".join(f"{row['cost']:g} of {row['needed']:g}" for row in rows)
        lines.append(f"| `{probe}` | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="32 images, one round")
    parser.add_argument("--output", type=Path, help="JSON; Markdown beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images, rounds = (32, 1) if arguments.quick else (IMAGES, 5)
    folder = RESULTS / "quick" if arguments.quick else RESULTS
    output = arguments.output or folder / "probes.json"
    result: dict[str, Any] = {
        "machine": describe(("torch", "numpy", "timm")),
        "images": images,
        "rounds": rounds,
        "models": {
            name: measure(model, data, rounds) for name, (model, data) in subjects(images).items()
        },
    }
    print(markdown(result))
    write(output, result, markdown(result))


if __name__ == "__main__":
    main()
