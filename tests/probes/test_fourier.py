import numpy as np
import pytest
import torch

from landscape.blocks import Blocks
from landscape.models import vit_nano
from landscape.probes.fourier import FourierAmplitude, fourier_amplitude
from tests.cases import assert_untouched, snapshot
from tests.probes.filters import Cached, filters, images

SIZES = [(8, 8), (7, 7), (8, 16), (9, 6), (5, 8), (4, 1)]


def curve(result, name):
    return result.delta_log_amplitude[result.names.index(name)]


def error(result, name):
    return result.stderr[result.names.index(name)]


def by_hand(maps, *, radial=False, window=None):
    """Δ log amplitude of each sample `(n, l)`, term by term from the definition."""
    maps = maps.double()
    h, w = maps.shape[-2:]
    if window is not None:
        maps = maps * (0.5 - 0.5 * torch.cos(2 * torch.pi * torch.arange(h).double() / h))[:, None]
        maps = maps * (0.5 - 0.5 * torch.cos(2 * torch.pi * torch.arange(w).double() / w))
    logs = torch.log(torch.fft.fft2(maps).abs() + 1e-6).mean(1)
    m = min(h, w)
    points = []
    for j in range(m // 2 + 1):
        if radial:
            values = []
            for k in range(h):
                for i in range(w):
                    f = np.hypot(2 * min(k, h - k) / h, 2 * min(i, w - i) / w)
                    near = min(range(m // 2 + 2), key=lambda p: round(abs(f - 2 * p / m), 9))
                    if (near if f == 0 else max(near, 1)) == j:
                        values.append(logs[:, k, i])
            points.append(torch.stack(values).mean(0))
        else:
            k = min(range(h // 2 + 1), key=lambda k: round(abs(k / h - j / m), 9))
            i = min(range(w // 2 + 1), key=lambda i: round(abs(i / w - j / m), 9))
            points.append(logs[:, k, i])
    curves = torch.stack(points, dim=1)
    return (curves - curves[:, :1]).numpy()


def test_white_noise_is_flat_but_for_its_real_ends():
    model, blocks = filters()
    result = fourier_amplitude(model, images((600,)), blocks=blocks)
    expected = np.array([0, np.log(2) / 2, np.log(2) / 2, np.log(2) / 2, 0])
    assert (np.abs(curve(result, "white") - expected) <= 4 * error(result, "white")).all()
    assert error(result, "white")[1:].max() < 0.05
    assert error(result, "white")[0] == 0


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (16, 8), (10, 20)], ids=str)
def test_filters_add_the_logarithm_of_their_transfer_function(size):
    model, blocks = filters(size=size)
    result = fourier_amplitude(model, images((5,), size), blocks=blocks)
    f = result.frequency[0]
    np.testing.assert_allclose(f, 2 * np.arange(min(size) // 2 + 1) / min(size))
    white = curve(result, "white")
    transfer = ((4 + 2 * np.cos(np.pi * f)) / 6) ** 2
    np.testing.assert_allclose(curve(result, "blur") - white, np.log(transfer), atol=1e-5)
    transfer = 4 * (1 - np.cos(np.pi * f))
    laplacian = curve(result, "laplacian") - white
    gain = laplacian[1:] - laplacian[1]
    np.testing.assert_allclose(gain, np.log(transfer[1:] / transfer[1]), atol=1e-5)


@pytest.mark.parametrize("side", [8, 7])
def test_diagonal_runs_from_the_centre_of_the_shifted_transform_to_its_corner(side):
    names = ["white", "blur"]  # the mean of a Laplacian is 0: its logarithm is rounding
    model, blocks = filters(torch.float32, names, (side, side))
    ((x, y),) = images((9,), (side, side), torch.float32)
    result = fourier_amplitude(model, [(x, y)], blocks=blocks)
    for name, feature in blocks.capture(x).items():
        shifted = torch.fft.fftshift(torch.log(torch.fft.fft2(feature).abs() + 1e-6), (-2, -1))
        diagonal = shifted.mean((0, 1)).diagonal()
        expected = diagonal[: side // 2 + 1].flip(0)
        np.testing.assert_allclose(curve(result, name), expected - expected[0], atol=1e-5)


@pytest.mark.parametrize("window", [None, "hann"])
@pytest.mark.parametrize("radial", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_curves_and_errors_are_the_definition_on_captured_features(size, radial, window):
    names = ["white"] if 1 in size else ["white", "blur"]
    model, blocks = filters(names=names, size=size)
    ((x, y),) = images((6,), size)
    result = fourier_amplitude(model, [(x, y)], blocks=blocks, radial=radial, window=window)
    for name, feature in blocks.capture(x).items():
        expected = by_hand(feature, radial=radial, window=window)
        np.testing.assert_allclose(curve(result, name), expected.mean(0), atol=1e-10)
        stderr = expected.std(0, ddof=1) / np.sqrt(6)
        np.testing.assert_allclose(error(result, name), stderr, atol=1e-7)
    assert result.sizes.tolist() == [list(size)] * len(names)


def test_a_plane_wave_has_its_amplitude_at_its_frequency_alone():
    model, blocks = filters(names=["white"])
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    wave = 1 + torch.cos(2 * torch.pi * 3 * (rows + columns).double() / 8)
    x = wave.expand(2, 3, 8, 8)
    result = fourier_amplitude(model, [(x, torch.zeros(2).long())], blocks=blocks)
    high, floor = np.log(32 + 1e-6), np.log(1e-6)
    expected = np.array([0, floor, floor, high, floor]) - np.log(64 + 1e-6)
    expected[0] = 0
    np.testing.assert_allclose(curve(result, "white"), expected, atol=1e-6)


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (5, 6, 1), (1,) * 12], ids=str)
@pytest.mark.parametrize("radial", [False, True])
def test_batching_does_not_matter(sizes, radial):
    model, blocks = filters()
    whole = fourier_amplitude(model, images((12,)), blocks=blocks, radial=radial)
    parts = fourier_amplitude(model, images(sizes), blocks=blocks, radial=radial)
    for name in ("delta_log_amplitude", "stderr"):
        for a, b in zip(getattr(whole, name), getattr(parts, name), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)


def test_same_call_same_result_and_it_survives_a_file(tmp_path):
    model, blocks = filters()
    first = fourier_amplitude(model, images(), blocks=blocks, window="hann")
    again = fourier_amplitude(model, images(), blocks=blocks, window="hann")
    loaded = FourierAmplitude.load(first.save(tmp_path / "fourier"))
    for other in (again, loaded):
        for name in ("frequency", "delta_log_amplitude", "stderr"):
            for a, b in zip(getattr(first, name), getattr(other, name), strict=True):
                np.testing.assert_array_equal(a, b)
    assert loaded.names == ("white", "blur", "laplacian")  # the head has no map
    assert (loaded.window, loaded.radial) == ("hann", False)
    assert loaded.provenance.num_samples == 12
    assert loaded.provenance.num_forwards == 1
    np.testing.assert_array_equal(loaded.highest, [c[-1] for c in first.delta_log_amplitude])
    np.testing.assert_array_equal(loaded.highest_stderr, [c[-1] for c in first.stderr])


def test_maps_of_half_precision_are_transformed_in_float32():
    model, blocks = filters(torch.bfloat16)
    data = images((6,), dtype=torch.bfloat16)
    result = fourier_amplitude(model, data, blocks=blocks)
    expected = by_hand(blocks.capture(data[0][0])["blur"].float())
    np.testing.assert_allclose(curve(result, "blur"), expected.mean(0), atol=1e-5)


def test_one_sample_has_no_error_and_a_map_of_one_column_no_high_frequency():
    model, blocks = filters(names=["white"], size=(4, 1))
    result = fourier_amplitude(model, images((1,), (4, 1)), blocks=blocks)
    assert curve(result, "white").tolist() == [0]
    assert np.isnan(result.highest).all()
    assert np.isnan(error(result, "white")).all()


def test_values_that_are_not_finite_stay():
    model, blocks = filters(names=["white"])
    ((x, y),) = images()
    x[3, 1, 2, 2] = torch.nan
    result = fourier_amplitude(model, [(x, y)], blocks=blocks)
    assert np.isnan(curve(result, "white")).all()


def test_mappings_are_passed_by_name():
    model, blocks = filters()
    batches = [{"pixel_values": x, "labels": y} for x, y in images((6, 6))]
    result = fourier_amplitude(model, batches, blocks=blocks)
    plain = fourier_amplitude(model, images((6, 6)), blocks=blocks)
    np.testing.assert_array_equal(curve(result, "blur"), curve(plain, "blur"))


def test_model_is_untouched_and_can_train_afterwards():
    model = Cached().train()
    before = snapshot(model)
    blocks = Blocks(model, ["conv", "norm"], example=torch.zeros(2, 3, 8, 8))
    data = images(dtype=torch.float32)
    a = fourier_amplitude(model, data, blocks=blocks)
    b = fourier_amplitude(model, data, blocks=blocks)
    np.testing.assert_array_equal(a.highest, b.highest)  # nothing drops
    assert_untouched(model, before)
    model(data[0][0]).sum().backward()  # the cache is no inference tensor


def test_model_is_untouched_after_an_error():
    model, blocks = filters()
    model.train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"inputs of one size, got maps of \(8, 8\) and \(6, 6\)"):
        fourier_amplitude(model, images() + images(size=(6, 6)), blocks=blocks)
    assert_untouched(model, before)


def test_errors():
    model, blocks = filters()
    with pytest.raises(ValueError, match="must be those of the model that is probed"):
        fourier_amplitude(model, images(), blocks=filters()[1])
    with pytest.raises(ValueError, match="`window` must be one of None, 'hann', got 'hamming'"):
        fourier_amplitude(model, images(), window="hamming", blocks=blocks)
    with pytest.raises(TypeError, match="`data` must be re-iterable"):
        fourier_amplitude(model, iter(images()), blocks=blocks)
    with pytest.raises(ValueError, match="`data` must yield at least one sample"):
        fourier_amplitude(model, [], blocks=blocks)
    with pytest.raises(ValueError, match="`blocks` must hold a block with a map"):
        fourier_amplitude(model, images(), blocks=Blocks(model, ["head"], example=images()[0][0]))


def test_blocks_are_found_with_the_first_batch():
    model = vit_nano(num_classes=3).eval()
    data = [(x, y) for x, y in images((3, 2), (32, 32), torch.float32)]
    found = fourier_amplitude(model, data)
    given = fourier_amplitude(model, data, blocks=Blocks(model, example=data[0][0]))
    assert found.names == given.names
    assert found.kinds == ("stem", *("msa", "mlp") * 4)
    np.testing.assert_array_equal(found.highest, given.highest)
    assert found.depth[0] == 0
    assert found.depth[-1] == 1
