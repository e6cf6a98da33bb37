"""Figure 12 from results that are made up: what it shows and claims follows from them."""

import itertools
import json
import runpy
import sys
from dataclasses import fields, replace

import numpy as np
import pytest

from landscape.plot import style
from landscape.probes.corruption import CorruptionRobustness
from landscape.results import Provenance
from tests.plot.cases import random_spectrum
from tests.plot.test_build_up import table as build_up_table
from tests.plot.test_features import boxes
from tests.plot.test_robustness import evaluation
from tests.test_package import ROOT

TRIED = ["0-0-0", "0-0-1", "0-1-0", "0-0-2", "0-1-1"]
WALKS = [
    {"0-0-0": True, "0-0-1": True, "0-0-2": False, "0-1-1": True},
    {"0-0-0": True, "0-0-1": False, "0-1-0": False},
    {"0-0-0": True, "0-0-1": True, "0-0-2": True},
]
VALIDATION = {  # one a seed
    "0-0-0": [0.70, 0.75, 0.72],
    "0-0-1": [0.74, 0.74, 0.75],
    "0-1-0": [0.71, 0.73, 0.70],
    "0-0-2": [0.73, 0.76, 0.77],
    "0-1-1": [0.78, 0.72, 0.74],
}
ERROR = {"ResNet": [0.3, 0.31, 0.32], "ViT": [0.2, 0.3, 0.4], "AlterNet": [0.1, 0.11, 0.12]}


def walked(fates):
    """Return the table of a seed whose networks had these fates."""
    msas = np.array([list(map(int, label.split("-"))) for label in fates])
    kept = list(fates.values())
    return replace(build_up_table(kept=kept), depths=(1, 2, 4), msas=msas)


@pytest.fixture
def results():
    """The results of three networks with three seeds, and of a build-up with three seeds."""
    predicted = {n: [evaluation_of(1 - e) for e in errors] for n, errors in ERROR.items()}
    validated = {n: [evaluation_of(a) for a in accuracy] for n, accuracy in VALIDATION.items()}
    tested = {n: [evaluation_of(a - 0.05) for a in accuracy] for n, accuracy in VALIDATION.items()}
    return {
        "build-up": {"0-0-0": [walked(fates) for fates in WALKS]},
        "validation": validated,
        "test": predicted | tested,
        "corruption": {n: [corrupted(2 * e) for e in errors] for n, errors in ERROR.items()},
        "spectrum-last": {
            n: [random_spectrum(seed, scale=scale) for seed in range(3)]
            for n, scale in {"ResNet": 90.0, "ViT": 30.0, "AlterNet": 3.0}.items()
        },
    }


def evaluation_of(accuracy):
    return replace(evaluation(), accuracy=accuracy, nll=2 - accuracy)


def corrupted(error):
    """Return a table of one corruption; all but its mean error is left out."""
    known = {"corruptions": ("fog",), "severities": (1,), "profile": "imagenet", "seed": 0}
    known |= {"mean_corruption_error": error, "relative": None, "provenance": Provenance()}
    rest = {field.name: np.nan for field in fields(CorruptionRobustness)}
    return CorruptionRobustness(**(rest | known))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return str(ROOT / "examples/reproduce_fig12.py")


def test_from_files_alone(results, script, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "fig12"
    labels = [*ERROR, *TRIED]
    folder.mkdir()
    for kind, named in results.items():
        for label, runs in named.items():
            for seed, result in enumerate(runs):
                result.save(folder / f"{kind}_{labels.index(label):02d}_{seed}.npz")
    setting = {"preset": "default", "arms": [{"label": label} for label in labels]}
    (folder / "setting.json").write_text(json.dumps(setting))
    monkeypatch.setattr(sys, "argv", [script, "--draw", str(folder), "--out", str(tmp_path / "o")])
    runpy.run_path(script, run_name="__main__")
    assert (tmp_path / "o/fig12.png").stat().st_size > 5000
    assert (tmp_path / "o/fig12.pdf").exists()
    assert (tmp_path / "o/fig12_claims.md").read_text().strip() in capsys.readouterr().out
    claims = json.loads((tmp_path / "o/fig12/claims.json").read_text())["claims"]
    assert {claim["about"] for claim in claims} == {5}
    value = {(c["text"], c["quantity"]): c["smaller"][1]["value"] for c in claims}
    first = ("an MSA at the end of the last stage helps", "change of validation error")
    built = ("the network built by the rule beats the plain one", "change of test error")
    assert value[first] == pytest.approx(-(0.04 - 0.01 + 0.03) / 3)  # each seed beside its own
    assert value[built] == pytest.approx(-(0.08 + 0.0 + 0.05) / 3)  # the best of each walk
    verdicts = {(c["larger"][0], c["quantity"]): c["verdict"] for c in claims}
    assert verdicts["ResNet", "test error"] == "agrees"
    assert verdicts["ResNet", "test NLL"] == "agrees"
    assert verdicts["ViT", "test error"] == "undecided"
    assert verdicts["ResNet", "corruption error"] == "agrees"
    assert verdicts["ResNet", "APE, mean over runs"] == "agrees"
    assert verdicts["ViT", "NEP, mean over runs"] == "undecided"


def test_every_seed_of_every_network_is_a_point_that_shows_its_fate(results, script):
    figure = runpy.run_path(script)["draw"](results)
    ax = next(ax for ax in figure.axes if "Validation" in ax.get_ylabel())
    ticks = [text.get_text() for text in ax.get_xticklabels()]
    assert ticks == ["\n".join(reversed(label.split("-"))) for label in TRIED]
    points = [line for line in ax.lines if line.get_gid() == "run"]
    assert len(points) == 3 * len(TRIED)
    for point, (label, seed) in zip(points, itertools.product(TRIED, range(3)), strict=True):
        assert point.get_ydata() == pytest.approx([100 * VALIDATION[label][seed]])
        assert point.get_xdata() == pytest.approx([TRIED.index(label) + 0.25 * (seed - 1)])
        kept = WALKS[seed].get(label)
        shown = {True: "AlterNet", False: "white"}.get(kept, style.MUTED)
        shown = style.family_color(shown) or shown
        if label == "0-0-0":
            shown = style.family_color("ResNet")
        assert point.get_markerfacecolor() == {"white": "w"}.get(shown, shown)
    ways = [line.get_ydata().tolist() for line in ax.lines if line.get_gid() == "way"]
    assert ways == [
        pytest.approx([70, 74, 78]),
        pytest.approx([75]),
        pytest.approx([72, 75, 77]),
    ]

    apart = [(text, box) for text, box in boxes(figure) if text not in ERROR]  # those are slanted
    for (a, one), (b, other) in itertools.combinations(apart, 2):
        assert not one.overlaps(other), (a, b)
