"""How near to the limits of a GPU are products, spectra and surfaces?

    python benchmarks/gpu.py [--only vit_tiny,resnet50] [--pieces w1,w5] [--rounds 3]
    python benchmarks/gpu.py --table-only    # the Markdown again, from results that are there

| row | |
|---|---|
| gradient, product | milliseconds of a gradient and of a Hessian product, 64 images |
| recorded gradient | the gradient as a CUDA graph: without the host between its operations |
| of the peak | floating-point operations of a product over its time, against the best `a @ b` |
| W1, W3 | 5 eigenvalues largest by magnitude of one batch and of 4, certified, in gradients |
| W4 | density of 80 steps over the time of 80 products |
| W5 | 64 mini-batches of 16 side by side (at 224 pixels 16), in TF32, one by one, by PyHessian |
| point | of a 9 x 9 surface (3 x 3 at 224 pixels), directions drawn, over a forward pass of 128 |
| further point | the same of the points that a surface of 13 x 13 (5 x 5) has more |
| training | a step of `fit`, 96 images in bfloat16 with augmentation, plain and recorded |

Models are untrained but for 20 steps on Fashion-MNIST, at 32 x 32 and, where the name says so, at
224 x 224. Everything runs in turns (A B A B …); medians. What is short runs once before and is not
counted; W3, W4 and W5 take the time of making their recordings with them. A product has twice the
multiplications of a gradient beyond what is kept, so its count is twice that of a gradient
(`torch.utils.flop_counter`). PyHessian runs as it comes, under the math kernel of attention, which
it needs. Nothing is written without a CUDA device, unless `--output` says where: `--device cpu
--quick` shows that everything runs.
"""

import argparse
import copy
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
from landscape.recording import Recording, apart, side_stream
from landscape.switches import rounding
from landscape.training import fit, load_images, recipe

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
PATIENCE = 8.0
"""Seconds of a mini-batch of PyHessian up to which a second one is measured."""

QUICK: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet20": ("resnet20", 32, {"width": 4}),
    "vit_nano": ("vit_nano", 32, {"dim": 24, "depth": 2}),
}


def main() -> None:
    """Measure every piece of every model, print it and write `results/gpu.json`."""
    parser = argparse.ArgumentParser(description="Products, spectra and surfaces on a GPU.")
    parser.add_argument("--only", help="models, comma-separated; rows of the others are kept")
    parser.add_argument("--pieces", default=",".join(PIECES), help="pieces, comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models; shows that it runs")
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument("--table-only", action="store_true", help="from results that are there")
    arguments = parser.parse_args()
    if arguments.table_only:
        path = arguments.output or RESULTS / "gpu.json"
        if not path.exists():
            parser.error(f"--table-only needs results, got none at {path}")
        path.with_suffix(".md").write_text(table(json.loads(path.read_text())))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; `--device cpu --quick` shows that everything runs")
    device = torch.device(arguments.device)
    models = QUICK if arguments.quick else MODELS
    names = arguments.only.split(",") if arguments.only else list(models)
    pieces = arguments.pieces.split(",")
    for option, given, known in (("only", names, models), ("pieces", pieces, PIECES)):
        if unknown := set(given) - set(known):
            parser.error(f"--{option} takes {', '.join(known)}, got {', '.join(sorted(unknown))}")
    where = machine.describe(("torch", "numpy", "PyHessian"))
    where["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    output = arguments.output or (RESULTS / "gpu.json" if device.type == "cuda" else None)
    rows = earlier(output, where) if arguments.only else {}
    content: dict[str, Any] = {"machine": where, "peak": peak(device), "peak_tf32": None}
    if device.type == "cuda":
        with rounding("tf32"):
            content["peak_tf32"] = peak(device)
    subjects = {name: Subject(*models[name], device, arguments.rounds) for name in names}
    for piece in pieces:
        for name, subject in subjects.items():
            began = time.perf_counter()
            measured = PIECES[piece](subject, quick=arguments.quick)
            if "product_flops_per_s" in measured:
                measured["of_the_peak"] = measured["product_flops_per_s"] / content["peak"]
            row = rows.setdefault(name, {"model": name}) | measured
            row.setdefault("seconds", {})[piece] = time.perf_counter() - began
            row.setdefault("commits", {})[piece] = where["commit"]
            rows[name] = row
            print(json.dumps({"model": name} | measured, indent=1), flush=True)
            if output is not None:  # after each: the next may not fit
                content["rows"] = list(rows.values())
                output.write_text(json.dumps(content, indent=1) + "\n")
                output.with_suffix(".md").write_text(table(content))


def earlier(output: Path | None, where: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of an earlier run on the same device, by model."""
    if output is None or not output.exists():
        return {}
    content = json.loads(output.read_text())
    if content["machine"]["device"] != where["device"]:
        return {}
    return {row["model"]: row for row in content["rows"]}


class Subject:
    """A model with its data on a device.

    Attributes:
        model: Trained for 20 steps.
        device: Its device.
        rounds: Rounds to time.
        image_size: Pixels a side.
    """

    def __init__(
        self, name: str, image_size: int, sizes: dict[str, Any], device: torch.device, rounds: int
    ) -> None:
        torch.manual_seed(0)
        self.model = create_model(name, **sizes).to(device)
        self.device, self.rounds, self.image_size = device, rounds, image_size
        workloads.train(self.model, self.data(20, 16), 20)

    def data(self, count: int, size: int) -> list[Batch]:
        """Return batches of Fashion-MNIST on the device, enlarged where the model wants it."""

        def enlarged(x: Tensor) -> Tensor:
            x = x.to(self.device)
            size = self.image_size
            return x if size == 32 else F.interpolate(x, size=size, mode="bilinear")

        return [(enlarged(x), y.to(self.device)) for x, y in workloads.batches(count, size)]

    def batches(self, count: int, quick: bool) -> list[Batch]:
        """Return the batches of W1, W3 and W4."""
        return self.data(count, 4 if quick else 64 if self.image_size == 32 else 16)


def product(subject: Subject, *, quick: bool) -> dict[str, Any]:
    """Return what a gradient and a product of one batch take."""
    model, device = subject.model, subject.device
    batches = subject.batches(1, quick)
    gradient = partial(gradients, model, batches)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        gradient()
    frozen = landscape.Objective().freeze(model, batches)
    operator = HessianOperator.of(frozen)
    v = torch.randn(operator.dim, device=device)
    contenders = {"gradient": gradient, "product": lambda: operator.matvec(v)}
    if device.type == "cuda":
        rounded = HessianOperator.of(frozen, precision="tf32")
        contenders["product_tf32"] = lambda: rounded.matvec(v)
        contenders["recorded_gradient"] = recorded(gradient, device)
    for work in contenders.values():
        work()  # the second call of a product records it
    taken = in_turns(contenders, device, max(subject.rounds, 5))
    ms = {f"{name}_ms": 1e3 * median(seconds) for name, seconds in taken.items()}
    return ms | {
        "images": len(batches[0][0]),
        "parameters": operator.dim,
        "product_in_gradients": ms["product_ms"] / ms["gradient_ms"],
        "product_flops_per_s": 2e3 * counter.get_total_flops() / ms["product_ms"],
    }


def recorded(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return work as a CUDA graph."""
    stream = side_stream(device)
    assert stream is not None, "a GPU has one"
    with apart(stream):
        work()
    return partial(Recording(work, stream).replay, stream)


def one_batch(subject: Subject, *, quick: bool) -> dict[str, Any]:
    """Return W1 in plain gradients."""
    batches = subject.batches(1, quick)
    found: list[int] = []

    def search() -> None:
        found.append(top(subject.model, batches, seed=len(found)))

    work = {"gradient": partial(gradients, subject.model, batches), "w1": search}
    taken = in_turns(work, subject.device, subject.rounds)
    seconds = median(taken["w1"])
    return {
        "w1_seconds": seconds,
        "w1_gradients": seconds / median(taken["gradient"]),
        "w1_products": median(found[1:]),
    }


def many_batches(subject: Subject, *, quick: bool) -> dict[str, Any]:
    """Return W3 in gradients of its data, and W4 over its products."""
    model, batches = subject.model, subject.batches(2 if quick else 4, quick)
    found: list[int] = []
    work = {
        "gradient": partial(gradients, model, batches),
        "w3": lambda: found.append(top(model, batches, seed=len(found))),
        "w4": lambda: landscape.hessian_density(model, batches[:1], num_steps=80),
        "w4_products": lambda: repeat(HessianOperator(model, batches[:1]), 80),
    }
    taken = in_turns(work, subject.device, min(subject.rounds, 2), warm=False)
    return {
        "w3_gradients": median(taken["w3"]) / min(taken["gradient"]),
        "w3_products": median(found),
        "w4_over_products": median(taken["w4"]) / median(taken["w4_products"]),
    }


def top(model: nn.Module, batches: list[Batch], seed: int) -> int:
    """Find 5 eigenpairs, certified, and return the number of products."""
    generator = torch.Generator().manual_seed(seed)
    return landscape.top_eigenpairs(
        HessianOperator(model, batches), generator=generator
    ).num_matvecs


def gradients(model: nn.Module, batches: list[Batch]) -> None:
    """Take a gradient of every batch."""
    for x, y in batches:
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def mini_batches(subject: Subject, *, quick: bool) -> dict[str, Any]:
    """Return W5: seconds per mini-batch of each way, and how far its values are from exact ones.

    In each of two turns all mini-batches go side by side, in float32 and in TF32, two of them one
    by one, and one through PyHessian, again only if that was quick.
    """
    model, device = subject.model, subject.device
    count = 64 if subject.image_size == 32 else 16
    batches = subject.data(4 if quick else count, 4 if quick else 16)
    on_gpu = device.type == "cuda"
    few = batches[:2]
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
        for _ in range(min(subject.rounds, 2)):
            take("side_by_side", batches, group=None if on_gpu else 2)
            take("one_by_one", few, group=1)
            if on_gpu:
                take("tf32", batches, precision="tf32")
            if find_spec("pyhessian") is not None and turns.get("pyhessian", [0])[0] < PATIENCE:
                _, taken = timed(partial(pyhessian, model, batches[0], on_gpu), device)
                turns.setdefault("pyhessian", []).append(taken)
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


def surface(subject: Subject, *, quick: bool) -> dict[str, Any]:
    """Return a point of a surface, directions drawn, and a further one, in plain forward passes."""
    model = subject.model
    batches = subject.data(1, 8 if quick else 128)
    small, large = (3, 5) if quick or subject.image_size > 32 else (9, 13)

    def forward() -> None:
        with torch.no_grad():
            for _ in range(small**2):
                for x, _ in batches:
                    model(x)

    def plane(points: int) -> None:
        landscape.loss_surface(model, batches, points=points, metrics=("loss",))

    work = {"forward": forward, "small": partial(plane, small), "large": partial(plane, large)}
    taken = in_turns(work, subject.device, 2)
    one = median(taken["forward"]) / small**2
    more = (median(taken["large"]) - median(taken["small"])) / (large**2 - small**2)
    return {
        "forward_ms": 1e3 * one,
        "surface_forwards_a_point": median(taken["small"]) / small**2 / one,
        "surface_further_point": more / one,
    }


def training(subject: Subject, *, quick: bool) -> dict[str, Any]:
    """Return milliseconds of a step of `fit`, of its second epoch, without and with CUDA graphs."""
    steps = 3 if quick else 40
    data = load_images("fashion_mnist_mini", size=subject.image_size, channels=3, batch_size=96)
    data = data.subset(96 * steps).to(subject.device)
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(2):
        for cuda_graphs, seconds in taken.items():
            history = fit(
                copy.deepcopy(subject.model),
                data,
                epochs=2,
                transform=recipe(data.mean, data.std, data.num_classes),
                cuda_graphs=cuda_graphs,
            )
            seconds.append(float(history.seconds[1]) / steps)
    return {
        "step_ms": 1e3 * median(taken[False]),
        "recorded_step_ms": 1e3 * median(taken[True]),
    }


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


def table(content: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    where = content["machine"]
    lines = [
        "# GPU benchmark",
        "",
        f"{where['device']}, PyTorch {where['versions']['torch']}; {where['began']}, commit "
        f"{where['commit']} (what was measured earlier: `commits` in the JSON). Peak of `a @ b`: "
        f"{content['peak'] / 1e12:.0f} TFLOP/s in float32"
        + (f", {content['peak_tf32'] / 1e12:.0f} in TF32." if content["peak_tf32"] else "."),
        "",
        "Milliseconds of a plain gradient as PyTorch makes it, of it as a CUDA graph, of a Hessian "
        "product in float32 (with its share of the peak) and in TF32; certified top 5 of one batch "
        "(W1), in gradients and products, and of four (W3), in their gradients; density of 80 "
        "steps over 80 products (W4); W5 in milliseconds a mini-batch of 16, and times as fast as "
        "PyHessian (at its defaults, the first mini-batch alone, once or twice); a point of a "
        "9 x 9 surface (3 x 3 at 224 pixels), directions drawn, and a "
        "further point, over a forward pass of 128 images; "
        "milliseconds of a training step of 96 images in bfloat16, and with CUDA graphs. "
        "`benchmarks/gpu.py` says how each is measured. Empty: not measured.",
        "",
        "| model | images | gradient | as a graph | product | of the peak | in TF32 | W1 | products"
        " | W3 | W4 | W5 | one by one | in TF32 | PyHessian | times | point"
        " | further point | step | recorded |",
        "|---|" + "---:|" * 19,
    ]
    for row in content["rows"]:
        w5 = {k: 1e3 * v for k, v in row.get("w5_seconds_a_mini_batch", {}).items()}
        cells = [
            _cell(row.get("gradient_ms"), ".1f"),
            _cell(row.get("recorded_gradient_ms"), ".1f"),
            _cell(row.get("product_ms"), ".1f"),
            _cell(row.get("of_the_peak"), ".0%"),
            _cell(row.get("product_tf32_ms"), ".1f"),
            _cell(row.get("w1_gradients"), ".0f"),
            _cell(row.get("w1_products"), ".0f"),
            _cell(row.get("w3_gradients"), ".0f"),
            _cell(row.get("w4_over_products"), ".2f"),
            *(_cell(w5.get(n), ".0f") for n in ("side_by_side", "one_by_one", "tf32", "pyhessian")),
            _cell(row.get("w5_times_as_fast_as", {}).get("pyhessian"), ".1f"),
            _cell(row.get("surface_forwards_a_point"), ".2f"),
            _cell(row.get("surface_further_point"), ".2f"),
            _cell(row.get("step_ms"), ".1f"),
            _cell(row.get("recorded_step_ms"), ".1f"),
        ]
        lines.append(f"| {' | '.join([row['model'], str(row['images']), *cells])} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


PIECES: dict[str, Callable[..., dict[str, Any]]] = {
    "product": product,
    "w1": one_batch,
    "surface": surface,
    "w5": mini_batches,
    "w3_w4": many_batches,
    "training": training,
}


if __name__ == "__main__":
    main()
