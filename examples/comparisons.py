"""What Figures 4, 5, 6, 7, 12 and Appendix C have in common: networks compared over seeds.

Figures 2, 8, 9 and 10 are measured on these networks with `--seeds` (`subjects.py`).

A study names its networks (`Arm`) and what is measured of each. Every network is trained once a
seed, under one protocol: side by side on the cores of a CPU, one after another on a GPU. Trained
weights and measurements are kept in `runs/comparisons/` by what determines them, so studies share
them, and a run that was stopped goes on.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from claims import Claim, write_claims
from matplotlib.figure import Figure
from outputs import figures_of, preset_of, read_setting, save_figure, write_setting
from torch import nn
from tqdm import tqdm
from trained import ALTERNET, LARGE, LARGE_ALTERNET, Setting, augmentation, load_weights, say

import landscape
from landscape import Objective, Result
from landscape.models import create_model
from landscape.training import DeviceImages, WarmupCosine, adamw, fit, load_images

Results = dict[str, dict[str, list[Any]]]
"""Kind of measurement -> label of the network -> result of each seed."""

WARMUP, LAST = "spectrum-warmup", "spectrum-last"
"""Hessian max eigenvalue spectra on training images, after the warm-up and at the end."""
TEST, TRAIN = "test", "train"
"""Predictions for the test images, and for the augmented training images that were fitted."""
CORRUPTION = "corruption"
"""Predictions for corrupted test images."""
PROBES: Mapping[str, Callable[..., Result]] = {
    "fourier": landscape.fourier_amplitude,
    "frequency": landscape.frequency_robustness,
    "variance": landscape.feature_variance,
    "cka": landscape.cka,
    "lesion": landscape.lesion_study,
}
"""What Figures 2, 8, 9 and 10 measure on test images, of a model and its data."""
PROBE_BATCH = 100
"""Images in a batch for these: CKA's mini-batch."""


@dataclass(frozen=True)
class Arm:
    """A network of a comparison, and the share of the training images that it gets.

    Attributes:
        label: Its name in the figure.
        network: Name of the network in the protocol.
        sizes: What is different from there.
        share: Share of the training images.
    """

    label: str
    network: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0


@dataclass(frozen=True)
class Protocol:
    """Everything besides the network that determines the numbers.

    Attributes:
        dataset: Name of the data set.
        image_size: Side that images are padded to.
        train_images: Training images used, all where the set has fewer.
        test_images: Test images used.
        networks: Constructor and sizes by name.
        epochs: Epochs, those of the warm-up included.
        warmup_epochs: Epochs of the warm-up.
        batch_size: Images a step.
        learning_rate: AdamW's largest learning rate.
        weight_decay: AdamW's, and λ of the objective.
        hessian_batches: Mini-batches of 16 training images for the Hessian max spectra.
        corrupted_images: Test images for the corruptions.
        severities: Severities of the corruptions.
        seeds: Runs of each network.
    """

    dataset: str
    image_size: int
    train_images: int
    test_images: int
    networks: Mapping[str, tuple[str, Mapping[str, Any]]]
    epochs: int
    warmup_epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    hessian_batches: int
    corrupted_images: int
    severities: tuple[int, ...]
    seeds: int


SMALL = {name: (constructor, sizes) for name, constructor, sizes in (*Setting().models, ALTERNET)}
PAPERS = {name: (constructor, sizes) for name, constructor, sizes in (*LARGE, LARGE_ALTERNET)}

DEFAULT = Protocol(
    dataset="fashion_mnist_mini", image_size=28, train_images=6000, test_images=2000,
    networks=SMALL, epochs=15, warmup_epochs=3, batch_size=96, learning_rate=2e-3,
    weight_decay=0.05, hessian_batches=20, corrupted_images=500, severities=(1, 3, 5), seeds=5,
)  # fmt: skip
PAPER = replace(
    DEFAULT, dataset="cifar100", image_size=32, train_images=50_000, test_images=10_000,
    networks=PAPERS, epochs=305, warmup_epochs=5, learning_rate=1.25e-4, hessian_batches=312,
    corrupted_images=10_000, severities=(1, 2, 3, 4, 5), seeds=3,
)  # fmt: skip
PROTOCOLS = {
    "default": DEFAULT,
    "quick": replace(
        DEFAULT, train_images=480, test_images=200, epochs=2, warmup_epochs=1, hessian_batches=1,
        corrupted_images=50, severities=(3,), seeds=2,
    ),
    "gpu": replace(
        PAPER, dataset="fashion_mnist", train_images=60_000, epochs=20, warmup_epochs=2,
        hessian_batches=64, corrupted_images=2000, severities=(1, 3, 5),
    ),
    "paper": PAPER,
}  # fmt: skip


Found = dict[tuple[str, int], dict[str, Path]]
"""Label of the network and seed -> kind of measurement -> file."""


@dataclass(frozen=True)
class More:
    """What a study measures besides, on networks that are not trained as the protocol says.

    Attributes:
        arms: Networks.
        found: Where their measurements lie.
        setting: What determines these besides the protocol.
    """

    arms: Sequence[Arm]
    found: Found
    setting: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """A figure: the networks, what is measured on each, how it is drawn, what it is to show.

    Attributes:
        name: Name of its files.
        arms: Networks under a protocol, by preset.
        kinds: What is measured.
        draw: The figure.
        claims: Claims of the paper with what was measured.
        note: What the intervals mean, and what the setting cannot show.
        seeds: Runs of each network by preset, where it is not the protocol's number.
        more: What else is measured, of a preset, its protocol, and the data set's own files.
    """

    name: str
    arms: Callable[[str], Sequence[Arm]]
    kinds: Sequence[str]
    draw: Callable[[Results], Figure]
    claims: Callable[[Results], list[Claim]]
    note: str
    seeds: Mapping[str, int] = field(default_factory=dict)
    more: Callable[[str, Protocol, str | None], More] | None = None


def run(study: Study, description: str) -> None:
    """Train and measure what is missing, draw, and compare with the claims."""
    args = _parse(description)
    began = time.perf_counter()
    preset = preset_of(args)
    out = args.out or figures_of(preset)
    folder = args.draw or out / study.name
    if not args.draw:
        protocol = PROTOCOLS[preset]
        seeds = args.seeds or study.seeds.get(preset, protocol.seeds)
        protocol = replace(protocol, seeds=seeds, dataset=args.dataset or protocol.dataset)
        arms = study.arms(preset)
        found = compute(protocol, arms, study.kinds, args.root)
        more = More((), {}, {})
        if study.more is not None:
            more = study.more(preset, protocol, args.root)
        setting = {"preset": preset, **asdict(protocol), **more.setting}
        collect(found | more.found, setting, [*arms, *more.arms], folder)
    results = load_results(folder)
    save_figure(study.draw(results), out / study.name)
    table = write_claims(out, study.name, study.claims(results), study.note, read_setting(folder))
    print(f"\n{table}\nwrote {out}/{study.name}.png, .pdf, {study.name}/*.npz", end=" ")
    print(f"in {time.perf_counter() - began:.0f} s")


# --- compute -------------------------------------------------------------------------------------


def compute(
    protocol: Protocol, arms: Sequence[Arm], kinds: Sequence[str], root: str | None = None
) -> Found:
    """Train and measure every network with every seed, unless that is on disk.

    Args:
        protocol: The protocol.
        arms: The networks.
        kinds: What is measured.
        root: Folder with the data set's own files.

    Returns:
        Where the measurements lie.
    """
    jobs = [(protocol, arm, seed, kinds, root) for arm in arms for seed in range(protocol.seeds)]
    jobs.sort(key=lambda job: _cost(job[1]), reverse=True)  # long ones first: no core waits at last
    found: Found = {}
    for files in side_by_side(work, jobs):
        found |= files
    return found


def side_by_side(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Yield what a function returns of each job, done first come first; on a GPU one at a time."""
    if torch.cuda.is_available():
        yield from (function(*job) for job in tqdm(jobs, "Runs"))
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # small models keep one core busy, not two
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), "Runs", total=len(jobs)):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def work(protocol: Protocol, arm: Arm, seed: int, kinds: Sequence[str], root: str | None) -> Found:
    """Train one network with one seed, and measure it."""
    whole = any(kind != WARMUP for kind in kinds)
    folder = run_folder(protocol, arm, whole)
    files = {kind: folder / f"seed-{seed}" / f"{kind}.npz" for kind in kinds}
    if not all(path.exists() for path in files.values()):
        data = training_images(protocol, arm, root)
        test = test_images(protocol, data.device, root)
        model = make_model(protocol, arm, data, seed)
        checkpoints = train(protocol, model, data, folder, seed, whole)
        for kind, path in files.items():
            if not path.exists():
                load_weights(model, checkpoints["warmup" if kind == WARMUP else "last"])
                measure(kind, model, data, test, protocol, seed).save(path)
        say(f"{arm.label}, seed {seed}", f"measured: {', '.join(kinds)}")
    return {(arm.label, seed): files}


def run_folder(protocol: Protocol, arm: Arm, whole: bool) -> Path:
    """Return the folder of a network's runs, named by a digest of all that determines them."""
    constructor, sizes = protocol.networks[arm.network]
    made_of = asdict(replace(protocol, networks={}, seeds=0))
    made_of |= {"sizes": {**sizes, **arm.sizes}, "share": arm.share, "whole": whole}
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:10]
    return Path("runs/comparisons") / f"{protocol.dataset}-{constructor}-{digest}"


def training_images(protocol: Protocol, arm: Arm, root: str | None) -> DeviceImages:
    """Return the share of the training images that a network gets, in their order."""
    data = load_images(protocol.dataset, root=root, size=protocol.image_size)
    data = data.to("cuda" if torch.cuda.is_available() else "cpu")
    count = round(arm.share * min(protocol.train_images, data.num_samples))
    return data.subset(count)


def test_images(protocol: Protocol, device: torch.device, root: str | None) -> DeviceImages:
    """Return the test images."""
    test = load_images(protocol.dataset, root=root, split="test", size=protocol.image_size)
    return test.to(device).subset(protocol.test_images).with_(batch_size=200)


def make_model(protocol: Protocol, arm: Arm, data: DeviceImages, seed: int) -> nn.Module:
    """Return a new network; the global random state is left as found."""
    constructor, sizes = protocol.networks[arm.network]
    sizes = {**sizes, **arm.sizes}
    if constructor.startswith("vit"):
        sizes["image_size"] = protocol.image_size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = create_model(
            constructor,
            in_channels=data.images.shape[1],
            num_classes=data.num_classes,
            **sizes,
        )
    return model.to(data.device)


def train(
    protocol: Protocol,
    model: nn.Module,
    data: DeviceImages,
    folder: Path,
    seed: int,
    whole: bool,
) -> dict[Any, str]:
    """Train a network, to the end or to the end of the warm-up.

    Returns:
        Its checkpoints.
    """
    history = fit(
        model,
        data.with_(batch_size=protocol.batch_size, shuffle=True, seed=seed),
        optimizer=adamw(model, lr=protocol.learning_rate, weight_decay=protocol.weight_decay),
        schedule=WarmupCosine(protocol.epochs, protocol.warmup_epochs),
        epochs=protocol.epochs if whole else protocol.warmup_epochs,
        transform=augmentation(data),
        folder=folder / f"training-{seed}",
        checkpoints=("warmup", "last"),
        resume=True,
        cuda_graphs=True,
        seed=seed,
    )
    return history.checkpoints


def measure(
    kind: str,
    model: nn.Module,
    data: DeviceImages,
    test: DeviceImages,
    protocol: Protocol,
    seed: int,
) -> Result:
    """Return one measurement of a trained network."""
    augment = augmentation(data)
    if kind in (WARMUP, LAST):
        # What was optimised: NLL + L2 on augmented images, one draw of the augmentation for all.
        objective = Objective(weight_decay=protocol.weight_decay, transform=augment, seed=seed)
        few = data.subset(min(16 * protocol.hessian_batches, data.num_samples // 16 * 16))
        return landscape.hessian_max_spectrum(model, few.with_(batch_size=16), objective=objective)
    if kind == TEST:
        return landscape.evaluate(model, test)
    if kind == TRAIN:
        generator = torch.Generator(data.device).manual_seed(seed)
        batches = [augment(x, y, generator) for x, y in data.with_(batch_size=protocol.batch_size)]
        return landscape.evaluate(model, batches)
    if kind in PROBES:
        return PROBES[kind](model, test.with_(batch_size=PROBE_BATCH))
    # The corruptions need 32 pixels a side: they act on padded images, the network sees them cut.
    side = max(protocol.image_size, 32)
    return landscape.corruption_robustness(
        nn.Sequential(nn.ZeroPad2d((protocol.image_size - side) // 2), model),
        test.subset(protocol.corrupted_images).resized(side),
        severities=protocol.severities,
    )


def _cost(arm: Arm) -> float:
    """Return roughly how long a run takes: only the order of the jobs depends on it."""
    return arm.share * {"ResNet": 1.5, "ViT": 1.0, "AlterNet": 3.0}.get(arm.network, 1.0)


# --- results -------------------------------------------------------------------------------------


def collect(found: Found, setting: Mapping[str, Any], arms: Sequence[Arm], folder: Path) -> None:
    """Copy the measurements beside the figure, with what they were measured on."""
    begin_folder(folder, {**setting, "arms": [asdict(arm) for arm in arms]})
    numbers = {arm.label: number for number, arm in enumerate(arms)}
    for (label, seed), files in found.items():
        for kind, path in files.items():
            shutil.copy(path, result_path(folder, kind, numbers[label], seed))


def begin_folder(folder: Path, setting: Mapping[str, Any]) -> None:
    """Empty the folder of a figure's results, and say in it what they will be measured on."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.npz"):
        stale.unlink()
    write_setting(folder, setting)


def result_path(folder: Path, kind: str, number: int, seed: int) -> Path:
    """Return where a measurement of a network, by its number in the setting, is kept."""
    return folder / f"{kind}_{number:02d}_{seed}.npz"


def load_results(folder: Path) -> Results:
    """Return the saved measurements."""
    paths = sorted(folder.glob("*_*_*.npz"))
    if not paths:
        sys.exit(f"{folder} holds no results (KIND_NETWORK_SEED.npz).")
    arms = read_setting(folder)["arms"]
    labels = [re.sub(r"(?<=\d)%", " %", arm["label"]) for arm in arms]  # "6%" in older files
    results: Results = {}
    for path in paths:
        kind, number, _ = path.stem.split("_")
        named = results.setdefault(kind, {})
        named.setdefault(labels[int(number)], []).append(Result.load(path))
    return results


def _parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--preset", choices=PROTOCOLS, default="default")
    parser.add_argument("--quick", action="store_true", help="the same path in little")
    parser.add_argument("--seeds", type=int, help="runs of each network")
    parser.add_argument("--dataset", help="data set instead of the preset's")
    parser.add_argument("--root", help="folder with the data set's own files")
    parser.add_argument("--out", type=Path, help="folder for the figure")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw saved results again")
    return parser.parse_args()
