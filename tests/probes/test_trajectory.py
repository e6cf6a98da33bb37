import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from landscape.probes.checkpoints import read_trail
from landscape.probes.directions import Directions
from landscape.probes.planes import pca_directions
from landscape.probes.trajectory import (
    PolarTrajectory,
    Trajectory,
    polar_trajectory,
    project_trajectory,
)
from tests.cases import assert_untouched, make_model, snapshot

OPTIMUM = np.array([5.0, -3.0, 2.0, 1.0])


def spiral(t):
    """Checkpoints at radius 1 − t and angle t·π/2 in the plane of the first two coordinates."""
    around = np.array([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2), 0, 0])
    weight = OPTIMUM + 4 * (1 - t) * around
    return {
        "layer.weight": torch.tensor(weight, dtype=torch.float64).view(2, 2),
        "layer.running_mean": torch.full((3,), 100 * t),
        "layer.num_batches_tracked": torch.tensor(int(1000 * t)),
    }


TIMES = np.linspace(0, 1, 6)


def test_polar_coordinates_of_a_spiral():
    result = polar_trajectory([spiral(t) for t in TIMES])
    np.testing.assert_allclose(result.radius, 1 - TIMES, atol=1e-12)
    np.testing.assert_allclose(result.angle[:-1], TIMES[:-1] * math.pi / 2, atol=1e-7)
    assert np.isnan(result.angle[-1])
    np.testing.assert_array_equal(result.steps, np.arange(6))
    assert result.distance == pytest.approx(4)
    assert result.provenance.num_parameters == 4


def test_angles_beyond_a_right_angle_stay_in_radians():
    states = [{"w": torch.tensor([x, y])} for x, y in [(1.0, 0), (-1.0, 1), (-2.0, 0), (0.0, 0)]]
    result = polar_trajectory(states)
    np.testing.assert_allclose(result.angle[:3], [0, 0.75 * math.pi, math.pi], atol=1e-7)
    np.testing.assert_allclose(result.radius, [1, math.sqrt(2), 2, 0])


def test_small_moves_of_large_single_precision_weights_are_measured_in_double():
    start = torch.full((1000,), 1000.0)
    states = [{"w": start + step} for step in (2.0, 1.0, 0.0)]
    result = polar_trajectory(states)
    np.testing.assert_allclose(result.radius, [1, 0.5, 0], rtol=1e-12)


@pytest.mark.parametrize(
    "wrap",
    [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}, lambda s: {"net": s}],
)
@pytest.mark.parametrize("old_format", [False, True])
def test_files_folders_and_memory_give_the_same(wrap, old_format, tmp_path):
    paths = []
    for index, t in enumerate(TIMES):
        paths.append(tmp_path / f"epoch-{3 * index}.pt")
        torch.save(wrap(spiral(t)), paths[-1], _use_new_zipfile_serialization=not old_format)
    torch.save({"optimizer": {}, "model": spiral(0.3)}, tmp_path / "resume-00015.pt")
    memory = polar_trajectory([spiral(t) for t in TIMES])
    for source in (paths, [str(p) for p in paths], tmp_path):
        result = polar_trajectory(source)
        np.testing.assert_array_equal(result.radius, memory.radius)
        np.testing.assert_array_equal(result.angle, memory.angle)
        np.testing.assert_array_equal(result.steps, 3 * np.arange(6))


def test_an_unknown_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for number, t in [(10, 1.0), (9, 0.5), (1, 0.0)]:
        torch.save(spiral(t), tmp_path / f"net_{number}.pth")
    torch.save({"epoch": 4}, tmp_path / "resume-1.pt")
    (tmp_path / "log.csv").write_text("epoch\n")
    result = polar_trajectory(tmp_path)
    np.testing.assert_array_equal(result.steps, [1, 9, 10])
    np.testing.assert_allclose(result.radius, [1, 0.5, 0], atol=1e-12)


def test_the_epoch_inside_a_file_counts(tmp_path):
    for epoch, t in [(7, 0.0), (20, 1.0)]:
        torch.save({"epoch": epoch, "state_dict": spiral(t)}, tmp_path / f"{t:.0f}.pth.tar")
    np.testing.assert_array_equal(polar_trajectory(tmp_path).steps, [7, 20])


def test_tied_weights_count_once():
    tied = torch.ones(3)
    start = {"a.weight": tied, "b.weight": tied, "c": torch.zeros(1)}
    end = {"a.weight": torch.zeros(3), "b.weight": torch.zeros(3), "c": torch.ones(1)}
    end["b.weight"] = end["a.weight"]
    assert polar_trajectory([start, end]).distance == pytest.approx(2)


def test_a_straight_way_has_no_angle_though_its_cosine_rounds_above_one():
    states = [{"w": torch.full((3,), size)} for size in (1.0, 0.5, 0.0)]
    np.testing.assert_array_equal(polar_trajectory(states).angle, [0, 0, np.nan])


def test_numbers_of_steps_are_the_last_of_a_name_or_the_epochs_of_a_file(tmp_path):
    for number in (1, 2):
        torch.save({"w": number * torch.ones(3)}, tmp_path / f"resnet20-epoch-{number}.pt")
    files = sorted(tmp_path.iterdir())
    np.testing.assert_array_equal(polar_trajectory(files).steps, [1, 2])
    states = [{"step": 400 * k, "epoch": k, "state_dict": {"w": k * torch.ones(3)}} for k in (1, 2)]
    paths = [tmp_path / f"{k}.pt" for k in "ab"]
    for path, state in zip(paths, states, strict=True):
        torch.save(state, path)
    np.testing.assert_array_equal(polar_trajectory(paths).steps, [1, 2])
    picked = pca_directions([{"w": torch.randn(9)} for _ in range(5)], num=3)
    shares = picked.explained_variance[[2, 0]]
    np.testing.assert_array_equal(picked.select(2, 0).explained_variance, shares)


def test_a_tied_weight_counts_once_in_copies_too(generator):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    states = []
    for _ in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        states.append({name: t.clone() for name, t in model.state_dict().items()})
    np.testing.assert_allclose(
        polar_trajectory(states).radius, polar_trajectory(states, model=model).radius
    )
    assert "1.weight" not in pca_directions(states).vectors[0]


def test_a_model_tells_parameters_from_buffers():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2))
    model.register_buffer("average", torch.zeros(2))
    states = [
        {"weight": torch.ones(2), "average": 2 * torch.ones(2)},
        {"weight": torch.zeros(2), "average": torch.zeros(2)},
    ]
    assert polar_trajectory(states).distance == pytest.approx(10**0.5)
    assert polar_trajectory(states, model=model).distance == pytest.approx(math.sqrt(2))


def plane(*vectors):
    return Directions(
        vectors=tuple(
            {"layer.weight": np.array(v, dtype=np.float64).reshape(2, 2)} for v in vectors
        ),
        kind="random",
    )


def test_projection_on_skewed_directions_inverts_the_displacement():
    d1, d2 = np.array([2.0, 0, 0, 0]), np.array([1.0, 0.5, 0, 0])
    result = project_trajectory([spiral(t) for t in TIMES], plane(d1, d2))
    points = result.coordinates @ np.stack([d1, d2]) + OPTIMUM
    expected = np.stack([spiral(t)["layer.weight"].numpy().ravel() for t in TIMES])
    np.testing.assert_allclose(points, expected, atol=1e-10)
    np.testing.assert_allclose(result.residual, 0, atol=1e-7)


def test_projection_reports_what_the_plane_does_not_show():
    states = [
        {"layer.weight": torch.tensor([[3.0, 1.0], [4.0, 0.0]])},
        {"layer.weight": torch.zeros(2, 2)},
    ]
    result = project_trajectory(states, plane([1, 0, 0, 0], [0, 1, 0, 0]))
    np.testing.assert_allclose(result.coordinates, [[3, 1], [0, 0]], atol=1e-12)
    np.testing.assert_allclose(result.residual, [4 / math.sqrt(26), 0])
    shifted = project_trajectory(
        states, plane([1, 0, 0, 0], [0, 1, 0, 0]), origin={"layer.weight": torch.ones(2, 2)}
    )
    np.testing.assert_allclose(shifted.coordinates, [[2, 0], [-1, -1]])


def test_principal_components_hold_a_plane_path():
    states = [spiral(t) for t in TIMES]
    result = project_trajectory(states, pca_directions(states))
    np.testing.assert_allclose(result.residual, 0, atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(result.coordinates, axis=1), 4 * (1 - TIMES), atol=1e-9
    )


def test_pieces_do_not_change_the_answer(monkeypatch):
    states = [make_model("conv", seed=s).state_dict() for s in range(4)]
    directions = pca_directions(states)
    polar, projected = polar_trajectory(states), project_trajectory(states, directions)
    monkeypatch.setattr("landscape.probes.checkpoints._CHUNK", 29)
    np.testing.assert_allclose(polar_trajectory(states).angle, polar.angle, rtol=1e-12)
    again = project_trajectory(states, directions)
    np.testing.assert_allclose(again.coordinates, projected.coordinates, rtol=1e-9, atol=1e-12)


def test_results_come_back_from_disk(tmp_path):
    states = [spiral(t) for t in TIMES]
    polar = polar_trajectory(states)
    loaded = PolarTrajectory.load(polar.save(tmp_path / "polar"))
    np.testing.assert_array_equal(loaded.angle, polar.angle)
    projected = project_trajectory(states, pca_directions(states))
    loaded = Trajectory.load(projected.save(tmp_path / "path"))
    np.testing.assert_array_equal(loaded.coordinates, projected.coordinates)


def test_modules_are_left_as_found_and_calls_repeat():
    models = [make_model("conv", seed=s).train() for s in range(3)]
    before = [snapshot(m) for m in models]
    first = polar_trajectory(models)
    torch.manual_seed(5)
    before = [{**b, "rng": torch.get_rng_state()} for b in before]
    second = polar_trajectory(models)
    np.testing.assert_array_equal(first.angle, second.angle)
    for model, state in zip(models, before, strict=True):
        assert_untouched(model, state)


class NotTensors:
    pass


def test_bad_checkpoints_are_refused(tmp_path):
    state = spiral(0.0)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        polar_trajectory([state])
    with pytest.raises(ValueError, match="must begin and end at different weights"):
        polar_trajectory([state, state])
    with pytest.raises(ValueError, match="of one model, got shape none for 'other'"):
        polar_trajectory([state, {"other": torch.ones(2)}])
    with pytest.raises(ValueError, match="must hold floating-point parameters"):
        polar_trajectory([{"n": torch.tensor(0)}, {"n": torch.tensor(1)}])
    with pytest.raises(TypeError, match="got int"):
        polar_trajectory([1, 2])
    with pytest.raises(TypeError, match="must be a sequence, got a single one"):
        polar_trajectory(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must be a folder or a sequence"):
        polar_trajectory(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least 2, got 0"):
        polar_trajectory(tmp_path)
    torch.save({"w": torch.ones(2), "x": NotTensors()}, tmp_path / "unsafe.pt")
    with pytest.raises(ValueError, match="weights_only=True"):
        polar_trajectory([tmp_path / "unsafe.pt", state])
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pt").read_bytes()
    for content in (b"PK\x03\x04 nothing", b"hello", old[:31], old[:93]):
        (tmp_path / "cut.pt").write_bytes(content)
        with pytest.raises(ValueError, match="weights_only=True"):
            polar_trajectory([tmp_path / "cut.pt", state])
    with pytest.raises(ValueError, match="must hold tensors by name"):
        polar_trajectory([{"epoch": 3}, state])


def test_checkpoints_of_another_model_or_without_a_parameter_are_refused():
    model = nn.Linear(2, 1)
    full = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    less = {"weight": torch.zeros(1, 2)}
    wrapped = {f"module.{name}": value for name, value in full.items()}
    for states, known, message in [
        ([full, less], None, r"got shape \(1,\) for 'bias' in checkpoint 0 and none in the last"),
        ([less, full], model, "got shape none for 'bias' in checkpoint 0"),
        ([wrapped, wrapped], model, "names begin with 'module.weight' here and 'weight' there"),
        ([full, full], nn.Linear(3, 1), r"\(1, 2\) for 'weight' .* \(1, 3\) in the model"),
    ]:
        with pytest.raises(ValueError, match=message):
            polar_trajectory(states, model=known)
    with pytest.raises(ValueError, match="`origin` must be of the model .* got none for 'layer"):
        project_trajectory([spiral(0.0)], plane([1, 0, 0, 0]), origin=less)
    with pytest.raises(TypeError, match="`origin` must be state dicts, .* got int"):
        project_trajectory([spiral(0.0)], plane([1, 0, 0, 0]), origin=3)
    with pytest.raises(ValueError, match="`checkpoints` must be finite"):
        pca_directions([full, less | {"bias": torch.tensor([math.nan])}], num=1)


def test_bad_directions_are_refused():
    states = [spiral(t) for t in TIMES]
    with pytest.raises(ValueError, match="`directions` must be independent"):
        project_trajectory(states, plane([1, 0, 0, 0], [-2, 0, 0, 0]))
    strangers = Directions(vectors=({"head": np.ones(3)},), kind="random")
    with pytest.raises(ValueError, match="made for the model of the checkpoints, got 'head'"):
        project_trajectory(states, strangers)


def test_a_trail_maps_files_instead_of_reading_them(tmp_path):
    torch.save(spiral(0.0), tmp_path / "epoch-00000.pt")
    torch.save(spiral(1.0), tmp_path / "epoch-00001.pt")
    trail = read_trail(tmp_path)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert maps.read_text().count("epoch-0000") >= 2
    assert trail.names == ("layer.weight",)
    assert set(trail.ignored) == {"layer.running_mean", "layer.num_batches_tracked"}


def test_steps_are_read_from_names_where_they_rise(tmp_path):
    names = {
        "resnet18_{}.pt": (["init", "mid", "last"], [0, 1, 2]),
        "epoch={}-loss=0.91.ckpt": ([0, 5, 10], [0, 5, 10]),
        "run3_step_{}.pt": ([100, 200, 300], [100, 200, 300]),
    }
    for number, (name, (parts, steps)) in enumerate(names.items()):
        paths = [tmp_path / name.format(part) for part in parts]
        for i, path in enumerate(paths):
            torch.save({"w": torch.full((3,), float(i)) + torch.tensor([0.0, 1, 4]) * i}, path)
        assert polar_trajectory(paths).steps.tolist() == steps, number


def test_a_checkpoint_that_is_not_finite_lies_in_no_plane():
    states = [
        {"w": torch.tensor(v)} for v in ([np.nan, 1.0, 2.0], [1.0, 2.0, 5.0], [0.0, 0.0, 0.0])
    ]
    directions = pca_directions([{"w": torch.eye(3)[i]} for i in range(3)], num=2)
    found = project_trajectory(states, directions)
    assert np.isnan(found.residual[0])
    assert found.residual[-1] == 0
