"""What Figures 2, 8, 9 and 10 are measured on, and the way from there to files.

By default the models of Figure 1 (trained where they are not yet) on the test images; `--alternet`
adds a small AlterNet, whose stages end in MSAs, for Figures 8, 9 and 10 (several minutes of
training the first time). With `--seeds N` the networks of Figures 5 and 12, N runs each: what is
drawn are means over runs, and intervals are those of the spread between runs. With `--model
timm:NAME --weights FILE --images FOLDER` any model of timm on a folder of images, one class a
folder: the paper's ImageNet setting.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from any_model import images_of
from claims import Claim, write_claims
from comparisons import (
    PROBE_BATCH,
    PROBES,
    PROTOCOLS,
    Arm,
    Results,
    begin_folder,
    collect,
    compute,
    load_results,
    result_path,
)
from matplotlib.figure import Figure
from outputs import figures_of, preset_of, read_setting, save_figure
from scipy import stats
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

Means = Mapping[str, Mapping[str, Any]]
"""Kind of measurement -> label of the network -> mean over its runs."""


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
        kinds: What is measured of each network, names in `PROBES`.
        draw: Figure and interactive figure from the means over runs.
        claims: Claims of the paper with what was measured.
        note: What the intervals mean, and what the setting cannot show.
    """

    name: str
    kinds: Sequence[str]
    draw: Callable[[Means], tuple[Figure, Any]]
    claims: Callable[[Results], list[Claim]]
    note: str


def run(study: Study, description: str) -> None:
    """Compute, save, draw, and compare with the claims; `--draw` begins with what is saved."""
    args = _parse(description)
    out = args.out or figures_of(preset_of(args))
    began = time.perf_counter()
    folder = args.draw or out / study.name
    if not args.draw:
        measure = _measure_runs if args.seeds else _measure_once
        measure(study.kinds, args, folder)
    results = load_results(folder)
    means = {
        kind: {label: mean_over_runs(runs) for label, runs in named.items()}
        for kind, named in results.items()
    }
    figure, html = study.draw(means)
    save_figure(figure, out / study.name)
    html.write_html(out / f"{study.name}.html", include_plotlyjs="cdn")
    table = write_claims(out, study.name, study.claims(results), study.note, read_setting(folder))
    print(f"\n{table}\nwrote {out}/{study.name}.png, .pdf, .html, {study.name}/*.npz", end=" ")
    print(f"in {time.perf_counter() - began:.0f} s")


def mean_over_runs(runs: Sequence[Result]) -> Result:
    """Return the mean of several runs' results, to be drawn.

    Args:
        runs: Results of one probe, one per run; blocks are those of the same network.

    Returns:
        The first of them with every quantity that has a standard error averaged, and for its error
        half of the 95 % interval of the mean (Student's t) to one side, as plots draw two errors
        each side. One alone is returned as it is.
    """
    if len(runs) == 1:
        return runs[0]
    averaged: dict[str, Any] = {}
    for field in fields(runs[0]):
        if not field.name.endswith("stderr"):
            continue
        quantity = field.name.removesuffix("_stderr")
        if quantity == "stderr":
            names = {each.name for each in fields(runs[0])}
            (quantity,) = names & {"delta_log_amplitude", "variance", "values"}
        values = [getattr(run, quantity) for run in runs]
        if isinstance(values[0], tuple):  # a curve per block, each of a length of its own
            pairs = [_mean_and_error(block) for block in zip(*values, strict=True)]
            averaged[quantity], averaged[field.name] = zip(*pairs, strict=True)
        else:
            averaged[quantity], averaged[field.name] = _mean_and_error(values)
    return replace(runs[0], **averaged)


def _mean_and_error(values: Sequence[Any]) -> tuple[Any, Any]:
    """Return mean and half of its interval to one side over runs, the first axis."""
    stacked = np.stack(values)
    ends = stats.t.ppf(0.975, len(values) - 1) * stats.sem(stacked)
    return stacked.mean(axis=0), ends / 2


def _measure_once(kinds: Sequence[str], args: argparse.Namespace, folder: Path) -> None:
    """Measure the models of Figure 1, or those of the command line."""
    found = {}
    subjects = _subjects(args)
    for label, subject in subjects.items():
        found[label] = {
            kind: PROBES[kind](subject.model, subject.data, progress=True) for kind in kinds
        }
        say(label, "measured")
    begin_folder(folder, {**_setting(args), "arms": [{"label": label} for label in found]})
    for number, results in enumerate(found.values()):
        for kind, result in results.items():
            result.save(result_path(folder, kind, number, seed=0))


def _measure_runs(kinds: Sequence[str], args: argparse.Namespace, folder: Path) -> None:
    """Measure several runs of each network, trained where they are not yet."""
    preset = preset_of(args)
    protocol = PROTOCOLS[preset]
    protocol = replace(protocol, seeds=args.seeds, dataset=args.dataset or protocol.dataset)
    names = ["ResNet", "ViT", *([ALTERNET[0]] if args.alternet else [])]
    arms = [Arm(name, name) for name in names]
    found = compute(protocol, arms, kinds, args.root)
    collect(found, {"preset": preset, **asdict(protocol)}, arms, folder)


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
    test = images(setting, args.root, "test").with_(batch_size=PROBE_BATCH)
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


def _parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--quick", action="store_true", help="the same path in little")
    parser.add_argument("--alternet", action="store_true", help="measure an AlterNet too")
    parser.add_argument("--seeds", type=int, help="runs of each network of Figures 5 and 12")
    parser.add_argument("--dataset", help="data set instead of the preset's")
    parser.add_argument("--root", help="folder with the data set's own files")
    parser.add_argument("--model", action="append", default=[], metavar="timm:NAME")
    parser.add_argument("--weights", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument("--images", type=Path, help="folder of images, one class a folder")
    parser.add_argument("--max-images", type=int, default=1000, help="images of that folder used")
    parser.add_argument("--out", type=Path, help="folder for the figure")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw saved results again")
    args = parser.parse_args()
    if args.seeds is not None and (args.seeds < 1 or args.model):
        parser.error("--seeds must be at least 1, and goes without --model, which is not trained.")
    return args
