"""What Figures 2, 8, 9 and 10 are measured on, and the way from there to files.

By default the models of Figure 1 (trained where they are not yet) on the test images; `--alternet`
adds a small AlterNet, whose stages end in MSAs, for Figures 8, 9 and 10 (several minutes of
training the first time). With `--model timm:NAME --weights FILE --images FOLDER` any model of timm
on a folder of images, one class a folder: the paper's ImageNet setting.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from any_model import images_of
from claims import Claim, write_claims
from matplotlib.figure import Figure
from outputs import figures_of, preset_of, read_setting, save_figure, write_setting
from torch import nn
from trained import (
    ALTERNET,
    LARGE,
    LARGE_ALTERNET,
    PRESETS,
    for_every_model,
    images,
    say,
    train,
    work_folder,
)

from landscape import Result

QUICK = {"depths": (2, 4), "msas": (0, 2), "heads": (1, 2)}
"""Sizes of the AlterNet in little."""

Results = dict[str, dict[str, Any]]  # kind of result -> model -> result


@dataclass(frozen=True)
class Subject:
    """A trained model and the images it is measured on.

    Attributes:
        model: The model.
        data: Re-iterable of batches `(x, y)` that knows its `mean` and `std`.
    """

    model: nn.Module
    data: Any


@dataclass(frozen=True)
class Study:
    """A figure: what is measured on each model, how it is drawn, and the claims it is about.

    Attributes:
        name: Name of its files.
        compute: Results of one model by kind.
        draw: Figure and interactive figure from all results.
        claims: Claims of the paper with what was measured.
        note: What the intervals mean, and what the setting cannot show.
    """

    name: str
    compute: Callable[[Subject], Mapping[str, Result]]
    draw: Callable[[Results], tuple[Figure, Any]]
    claims: Callable[[Results], list[Claim]]
    note: str


def run(study: Study, description: str) -> None:
    """Compute, save, draw, and compare with the claims; `--draw` begins with what is saved."""
    args = _parse(description)
    out = args.out or figures_of(preset_of(args))
    began = time.perf_counter()
    folder = args.draw or out / study.name
    if not args.draw:
        subjects = _subjects(args)
        found = {}
        for label, subject in subjects.items():
            for kind, result in study.compute(subject).items():
                found[f"{kind}_{label}.npz"] = result
            say(label, "measured")
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.npz"):
            stale.unlink()
        write_setting(folder, _setting(args))
        for name, result in found.items():
            result.save(folder / name)
    results = _load(folder)
    figure, html = study.draw(results)
    save_figure(figure, out / study.name)
    html.write_html(out / f"{study.name}.html", include_plotlyjs="cdn")
    table = write_claims(out, study.name, study.claims(results), study.note, read_setting(folder))
    print(f"\n{table}\nwrote {out}/{study.name}.png, .pdf, .html, {study.name}/*.npz", end=" ")
    print(f"in {time.perf_counter() - began:.0f} s")


def _setting(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the models are and what they are measured on."""
    if args.model:
        return {"models": args.model, "images": args.images.name}
    preset = preset_of(args)
    return {"preset": preset, **asdict(PRESETS[preset])} | (
        {"dataset": args.dataset} if args.dataset else {}
    )


def _subjects(args: argparse.Namespace) -> dict[str, Subject]:
    """Return the models by label, in network families' order of the paper."""
    if args.model:
        return {label: Subject(model, data) for label, model, data in _timm_models(args)}
    preset = preset_of(args)
    setting = PRESETS[preset]
    if args.dataset:
        setting = replace(setting, dataset=args.dataset)
    work = work_folder(preset, setting)
    if args.alternet:
        name, constructor, sizes = LARGE_ALTERNET if setting.models == LARGE else ALTERNET
        third = (name, constructor, sizes | QUICK if preset == "quick" else sizes)
        setting = replace(setting, models=(*setting.models, third))
    last = f"epoch-{setting.epochs:05d}.pt"
    trained = [work / name / last for name, _, _ in setting.models]
    if not all(path.exists() for path in trained):
        for_every_model(train, setting, work, args.root)
    test = images(setting, args.root, "test").with_(batch_size=100)
    if args.quick:
        test = test.subset(200)
    return {
        setting.models[i][0]: Subject(train(setting, i, work, args.root)[0], test)
        for i in range(len(setting.models))
    }


def _timm_models(args: argparse.Namespace) -> "list[tuple[str, nn.Module, Any]]":
    """Return label, model and images of each `--model`."""
    import timm

    from landscape.training import FolderImages

    if not args.images or len(args.weights) != len(args.model):
        sys.exit("--model needs --weights with a file for each model, and --images with a folder.")
    found = []
    for name, weights in zip(args.model, args.weights, strict=True):
        name = name.removeprefix("timm:")
        model = timm.create_model(name, checkpoint_path=str(weights)).eval()
        config = timm.data.resolve_model_data_config(model)
        data = FolderImages(
            args.images, batch_size=50, max_images=args.max_images, **images_of(config)
        )
        found.append((name, model, data))
    return found


def _load(folder: Path) -> Results:
    """Return the saved results by kind and model."""
    results: Results = {}
    order = ["ResNet", "ViT", ALTERNET[0]]
    paths = list(folder.glob("*_*.npz"))
    if not paths:
        sys.exit(f"{folder} holds no results (KIND_MODEL.npz).")
    for path in sorted(paths, key=lambda p: _rank(p.stem.split("_", 1)[1], order)):
        kind, label = path.stem.split("_", 1)
        results.setdefault(kind, {})[label] = Result.load(path)
    return results


def _rank(label: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(label) if label in order else len(order), label)


def _parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--quick", action="store_true", help="the same path in little")
    parser.add_argument("--alternet", action="store_true", help="measure an AlterNet too")
    parser.add_argument("--dataset", help="data set instead of the preset's")
    parser.add_argument("--root", help="folder with the data set's own files")
    parser.add_argument("--model", action="append", default=[], metavar="timm:NAME")
    parser.add_argument("--weights", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument("--images", type=Path, help="folder of images, one class a folder")
    parser.add_argument("--max-images", type=int, default=1000, help="images of that folder used")
    parser.add_argument("--out", type=Path, help="folder for the figure")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw saved results again")
    return parser.parse_args()
