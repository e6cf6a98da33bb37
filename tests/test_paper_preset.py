"""The paper's setting, `--preset paper --dataset cifar100`, with everything small but the code."""

import json

import numpy as np
import pytest
import torch

from landscape import HessianMaxSpectrum, LossSurface, PolarTrajectory
from tests.test_package import ROOT, run

IMAGES = {"train": 96, "test": 40}
SHRUNKEN = f"""
import sys
from dataclasses import replace

sys.path.insert(0, {str(ROOT / "examples")!r})
import reproduce_fig1
from trained import PRESETS

if __name__ == "__main__":
    paper = PRESETS["paper"]
    sizes = {{
        "resnet50": {{"width": 2, "depths": (1, 1, 1, 1)}},
        "vit_tiny": {{"dim": 12, "depth": 2, "patch_size": 8}},
    }}
    PRESETS["paper"] = replace(
        paper,
        train_images={IMAGES["train"]},
        models=tuple((name, built, size | sizes[built]) for name, built, size in paper.models),
        epochs=4,
        warmup_epochs=1,
        hessian_epochs=(2, 3, 4),
        surface_points=3,
        surface_images=32,
        hessian_batches=2,
    )
    reproduce_fig1.main()
"""


def write_cifar100(folder):
    """Write random images in the binary format: coarse label, fine label, planes of 32x32."""
    rng = np.random.default_rng(0)
    for split, count in IMAGES.items():
        labels = rng.integers(0, (20, 100), (count, 2), dtype=np.uint8)
        pixels = rng.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        (folder / f"{split}.bin").write_bytes(np.concatenate([labels, pixels], axis=1).tobytes())


@pytest.mark.slow
def test_the_papers_preset_goes_from_cifar100_to_the_claims(tmp_path):
    write_cifar100(tmp_path)
    script = tmp_path / "shrunken.py"
    script.write_text(SHRUNKEN)
    arguments = ("--preset", "paper", "--dataset", "cifar100", "--root", ".", "--out", "out")
    done = run(str(script), *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr

    work = tmp_path / "runs/fig1-paper-cifar100"
    setting = json.loads((work / "setting.json").read_text())
    assert [built for _, built, _ in setting["models"]] == ["resnet50", "vit_tiny"]
    assert (setting["batch_size"], setting["learning_rate"]) == (96, 1.25e-4)
    for name in ("ResNet", "ViT"):
        kept = sorted(path.name for path in (work / name).glob("epoch-*.pt"))
        assert kept == [f"epoch-{epoch:05d}.pt" for epoch in range(5)]
        weights = torch.load(work / name / kept[-1], weights_only=True)
        assert weights["head.weight"].shape[0] == 100
        trajectory = PolarTrajectory.load(work / f"trajectory_{name}.npz")
        assert trajectory.steps.tolist() == [0, 1, 2, 3, 4]
        for epoch in ("warmup", 2, 3, 4):
            spectrum = HessianMaxSpectrum.load(tmp_path / f"out/fig1/spectrum_{name}_{epoch}.npz")
            assert spectrum.eigenvalues.shape == (2, 5)
            assert spectrum.provenance.num_samples == 32
            assert "weight_decay=0.05" in spectrum.provenance.objective
        surface = LossSurface.load(tmp_path / f"out/fig1/surface_{name}.npz")
        assert surface.loss.shape == (3, 3)

    table = (tmp_path / "out/fig1_claims.md").read_text()
    assert table.strip() in done.stdout
    assert "nan" not in table
    for words in ("(a)", "(b)", "(c) warm-up", "(c) epoch 4"):
        assert words in table
    assert all((tmp_path / "out" / f"fig1.{kind}").exists() for kind in ("png", "pdf"))
