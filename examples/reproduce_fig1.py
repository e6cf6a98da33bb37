"""Figure 1 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022), from scratch.

    python examples/reproduce_fig1.py                  # two CPU cores, offline, some ten minutes
    python examples/reproduce_fig1.py --quick          # the same path in little: a smoke test
    python examples/reproduce_fig1.py --preset gpu     # the paper's networks, minutes on a GPU
    python examples/reproduce_fig1.py --preset paper --dataset cifar100    # the paper's, on a GPU
    python examples/reproduce_fig1.py --draw figures/fig1   # draw saved results again, no model

A ResNet and a ViT are trained with one recipe and measured under one objective, NLL + L2 on the
augmented training data: (a) filter-normalised loss surfaces, (b) training trajectories in polar
coordinates, (c) Hessian max eigenvalue spectra from the end of warm-up on. Finished stages are kept
in `runs/` and reused by the next run of the same setting; those of the paper's take 7 GB of disk,
most of it 47 checkpoints of ResNet-50 of 95 MB each.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from claims import Claim, Measured, write_claims
from outputs import figures_of, preset_of, read_setting, save_figure
from trained import (
    PRESETS,
    Setting,
    augmentation,
    for_every_model,
    images,
    load_weights,
    say,
    train,
    work_folder,
)

import landscape
from landscape import HessianMaxSpectrum, LossSurface, Objective, PolarTrajectory, Result

R = TypeVar("R", bound=Result)

NOTE = (
    "Intervals (95 %): NLL over images, as if centre and ring were independent (too wide); "
    "APE and NEP bootstrapped over mini-batches, an NEP of 0 as of independent values. One "
    "training run a model: no interval covers the choice of seed, and overlapping intervals are "
    "called undecided."
)


def main() -> None:
    """Compute what is missing, draw, and print the claims."""
    args = parse_args()
    preset = preset_of(args)
    began = time.perf_counter()
    if args.draw:
        results = args.draw
        out = args.out or args.draw.parent
    else:
        setting = PRESETS[preset]
        if args.dataset:
            setting = replace(setting, dataset=args.dataset)
        out = args.out or figures_of(preset)
        work = work_folder(preset, setting)
        for_every_model(compute_model, setting, work, args.root)
        results = out / "fig1"
        results.mkdir(parents=True, exist_ok=True)
        for path in (*sorted(work.glob("*.npz")), work / "setting.json"):
            shutil.copy(path, results / path.name)
    surfaces, trajectories, spectra = load(results)
    draw(surfaces, trajectories, spectra, out)
    claims = figure_claims(surfaces, trajectories, spectra)
    table = write_claims(out, "fig1", claims, NOTE, read_setting(results))
    print(f"\n{table}\nwrote {out}/fig1.png, .pdf, fig1a.html, fig1/*.npz", end=" ")
    print(f"in {time.perf_counter() - began:.0f} s")


# --- compute -------------------------------------------------------------------------------------


def compute_model(setting: Setting, index: int, work: Path, root: str | None) -> None:
    """Train one model, then its trajectory, spectra and surface; skip what is on disk."""
    name = setting.models[index][0]
    model, history = train(setting, index, work, root)
    data = images(setting, root)
    augment = augmentation(data)
    say(name, f"trained: test accuracy {history.validation_accuracy[-1]:.3f}")
    once(work / f"history_{name}.npz", lambda: replace(history, checkpoints={}, trajectory=()))
    once(
        work / f"trajectory_{name}.npz",
        lambda: landscape.polar_trajectory(history.trajectory, model=model),
    )
    # What was optimised: NLL + L2 on augmented images, one draw of the augmentation for all.
    objective = Objective(weight_decay=setting.weight_decay, transform=augment, seed=setting.seed)
    tenth = data.subset(16 * setting.hessian_batches).with_(batch_size=16, shuffle=False)
    for epoch in ("warmup", *setting.hessian_epochs):
        load_weights(model, history.checkpoints[epoch])
        spectrum = once(
            work / f"spectrum_{name}_{epoch}.npz",
            lambda: landscape.hessian_max_spectrum(
                model, tenth, objective=objective, progress=True
            ),
        )
        say(name, f"{epoch}: NEP {spectrum.nep:.3f}, APE {spectrum.ape:.4g}")
    load_weights(model, history.checkpoints["last"])
    few = data.subset(setting.surface_images).with_(batch_size=128, shuffle=False)
    once(
        work / f"surface_{name}.npz",
        lambda: landscape.loss_surface(
            model,
            few,
            points=setting.surface_points,
            objective=objective,
            metrics=("loss", "accuracy", "ece"),
            resume=work / f"surface_{name}.part",
            progress=True,
        ).without_vectors(),  # two are twice the weights
    )
    say(name, "surface done")


def once(path: Path, make: Callable[[], R]) -> R:
    """Return the result saved at `path`, making and saving it first where it is missing."""
    if not path.exists():
        make().save(path)
    return Result.load(path)


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
    from landscape import plot

    save_figure(plot.figure1(surfaces, trajectories, spectra), out / "fig1", dpi=160)
    html = plot.interactive.loss_surface(surfaces)
    html.write_html(out / "fig1a.html", include_plotlyjs="cdn")


# --- claims --------------------------------------------------------------------------------------


def figure_claims(surfaces: Surfaces, trajectories: Trajectories, spectra: Spectra) -> list[Claim]:
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
                about=1,
            )
        )
    turn = {n: total_turning(t) for n, t in trajectories.items()}
    claims.append(
        Claim(
            "(b) ViT converges along a smoother path",
            "turning of the polar path [rad], one run each: no interval",
            ("ViT", turn["ViT"]),
            ("ResNet", turn["ResNet"]),
            about=1,
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
                about=1,
            )
        )
        claims.append(
            Claim(
                f"(c) {epoch}: ViT is less convex",
                "NEP",
                ("ResNet", nep["ResNet"]),
                ("ViT", nep["ViT"]),
                about=1,
            )
        )
    return claims


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
    steps = steps[steps != 0]  # standing still is no turn: a warm-up's first step has rate 0
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
