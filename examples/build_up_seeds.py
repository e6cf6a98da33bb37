"""The build-up of an AlterNet once a seed, and every network that was tried with every seed.

Walks over different seeds part ways, and a network that only some of them reach was reached because
those seeds did well. So, when all walks are done, each network that any of them tried is trained
with the other seeds, too: the mean of every network is one over all seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparisons import (
    DEFAULT,
    PAPER,
    TEST,
    Arm,
    Found,
    More,
    Protocol,
    make_model,
    run_folder,
    side_by_side,
    test_images,
    training_images,
)
from matplotlib.axes import Axes
from torch import nn
from trained import augmentation, say

from landscape import Evaluation, evaluate
from landscape.models import alternate
from landscape.models.residual_stages import count_msas, resnet_stages
from landscape.plot import style
from landscape.plot.seeds import draw_mean
from landscape.training import (
    BuildUp,
    DeviceImages,
    WarmupCosine,
    adamw,
    build_up,
    fit,
)

WALK, VALIDATION = "build-up", "validation"
"""The table of a seed's build-up, and predictions for the images that decide."""

HELD_OUT = 0.2
"""Share of the training images that decide and are not trained on."""

LARGE = (PAPER.networks["AlterNet"][0], {**PAPER.networks["AlterNet"][1], "msas": (0, 0, 0, 0)})


def _small(*depths: int) -> tuple[str, dict[str, Any]]:
    """Return the AlterNet of the default without MSAs, with other depths of its stages."""
    constructor, sizes = DEFAULT.networks["AlterNet"]
    return constructor, {**sizes, "msas": (0, 0, 0), "depths": depths}


CHANGES: dict[str, dict[str, Any]] = {
    "default": {"networks": {"plain": _small(1, 2, 4)}, "epochs": 6}
    | {"warmup_epochs": 1, "seeds": 4},
    "quick": {"networks": {"plain": _small(1, 2, 2)}, "epochs": 1, "warmup_epochs": 0, "seeds": 2},
    "gpu": {"networks": {"plain": LARGE}, "epochs": 5, "warmup_epochs": 1, "seeds": 3},
    "paper": {"networks": {"plain": LARGE}, "seeds": 3},
}
"""What is different from the protocol by preset: the plain network, and how long it is trained."""


def run_build_ups(preset: str, protocol: Protocol, root: str | None) -> More:
    """Build up once a seed, then score every network that was tried with every seed.

    Args:
        preset: Name of the preset.
        protocol: Its protocol; more seeds than the preset's are taken over.
        root: Folder with the data set's own files.

    Returns:
        The networks, with the table of each seed at the first one, and validation and test
        predictions at all.
    """
    changes = CHANGES[preset] | {"seeds": max(CHANGES[preset]["seeds"], protocol.seeds)}
    protocol = replace(protocol, **changes)
    seeds = range(protocol.seeds)
    walks: dict[int, Path] = dict(side_by_side(walk, [(protocol, seed, root) for seed in seeds]))
    tables = [BuildUp.load(path) for path in walks.values()]
    tried = {tuple(msas) for table in tables for msas in table.msas.tolist()}
    order = sorted(tried, key=lambda msas: (sum(msas), [-count for count in reversed(msas)]))
    found: Found = {}
    for files in side_by_side(score, [(protocol, m, seed, root) for m in order for seed in seeds]):
        found |= files
    for seed, path in walks.items():
        found[name(order[0]), seed][WALK] = path
    arms = [Arm(name(msas), "plain", {"msas": msas}) for msas in order]
    return More(arms, found, {"build_up": {**changes, "held_out": HELD_OUT}})


def walk(protocol: Protocol, seed: int, root: str | None) -> tuple[int, Path]:
    """Build up with one seed; return the seed and the file with the table."""
    data, validation = split_images(protocol, root)
    folder = _folder(protocol, seed)

    def train(network: nn.Module, images: DeviceImages) -> None:
        train_network(protocol, network, images, folder, seed)

    table = build_up(
        make_model(protocol, Arm("plain", "plain"), data, seed),
        data,
        validation=validation,
        train=train,
        folder=folder / "walk",
        seed=seed,
        **_attention(protocol),
    )
    say(f"build-up, seed {seed}", f"{len(table.stage)} networks, the last kept {table.best}")
    return seed, folder / "walk" / "build_up.npz"


def score(protocol: Protocol, msas: tuple[int, ...], seed: int, root: str | None) -> Found:
    """Train the network with some MSAs a stage, unless a walk did, and let it predict."""
    folder = _folder(protocol, seed)
    files = {kind: folder / f"network-{name(msas)}" / f"{kind}.npz" for kind in (VALIDATION, TEST)}
    if not all(path.exists() for path in files.values()):
        data, validation = split_images(protocol, root)
        test = test_images(protocol, data.device, root)
        plain = make_model(protocol, Arm("plain", "plain"), data, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = alternate(plain, msas, **_attention(protocol))
        train_network(protocol, network, data, folder, seed)
        for kind, images in ((VALIDATION, validation), (TEST, test)):
            evaluate(network, images).save(files[kind])
    return {(name(msas), seed): files}


def train_network(
    protocol: Protocol, network: nn.Module, data: DeviceImages, folder: Path, seed: int
) -> None:
    """Train a network in place, or load it from where it was trained."""
    msas = [count_msas(stage) for stage in resnet_stages(network)]
    fit(
        network,
        data.with_(batch_size=protocol.batch_size, shuffle=True, seed=seed),
        optimizer=adamw(network, lr=protocol.learning_rate, weight_decay=protocol.weight_decay),
        schedule=WarmupCosine(protocol.epochs, protocol.warmup_epochs),
        epochs=protocol.epochs,
        transform=augmentation(data),
        folder=folder / f"network-{name(msas)}",
        resume=True,
        cuda_graphs=True,
        seed=seed,
    )


def split_images(protocol: Protocol, root: str | None) -> tuple[DeviceImages, DeviceImages]:
    """Return the training images without those that are held out, and these."""
    data = training_images(protocol, Arm("plain", "plain"), root)
    order = torch.randperm(data.num_samples, generator=torch.Generator().manual_seed(0))
    held_out = round(HELD_OUT * data.num_samples)
    return data.subset(order[held_out:]), data.subset(order[:held_out]).with_(batch_size=200)


def name(msas: Sequence[int]) -> str:
    """Return the label of a network of the build-up, its MSAs per stage: 0-1-2."""
    return "-".join(map(str, msas))


def _folder(protocol: Protocol, seed: int) -> Path:
    """Return where the networks of one seed are kept."""
    folder = run_folder(protocol, Arm("plain", "plain", share=1 - HELD_OUT), whole=True)
    return folder.with_name(f"build-up-{folder.name}") / f"seed-{seed}"


def _attention(protocol: Protocol) -> dict[str, Any]:
    """Return the sizes of the MSAs for `alternate`."""
    sizes = protocol.networks["plain"][1]
    chosen = {key: sizes[key] for key in ("heads", "head_dim", "window") if key in sizes}
    return {**chosen, "image_size": protocol.image_size}


# --- draw ----------------------------------------------------------------------------------------


def draw_build_ups(
    ax: Axes, walks: Sequence[BuildUp], scores: Mapping[str, Sequence[Evaluation]]
) -> None:
    """Draw the validation accuracy of every network with every seed, and the way of each seed.

    In a column the seeds stand side by side, always in their order; a thin line joins the networks
    that a seed kept.

    Args:
        ax: Axes to draw on.
        walks: The build-up of each seed.
        scores: Predictions for the validation images, one per seed, by MSAs per stage.
    """
    fates = [_fates(table) for table in walks]
    offsets = 0.5 * (np.arange(len(walks)) / max(len(walks) - 1, 1) - 0.5)
    msa, plain = style.family_color("AlterNet"), style.family_color("ResNet")
    look: dict[str, dict[str, Any]] = {
        "kept": {"mfc": msa, "mec": msa, "ms": 3.5},
        "refused": {"mfc": "w", "mec": msa, "ms": 3.5},
        "not tried": {"mfc": style.MUTED, "mec": style.MUTED, "ms": 1.5},
    }
    accuracy = {label: [100 * each.accuracy for each in runs] for label, runs in scores.items()}
    for column, (label, values) in enumerate(accuracy.items()):
        draw_mean(ax, column, values, color="0.2")
        for fate, offset, value in zip(fates, offsets, values, strict=True):
            marker = look[fate.get(label, "not tried")]
            if column == 0:
                marker = marker | {"mfc": plain, "mec": plain}
            ax.plot(column + offset, value, "o", mew=0.7, gid="run", **marker)
    for seed, (fate, offset) in enumerate(zip(fates, offsets, strict=True)):
        kept = [i for i, label in enumerate(accuracy) if fate.get(label) == "kept"]
        y = [list(accuracy.values())[i][seed] for i in kept]
        ax.plot(np.array(kept) + offset, y, color=msa, lw=0.6, alpha=0.6, zorder=1, gid="way")
    labels = ["\n".join(reversed(label.split("-"))) for label in accuracy]
    ax.set_xticks(range(len(labels)), labels)
    ax.set(xlim=(-0.5, len(labels) - 0.5), ylabel="Validation accuracy (%)")
    ax.set_xlabel("MSAs per stage, the last stage on top")
    shown = {"plain": {**look["kept"], "mfc": plain, "mec": plain}, **look}
    for key, marker in shown.items():
        ax.plot([], [], "o", mew=0.7, label=key, **marker)
    ax.plot([], [], "s", ms=3.5, color="0.2", mec="w", label="mean, 95 % interval")
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.2 * (top - bottom))  # room for the legend above every bar
    ax.legend(loc="upper left", ncols=len(shown) + 1)


def _fates(table: BuildUp) -> dict[str, str]:
    """Return what became of each network that was tried."""
    rows = zip(table.msas.tolist(), table.kept, strict=True)
    return {name(msas): "kept" if kept else "refused" for msas, kept in rows}
