"""How many products do the eigenvectors of the checkpoint before save?

    python benchmarks/warm_start.py [--every 10] [--checkpoints 3] [--starts 2] [--threads 1]

ResNet-20 and the small ViT, from 200 training steps on, a checkpoint every few steps of AdamW: the
five eigenvalues largest by magnitude on one batch of 64, from random start vectors and from the
sum of the five eigenvectors found at the checkpoint before. Counts of products until convergence;
the certificate comes on top, and costs both the same. Counts do not depend on the load of the
machine. Each set is compared with that of a random start.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import workloads
from tqdm import tqdm

from landscape import Eigenpairs, HessianOperator, top_eigenpairs

OUTPUT = Path(__file__).parent / "results" / "warm_start.json"
K, TOL = 5, 1e-3


def find(operator: HessianOperator, seed: int, start: Any = None) -> Eigenpairs:
    """Return the top eigenpairs with vectors."""
    generator = torch.Generator().manual_seed(seed)
    return top_eigenpairs(
        operator, K, tol=TOL, certify=False, vectors=True, start=start, generator=generator
    )


def follow(name: str, every: int, checkpoints: int, starts: int) -> list[dict[str, Any]]:
    """Return one row per checkpoint."""
    model = workloads.trained(name, steps=200)
    data = workloads.batches(1, 64)
    training = workloads.batches(every * checkpoints, 64)
    stream = iter(training)
    before = find(HessianOperator(model, data), 0)
    rows = []
    for index in tqdm(range(checkpoints), desc=name, leave=False):
        workloads.train(model, stream, every)
        operator = HessianOperator(model, data)
        row: dict[str, Any] = {"model": name, "step": 200 + (index + 1) * every}
        cold = [find(operator, seed) for seed in range(starts)]
        warm = find(operator, 0, torch.from_numpy(before.vectors))
        row["random"] = [pairs.num_matvecs for pairs in cold]
        row["warm"] = warm.num_matvecs
        row["largest_difference"] = float(np.abs(warm.values / cold[0].values - 1).max())
        overlap = np.linalg.norm(before.vectors @ warm.vectors.T, axis=0)
        row["overlap"] = overlap.tolist()
        before = warm
        rows.append(row)
    return rows


def main() -> None:
    """Follow both models, print the rows, write `results/warm_start.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=10, help="training steps between checkpoints")
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--starts", type=int, default=2, help="random start vectors")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    described = machine.describe(("torch", "numpy"))
    rows, summary = [], []
    for name in ("resnet20", "vit_micro"):
        found = follow(name, arguments.every, arguments.checkpoints, arguments.starts)
        rows += found
        cold, warm = (np.mean([row[key] for row in found]) for key in ("random", "warm"))
        summary.append(
            f"Warm start, {name}, a checkpoint every {arguments.every} steps: {warm:.1f} products "
            f"instead of {cold:.1f}."
        )
    print("\n".join(summary))
    content = {"machine": described, "summary": summary, "rows": rows}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
