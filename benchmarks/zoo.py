"""Are products right for models that others wrote, and what do they cost?

    python benchmarks/zoo.py [--only NAME,…] [--rounds 3] [--threads 2]

A small model or two from each of 84 of timm's 98 model files, and of torchvision, 108 in all, with
random weights, on random images of 64 pixels, 96 or 128 where it takes no smaller ones. Error: of
one Hessian-vector product in float64 against PyTorch's own double backward, and where that fails or
gives NaN, against central differences of the gradient. Cost: of one product of 8 images in float32,
in gradients on the same images, next to PyTorch's own double backward with its graph kept, in
turns. And how many residual blocks are found.
"""

import argparse
import copy
import gc
import json
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from landscape import Blocks, HessianOperator

RESULTS = Path(__file__).parent / "results"
RIGHT = 1e-6
STEP = 1e-5  # of the differences, whose error is about its square

TIMM = """
test_byobnet cait_xxs24_224 coat_tiny convit_tiny
test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny
deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small
efficientformerv2_s0 mnasnet_small efficientvim_m1 efficientvit_b0 efficientvit_m0
eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050
hardcorenas_b hgnetv2_b0 hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t
inception_next_atto inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 test_mambaout
test_coatnet poolformerv2_s12 gmlp_ti16_224 lcnet_035 mobilevit_xxs mvitv2_tiny nest_tiny
nextvit_small test_nfnet pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m1
res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s
shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m
twins_svt_small visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos vitamin_small_224
volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
resnet50 convnext_atto efficientnet_b0 mobilenetv3_small_100 vit_small_patch16_224
"""

TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3
mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet18 resnext50_32x4d
shufflenet_v2_x0_5 squeezenet1_0 swin_t swin_v2_t vgg11_bn vit_b_16
"""


def build(package: str, name: str) -> tuple[nn.Module, int]:
    """Return a model in evaluation mode, no weight of which is zero, and the side of its images."""
    if package == "timm":
        import timm

        make: Callable[..., nn.Module] = timm.create_model
        sized = "img_size"
    else:
        import torchvision

        make, sized = torchvision.models.get_model, "image_size"
    trials: list[tuple[dict[str, int], int]] = [({sized: 64}, 64)]
    trials += [({}, side) for side in (64, 96, 128)]
    for sizes, side in trials:
        torch.manual_seed(0)
        try:
            model = make(name, num_classes=10, **sizes).eval()
            with torch.no_grad():
                model(torch.randn(2, 3, side, side))
        except Exception:  # not of this size
            continue
        break
    else:
        raise ValueError(f"{name} takes none of the sizes {[side for _, side in trials]}")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.7, 1.4)
    return model, side


class Plain:
    """Gradients and products by PyTorch alone."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self._model, self._x, self._y = model, x, y
        self._parameters = list(model.parameters())

    def gradient(self, keep: bool = False) -> list[Tensor]:
        """Return the gradient, with its graph to differentiate it again."""
        self._model.eval()  # timm's models forget what they have looked up
        with sdpa_kernel(SDPBackend.MATH) if keep else torch.enable_grad():
            loss = F.cross_entropy(self._model(self._x), self._y)
            return list(
                torch.autograd.grad(
                    loss, self._parameters, create_graph=keep, materialize_grads=True
                )
            )

    def product(self, gradient: list[Tensor], v: Tensor) -> Tensor:
        """Return H v from a gradient whose graph was kept."""
        pieces = torch.split(v, [p.numel() for p in self._parameters])
        pairs = [
            (g, piece.view_as(g))
            for g, piece in zip(gradient, pieces, strict=True)
            if g.requires_grad
        ]
        found = torch.autograd.grad(
            [g for g, _ in pairs], self._parameters, [t for _, t in pairs],
            retain_graph=True, materialize_grads=True,
        )  # fmt: skip
        return torch.cat([t.reshape(-1) for t in found])

    def difference(self, v: Tensor, step: float) -> Tensor:
        """Return (∇L(θ + εv) − ∇L(θ − εv)) / 2ε."""
        ahead, behind = (self._at(v, sign * step) for sign in (1, -1))
        return (ahead - behind) / (2 * step)

    def _at(self, v: Tensor, step: float) -> Tensor:
        before = nn.utils.parameters_to_vector(self._parameters).detach()
        nn.utils.vector_to_parameters(before + step * v, self._parameters)
        try:
            return torch.cat([g.reshape(-1) for g in self.gradient()])
        finally:
            nn.utils.vector_to_parameters(before, self._parameters)


def error(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return the relative error of a product in float64, and against what."""
    model, x = copy.deepcopy(model).double(), x.double()
    plain, operator = Plain(model, x, y), HessianOperator(model, [(x, y)])
    v = torch.randn(operator.dim, dtype=torch.float64)
    v /= v.norm()
    found = operator.matvec(v)
    against = "double backward"
    try:
        expected = plain.product(plain.gradient(keep=True), v)
    except RuntimeError:
        expected = torch.full_like(v, torch.nan)
    if not expected.isfinite().all():
        against, expected = "differences", plain.difference(v, STEP)
    return {"error": float((found - expected).norm() / expected.norm()), "against": against}


def costs(model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    """Return what products cost in gradients, ours and PyTorch's: medians over rounds in turns."""
    plain, operator = Plain(model, x, y), HessianOperator(model, [(x, y)])
    v = torch.randn(operator.dim)
    contenders: dict[str, Callable[[], object]] = {
        "gradient": plain.gradient,
        "landscape": lambda: operator.matvec(v),
    }
    try:
        kept = plain.gradient(keep=True)
        plain.product(kept, v)
        contenders["pytorch"] = lambda: plain.product(kept, v)
    except RuntimeError:  # no second derivative
        pass
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            began = time.perf_counter()
            work()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    unit = float(np.median(seconds.pop("gradient")))
    return {name: round(float(np.median(each)) / unit, 2) for name, each in seconds.items()}


def measure(package: str, name: str, rounds: int) -> dict[str, Any]:
    """Return the row of one model."""
    model, side = build(package, name)
    x, y = torch.randn(8, 3, side, side), torch.arange(8)
    row: dict[str, Any] = {
        "model": f"{package}:{name}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "side": side,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row |= error(model, x[:2], y[:2]) | costs(model, x, y, rounds)
        try:
            row["blocks"] = len(Blocks(model, example=x[:2])) - 1  # without the head
        except ValueError:  # no residual sum
            row["blocks"] = 0
    return row


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the rows in a sentence or two."""
    right = sum(row["error"] < RIGHT for row in rows)
    both = [row for row in rows if "pytorch" in row]
    ours, theirs = (np.median([row[key] for row in both]) for key in ("landscape", "pytorch"))
    return (
        f"{right} of {len(rows)} products agree to {RIGHT:g}. A product costs {ours:.2f} gradients "
        f"(median; PyTorch's double backward with its graph kept {theirs:.2f})."
    )


def table(rows: list[dict[str, Any]], described: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "# Models that others wrote",
        "",
        f"{described['cpu']}, {described['threads']} thread(s); commit {described['commit']}, "
        f"{described['began']}; "
        + ", ".join(f"{name} {v}" for name, v in described["versions"].items())
        + ".",
        "",
        summary(rows),
        "",
        "Error of one product in float64 (some models compute in float32 inside); cost of one of 8 "
        "images in float32, in gradients; residual blocks found (0: layers have to be named). "
        "*Differences*: PyTorch has no second derivative there, or NaN.",
        "",
        "| model | parameters | side | error | against | cost | PyTorch's | blocks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["model"], f"{row['parameters'] / 1e6:.1f} M", str(row["side"])]
        cells += [f"{row['error']:.0e}", row["against"], f"{row['landscape']:.1f}"]
        cells += [f"{row['pytorch']:.1f}" if "pytorch" in row else "", str(row["blocks"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write `results/zoo.json` and `zoo.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if find_spec("timm") is None or find_spec("torchvision") is None:
        parser.error('no models to measure here: `pip install -e ".[models]"`')
    torch.set_num_threads(arguments.threads)
    described = machine.describe(("torch", "timm", "torchvision"))
    chosen = [("timm", name) for name in TIMM.split()]
    chosen += [("torchvision", name) for name in TORCHVISION.split()]
    if arguments.only:
        chosen = [each for each in chosen if each[1] in arguments.only.split(",")]
    rows = []
    for package, name in tqdm(chosen, desc="Models", leave=False):
        rows.append(measure(package, name, arguments.rounds))
        gc.collect()
    print(table(rows, described))
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = {"machine": described, "summary": summary(rows), "rows": rows}
    (arguments.output / "zoo.json").write_text(json.dumps(content, indent=1) + "\n")
    (arguments.output / "zoo.md").write_text(table(rows, described))


if __name__ == "__main__":
    main()
