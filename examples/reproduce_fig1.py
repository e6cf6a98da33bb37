"""Figure 1 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022), from scratch.

    python examples/reproduce_fig1.py                  # two CPU cores, offline, under ten minutes
    python examples/reproduce_fig1.py --quick          # the same path in little: a smoke test
    python examples/reproduce_fig1.py --preset paper --dataset cifar100    # the paper's, on a GPU
    python examples/reproduce_fig1.py --draw figures/fig1   # draw saved results again, no model

A ResNet and a ViT are trained with one recipe and measured under one objective, NLL + L2 on the
augmented training data: (a) filter-normalised loss surfaces, (b) training trajectories in polar
coordinates, (c) Hessian max eigenvalue spectra from the end of warm-up on. Finished stages are kept
in `runs/` and reused by the next run of the same setting.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from claims import Claim, Measured, format_table

import landscape
from landscape import HessianMaxSpectrum, LossSurface, Objective, PolarTrajectory, Result
from landscape.models import create_model
from landscape.training import WarmupCosine, adamw, fit, load_images, recipe

R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Setting:
    """Everything that determines the numbers of the figure."""

    dataset: str = "fashion_mnist_mini"
    train_images: int = 6000
    models: tuple[tuple[str, str, dict], ...] = (
        ("ResNet", "resnet20", {"width": 8, "drop_path": 0.1}),
        ("ViT", "vit_nano", {"drop_path": 0.1}),
    )
    epochs: int = 30  # warm-up included
    warmup_epochs: int = 2
    hessian_epochs: tuple[int, ...] = (10, 20, 30)
    batch_size: int = 96
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    surface_points: int = 21
    surface_images: int = 512
    hessian_batches: int = 24  # mini-batches of 16 training images each
    seed: int = 0


PRESETS = {
    "default": Setting(),
    "quick": Setting(
        train_images=480, epochs=4, warmup_epochs=1, hessian_epochs=(2, 3, 4),
        surface_points=7, surface_images=64, hessian_batches=3,
    ),
    "paper": Setting(
        dataset="cifar100", train_images=50_000,
        models=(
            ("ResNet", "resnet50", {"drop_path": 0.1}),
            ("ViT", "vit_tiny", {"drop_path": 0.1}),
        ),
        epochs=305, warmup_epochs=5, hessian_epochs=(105, 205, 305), learning_rate=1.25e-4,
        surface_images=10_000, hessian_batches=312,
    ),
}  # fmt: skip


def main() -> None:
    """Compute what is missing, draw, and print the claims."""
    args = parse_args()
    if args.draw:
        surfaces, trajectories, spectra = load(args.draw)
        out = args.out or args.draw.parent
        draw(surfaces, trajectories, spectra, out)
        table = claims_table(surfaces, trajectories, spectra)
        (out / "fig1_claims.md").write_text(table + "\n")
        print(table)
        return
    preset = "quick" if args.quick else args.preset
    setting = PRESETS[preset]
    if args.dataset:
        setting = replace(setting, dataset=args.dataset)
    out = args.out or Path("figures" if preset == "default" else f"figures/{preset}")
    work = Path("runs") / f"fig1-{preset}-{setting.dataset}"
    began = time.perf_counter()
    compute(setting, work, args.root)
    results = out / "fig1"
    results.mkdir(parents=True, exist_ok=True)
    for path in sorted(work.glob("*.npz")):
        shutil.copy(path, results / path.name)
    surfaces, trajectories, spectra = load(results)
    draw(surfaces, trajectories, spectra, out)
    table = claims_table(surfaces, trajectories, spectra)
    (out / "fig1_claims.md").write_text(table + "\n")
    print(f"\n{table}\n\nwrote {out}/fig1.png, .pdf, fig1a.html, fig1/*.npz", end=" ")
    print(f"in {time.perf_counter() - began:.0f} s")


# --- compute -------------------------------------------------------------------------------------


def compute(setting: Setting, work: Path, root: str | None) -> None:
    """Train and probe every model, each in a process of its own where there is no GPU."""
    work.mkdir(parents=True, exist_ok=True)
    stamp, description = work / "setting.json", json.dumps(asdict(setting), indent=1)
    if stamp.exists() and stamp.read_text() != description:
        print(f"{work} holds another setting; computing afresh.")
        shutil.rmtree(work)
        work.mkdir(parents=True)
    stamp.write_text(description)
    if torch.cuda.is_available():
        for index in range(len(setting.models)):
            compute_model(setting, index, work, root)
        return
    # Small models keep one core busy, not two: one process a model, half the cores each.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // len(setting.models))
    workers = []
    for index in range(len(setting.models)):
        os.environ |= {"TQDM_POSITION": str(index), "OMP_NUM_THREADS": str(threads)}
        workers.append(
            context.Process(target=compute_model, args=(setting, index, work, root), daemon=True)
        )
        workers[-1].start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit("A model failed; its message is above. Finished stages are kept.")


def compute_model(setting: Setting, index: int, work: Path, root: str | None) -> None:
    """Train one model, then its trajectory, spectra and surface; skip what is on disk."""
    name, constructor, sizes = setting.models[index]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = load_images(setting.dataset, root=root).to(device)
    test = load_images(setting.dataset, root=root, split="test").to(device)
    train = train.subset(setting.train_images).with_(batch_size=setting.batch_size, shuffle=True)
    augment = recipe(train.mean, train.std, train.num_classes)
    channels, size = train.images.shape[1:3]
    if constructor.startswith("vit"):
        sizes = sizes | {"image_size": size}
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        model = create_model(
            constructor, in_channels=channels, num_classes=train.num_classes, **sizes
        ).to(device)
    history = fit(
        model,
        train,
        optimizer=adamw(model, lr=setting.learning_rate, weight_decay=setting.weight_decay),
        schedule=WarmupCosine(setting.epochs, setting.warmup_epochs),
        epochs=setting.epochs,
        transform=augment,
        validation=test.with_(batch_size=500),
        folder=work / name,
        checkpoints=("init", "warmup", *setting.hessian_epochs, "last"),
        trajectory=max(1, setting.epochs // 40),
        resume=True,
        seed=setting.seed,
        progress=True,
    )
    say(name, f"trained: test accuracy {history.validation_accuracy[-1]:.3f}")
    once(work / f"history_{name}.npz", lambda: replace(history, checkpoints={}, trajectory=()))
    once(
        work / f"trajectory_{name}.npz",
        lambda: landscape.polar_trajectory(history.trajectory, model=model),
    )
    # What was optimised: NLL + L2 on augmented images, one draw of the augmentation for all.
    objective = Objective(weight_decay=setting.weight_decay, transform=augment, seed=setting.seed)
    tenth = train.subset(16 * setting.hessian_batches).with_(batch_size=16, shuffle=False)
    for epoch in ("warmup", *setting.hessian_epochs):
        load_weights(model, history.checkpoints[epoch], device)
        spectrum = once(
            work / f"spectrum_{name}_{epoch}.npz",
            lambda: landscape.hessian_max_spectrum(
                model, tenth, objective=objective, progress=True
            ),
        )
        say(name, f"{epoch}: NEP {spectrum.nep:.3f}, APE {spectrum.ape:.4g}")
    load_weights(model, history.checkpoints["last"], device)
    images = train.subset(setting.surface_images).with_(batch_size=128, shuffle=False)
    once(
        work / f"surface_{name}.npz",
        lambda: landscape.loss_surface(
            model,
            images,
            points=setting.surface_points,
            objective=objective,
            metrics=("loss", "accuracy", "ece"),
            resume=work / f"surface_{name}.part",
            progress=True,
        ),
    )
    say(name, "surface done")


def once(path: Path, make: Callable[[], R]) -> R:
    """Return the result saved at `path`, making and saving it first where it is missing."""
    if not path.exists():
        make().save(path)
    return Result.load(path)


def load_weights(model: torch.nn.Module, path: str, device: torch.device) -> None:
    """Load a state dict of a checkpoint."""
    model.load_state_dict(torch.load(path, map_location=device, weights_only=True))


def say(name: str, message: str) -> None:
    """Print a line for one model."""
    print(f"[{name}] {message}", flush=True)


# --- draw ----------------------------------------------------------------------------------------

Surfaces = dict[str, LossSurface]
Trajectories = dict[str, PolarTrajectory]
Spectra = dict[str, dict[str, HessianMaxSpectrum]]


def load(folder: Path) -> tuple[Surfaces, Trajectories, Spectra]:
    """Return the saved results by model."""
    names = sorted(path.stem.removeprefix("surface_") for path in folder.glob("surface_*.npz"))
    if not names:
        sys.exit(f"{folder} holds no results (surface_*.npz).")
    surfaces = {n: LossSurface.load(folder / f"surface_{n}.npz") for n in names}
    trajectories = {n: PolarTrajectory.load(folder / f"trajectory_{n}.npz") for n in names}
    spectra: Spectra = {}
    for name in names:
        epochs = [p.stem.rsplit("_", 1)[1] for p in folder.glob(f"spectrum_{name}_*.npz")]
        epochs.sort(key=lambda epoch: 0 if epoch == "warmup" else int(epoch))
        spectra[name] = {
            "warm-up" if epoch == "warmup" else f"epoch {epoch}": HessianMaxSpectrum.load(
                folder / f"spectrum_{name}_{epoch}.npz"
            )
            for epoch in epochs
        }
    return surfaces, trajectories, spectra


def draw(surfaces: Surfaces, trajectories: Trajectories, spectra: Spectra, out: Path) -> None:
    """Write the figure from results alone."""
    import matplotlib as mpl

    from landscape import plot

    out.mkdir(parents=True, exist_ok=True)
    figure = plot.figure1(surfaces, trajectories, spectra)
    with mpl.rc_context(plot.style.rc()):  # fonts embedded as TrueType
        figure.savefig(out / "fig1.png", dpi=160)
        figure.savefig(out / "fig1.pdf")
    html = plot.interactive.loss_surface(surfaces)
    html.write_html(out / "fig1a.html", include_plotlyjs="cdn")


# --- claims --------------------------------------------------------------------------------------


def claims_table(surfaces: Surfaces, trajectories: Trajectories, spectra: Spectra) -> str:
    """Return the paper's claims for Figure 1 next to what was measured."""
    claims = []
    for quantity, label in (("loss", "NLL + L2"), ("nll", "NLL")):
        rise = {n: surface_rise(s, quantity) for n, s in surfaces.items()}
        claims.append(
            Claim(
                "(a) the loss surface of ViT is flatter",
                f"rise of {label} at radius 0.5 [nat]",
                ("ViT", rise["ViT"]),
                ("ResNet", rise["ResNet"]),
            )
        )
    turn = {n: total_turning(t) for n, t in trajectories.items()}
    claims.append(
        Claim(
            "(b) ViT converges along a smoother path",
            "turning of the polar path [rad], one run each: no interval",
            ("ViT", turn["ViT"]),
            ("ResNet", turn["ResNet"]),
        )
    )
    for epoch in spectra["ViT"]:
        pair = {n: spectra[n][epoch] for n in ("ViT", "ResNet")}
        ape = {n: Measured(s.ape, *s.ape_interval) for n, s in pair.items()}
        nep = {n: Measured(s.nep, *s.nep_interval) for n, s in pair.items()}
        claims.append(
            Claim(
                f"(c) {epoch}: ViT has smaller Hessian eigenvalues",
                "APE",
                ("ViT", ape["ViT"]),
                ("ResNet", ape["ResNet"]),
            )
        )
        claims.append(
            Claim(
                f"(c) {epoch}: ViT is less convex",
                "NEP",
                ("ResNet", nep["ResNet"]),
                ("ViT", nep["ViT"]),
            )
        )
    note = (
        "Intervals (95 %): NLL over images, as if centre and ring were independent (too wide); "
        "APE and NEP bootstrapped over mini-batches. One training run a model: no interval covers "
        "the choice of seed, and overlapping intervals are called undecided."
    )
    return f"{format_table(claims)}\n\n{note}"


def surface_rise(surface: LossSurface, quantity: str) -> Measured:
    """Return the mean rise above the centre over the four axis points nearest to radius 0.5."""
    i, j = (int(np.abs(axis).argmin()) for axis in (surface.x, surface.y))
    left, right = (int(np.abs(surface.x - r).argmin()) for r in (-0.5, 0.5))
    low, high = (int(np.abs(surface.y - r).argmin()) for r in (-0.5, 0.5))
    values = getattr(surface, quantity)
    ring = [values[left, j], values[right, j], values[i, low], values[i, high]]
    ring_error = np.mean([surface.nll_stderr[left, j], surface.nll_stderr[right, j],
                          surface.nll_stderr[i, low], surface.nll_stderr[i, high]])  # fmt: skip
    rise = float(np.mean(ring) - values[i, j])
    error = 1.96 * float(np.hypot(ring_error, surface.nll_stderr[i, j]))
    return Measured(rise, rise - error, rise + error)


def total_turning(trajectory: PolarTrajectory) -> Measured:
    """Return the sum of the angles between successive steps of the path in polar coordinates."""
    finite = np.isfinite(trajectory.angle)
    r, angle = trajectory.radius[finite], trajectory.angle[finite]
    steps = np.diff(np.append(r * np.exp(1j * angle), 0))  # the path ends at the optimum
    turning = float(np.abs(np.angle(steps[1:] / steps[:-1])).sum())
    return Measured(turning, float("nan"), float("nan"))


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--quick", action="store_true", help="same as --preset quick")
    parser.add_argument("--dataset", help="data set instead of the preset's")
    parser.add_argument("--root", help="folder with the data set's own files")
    parser.add_argument("--out", type=Path, help="folder for the figures")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw saved results again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
