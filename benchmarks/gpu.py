"""How near to the limits of a GPU are products, spectra and surfaces?

    python benchmarks/gpu.py [--only vit_tiny,resnet50] [--rounds 3] [--device cuda]

| row | |
|---|---|
| gradient, product | milliseconds of a gradient and of a Hessian product (graph kept), batch 64 |
| of the peak | floating-point operations of a product over its time, against the best `a @ b` |
| W1, W3 | 5 eigenvalues largest by magnitude of one batch and of 8, certified, in gradients |
| W4 | density of 80 steps over the time of 80 products |
| W5 | 64 mini-batches of 16: in lock-step, one after the other, and by PyHessian (a part of them) |
| surface | a point of a 9 x 9 surface over the plain forward pass at batch 128 |

Models are untrained but for 20 steps on Fashion-MNIST, at 32 x 32 and, where the name says so, at
224 x 224. Everything runs in turns (A B A B …), after a round that is not counted; medians. A
product has twice the multiplications of a gradient beyond what is kept, so its count is twice that
of a gradient (`torch.utils.flop_counter`). Nothing is written without a CUDA device, unless
`--output` says where: `--device cpu --quick` shows that everything runs.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import machine
import solvers
import torch
import torch.nn.functional as F
import workloads
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from workloads import Batch

import landscape
from landscape import HessianOperator
from landscape.models import create_model

RESULTS = Path(__file__).parent / "results"
LARGE = {"image_size": 224, "patch_size": 16, "dim": 768, "heads": 12}
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet20": ("resnet20", 32, {}),
    "resnet50": ("resnet50", 32, {}),
    "vit_tiny": ("vit_tiny", 32, {}),
    "vit_small": ("vit_small", 32, {}),
    "resnet50_224": ("resnet50", 224, {"stem": "imagenet"}),
    "vit_base_224": ("vit_small", 224, LARGE),
}
QUICK: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet20": ("resnet20", 32, {"width": 4}),
    "vit_nano": ("vit_nano", 32, {"dim": 24, "depth": 2}),
}


def main() -> None:
    """Measure every model, print the rows and write `results/gpu.json`."""
    parser = argparse.ArgumentParser(description="Products, spectra and surfaces on a GPU.")
    parser.add_argument("--only", help="models, comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models; shows that it runs")
    parser.add_argument("--output", type=Path, help="the JSON file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; `--device cpu --quick` shows that everything runs")
    device = torch.device(arguments.device)
    models = QUICK if arguments.quick else MODELS
    names = arguments.only.split(",") if arguments.only else list(models)
    if unknown := set(names) - set(models):
        parser.error(f"--only takes {', '.join(models)}, got {', '.join(sorted(unknown))}")
    where = machine.describe(("torch", "numpy", "PyHessian"))
    where["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    content: dict[str, Any] = {"machine": where, "peak": peak(device), "rows": []}
    output = arguments.output or (RESULTS / "gpu.json" if device.type == "cuda" else None)
    with sdpa_kernel(SDPBackend.MATH):
        for name in names:
            row = measure(name, *models[name], device, arguments.rounds, quick=arguments.quick)
            row["of_the_peak"] = row["product_flops_per_s"] / content["peak"]
            content["rows"].append(row)
            print(json.dumps(row, indent=1), flush=True)
            if output is not None:  # after each model: the next may not fit
                output.write_text(json.dumps(content, indent=1) + "\n")


def measure(
    name: str,
    model_name: str,
    image_size: int,
    sizes: dict[str, Any],
    device: torch.device,
    rounds: int,
    *,
    quick: bool,
) -> dict[str, Any]:
    """Return all rows of one model."""
    torch.manual_seed(0)
    model = create_model(model_name, **sizes).to(device)
    batch_size, count, mini = (64, 8, 64) if image_size == 32 else (16, 2, 16)
    if quick:
        batch_size, count, mini = 8, 2, 4
    training = data(20, batch_size, image_size, device)
    workloads.train(model, training, 2 if quick else 20)
    row: dict[str, Any] = {"model": name, "images": batch_size}
    row |= product(model, training[:1], device, rounds)
    row |= spectra(model, training[:count], row["gradient_ms"] / 1e3, device, rounds)
    row |= mini_batches(model, data(mini, 4 if quick else 16, image_size, device), device, rounds)
    row |= surface(model, data(2, 8 if quick else 128, image_size, device), device, quick=quick)
    return row


def product(
    model: nn.Module, batches: list[Batch], device: torch.device, rounds: int
) -> dict[str, Any]:
    """Return what a gradient and a product of one batch take."""
    operator = HessianOperator(model, batches)
    v = torch.randn(operator.dim, device=device)

    def gradient() -> None:
        for x, y in batches:
            torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))

    with FlopCounterMode(display=False) as counter:
        gradient()
    taken = in_turns({"gradient": gradient, "product": lambda: operator.matvec(v)}, device, rounds)
    gradient_s, product_s = median(taken["gradient"]), median(taken["product"])
    return {
        "parameters": operator.dim,
        "gradient_ms": 1e3 * gradient_s,
        "product_ms": 1e3 * product_s,
        "product_in_gradients": product_s / gradient_s,
        "product_flops_per_s": 2 * counter.get_total_flops() / product_s,
    }


def spectra(
    model: nn.Module, batches: list[Batch], unit: float, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Return W1 and W3 in gradients of their data, and W4 over its products."""
    seeds = iter(range(1000))

    def top(data: list[Batch]) -> int:
        generator = torch.Generator().manual_seed(next(seeds))
        return landscape.top_eigenpairs(
            HessianOperator(model, data), generator=generator
        ).num_matvecs

    products: dict[str, list[int]] = {"w1": [], "w3": []}
    taken = in_turns(
        {
            "w1": lambda: products["w1"].append(top(batches[:1])),
            "w3": lambda: products["w3"].append(top(batches)),
            "w4": lambda: landscape.hessian_density(model, batches[:1], num_steps=80),
            "w4_products": lambda: repeat(HessianOperator(model, batches[:1]), 80),
        },
        device,
        rounds,
    )
    return {
        "w1_gradients": median(taken["w1"]) / unit,
        "w1_products": median(products["w1"][1:]),
        "w3_gradients": median(taken["w3"]) / unit / len(batches),
        "w3_products": median(products["w3"][1:]),
        "w4_over_products": median(taken["w4"]) / median(taken["w4_products"]),
    }


def mini_batches(
    model: nn.Module, batches: list[Batch], device: torch.device, rounds: int
) -> dict[str, Any]:
    """Return W5: seconds a mini-batch of each way, and what the lock-step is worth."""
    part = batches[: max(2, len(batches) // 16)]
    groups: list[Any] = []

    def together(group: int | None) -> Any:
        return landscape.hessian_max_spectrum(model, batches, group=group)

    contenders: dict[str, Callable[[], Any]] = {
        "lock_step": lambda: groups.append(together(None if device.type == "cuda" else 2)),
        "one_by_one": lambda: landscape.hessian_max_spectrum(model, part, group=1),
    }
    if find_spec("pyhessian") is not None:
        contenders["pyhessian"] = lambda: pyhessian(model, part, device)
    taken = in_turns(contenders, device, rounds)
    counts = {"lock_step": len(batches), "one_by_one": len(part), "pyhessian": len(part)}
    seconds = {key: median(values) / counts[key] for key, values in taken.items()}
    alone = landscape.hessian_max_spectrum(model, part, group=1, tol=1e-4)
    apart = abs(groups[-1].eigenvalues[: len(part)] / alone.eigenvalues - 1).max()
    return {
        "w5_seconds_a_mini_batch": seconds,
        "w5_group": groups[-1].provenance.settings["group"],
        "w5_faster_than": {key: value / seconds["lock_step"] for key, value in seconds.items()},
        "w5_largest_difference": float(apart),
    }


def surface(
    model: nn.Module, batches: list[Batch], device: torch.device, *, quick: bool
) -> dict[str, Any]:
    """Return a point of a surface in plain forward passes."""
    points = 3 if quick else 9

    def forward() -> None:
        with torch.no_grad():
            for _ in range(points**2):
                for x, _ in batches:
                    model(x)

    taken = in_turns(
        {
            "forward": forward,
            "surface": lambda: landscape.loss_surface(
                model, batches, points=points, metrics=("loss",)
            ),
        },
        device,
        2,
    )
    return {"surface_forwards_a_point": median(taken["surface"]) / median(taken["forward"])}


def pyhessian(model: nn.Module, batches: list[Batch], device: torch.device) -> None:
    """The five largest by magnitude of every mini-batch, at PyHessian's defaults."""
    from pyhessian import hessian

    for batch in batches:
        with solvers.quiet_backward():
            engine = hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=device.type == "cuda")
            engine.eigenvalues(top_n=5)
        model.zero_grad(set_to_none=True)


def repeat(operator: HessianOperator, count: int) -> None:
    """Multiply one vector again and again."""
    v = torch.randn(operator.dim, device=operator.device)
    for _ in range(count):
        operator.matvec(v)


def in_turns(
    contenders: dict[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each contender, run in turns after a round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            wait(device)
            began = time.perf_counter()
            work()
            wait(device)
            if turn:
                taken[name].append(time.perf_counter() - began)
    return taken


def peak(device: torch.device) -> float:
    """Return the best floating-point operations a second of a large product of matrices."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device)
    seconds = in_turns({"product": lambda: a @ a}, device, 5)["product"]
    return 2 * size**3 / min(seconds)


def wait(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def data(count: int, size: int, image_size: int, device: torch.device) -> list[Batch]:
    """Return batches of Fashion-MNIST on the device, enlarged where the model wants it."""

    def enlarged(x: Tensor) -> Tensor:
        x = x.to(device)
        return x if image_size == 32 else F.interpolate(x, size=image_size, mode="bilinear")

    return [(enlarged(x), y.to(device)) for x, y in workloads.batches(count, size)]


if __name__ == "__main__":
    main()
