import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from landscape import Eigenpairs, Provenance, Result
from landscape.results import write_atomically


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


def test_save_and_load_return_the_same_result(tmp_path):
    result = make_result()
    path = result.save(tmp_path / "deep" / "result")
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


def test_results_hold_no_objects():
    bad = Nested(None, {"x": np.array([object()])}, (0.0, 1.0), None, 0.0, Provenance())
    with pytest.raises(TypeError, match="no object arrays"):
        bad.save("never.npz")
