import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from landscape.blocks import Blocks
from landscape.models import resnet20, vit_nano
from landscape.probes.cka import CKA, _ratio, cka
from landscape.switches import rounding
from tests.cases import assert_untouched, snapshot
from tests.probes.filters import Cached, filters, images

ARRAYS = ("values", "stderr", "hsic", "hsic_a", "hsic_b", "batch_sizes")


class Branches(nn.Module):
    """Linear maps of one flat input, each a block."""

    def __init__(self, **weights):
        super().__init__()
        for name, weight in weights.items():
            layer = nn.Linear(*weight.T.shape, bias=False)
            layer.weight = nn.Parameter(weight)
            setattr(self, name, layer)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.children()], dim=1)


def branches(**weights):
    model = Branches(**weights)
    width = next(iter(weights.values())).shape[1]
    dtype = next(iter(weights.values())).dtype
    return model, Blocks(model, list(weights), example=torch.zeros(3, width, dtype=dtype))


def vectors(sizes=(16, 16), width=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), width, generator=generator, dtype=torch.float64).to(dtype)
    return list(zip(x.split(sizes), torch.zeros(sum(sizes)).long().split(sizes), strict=True))


def hsic(x, y):
    """Nguyen et al. 2021, eq. 3, in its own terms."""
    n = len(x)
    k, m = (z.double().flatten(1) @ z.double().flatten(1).T for z in (x, y))
    k, m = (each - torch.diag(each.diag()) for each in (k, m))
    one = torch.ones(n, dtype=torch.float64)
    terms = torch.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return ((terms - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))).item()


def by_hand(features_a, features_b, sizes):
    """CKA of two lists of features, of all mini-batches."""
    sums = [0.0, 0.0, 0.0]
    parts = [f.split(sizes) for f in (features_a, features_b)]
    for size, x, y in zip(sizes, *parts, strict=True):
        for i, pair in enumerate(((x, y), (x, x), (y, y))):
            sums[i] += size * hsic(*pair)
    return sums[0] / np.sqrt(sums[1] * sums[2])


def random_weight(rows, columns, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("part", [1 << 18, 2 * 64 * 32, 1], ids=str)
@pytest.mark.parametrize("sizes", [(16, 16), (13, 12, 7), (32,), (4,) * 8], ids=str)
def test_values_are_the_formula(sizes, part, monkeypatch):
    monkeypatch.setattr(sys.modules["landscape.probes.cka"], "_PART", part)
    model, blocks = filters()
    data = images(sizes)
    result = cka(model, data, blocks_a=blocks)
    captured = blocks.capture(torch.cat([x for x, _ in data]))
    assert result.blocks_a.names == ("white", "blur", "laplacian", "head")
    for i, a in enumerate(result.blocks_a.names):
        for j, b in enumerate(result.blocks_b.names):
            expected = by_hand(captured[a], captured[b], sizes)
            np.testing.assert_allclose(result.values[i, j], expected, rtol=1e-10, atol=1e-13)
            first = [captured[name][: sizes[0]] for name in (a, b)]
            np.testing.assert_allclose(result.hsic[0, i, j], hsic(*first), rtol=1e-7, atol=1e-11)
    assert result.hsic.shape == (len(sizes), 4, 4)


def test_two_models_are_compared_on_the_same_samples():
    a, blocks_a = filters(names=["white", "laplacian"])
    b, blocks_b = filters(torch.float32, names=["blur", "white", "head"])
    data = images((20, 12))
    result = cka(a, data, b, blocks_a=blocks_a, blocks_b=blocks_b)
    x = torch.cat([x for x, _ in data])
    left, right = blocks_a.capture(x), blocks_b.capture(x.float())
    assert result.values.shape == (2, 3)
    for i, first in enumerate(left.values()):
        for j, second in enumerate(right.values()):
            expected = by_hand(first, second, (20, 12))
            np.testing.assert_allclose(result.values[i, j], expected, rtol=1e-5, atol=1e-7)
    swapped = cka(b, data, a, blocks_a=blocks_b, blocks_b=blocks_a)
    np.testing.assert_allclose(swapped.values, result.values.T, rtol=1e-5, atol=1e-7)
    assert result.provenance.num_forwards == 2


def test_the_second_model_sees_its_own_precision():
    half, blocks_half = filters(torch.bfloat16, names=["white", "blur"])
    full, blocks_full = filters(torch.float32, names=["white", "blur"])
    data = [(100 + x, y) for x, y in images((16,))]
    alone = cka(full, data, blocks_a=blocks_full)
    for first, second in ((half, full), (full, half)):
        blocks = {half: blocks_half, full: blocks_full}
        both = cka(first, data, second, blocks_a=blocks[first], blocks_b=blocks[second])
        own = both.hsic_a if first is full else both.hsic_b
        np.testing.assert_array_equal(own, alone.hsic_a)


def test_rotation_and_scale_do_not_matter():
    rotation = torch.linalg.qr(random_weight(6, 6, seed=3))[0]
    weight = random_weight(6, 6, seed=4)
    model, blocks = branches(
        plain=weight, rotated=rotation @ weight, small=1e-20 * weight, large=1e20 * weight,
        other=random_weight(5, 6, 5),
    )  # fmt: skip
    result = cka(model, vectors((20, 9)), blocks_a=blocks)
    np.testing.assert_allclose(np.diag(result.values), 1, rtol=1e-12)
    np.testing.assert_allclose(result.values[:4, :4], 1, rtol=1e-12)
    np.testing.assert_array_less(result.values[:4, 4], 0.99)
    np.testing.assert_allclose(result.values, result.values.T, rtol=1e-12)
    np.testing.assert_allclose(result.stderr[:4, :4], 0, atol=1e-10)


def test_any_linear_map_of_one_direction_is_alike():
    """Features of rank one have the kernel x xᵀ whatever the map."""
    model, blocks = branches(
        a=random_weight(4, 1, 1) @ torch.ones(1, 6).double(), b=torch.ones(1, 6).double()
    )
    result = cka(model, vectors(), blocks_a=blocks)
    np.testing.assert_allclose(result.values, 1, rtol=1e-10)


def test_independent_features_have_none_within_the_error():
    upper, lower = torch.zeros(2, 12, 24, dtype=torch.float64)
    upper[:, :12], lower[:, 12:] = torch.eye(12), torch.eye(12)
    model, blocks = branches(upper=upper, lower=lower)
    data = vectors((10,) * 60, width=24)  # so few that the biased estimate is 0.56
    result = cka(model, data, blocks_a=blocks)
    assert abs(result.values[0, 1]) <= 3 * result.stderr[0, 1]
    assert 0 < result.stderr[0, 1] < 0.03


def test_error_is_the_jackknife_over_batches():
    model, blocks = filters()
    data = images((9, 9, 9))
    left = [cka(model, data[:i] + data[i + 1 :], blocks_a=blocks).values for i in range(3)]
    found = cka(model, data, blocks_a=blocks)
    expected = np.sqrt((3 - 1) / 3 * np.square(left - found.values).sum(0))
    np.testing.assert_allclose(found.stderr, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("sizes", [(64, 64), (64, 4), (64, 64, 4), (40, 30, 20, 10)], ids=str)
def test_batches_of_any_sizes_have_the_error_of_their_weighted_mean(sizes):
    """A thousand pairs of blocks whose HSIC has the variance 1 / n, and 1 with themselves."""
    sizes = np.array(sizes)
    draws = np.random.RandomState(0).normal(size=(len(sizes), 1, 1000))
    draws /= np.sqrt(sizes)[:, None, None]
    values, stderr = _ratio(draws, np.ones((len(sizes), 1)), np.ones((len(sizes), 1000)), sizes)
    assert values.std() == pytest.approx(1 / np.sqrt(sizes.sum()), rel=0.1)
    assert np.sqrt(np.square(stderr).mean()) == pytest.approx(1 / np.sqrt(sizes.sum()), rel=0.1)


def test_error_is_the_spread_over_repeated_draws():
    weight = random_weight(4, 6, seed=8)
    model, blocks = branches(a=torch.eye(6).double(), b=weight)
    draws = [cka(model, vectors((16,) * 12, seed=s), blocks_a=blocks) for s in range(60)]
    values, errors = (np.array([getattr(d, f)[0, 1] for d in draws]) for f in ("values", "stderr"))
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.25)


def test_order_within_batches_does_not_matter():
    model, blocks = filters()
    data = images((20, 12))
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(len(y), generator=generator) for _, y in data]
    shuffled = [(x[o], y[o]) for (x, y), o in zip(data, orders, strict=True)]
    a, b = (cka(model, each, blocks_a=blocks) for each in (data, shuffled))
    np.testing.assert_allclose(a.values, b.values, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(a.stderr, b.stderr, rtol=1e-8, atol=1e-12)


def test_batches_change_the_estimate_and_not_what_is_estimated():
    weight = random_weight(4, 6, seed=8)
    model, blocks = branches(a=torch.eye(6).double(), b=weight)
    a, b = (cka(model, vectors(sizes), blocks_a=blocks) for sizes in ((8,) * 100, (100,) * 8))
    difference = abs(a.values[0, 1] - b.values[0, 1])
    assert 0 < difference <= 3 * np.hypot(a.stderr[0, 1], b.stderr[0, 1])


def test_float32_is_accurate_far_from_the_origin():
    model, blocks = filters(torch.float32, names=["white", "blur", "laplacian"])
    data = [(x + 100, y) for x, y in images((16, 16), dtype=torch.float32)]
    result = cka(model, data, blocks_a=blocks)
    captured = blocks.capture(torch.cat([x for x, _ in data]))
    for i, a in enumerate(captured.values()):
        for j, b in enumerate(captured.values()):
            centred = [f.double() - f.double().mean(0) for f in (a, b)]
            assert result.values[i, j] == pytest.approx(by_hand(*centred, (16, 16)), abs=1e-5)


def test_products_are_not_rounded_because_the_user_lets_a_gpu():
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default and args[0].shape[0] == args[1].shape[1] == 16:
                seen.append(torch.backends.cuda.matmul.fp32_precision)
            return func(*args, **(kwargs or {}))

    seen = []
    model, blocks = filters(torch.float32, names=["white", "blur"])
    with rounding("tf32"), Products():
        cka(model, images((16, 16), dtype=torch.float32), blocks_a=blocks)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert seen == ["ieee"] * 4  # two blocks in two batches


def test_one_batch_has_no_error():
    model, blocks = filters()
    result = cka(model, images((8,)), blocks_a=blocks)
    assert np.isfinite(result.values).all()
    assert np.isnan(result.stderr).all()


def test_constant_features_have_no_similarity():
    model, blocks = branches(zero=torch.zeros(3, 6).double(), one=torch.eye(6).double())
    result = cka(model, vectors(), blocks_a=blocks)
    assert np.isnan(result.values[0]).all()
    assert result.values[1, 1] == pytest.approx(1)


def test_features_that_are_equal_but_for_rounding_have_no_similarity():
    model, blocks = branches(zero=torch.zeros(3, 6), one=torch.eye(6))
    model.zero.register_forward_hook(lambda module, args, out: out + torch.tensor([0.1, 0.7, 1.3]))
    blocks = Blocks(model, ["zero", "one"], example=torch.zeros(3, 6))
    result = cka(model, vectors((19, 37), dtype=torch.float32), blocks_a=blocks)
    assert np.isnan(result.values[0]).all()
    assert result.values[1, 1] == pytest.approx(1)


def test_a_large_constant_beside_features_hides_none_of_them():
    model, _ = branches(one=torch.eye(6), two=torch.eye(6)[:4])
    offset = torch.tensor([1e6, 0, 0, 0, 0, 0])
    model.one.register_forward_hook(lambda module, args, out: 0.1 * out * (offset == 0) + offset)
    blocks = Blocks(model, ["one", "two"], example=torch.zeros(3, 6))
    values = cka(model, vectors((19, 37), dtype=torch.float32), blocks_a=blocks).values
    assert np.isfinite(values).all()
    assert values[0, 0] == pytest.approx(1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_feature_that_is_not_finite_makes_its_row_nan(bad):
    model, blocks = branches(one=torch.eye(6).double(), two=torch.ones(6, 6).double())
    data = vectors((16, 16, 16))
    data[1][0][3, 2] = bad
    assert np.isnan(cka(model, data, blocks_a=blocks).values).all()


def test_a_small_last_batch_is_left_out_with_a_warning_and_counted():
    model, blocks = filters()
    whole = images((10, 10, 3))
    with pytest.warns(UserWarning, match="3 of 23 samples came in batches of fewer than 4"):
        result = cka(model, whole, blocks_a=blocks)
    expected = cka(model, whole[:2], blocks_a=blocks)
    np.testing.assert_array_equal(result.values, expected.values)
    assert (result.num_skipped, expected.num_skipped) == (3, 0)
    assert result.batch_sizes.tolist() == [10, 10]
    assert result.provenance.num_samples == 20


def test_same_call_same_result_and_it_survives_a_file(tmp_path):
    model, blocks = filters()
    first = cka(model, images((9, 9)), blocks_a=blocks)
    again = cka(model, images((9, 9)), blocks_a=blocks)
    loaded = CKA.load(first.save(tmp_path / "cka"))
    for other in (again, loaded):
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(first, name), getattr(other, name))
        assert other.blocks_a.names == other.blocks_b.names == first.blocks_a.names
        np.testing.assert_array_equal(other.blocks_a.stage, first.blocks_a.stage)


def test_models_are_untouched_and_can_train_afterwards():
    model, other = Cached().train(), Cached().eval()
    before = snapshot(model), snapshot(other)
    data = images((8, 8), dtype=torch.float32)
    blocks = [Blocks(m, ["conv", "norm"], example=data[0][0]) for m in (model, other)]
    cka(model, data, other, blocks_a=blocks[0], blocks_b=blocks[1])
    assert_untouched(model, before[0])
    assert_untouched(other, before[1])
    model(data[0][0]).sum().backward()


def test_errors():
    model, blocks = filters()
    with pytest.raises(ValueError, match="must be those of the model that is probed"):
        cka(model, images(), blocks_a=filters()[1])
    with pytest.raises(ValueError, match="batches of at least 4 samples for CKA, got 3 in the fi"):
        cka(model, images((3, 8)), blocks_a=blocks)
    with pytest.raises(ValueError, match="`blocks_b` must be None without `model_b`"):
        cka(model, images(), blocks_b=blocks)
    with pytest.raises(TypeError, match="`data` must be re-iterable"):
        cka(model, iter(images()), blocks_a=blocks)
    with pytest.raises(ValueError, match="`data` must yield at least one sample"):
        cka(model, [], blocks_a=blocks)


def test_features_of_parts_of_a_sample_are_refused():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.piece, self.head = nn.Conv2d(3, 4, 1), nn.Linear(256, 3)

        def forward(self, x):
            halves = self.piece(x.view(2 * len(x), 3, -1, x.shape[3]))
            return self.head(halves.view(len(x), -1))

    model, data = Halves(), images((6,), (8, 8), torch.float32)
    named = Blocks(model, ["piece", "head"], example=data[0][0])
    with pytest.raises(ValueError, match="one feature a sample, got 12 for 6 samples at .*'piece'"):
        cka(model, data, blocks_a=named)


def test_blocks_of_both_models_are_found_with_the_first_batch():
    a, b = resnet20(width=4, num_classes=3), vit_nano(num_classes=3)
    data = images((6, 6), (32, 32), torch.float32)
    result = cka(a, data, b)
    assert result.blocks_a.kinds == ("stem", *["conv"] * 9, "head")
    assert result.blocks_b.kinds == ("stem", *["msa", "mlp"] * 4, "head")
    assert result.blocks_a.stage.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert result.values.shape == (11, 10)
    given = cka(b, data, a, blocks_a=Blocks(b), blocks_b=Blocks(a))
    np.testing.assert_allclose(given.values.T, result.values, rtol=1e-4, atol=1e-5)
