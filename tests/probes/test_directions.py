import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from landscape.probes.directions import Directions, random_directions
from tests.cases import MODELS, Tied, assert_untouched, make_model, snapshot

# Dimensions over which the norm of a (out, in, 3, 3) direction must be that of the weights.
NORM_DIMS = {"filter": (1, 2, 3), "layer": (0, 1, 2, 3), "input": (0,)}


def norms(array, dims):
    return np.sqrt((array.astype(np.float64) ** 2).sum(dims))


@pytest.mark.parametrize("rule", NORM_DIMS)
def test_norms_are_those_of_the_weights_for_this_rule_alone(rule, generator):
    model = nn.Conv2d(5, 7, 3, dtype=torch.float64)
    with torch.no_grad():  # filters and inputs of very different norms
        model.weight.mul_(torch.logspace(-3, 2, 7)[:, None, None, None])
        model.weight.mul_(torch.logspace(-1, 1, 5)[:, None, None])
    directions = random_directions(model, normalization=rule, generator=generator)
    weight = model.weight.detach().numpy()
    for vector in directions.vectors:
        for other, dims in NORM_DIMS.items():
            same = np.allclose(norms(vector["weight"], dims), norms(weight, dims), rtol=1e-10)
            # equal norms of the parts imply equal norms of the whole
            assert same == (other == rule or other == "layer"), other


def test_filter_rule_on_linear_layers_and_biases():
    model = nn.Linear(6, 4, dtype=torch.float64)
    directions = random_directions(model, ignore_1d=False)
    weight, bias = directions.vectors[0]["weight"], directions.vectors[0]["bias"]
    np.testing.assert_allclose(norms(weight, 1), norms(model.weight.detach().numpy(), 1))
    np.testing.assert_allclose(np.abs(bias), np.abs(model.bias.detach().numpy()))


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_a_transposed_convolution_make_one_output_channel(groups):
    model = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False, dtype=torch.float64)
    vector = random_directions(model).vectors[0]["weight"]
    weight = model.weight.detach().numpy()
    for group in range(groups):
        rows = slice(group * 4 // groups, (group + 1) * 4 // groups)
        for channel in range(6 // groups):
            ours, theirs = vector[rows, channel], weight[rows, channel]
            np.testing.assert_allclose(np.linalg.norm(ours), np.linalg.norm(theirs))


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (nn.utils.parametrizations.weight_norm, "parametrizations.weight.original1"),
        (nn.utils.parametrizations.spectral_norm, "parametrizations.weight.original"),
        (nn.utils.spectral_norm, "weight_orig"),
    ],
)
def test_filters_of_a_reparametrised_transposed_convolution_are_its_own_too(wrap, name):
    model = wrap(nn.ConvTranspose2d(4, 6, 3, dtype=torch.float64))
    ours = random_directions(model).vectors[0][name]
    theirs = dict(model.named_parameters())[name].detach().numpy()
    lengths = [(v**2).sum((0, 2, 3)) for v in (ours, theirs)]
    np.testing.assert_allclose(*lengths)


@pytest.mark.parametrize("rule", ["filter", "layer", "input", None])
def test_pruned_weights_do_not_move_and_do_not_count(rule):
    model = nn.Linear(6, 4, dtype=torch.float64)
    whole = random_directions(model, normalization=None).vectors[0]["weight"]
    prune.l1_unstructured(model, "weight", 0.5)
    vector = random_directions(model, normalization=rule).vectors[0]["weight_orig"]
    kept, weight = model.weight_mask.numpy(), model.weight.detach().numpy()
    assert not vector[kept == 0].any()
    if rule is None:
        np.testing.assert_array_equal(vector, whole * kept)
        return
    dims = {"filter": 1, "layer": (0, 1), "input": 0}[rule]
    np.testing.assert_allclose(norms(vector, dims), norms(weight, dims))


def test_a_spectral_norm_takes_no_step_of_its_iteration():
    model = nn.utils.parametrizations.spectral_norm(nn.ConvTranspose2d(4, 6, 3))  # in training mode
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_directions(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rule", ["filter", "layer", "input"])
def test_zero_weights_give_zero_directions_and_nothing_else_changes(rule):
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[1].bias)
    vector = random_directions(model, normalization=rule, ignore_1d=False).vectors[0]
    assert not vector["0.weight"].any()
    assert not vector["1.bias"].any()
    assert vector["1.weight"].all()
    assert all(np.isfinite(array).all() for array in vector.values())


def test_plain_directions_are_standard_normal_and_independent(generator):
    model = nn.Linear(200, 150, bias=False)
    directions = random_directions(model, num=3, normalization=None, generator=generator)
    entries = np.stack([v["weight"].ravel() for v in directions.vectors])
    n = entries.shape[1]
    assert np.abs(entries.mean(1)).max() < 5 / np.sqrt(n)
    assert np.abs(entries.var(1) - 1).max() < 5 * np.sqrt(2 / n)
    assert np.abs((entries**4).mean(1) - 3).max() < 5 * np.sqrt(96 / n)
    off_diagonal = directions.cosines[~np.eye(3, dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(n)
    assert (off_diagonal != 0).all()  # independent, not orthogonalised
    np.testing.assert_allclose(np.diag(directions.cosines), 1)
    np.testing.assert_allclose(directions.norms, np.linalg.norm(entries, axis=1), rtol=1e-6)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(1, 4, 3))
        self.position_bias = nn.Parameter(torch.ones(3, 4))
        self.relative_position_bias_table = nn.Parameter(torch.ones(3, 4))
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 2)


def test_what_stays_in_place():
    model = Positions()
    directions = random_directions(model)
    assert directions.names == ("head.weight",)
    everything = {name for name, _ in model.named_parameters()}
    assert set(directions.ignored) == everything - {"head.weight"}
    free = random_directions(model, ignore_1d=False, exclude=())
    assert set(free.names) == everything - {"frozen.weight", "frozen.bias"}
    chosen = random_directions(model, parameters="norm.*", ignore_1d=False)
    assert chosen.names == ("norm.weight", "norm.bias")


def test_tied_weights_are_one_entry():
    directions = random_directions(Tied())
    assert "encode.weight" in directions.names
    assert "decode.weight" not in directions.names


def test_a_seed_fixes_the_directions_whatever_the_global_state_and_the_precision():
    model = make_model("conv")
    first = random_directions(model, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    again = random_directions(model, generator=torch.Generator().manual_seed(3))
    other = random_directions(model, generator=torch.Generator().manual_seed(4))
    single = random_directions(model.float(), generator=torch.Generator().manual_seed(3))
    for name in first.names:
        np.testing.assert_array_equal(first.vectors[1][name], again.vectors[1][name])
        assert not np.allclose(first.vectors[1][name], other.vectors[1][name])
        assert single.vectors[1][name].dtype == np.float32
        np.testing.assert_allclose(single.vectors[1][name], first.vectors[1][name], rtol=1e-5)
    assert first.provenance.seed == 3


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_found(name):
    model = make_model(name).train()
    before = snapshot(model)
    random_directions(model).tensors(model)
    assert_untouched(model, before)


def test_half_precision_weights_get_single_precision_directions():
    model = nn.Linear(8, 8).bfloat16()
    directions = random_directions(model)
    assert directions.vectors[0]["weight"].dtype == np.float32
    assert directions.tensors(model)[0]["weight"].dtype == torch.float32


def test_single_numbers_move_up_and_down():
    moved = random_directions(make_model("conv"), num=8, ignore_1d=False).vectors
    signs = np.sign([v["1.weight"] for v in moved])
    assert (signs.min(0) == -1).all()
    assert (signs.max(0) == 1).all()


def test_saved_directions_come_back_and_fit_their_model(tmp_path):
    model = make_model("conv")
    directions = random_directions(model, num=3)
    loaded = Directions.load(directions.save(tmp_path / "directions.npz"))
    chosen = loaded.select(2, 0)
    tensors = chosen.tensors(model)
    assert [len(loaded), len(chosen)] == [3, 2]
    for name in directions.names:
        np.testing.assert_array_equal(tensors[0][name].numpy(), directions.vectors[2][name])
        np.testing.assert_array_equal(tensors[1][name].numpy(), directions.vectors[0][name])
    assert loaded.normalization == "filter"
    assert loaded.ignored == directions.ignored


def test_directions_are_refused_by_another_model():
    directions = random_directions(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"`directions` .* got '1.weight', which it lacks"):
        directions.tensors(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"`directions` .* got shape \(2, 3\) for '1.weight'"):
        directions.tensors(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)))
    with pytest.raises(ValueError, match=r"`directions` .* got none for its '2.weight'"):
        directions.tensors(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2)))


@pytest.mark.parametrize("made", ["compiled", "plain"])
@pytest.mark.parametrize("used", ["compiled", "plain"])
def test_directions_suit_a_model_before_and_after_it_is_compiled(made, used):
    plain = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    models = {"plain": plain, "compiled": torch.compile(plain, backend="eager")}
    directions = random_directions(models[made])
    vectors = directions.tensors(models[used])
    names = [name for name, p in models[used].named_parameters() if p.dim() > 1]
    for vector, array in zip(vectors, directions.vectors, strict=True):
        assert list(vector) == names
        for tensor, entries in zip(vector.values(), array.values(), strict=True):
            np.testing.assert_array_equal(tensor.numpy(), entries)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num": 0}, ValueError, "`num` must be at least 1, got 0"),
        ({"normalization": "channel"}, ValueError, "`normalization` must be one of 'filter'"),
        ({"generator": 3}, TypeError, "`generator` must be a torch.Generator"),
        ({"exclude": "*"}, ValueError, "must leave a parameter to move, got none"),
        ({"parameters": "heda*"}, ValueError, "`parameters` must match parameter names"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        random_directions(nn.Linear(3, 2), **arguments)


def test_selecting_what_is_not_there_is_refused():
    directions = random_directions(nn.Linear(3, 2))
    with pytest.raises(IndexError, match="`indices` must be below 2, got 2"):
        directions.select(2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        directions.kind = "other"
