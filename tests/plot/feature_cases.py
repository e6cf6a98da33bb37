"""Results of feature probes to draw, with known values, in the manner of real networks."""

import numpy as np

from landscape.probes.cka import CKA
from landscape.probes.feature_maps import BlockTable
from landscape.probes.fourier import FourierAmplitude
from landscape.probes.lesion import LesionStudy
from landscape.probes.variance import FeatureVariance
from landscape.results import Provenance


def vit(depth=12, head=False):
    """Blocks of a ViT: a stem, attention and MLP in turn."""
    kinds = ["stem", *["msa", "mlp"] * depth]
    return kinds, np.zeros(len(kinds), dtype=int), head


def resnet(stages=(3, 4, 6, 3), head=False):
    """Blocks of a ResNet: a stem and stages of convolutions."""
    kinds = ["stem", *["conv"] * sum(stages)]
    stage = np.r_[0, np.repeat(np.arange(len(stages)), stages)]
    return kinds, stage, head


def fields(blocks):
    kinds, stage, head = blocks
    subsamples = np.r_[False, np.diff(stage) > 0]
    depth = np.linspace(0, 1, len(kinds))
    if head:
        kinds, stage = [*kinds, "head"], np.r_[stage, stage[-1]]
        subsamples, depth = np.r_[subsamples, False], np.r_[depth, 1.0]
    return {
        "names": tuple(f"{kind}.{i}" for i, kind in enumerate(kinds)),
        "kinds": tuple(kinds),
        "depth": depth,
        "subsamples": subsamples,
        "stage": stage,
    }


def fourier(blocks, sides=None, radial=False):
    """MSA lowers, other blocks raise the value at the highest frequency."""
    table = fields(blocks)
    sides = [16] * len(table["kinds"]) if sides is None else sides
    curves, high = [], -6.0
    for kind, side in zip(table["kinds"], sides, strict=True):
        high += {"msa": -0.5, "mlp": 0.7}.get(kind, 0.15)
        curves.append(high * (2 * np.arange(side // 2 + 1) / side) ** 0.3)
    return FourierAmplitude(
        **table,
        frequency=tuple(2 * np.arange(side // 2 + 1) / side for side in sides),
        delta_log_amplitude=tuple(curves),
        stderr=tuple(np.where(np.arange(len(c)), 0.05, 0) for c in curves),
        sizes=np.array([(side, side) for side in sides]),
        window=None,
        radial=radial,
        provenance=Provenance(),
    )


def variance(blocks, growth=1.1):
    table = fields(blocks)
    steps = [{"msa": 0.85}.get(kind, growth * 1.12) for kind in table["kinds"]]
    values = 0.2 * np.cumprod(steps)
    return FeatureVariance(**table, variance=values, stderr=0.02 * values, provenance=Provenance())


def similarity(blocks_a, blocks_b=None):
    """Blocks are alike where they are near, and within a stage."""
    a = fields(blocks_a)
    b = a if blocks_b is None else fields(blocks_b)
    near = np.exp(-4 * np.abs(a["depth"][:, None] - b["depth"]))
    values = 0.2 * (a["stage"][:, None] == b["stage"]) + 0.8 * near
    return CKA(
        values=values,
        stderr=0.01 * np.ones_like(values),
        blocks_a=BlockTable(**a),
        blocks_b=BlockTable(**b),
        hsic=values[None],
        hsic_a=np.ones((1, len(values))),
        hsic_b=np.ones((1, values.shape[1])),
        batch_sizes=np.array([64]),
        num_skipped=0,
        provenance=Provenance(),
    )


def lesions(blocks, skipped=(), kinds=None):
    table = fields(blocks)
    kept = [i for i, kind in enumerate(table["kinds"]) if kind not in ("stem", "head")]
    loss = np.array([0.01 + 0.03 * (i % 4 == 1) + 0.2 * (i < 2) for i in range(len(kept))])
    return LesionStudy(
        names=tuple(table["names"][i] for i in kept),
        kinds=tuple(table["kinds"][i] for i in kept) if kinds is None else kinds,
        parts=("branch",) * len(kept),
        depth=table["depth"][kept],
        stage=table["stage"][kept],
        accuracy=0.8 - loss,
        accuracy_stderr=np.full(len(kept), 0.01),
        delta_accuracy=-loss,
        delta_accuracy_stderr=np.full(len(kept), 0.004),
        nll=1 + 3 * loss,
        nll_stderr=np.full(len(kept), 0.02),
        delta_nll=3 * loss,
        delta_nll_stderr=np.full(len(kept), 0.01),
        clean_accuracy=0.8,
        clean_accuracy_stderr=0.01,
        clean_nll=1.0,
        clean_nll_stderr=0.02,
        skipped={name: "its map gets smaller" for name in skipped},
        provenance=Provenance(),
    )
