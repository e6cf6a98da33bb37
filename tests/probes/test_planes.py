import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape.objective import Objective
from landscape.probes.hessian import hessian_spectrum
from landscape.probes.planes import between, eigen_directions, pca_directions
from landscape.probes.surface import loss_line, loss_surface
from tests.cases import assert_untouched, make_batches, make_model, snapshot
from tests.oracles import dense


def flat(vector):
    return np.concatenate([array.ravel() for array in vector.values()])


@pytest.mark.parametrize("names", [None, ("0.weight", "5.bias")], ids=["all", "subset"])
def test_eigen_directions_have_the_curvature_of_their_eigenvalue(names):
    model, batches = make_model("conv"), make_batches((12,))
    values, vectors = np.linalg.eigh(dense(model, batches, names=names).numpy())
    pairs = SimpleNamespace(values=values[::-1], vectors=3 * vectors.T[::-1].copy())
    directions = eigen_directions(SimpleNamespace(largest=pairs), model, parameters=names)
    np.testing.assert_allclose(directions.norms, 1)
    np.testing.assert_allclose(directions.cosines, np.eye(2), atol=1e-10)
    h = 1e-3
    for index, value in enumerate(values[:-3:-1]):
        line = loss_line(model, batches, directions=directions.select(index), span=h, points=3)
        curvature = (line.nll[0] - 2 * line.nll[1] + line.nll[2]) / h**2
        assert curvature == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("names", [None, ["0.weight", "5.bias"]], ids=["all", "subset"])
def test_a_spectrum_knows_its_parameters(names, tmp_path):
    model, batches = make_model("conv"), make_batches((12,))
    spectrum = hessian_spectrum(
        model, batches, objective=Objective(parameters=names), vectors=True, density=False
    )
    loaded = type(spectrum).load(spectrum.save(tmp_path / "spectrum"))
    expected = eigen_directions(spectrum, model, parameters=names)
    for found in (eigen_directions(spectrum), eigen_directions(loaded)):
        assert found.ignored == expected.ignored
        for one, other in zip(found.vectors, expected.vectors, strict=True):
            assert list(one) == list(other)
            for name, array in one.items():
                np.testing.assert_array_equal(array, other[name])
        found.tensors(model)
    with pytest.raises(ValueError, match="`model` must be given where .* got Eigenpairs alone"):
        eigen_directions(spectrum.largest)


def test_eigen_directions_take_pairs_arrays_and_tensors():
    model = nn.Linear(3, 2, bias=False)
    vectors = np.eye(6)[:2]
    sources = [vectors, torch.from_numpy(vectors), SimpleNamespace(values=1, vectors=vectors)]
    for source in sources:
        directions = eigen_directions(source, model)
        np.testing.assert_array_equal([flat(v) for v in directions.vectors], vectors)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (SimpleNamespace(values=1, vectors=None), {}, "must hold eigenvectors, got none"),
        (np.eye(5)[:2], {}, r"vectors of shape \(k, 6\) for this model, got \(2, 5\)"),
        (np.eye(6)[:1], {}, "at least 2 vectors, got 1"),
        (np.eye(6), {"num": 0}, "`num` must be at least 1"),
    ],
)
def test_bad_spectra_are_refused(source, arguments, message):
    with pytest.raises(ValueError, match=message):
        eigen_directions(source, nn.Linear(3, 2, bias=False), **arguments)


def path(num=9, seed=0):
    """State dicts of a conv net with random parameters and wild running statistics."""
    generator = torch.Generator().manual_seed(seed)
    states = []
    for _ in range(num):
        state = make_model("conv").state_dict()
        for name, tensor in state.items():
            if tensor.is_floating_point():
                scale = 1e3 if "running" in name else 1.0
                tensor.add_(scale * torch.randn(tensor.shape, generator=generator).double())
        states.append(state)
    return states


def parameter_matrix(states):
    names = [name for name, _ in make_model("conv").named_parameters()]
    return np.stack([np.concatenate([s[n].numpy().ravel() for n in names]) for s in states])


@pytest.mark.parametrize("with_model", [True, False])
def test_pca_directions_are_the_right_singular_vectors(with_model):
    states = path()
    directions = pca_directions(states, num=3, model=make_model("conv") if with_model else None)
    matrix = parameter_matrix(states)
    _, s, vt = np.linalg.svd(matrix - matrix.mean(0), full_matrices=False)
    ours = np.stack([flat(v) for v in directions.vectors])
    np.testing.assert_allclose(np.abs(ours @ vt[:3].T), np.eye(3), atol=1e-10)
    np.testing.assert_allclose(directions.explained_variance, (s**2 / (s**2).sum())[:3])
    assert (ours @ (matrix[0] - matrix.mean(0)) > 0).all()
    assert "1.running_mean" in directions.ignored or with_model
    directions.tensors(make_model("conv"))  # they fit the model


def test_pca_in_pieces_equals_pca_at_once(monkeypatch):
    whole = pca_directions(path())
    monkeypatch.setattr("landscape.probes.checkpoints._CHUNK", 50)
    pieces = pca_directions(path())
    for a, b in zip(whole.vectors, pieces.vectors, strict=True):
        np.testing.assert_allclose(flat(a), flat(b), atol=1e-12)


def test_pca_needs_enough_directions():
    states = path(2)
    with pytest.raises(ValueError, match="`checkpoints` must hold at least 3, got 2"):
        pca_directions(states)
    with pytest.raises(ValueError, match="differ in at least 2 directions"):
        pca_directions([states[0], states[1], states[0]])


def test_between_reaches_the_other_weights_with_all_parameters():
    model, other, third = make_model("attention"), make_model("attention", seed=1), None
    third = make_model("attention", seed=2)
    batches = make_batches((9,))
    directions = between(model, other.state_dict(), third)
    surface = loss_surface(model, batches, directions=directions, points=([0.0, 1.0], [0.0, 1.0]))
    for entry, net in {(0, 0): model, (1, 0): other, (0, 1): third}.items():
        x, y = batches[0]
        expected = F.cross_entropy(net(x), y).item()
        assert surface.nll[entry] == pytest.approx(expected, rel=1e-12)
    assert set(directions.names) == {name for name, _ in model.named_parameters()}


def test_between_a_subset_leaves_the_rest():
    model, other = make_model("attention"), make_model("attention", seed=1)
    directions = between(model, other, parameters="head.*")
    line = loss_line(model, make_batches((9,)), directions=directions, points=[1.0])
    mixed = copy.deepcopy(model)
    mixed.head.load_state_dict(other.head.state_dict())
    expected = Objective().freeze(mixed, make_batches((9,))).value()
    assert line.nll[0] == pytest.approx(expected, rel=1e-12)


def test_between_refuses_weights_that_it_would_not_reach():
    model, other = make_model("attention"), make_model("attention", seed=1)
    model.qkv.requires_grad_(False)
    with pytest.raises(ValueError, match=r"got another 'qkv.weight' in state 0; call `model.req"):
        between(model, other)
    between(model, other, parameters="head.*")
    other.qkv.load_state_dict(model.qkv.state_dict())
    between(model, other)
    wrapped = {f"module.{name}": tensor for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"'module.norm.weight' there .* here, so what wraps"):
        between(model, wrapped)


def test_between_refuses_itself_and_strangers():
    model = make_model("attention")
    with pytest.raises(ValueError, match="`states` must differ from the model"):
        between(model, copy.deepcopy(model))
    with pytest.raises(ValueError, match="`states` must be of this model, got shape none"):
        between(model, make_model("conv"))
    with pytest.raises(TypeError, match="`states` must be state dicts, .* got NoneType"):
        between(model, None)
    with pytest.raises(ValueError, match="`states` must hold tensors by name"):
        between(model, {"epoch": 3})
    with pytest.raises(ValueError, match="`states` must be at least 1"):
        between(model)


def test_models_are_left_as_found():
    model, other = make_model("conv").train(), make_model("conv", seed=1)
    before, before_other = snapshot(model), snapshot(other)
    between(model, other)
    pca_directions([model, other, make_model("conv", seed=2)])
    eigen_directions(np.eye(Objective().freeze(model, make_batches((4,))).space.dim), model)
    assert_untouched(model, before)
    assert_untouched(other, before_other)
