import json
import os
import pickle
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import landscape
from landscape import Eigenpairs, Provenance, Result, results
from landscape.results import write_atomically
from tests.cases import make_batches, make_model


@dataclass(frozen=True)
class Nested(Result):
    pairs: Eigenpairs
    maps: dict[str, np.ndarray]
    interval: tuple[float, float]
    nothing: None
    number: float
    provenance: Provenance


def make_result():
    pairs = Eigenpairs(
        np.array([2.0, np.nan, np.inf]), np.ones(3), np.zeros(3), np.array([True, False, True]),
        "LM", 7,
    )  # fmt: skip
    maps = {"a/b": np.arange(6).reshape(2, 3), "c": np.zeros((0, 2), dtype=np.float32)}
    provenance = Provenance(model="Net", settings={"k": 5, "tol": 1e-3})
    return Nested(pairs, maps, (0.5, float("nan")), None, float("inf"), provenance)


@pytest.mark.parametrize("large", [1, 1 << 24])
def test_save_and_load_return_the_same_result(large, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_LARGE", large)  # above, nothing is compressed
    result = make_result()
    path = result.save(tmp_path / "deep" / "result")
    assert type(result).load(tmp_path / "deep" / "result") == result
    assert path.name == "result.npz"
    for loaded in (Nested.load(path), Result.load(path)):
        assert isinstance(loaded, Nested)
        np.testing.assert_array_equal(loaded.pairs.values, result.pairs.values)
        assert loaded.pairs.converged.dtype == bool
        assert loaded.pairs.vectors is None
        assert loaded.maps.keys() == result.maps.keys()
        for name, array in result.maps.items():
            np.testing.assert_array_equal(loaded.maps[name], array)
            assert loaded.maps[name].dtype == array.dtype
        assert loaded.interval[0] == 0.5
        assert np.isnan(loaded.interval[1])
        assert loaded.number == float("inf")
        assert loaded.provenance == result.provenance


def test_results_compare_and_hash_by_what_they_hold(tmp_path):
    result = make_result()
    again = Nested.load(result.save(tmp_path / "a.npz"))
    assert again == result == pickle.loads(pickle.dumps(result))
    assert len({result, again}) == 1
    zeros = (replace(result, number=0.0), replace(result, number=-0.0))
    assert len(set(zeros)) == 1
    others = (
        replace(result, number=1.0),
        replace(result, interval=(0.5, 0.0)),
        replace(result, maps={**result.maps, "c": np.ones((1, 2), dtype=np.float32)}),
        replace(result, pairs=replace(result.pairs, values=np.array([2.0, 1.0, np.inf]))),
        result.pairs,
    )
    for other in others:
        assert other != result


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = make_result().save(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="must hold a Eigenpairs, got a Nested"):
        Eigenpairs.load(path)
    content = path.read_bytes()
    for name, damaged in {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "text": b"not an archive",
        "flipped": content[:200] + bytes(255 - b for b in content[200:260]) + content[260:],
    }.items():
        bad = tmp_path / f"{name}.npz"
        bad.write_bytes(damaged)
        with pytest.raises(ValueError, match="must be a complete file written by"):
            Result.load(bad)
    np.savez(tmp_path / "foreign.npz", x=np.ones(3))
    with pytest.raises(ValueError, match="must be a complete file"):
        Result.load(tmp_path / "foreign.npz")
    np.savez(tmp_path / "pickled.npz", meta=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="must be a complete file"):
        Result.load(tmp_path / "pickled.npz")
    meta = '{"format": "landscape result 1", "result": {"class": "Provenance", "fields": [1]}}'
    for content in (meta, "[" * 100_000):
        np.savez(tmp_path / "malformed.npz", meta=np.array(content))
        with pytest.raises(ValueError, match="must be a complete file"):
            Result.load(tmp_path / "malformed.npz")
    np.save(tmp_path / "zeros.npy", np.zeros(3))
    whole = (tmp_path / "zeros.npy").read_bytes()
    cut = whole.replace(b"(3,)", b"(3, ")  # makes NumPy raise a TokenError
    huge = whole.replace(b"(3,), }" + b" " * 30, b"(3" + b"0" * 30 + b",), }")  # OverflowError
    for damaged in (cut, huge):
        with zipfile.ZipFile(tmp_path / "header.npz", "w") as archive:
            archive.writestr("a.npy", damaged)
        with pytest.raises(ValueError, match="must be a complete file"):
            Result.load(tmp_path / "header.npz")
    with pytest.raises(IsADirectoryError):
        Result.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Result.load(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("version", "name", "field", "got"),
    [
        (2, "Provenance", "seed", "format 'landscape result 2'"),
        (1, "Future", "seed", "a Future"),
        (1, "Provenance", "later", "a Provenance with later"),
    ],
)
def test_a_file_of_a_newer_version_is_not_called_damaged(tmp_path, version, name, field, got):
    result = {"class": name, "fields": {field: 1}}
    meta = json.dumps({"format": f"landscape result {version}", "result": result})
    np.savez(tmp_path / "newer.npz", meta=np.array(meta))
    with pytest.raises(ValueError, match=f"got {got} in .*update `landscape`, or import"):
        Result.load(tmp_path / "newer.npz")


def test_arrays_under_paths_that_read_the_same_are_both_kept(tmp_path):
    maps = {"a.b": np.ones(1), "a": {"b": np.zeros(1)}}
    loaded = Nested.load(replace(make_result(), maps=maps).save(tmp_path / "a"))
    np.testing.assert_array_equal(loaded.maps["a.b"], maps["a.b"])
    np.testing.assert_array_equal(loaded.maps["a"]["b"], maps["a"]["b"])


def test_a_file_is_exchanged_and_not_written_over(tmp_path):
    result = make_result()
    path = result.save(tmp_path / "result.npz")
    (tmp_path / "link").hardlink_to(path)
    content = path.read_bytes()
    replace(result, number=1.0).save(path)
    assert (tmp_path / "link").read_bytes() == content
    assert path.read_bytes() != content


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.npz").symlink_to(tmp_path / "there" / "result.npz")
    result = make_result()
    result.save(tmp_path / "link.npz")
    assert (tmp_path / "link.npz").is_symlink()
    assert Result.load(tmp_path / "there" / "result.npz") == result


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_threads_may_write_one_file(tmp_path):
    contents = [bytes([thread]) * 10_000 for thread in range(4)] * 25
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda content: write_atomically(tmp_path / "a.bin", content), contents))
    assert (tmp_path / "a.bin").read_bytes() in contents
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    process = subprocess.Popen(["true"])
    process.wait()
    kept = [f".a.bin.{os.getppid()}.part", ".a.bin.part", ".b.part"]
    for name in [f".a.bin.{process.pid}.part", f".a.bin.{process.pid}-7.part", *kept]:
        (tmp_path / name).touch()
    write_atomically(tmp_path / "a.bin", b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", *kept}


def test_results_hold_no_objects():
    bad = Nested(None, {"x": np.array([object()])}, (0.0, 1.0), None, 0.0, Provenance())
    with pytest.raises(TypeError, match="no object arrays"):
        bad.save("never.npz")


@dataclass(frozen=True)
class Everything(Result):
    pairs: Eigenpairs
    trace: float
    trace_stderr: float
    nep: float
    nep_interval: tuple[float, float]
    curve: np.ndarray
    curve_stderr: np.ndarray
    surface: np.ndarray
    reached: np.ndarray
    missing: np.ndarray
    names: tuple[str, ...]
    parts: tuple[np.ndarray, ...]
    states: tuple[dict[str, np.ndarray], ...]
    skipped: tuple[str, ...]
    nothing: None
    provenance: Provenance


def test_a_result_prints_numbers_with_their_errors_and_long_arrays_in_short():
    values, errors = np.array([232.93336, -147.58159]), np.array([2.9e-5, 0.00123])
    pairs = Eigenpairs(values, 2 * errors, errors, np.array([True, False]), "LM", 52, miss=0.01)
    surface = np.linspace(2, 3, 21 * 21).reshape(21, 21)
    surface[0, :3] = np.nan, np.inf, 2.5
    result = Everything(
        pairs, 812.84, 916.12, 0.5333, (0.2, 0.8), np.array([1.5, 2.5]), np.array([0.123, 0.0456]),
        surface, surface > 2.5, np.full(9, np.nan), tuple("abc"), (np.zeros(2), np.ones((3, 3))),
        ({"w": surface},), (), None, Provenance(
            model="Net", num_parameters=5_491_786, num_samples=48, device="cpu", dtype="float32",
            seconds=42.8204, settings={"k": 5, "directions": ("a", "b"), "long": "x" * 200},
        ),
    )  # fmt: skip
    assert str(result) == repr(result)
    assert (
        str(result)
        == """Everything
  pairs       Eigenpairs
    values       232.9 ± 2.9e-05, -147.6 ± 0.0012
    residuals    5.8e-05, 0.00246
    converged    True, False
    which        LM
    num_matvecs  52
    miss         0.01
  trace       812.8 ± 916.1
  nep         0.5333 [0.2, 0.8]
  curve       1.5 ± 0.12, 2.5 ± 0.046
  surface     (21, 21), 2.007 to 3, 2 not finite
  reached     (21, 21), 221 true
  missing     (9,), 9 not finite
  names       a, b, c
  parts       (0, 0), ((3, 3), 1 to 1)
  states      1 entries
  skipped     none
  provenance  Net, 5,491,786 parameters, 48 samples, cpu float32, 42.8 s"""
    )
    five = -np.arange(1, 6) / 7
    told = str(Eigenpairs(five, -five, -five / 3e7, five < 0, "LM", 52)).splitlines()[1:3]
    assert told[0] == (
        "  values       -0.1429 ± 4.8e-09, -0.2857 ± 9.5e-09, -0.4286 ± 1.4e-08, -0.5714 ± 1.9e-08,"
    )
    assert told[1] == "               -0.7143 ± 2.4e-08"
    assert "\n  objective\n" in repr(result.provenance)
    estimate = landscape.hessian_trace(make_model("conv"), make_batches((4,)), num_matvecs=9)
    assert f"  value        {estimate.value:.4g} ± {estimate.stderr:.2g}\n" in str(estimate)
    model = landscape.models.vit_nano(depth=2)
    variance = landscape.feature_variance(model, [(torch.randn(4, 3, 32, 32), torch.arange(4))])
    first = f"{variance.variance[0]:.4g} ± {variance.stderr[0]:.2g}"
    assert f"  variance    {first}, " in str(variance)
    settings = repr(result.provenance).splitlines()[-1]
    assert settings.startswith("  settings        k=5, directions=(a, b), long=xxx")
    assert settings.endswith("x…")
    assert len(settings) == 100


def test_provenance_says_what_was_measured_and_what_it_took(generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, other = (landscape.models.resnet20(width=4) for _ in range(2))
    data = [(torch.rand(6, 3, 16, 16, generator=generator), torch.arange(6))]
    lesions = landscape.lesion_study(model, data)
    for result, forwards in (
        (landscape.loss_line(model, data, points=3), 3),
        (landscape.frequency_robustness(model, data, frequencies=(0.5,), width=0.2), 1 + 1),
        (landscape.adversarial_robustness(model, data, radii=(0.01, 0.02), steps=3), 1 + 2 * 4),
        (lesions, 1 + len(lesions.names)),
        (landscape.polar_trajectory([model, other], model=model), 0),
    ):
        assert result.provenance.model == "ResNet"
        assert result.provenance.num_forwards == forwards
        assert 0 < result.provenance.seconds < 60


def test_numbers_may_be_given_as_tensors(generator, tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 4))
    data = [(torch.rand(4, 3, 32, 32, generator=generator), torch.arange(4))]
    number, severities = torch.tensor(0.25), torch.tensor([1, 3])
    for result in (
        landscape.frequency_robustness(model, data, width=number, norm=number),
        landscape.adversarial_robustness(model, data, steps=torch.tensor(2), step_size=number),
        landscape.corruption_robustness(model, data, corruptions=["fog"], severities=severities),
        landscape.loss_line(model, data, points=5, tol=number),
        landscape.evaluate(model, data, num_bins=torch.tensor(5)),
    ):
        assert Result.load(result.save(tmp_path / "a")) == result


def test_names_that_an_archive_takes_for_itself(tmp_path):
    maps = {"x.npy": np.ones(2), "x": np.zeros(2), "meta": np.full(2, 3.0)}
    result = replace(make_result(), maps=maps)
    loaded = Nested.load(result.save(tmp_path / "a"))
    for name, array in maps.items():
        np.testing.assert_array_equal(loaded.maps[name], array)
    (tmp_path / "a").mkdir()
    assert Nested.load(tmp_path / "a") == result
