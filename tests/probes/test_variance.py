import numpy as np
import pytest
import torch
from torch import nn

from landscape.blocks import Blocks
from landscape.probes.variance import FeatureVariance, feature_variance
from tests.cases import assert_untouched, snapshot
from tests.probes.filters import Cached, filters, images


def test_filtered_noise_has_the_power_of_the_kernel():
    model, blocks = filters()
    result = feature_variance(model, images((400,), (16, 16)), blocks=blocks)
    assert result.names == ("white", "blur", "laplacian")
    power = np.array([1, (18 / 36) ** 2, 16 + 4 * 1])  # sums of squares of the kernels
    at_zero = np.array([1, 1, 0])  # transfer function at frequency 0, which 1/256 of the noise has
    expected = (power - at_zero / 256) * 256 / 255
    assert (np.abs(result.variance - expected) <= 4 * result.stderr).all()
    assert (result.stderr / result.variance < 0.01).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_are_the_definition_on_captured_features(dtype):
    model, blocks = filters(dtype, size=(5, 9))
    ((x, y),) = images((7,), (5, 9), dtype)
    result = feature_variance(model, [(x, y)], blocks=blocks)
    captured = blocks.capture(x)
    for i, name in enumerate(result.names):
        maps = captured[name].double().numpy()
        centred = maps - maps.mean((2, 3), keepdims=True)
        samples = ((centred**2).sum((2, 3)) / (5 * 9 - 1)).mean(1)
        np.testing.assert_allclose(result.variance[i], samples.mean(), rtol=1e-6)
        np.testing.assert_allclose(result.stderr[i], samples.std(ddof=1) / np.sqrt(7), rtol=1e-5)


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (5, 6, 1), (1,) * 12], ids=str)
def test_batching_does_not_matter(sizes):
    model, blocks = filters()
    whole = feature_variance(model, images((12,)), blocks=blocks)
    parts = feature_variance(model, images(sizes), blocks=blocks)
    np.testing.assert_allclose(whole.variance, parts.variance, rtol=1e-12)
    np.testing.assert_allclose(whole.stderr, parts.stderr, rtol=1e-9)


class Windows(nn.Module):
    """Cuts images into quarters, which are a sample each to its convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        windows = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
        found = self.conv(windows.flatten(0, 2)).mean((2, 3))
        return self.head(found.view(len(x), -1, 4).mean(1))


def test_windows_of_an_image_are_one_sample(generator):
    x = torch.randn(6, 3, 8, 8, generator=generator)
    x *= torch.rand(6, 3, 1, 1, generator=generator)
    model = Windows()
    blocks = Blocks(model, ["conv"], example=x)
    result = feature_variance(model, [(x[:4], x[:4]), (x[4:], x[4:])], blocks=blocks)
    with torch.no_grad():
        maps = model.conv(x).unfold(2, 4, 4).unfold(3, 4, 4)
    samples = maps.flatten(4).var(-1).mean((1, 2, 3))
    np.testing.assert_allclose(result.variance, samples.mean(), rtol=1e-5)
    np.testing.assert_allclose(result.stderr, samples.std() / 6**0.5, rtol=1e-5)
    alone = feature_variance(model, [(x[:1], x[:1])], blocks=blocks)
    assert np.isnan(alone.stderr).all()


def test_a_constant_offset_does_not_matter_and_a_factor_is_squared():
    model, blocks = filters(names=["white"])
    ((x, y),) = images()
    plain = feature_variance(model, [(x, y)], blocks=blocks)
    other = feature_variance(model, [(3 * x + 100, y)], blocks=blocks)
    np.testing.assert_allclose(other.variance, 9 * plain.variance, rtol=1e-10)


def test_same_call_same_result_and_it_survives_a_file(tmp_path):
    model, blocks = filters()
    first = feature_variance(model, images(), blocks=blocks)
    again = feature_variance(model, images(), blocks=blocks)
    loaded = FeatureVariance.load(first.save(tmp_path / "variance"))
    for other in (again, loaded):
        for name in ("variance", "stderr", "depth", "subsamples", "stage"):
            np.testing.assert_array_equal(getattr(first, name), getattr(other, name))
        assert (other.names, other.kinds) == (first.names, first.kinds)
    assert loaded.provenance.num_samples == 12


def test_model_is_untouched_and_can_train_afterwards():
    model = Cached().train()
    before = snapshot(model)
    data = images(dtype=torch.float32)
    blocks = Blocks(model, ["conv", "norm"], example=data[0][0])
    a, b = (feature_variance(model, data, blocks=blocks) for _ in range(2))
    np.testing.assert_array_equal(a.variance, b.variance)
    assert_untouched(model, before)
    model(data[0][0]).sum().backward()


def test_errors():
    model, blocks = filters()
    with pytest.raises(ValueError, match="must be those of the model that is probed"):
        feature_variance(model, images(), blocks=filters()[1])
    with pytest.raises(TypeError, match="`data` must be an iterable of batches, got a tensor"):
        feature_variance(model, torch.zeros(2, 3, 8, 8), blocks=blocks)
    with pytest.raises(ValueError, match="`data` must yield at least one sample"):
        feature_variance(model, [], blocks=blocks)
    with pytest.raises(ValueError, match="`blocks` must hold a block with a map"):
        feature_variance(model, images(), blocks=Blocks(model, ["head"], example=images()[0][0]))
