"""How near to the limits of a GPU are products, spectra and surfaces?

    python benchmarks/gpu.py [--only vit_tiny,resnet50] [--rounds 3] [--device cuda]

| row | |
|---|---|
| gradient, product | milliseconds of a gradient and of a Hessian product, 64 images |
| recorded gradient | the gradient as a CUDA graph: without the host between its operations |
| of the peak | floating-point operations of a product over its time, against the best `a @ b` |
| W1, W3 | 5 eigenvalues largest by magnitude of one batch and of 4, certified, in gradients |
| W4 | density of 80 steps over the time of 80 products |
| W5 | mini-batches of 16: 64 of them side by side, one by one, in TF32, and a few by PyHessian |
| surface | a point of a 9 x 9 surface over the plain forward pass at batch 128 |

Models are untrained but for 20 steps on Fashion-MNIST, at 32 x 32 and, where the name says so, at
224 x 224. Everything runs in turns (A B A B …); medians. What is short runs once before and is not
counted; W3, W4 and W5 take the time of making their recordings with them. A product has twice the
multiplications of a gradient beyond what is kept, so its count is twice that of a gradient
(`torch.utils.flop_counter`). PyHessian runs as it comes, under the math kernel of attention, which
it needs. Nothing is written without a CUDA device, unless `--output` says where: `--device cpu
--quick` shows that everything runs.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
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
    for name in names:
        began = time.perf_counter()
        row = measure(name, *models[name], device, arguments.rounds, quick=arguments.quick)
        row["of_the_peak"] = row["product_flops_per_s"] / content["peak"]
        row["seconds"] = time.perf_counter() - began
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
    batch_size, count, mini = (64, 4, 64) if image_size == 32 else (16, 2, 8)
    if quick:
        batch_size, count, mini = 8, 2, 4
    training = data(20, batch_size, image_size, device)
    workloads.train(model, training, 2 if quick else 20)
    row: dict[str, Any] = {"model": name, "images": batch_size}
    row |= product(model, training[0], device, rounds)
    row |= spectra(model, training[:count], row["gradient_ms"] / 1e3, device, rounds)
    row |= surface(model, data(2, 8 if quick else 128, image_size, device), device, quick=quick)
    images = data(mini, 4 if quick else 16, image_size, device)
    row |= mini_batches(model, images, device, peers=image_size == 32)
    return row


def product(model: nn.Module, batch: Batch, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return what a gradient and a product of one batch take."""
    x, y = batch
    parameters = list(model.parameters())

    def gradient() -> None:
        torch.autograd.grad(F.cross_entropy(model(x), y), parameters)

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        gradient()
    frozen = landscape.Objective().freeze(model, [batch])
    operator = HessianOperator.of(frozen)
    v = torch.randn(operator.dim, device=device)
    contenders = {"gradient": gradient, "product": lambda: operator.matvec(v)}
    if device.type == "cuda":
        rounded = HessianOperator.of(frozen, precision="tf32")
        contenders["product_tf32"] = lambda: rounded.matvec(v)
        contenders["recorded_gradient"] = recorded(gradient)
    for work in contenders.values():
        work()  # the second call of a product records it
    taken = in_turns(contenders, device, max(rounds, 5))
    ms = {f"{name}_ms": 1e3 * median(seconds) for name, seconds in taken.items()}
    return ms | {
        "parameters": operator.dim,
        "product_in_gradients": ms["product_ms"] / ms["gradient_ms"],
        "product_flops_per_s": 2e3 * counter.get_total_flops() / ms["product_ms"],
    }


def recorded(work: Callable[[], None]) -> Callable[[], None]:
    """Return work as a CUDA graph."""
    stream: Any = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


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
    taken = in_turns({"w1": lambda: products["w1"].append(top(batches[:1]))}, device, rounds)
    taken |= in_turns(
        {
            "w3": lambda: products["w3"].append(top(batches)),
            "w4": lambda: landscape.hessian_density(model, batches[:1], num_steps=80),
            "w4_products": lambda: repeat(HessianOperator(model, batches[:1]), 80),
        },
        device,
        min(rounds, 2),
        warm=False,
    )
    return {
        "w1_gradients": median(taken["w1"]) / unit,
        "w1_products": median(products["w1"][1:]),
        "w3_gradients": median(taken["w3"]) / unit / len(batches),
        "w3_products": median(products["w3"]),
        "w4_over_products": median(taken["w4"]) / median(taken["w4_products"]),
    }


def mini_batches(
    model: nn.Module, batches: list[Batch], device: torch.device, *, peers: bool
) -> dict[str, Any]:
    """Return W5: seconds a mini-batch of each way, and how far its values are from exact ones.

    In each of two turns one half of the mini-batches goes side by side, one quarter of that one by
    one, and a single one through PyHessian.
    """
    on_gpu = device.type == "cuda"
    half = len(batches) // 2
    halves = batches[:half], batches[half:]
    turns: dict[str, list[float]] = {}
    found: dict[str, list[Any]] = {}

    def take(name: str, data: list[Batch], **arguments: Any) -> None:
        result, seconds = timed(
            lambda: landscape.hessian_max_spectrum(model, data, **arguments), device
        )
        found.setdefault(name, []).append(result)
        turns.setdefault(name, []).append(seconds / len(data))

    with warnings.catch_warnings():  # what has not converged is told in the row
        warnings.filterwarnings("ignore", ".*have not converged", UserWarning)
        for part in halves:
            few = part[: max(1, half // 8)]
            take("side_by_side", part, group=None if on_gpu else 2)
            take("one_by_one", few, group=1)
            if on_gpu:
                take("tf32", part, precision="tf32")
            if peers and find_spec("pyhessian") is not None:
                _, seconds = timed(partial(pyhessian, model, part[0], on_gpu), device)
                turns.setdefault("pyhessian", []).append(seconds)
    tight = landscape.hessian_max_spectrum(model, few, group=1, tol=1e-5).eigenvalues
    seconds = {name: sum(values) / len(values) for name, values in turns.items()}
    return {
        "w5_mini_batches": len(batches),
        "w5_seconds_a_mini_batch": seconds,
        "w5_group": found["side_by_side"][-1].provenance.settings["group"],
        "w5_products": {n: r[-1].provenance.num_hvps for n, r in found.items()},
        "w5_times_as_fast_as": {n: s / seconds["side_by_side"] for n, s in seconds.items()},
        "w5_largest_error": {
            n: float(abs(r[-1].eigenvalues[: len(few)] / tight - 1).max()) for n, r in found.items()
        },
        "w5_converged": {n: float(r[-1].converged.mean()) for n, r in found.items()},
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


def pyhessian(model: nn.Module, batch: Batch, cuda: bool) -> None:
    """The five largest by magnitude of one mini-batch, at PyHessian's defaults."""
    from pyhessian import hessian

    with solvers.quiet_backward(), sdpa_kernel(SDPBackend.MATH):
        engine = hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=cuda)
        engine.eigenvalues(top_n=5)
    model.zero_grad(set_to_none=True)


def repeat(operator: HessianOperator, count: int) -> None:
    """Multiply one vector again and again."""
    v = torch.randn(operator.dim, device=operator.device)
    for _ in range(count):
        operator.matvec(v)


def in_turns(
    contenders: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    *,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Return the seconds of each contender, run in turns, if `warm` after one round more."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + warm):
        for name, work in contenders.items():
            _, seconds = timed(work, device)
            if turn or not warm:
                taken[name].append(seconds)
    return taken


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return what some work returns, and its seconds until the device has done everything."""
    wait(device)
    began = time.perf_counter()
    result = work()
    wait(device)
    return result, time.perf_counter() - began


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
