"""How far are eigenvalues in float32 from those in float64?

    python benchmarks/precision.py [--batches 8] [--images 16] [--threads 2]

ResNet-20 and the small ViT after 200 steps of training: the five eigenvalues largest by magnitude
of a few mini-batches, in float32 to a tolerance that rounding ends, and of the same weights and
images in float64. Differences are in units of the largest eigenvalue, next to two things that might
explain them: the asymmetry of the products, which is the least error that a result in float32
states, and the number of ReLUs whose input rounding has put on the other side of zero, where the
Hessian is another. Nothing is timed.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torch.nn.functional as F
import workloads
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from workloads import Batch

from landscape import Eigenpairs, HessianOperator, top_eigenpairs
from landscape.linalg.layers import cheap_second_derivatives

OUTPUT = Path(__file__).parent / "results" / "precision.json"
K = 5
SINGLE_TOL, DOUBLE_TOL = 1e-6, 1e-9


class _Signs(TorchFunctionMode):
    """Notes which inputs of every ReLU are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.positive: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.relu:
            self.positive.append(args[0].detach() > 0)
        return func(*args, **(kwargs or {}))


def signs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return which inputs of every ReLU are positive, in the pass that is differentiated."""
    with cheap_second_derivatives(), _Signs() as noted:
        model(x)
    return noted.positive


def find(model: nn.Module, batch: Batch, tol: float) -> Eigenpairs:
    """Return the eigenpairs of the mean loss over one batch."""
    generator = torch.Generator().manual_seed(0)
    return top_eigenpairs(HessianOperator(model, [batch]), K, tol=tol, generator=generator)


def compare(name: str, model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the eigenvalues of one mini-batch in both precisions."""
    x, y = batch
    single = find(model, batch, SINGLE_TOL)
    exact = copy.deepcopy(model).double()
    double = find(exact, (x.double(), y), DOUBLE_TOL)
    pairs = zip(signs(model, x), signs(exact, x.double()), strict=True)
    largest = np.abs(double.values).max()
    return {
        "model": name,
        "images": len(y),
        "float32": single.values.tolist(),
        "float64": double.values.tolist(),
        "difference": float(np.abs(single.values - double.values).max() / largest),
        "asymmetry": float(single.errors.min() / largest),
        "flipped": sum(int((a != b).sum()) for a, b in pairs),
    }


def summarise(name: str, rows: list[dict[str, Any]], flipped: bool) -> str:
    """Return a sentence on the mini-batches where a ReLU is on the other side, or on the others."""
    chosen = [row for row in rows if bool(row["flipped"]) == flipped]
    if not chosen:
        return ""
    off, asymmetry = ([row[key] for row in chosen] for key in ("difference", "asymmetry"))
    share = f"{len(chosen)} of {len(rows)} mini-batches of {chosen[0]['images']}"
    return (
        f"{name}, {share}, where {'a' if flipped else 'no'} ReLU is on the other side: off by "
        f"{min(off):.1e} to {max(off):.1e} of the largest eigenvalue, asymmetry "
        f"{min(asymmetry):.1e} to {max(asymmetry):.1e}."
    )


def main() -> None:
    """Compare on both models, print a line each, write `results/precision.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--images", type=int, default=16, help="of a batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    described = machine.describe(("torch", "numpy"))
    rows, summary = [], []
    for name in ("resnet20", "vit_micro"):
        model = workloads.trained(name, steps=200)
        data = workloads.batches(arguments.batches, arguments.images)
        found = [compare(name, model, batch) for batch in tqdm(data, desc=name, leave=False)]
        rows += found
        summary += [summarise(name, found, flipped) for flipped in (False, True)]
    summary = [sentence for sentence in summary if sentence]
    print("\n".join(summary))
    content = {"machine": described, "summary": summary, "rows": rows}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
