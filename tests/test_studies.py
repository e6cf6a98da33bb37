"""The studies over seeds: what is kept where, drawing and claims from files, `--quick`."""

import importlib
import json
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import landscape
from landscape.probes.cka import CKA
from landscape.probes.feature_maps import BlockTable
from landscape.probes.hessian_max import HessianMaxSpectrum
from landscape.results import Provenance
from tests.test_package import ROOT, run

STUDIES = ("reproduce_fig4", "reproduce_fig5", "reproduce_fig6", "reproduce_fig7")
STUDIES = (*STUDIES, "reproduce_appendix_c")
QUICK = (*STUDIES, "reproduce_fig12")


@pytest.fixture(scope="module", autouse=True)
def _examples():
    sys.path.insert(0, str(ROOT / "examples"))
    yield
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture
def comparisons():
    return importlib.import_module("comparisons")


def spectrum(rng, nep):
    values = rng.gamma(2, 10, size=(8, 5)) * np.where(rng.random((8, 5)) < nep, -1, 1)
    return HessianMaxSpectrum(
        eigenvalues=values,
        residuals=np.zeros_like(values),
        converged=np.ones(values.shape, dtype=bool),
        nep=float((values < 0).mean()),
        nep_interval=(0.0, 1.0),
        ape=float(values[values > 0].mean()),
        ape_interval=(0.0, 1.0),
        num_hvps=100,
        provenance=Provenance(),
    )


def evaluation(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    return landscape.evaluate(model, [(torch.randn(30, 1, 2, 2), torch.arange(30) % 3)])


def made_up(kinds, arms, folder, comparisons):
    """Write results of three seeds as a study would find them, and return where they lie."""
    rng = np.random.default_rng(0)
    found = {}
    for number, arm in enumerate(arms):
        for seed in range(3):
            files = {kind: folder / f"{number}-{seed}-{kind}.npz" for kind in kinds}
            for kind, path in files.items():
                spectral = kind in (comparisons.WARMUP, comparisons.LAST)
                result = spectrum(rng, 0.1 + 0.1 * (number % 5)) if spectral else evaluation(seed)
                result.save(path)
            found[arm.label, seed] = files
    return found


def test_training_is_emptied_for_another_setting_only_and_as_a_whole(tmp_path, monkeypatch):
    trained = importlib.import_module("trained")
    monkeypatch.chdir(tmp_path)
    setting = trained.PRESETS["quick"]
    other = replace(setting, surface_images=32)
    work = trained.work_folder("quick", setting)
    (work / "state").write_text("days of training")
    stamp = (work / "setting.json").stat()
    trained.work_folder("quick", setting)
    assert (work / "setting.json").stat() == stamp  # a write may fail
    assert (work / "state").exists()

    def interrupted(folder, **arguments):
        if folder.exists():
            (folder / "setting.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trained.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained.work_folder("quick", other)
    for changed in (other, setting):
        left = [path.name for path in trained.work_folder("quick", changed).iterdir()]
        assert left == ["setting.json"]
    assert [path.name for path in work.parent.iterdir()] == [work.name]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_drawn_and_judged_from_its_files(name, tmp_path, comparisons):
    preset = "default"
    script = importlib.import_module(name)
    kinds = (comparisons.WARMUP, comparisons.LAST, comparisons.TEST, comparisons.TRAIN)
    arms = script.arms(preset)
    assert len({arm.label for arm in arms}) == len(arms)
    protocol = replace(comparisons.PROTOCOLS[preset], seeds=3)
    found = made_up(kinds, arms, tmp_path, comparisons)
    comparisons.collect(found, asdict(protocol), arms, tmp_path / "study")
    setting = tmp_path / "study" / "setting.json"
    setting.write_text(setting.read_text().replace(" %", "%"))  # as older files spell it
    results = comparisons.load_results(tmp_path / "study")
    assert {kind: list(named) for kind, named in results.items()} == {
        kind: [arm.label for arm in arms] for kind in kinds
    }
    for (label, _), files in found.items():
        runs = results[comparisons.TEST][label]
        assert landscape.Result.load(files[comparisons.TEST]).nll in [r.nll for r in runs]
    comparisons.save_figure(script.draw(results), tmp_path / "study")
    assert (tmp_path / "study.png").stat().st_size > 5000
    claims = script.claims(results)
    assert claims
    assert {claim.verdict for claim in claims} <= {"agrees", "disagrees", "undecided"}


@pytest.mark.parametrize("name", STUDIES)
def test_the_networks_of_every_preset_can_be_made(name, comparisons):
    script = importlib.import_module(name)
    for preset, protocol in comparisons.PROTOCOLS.items():
        data = SimpleNamespace(images=torch.zeros(1, 3, 1, 1), num_classes=10, device="meta")
        with torch.device("meta"):
            made = [comparisons.make_model(protocol, a, data, 0) for a in script.arms(preset)]
        assert all(isinstance(model, nn.Module) for model in made)


def test_runs_are_kept_by_all_that_determines_them_and_by_nothing_else(comparisons):
    protocol = comparisons.PROTOCOLS["quick"]
    arm = comparisons.Arm("ViT", "ViT", {"pool": "gap"})
    folder = comparisons.run_folder(protocol, arm, True)
    same = [(replace(protocol, seeds=9), arm), (protocol, replace(arm, label="other"))]
    other = [
        (replace(protocol, learning_rate=1e-4), arm),
        (replace(protocol, dataset="cifar10"), arm),
        (protocol, replace(arm, share=0.5)),
        (protocol, replace(arm, sizes={"pool": "cls"})),
        (protocol, replace(arm, network="ResNet")),
    ]
    assert {comparisons.run_folder(*of, True) for of in same} == {folder}
    different = {comparisons.run_folder(*of, True) for of in other}
    different.add(comparisons.run_folder(protocol, arm, False))
    assert len(different) == 6
    assert folder not in different


def test_every_number_of_a_protocol_is_in_the_name_of_a_run(comparisons):
    protocol, arm = comparisons.PROTOCOLS["quick"], comparisons.Arm("ViT", "ViT")
    folders = {comparisons.run_folder(protocol, arm, True)}
    names = asdict(protocol).keys() - {"networks", "seeds"}
    for name in names:
        value = getattr(protocol, name)
        other = (*value, 9) if isinstance(value, tuple) else value * 2
        folders.add(comparisons.run_folder(replace(protocol, **{name: other}), arm, True))
    assert len(folders) == 1 + len(names)


def test_a_run_trains_measures_and_is_found_again(comparisons, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"dim": 12, "depth": 1, "heads": 2, "patch_size": 7}
    protocol = replace(
        comparisons.PROTOCOLS["quick"],
        networks={"ViT": ("vit_nano", sizes)},
        train_images=64,
        test_images=40,
    )
    arm = comparisons.Arm("ViT", "ViT", share=0.5)
    kinds = (comparisons.WARMUP, comparisons.LAST, comparisons.TEST, comparisons.TRAIN)
    jobs = [(protocol, arm, seed, kinds, None) for seed in (0, 1)]
    found = comparisons.work(*jobs[0]) | comparisons.work(*jobs[1])
    results = {key: {k: landscape.Result.load(p) for k, p in f.items()} for key, f in found.items()}
    assert set(results) == {("ViT", 0), ("ViT", 1)}
    of_seed = [results["ViT", seed] for seed in (0, 1)]
    assert of_seed[0][comparisons.TEST].num_samples == 40
    assert of_seed[0][comparisons.TRAIN].num_samples == 32  # the share that it was given
    assert of_seed[0][comparisons.WARMUP].eigenvalues.shape == (1, 5)
    for kind in kinds:  # seeds and moments differ
        scores = [getattr(r[kind], "nll", getattr(r[kind], "ape", None)) for r in of_seed]
        assert scores[0] != scores[1]
    assert of_seed[0][comparisons.WARMUP].ape != of_seed[0][comparisons.LAST].ape
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert comparisons.work(*jobs[0]) | comparisons.work(*jobs[1]) == found
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before


def test_the_page_of_claims_lists_every_verdict_with_its_evidence(tmp_path, monkeypatch):
    claims = importlib.import_module("claims")
    page = importlib.import_module("summarize_claims")
    low, high = claims.Measured(0, -1, 1), claims.Measured(3, 2, 4)
    first = claims.Claim("flatter", "APE", ("ViT", low), ("ResNet", high), about=1)
    second = claims.Claim("varies", "ratio", ("Conv", high), ("MSA", low), about=3)
    third = claims.Claim("same", "ratio", ("Conv", low), ("MSA", low), about=3)
    setting = {"models": ["a", "b"], "images": "folder"}
    claims.write_claims(tmp_path, "fig1", [first], "note", setting)
    table = claims.write_claims(tmp_path, "fig9", [second, third], "a note", setting)
    assert table.endswith("a note\n")
    assert (tmp_path / "fig9_claims.md").read_text() == table
    read, of_file = claims.read_claims(tmp_path / "fig9/claims.json")
    assert (read, of_file) == ([second, third], setting)
    json.loads((tmp_path / "fig9/claims.json").read_text())
    monkeypatch.setattr(sys, "argv", ["summarize_claims.py", "--figures", str(tmp_path)])
    page.main()
    text = (tmp_path / "CLAIMS.md").read_text()
    assert list(page.PAPER) == [1, 2, 3, 4, 5, 6]
    assert all(sentence in text for sentence in page.PAPER.values())
    assert "**1 comparisons: 1 agree.**" in text
    assert "**2 comparisons: 1 disagree, 1 undecided.**" in text
    assert text.count("Not measured.") == 4
    assert "| [Figure 9](fig9_claims.md) | varies | ratio | Conv 3 [2, 4] | MSA 0 [-1, 1] |" in text


def test_intervals_that_touch_decide_nothing():
    claims = importlib.import_module("claims")
    low, high = claims.estimated(1, 1), claims.estimated(4, 0.6)
    assert (low.low, low.high) == pytest.approx((1 - 1.96, 1 + 1.96))
    verdicts = {
        (low, high): "undecided",
        (high, low): "undecided",
        (low, claims.estimated(4, 0.25)): "agrees",
        (claims.estimated(4, 0.25), low): "disagrees",
        (low, claims.averaged([9])): "undecided",
        (low, claims.averaged([9, 9, 9])): "undecided",
        (low, claims.estimated(9, 0.0)): "undecided",
    }
    for (smaller, larger), verdict in verdicts.items():
        claim = claims.Claim("", "", ("a", smaller), ("b", larger), about=1)
        assert claim.verdict == verdict


@pytest.mark.parametrize("more", [0.0, 0.1])
def test_stages_are_alike_only_if_more_than_their_distance_says(more):
    script = importlib.import_module("reproduce_fig10")
    stage = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    kinds = ("stem", *["conv"] * 9, "head")
    nothing = np.zeros(len(stage))
    table = BlockTable(kinds, kinds, nothing, nothing.astype(bool), stage)
    same, apart = stage[:, None] == stage, np.abs(np.subtract.outer(*[np.arange(11)] * 2))
    values = 0.8**apart + more * same
    run = CKA(values, 1e-3 * values, table, table, *[values] * 4, 0, Provenance())
    (claim,) = script.claims({"cka": {"ResNet": [run]}, "lesion": {}})
    assert claim.larger[1].value == pytest.approx(more)
    assert claim.verdict == ("agrees" if more else "undecided")


@pytest.fixture(scope="module")
def in_little(tmp_path_factory):
    """A folder whose trained networks the studies share."""
    return tmp_path_factory.mktemp("studies")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, "reproduce_fig2 --seeds 2", "reproduce_fig10 --seeds 2"])
def test_a_study_in_little(name, in_little, monkeypatch, capsys):
    name, *arguments = name.split()
    command = [str(ROOT / f"examples/{name}.py"), "--quick", *arguments, "--out", "out"]
    monkeypatch.chdir(in_little)
    if name == "reproduce_fig4":  # as a user does
        done = run(*command, cwd=in_little)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:  # without the seconds in which processes start
        for module in map(importlib.import_module, ("comparisons", "build_up_seeds")):
            monkeypatch.setattr(module, "side_by_side", lambda f, jobs: [f(*job) for job in jobs])
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(command[0], run_name="__main__")
        printed = capsys.readouterr().out
    stem = name.removeprefix("reproduce_")
    table = Path(f"out/{stem}_claims.md").read_text()
    assert table.strip() in printed
    for suffix in ("png", "pdf"):
        assert Path(f"out/{stem}.{suffix}").stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", ["summarize_claims.py", "--figures", "out"])
    importlib.import_module("summarize_claims").main()
    assert f"]({stem}_claims.md)" in Path("out/CLAIMS.md").read_text()


def test_runs_of_a_probe_are_averaged_and_drawn_with_intervals_over_runs():
    half = stats.t.ppf(0.975, 2) / 2 / 3**0.5  # of the standard deviation of three runs
    mean_over_runs = importlib.import_module("subjects").mean_over_runs
    data = [(torch.rand(6, 3, 32, 32), torch.arange(6) % 3) for _ in range(2)]
    runs = {kind: [] for kind in importlib.import_module("comparisons").PROBES}
    for seed in range(3):
        torch.manual_seed(seed)
        model = landscape.models.vit_nano(dim=12, depth=2, heads=2, num_classes=3)
        for kind, probe in importlib.import_module("comparisons").PROBES.items():
            extra = {"mean": 0.0, "std": 1.0} if kind == "frequency" else {}
            runs[kind].append(probe(model, data, **extra))
    for kind, quantity, error in (
        ("variance", "variance", "stderr"),
        ("cka", "values", "stderr"),
        ("frequency", "nll", "nll_stderr"),
        ("lesion", "delta_nll", "delta_nll_stderr"),
    ):
        assert mean_over_runs(runs[kind][:1]) is runs[kind][0]
        mean = mean_over_runs(runs[kind])
        values = np.array([getattr(run, quantity) for run in runs[kind]])
        np.testing.assert_allclose(getattr(mean, quantity), values.mean(0))
        np.testing.assert_allclose(getattr(mean, error), half * values.std(0, ddof=1))
    mean = mean_over_runs(runs["fourier"])
    for block, curve in enumerate(mean.delta_log_amplitude):
        values = np.array([run.delta_log_amplitude[block] for run in runs["fourier"]])
        np.testing.assert_allclose(curve, values.mean(0))
        np.testing.assert_allclose(mean.stderr[block], half * values.std(0, ddof=1))


def test_claims_over_runs_have_the_interval_of_their_spread():
    claims = importlib.import_module("claims")
    alone = claims.estimated(0.5, 0.1)
    assert claims.over_runs([alone]) is alone
    of_three = claims.over_runs([claims.estimated(value, 9.0) for value in (0.4, 0.5, 0.6)])
    assert of_three.value == pytest.approx(0.5)
    assert of_three.high - of_three.value == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
