import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape.probes.frequency import (
    FREQUENCIES,
    RobustnessCurve,
    frequency_robustness,
    ring,
)
from landscape.training import DeviceImages
from tests.cases import assert_untouched, snapshot

ARRAYS = ("accuracy", "delta_accuracy", "nll", "delta_nll")
ARRAYS = (*ARRAYS, *(f"{name}_stderr" for name in ARRAYS))
CLEAN = ("clean_accuracy", "clean_accuracy_stderr", "clean_nll", "clean_nll_stderr")


class Recorder(nn.Module):
    """Keeps what it is shown; its float64 logits are two of the pixels."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=dtype))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.clone())
        return x.flatten(1)[:, :2]


def images(n=6, size=(16, 16), channels=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, *size, generator=g, dtype=torch.float64)
    return x, torch.randint(2, (n,), generator=g)


def cut(x, y, sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def noises(x, y, sizes=None, dtype=torch.float64, **arguments):
    """The noise that the model was shown, `(f, n, c, h, w)`, in the units of x."""
    model = Recorder(dtype)
    result = frequency_robustness(model, cut(x, y, sizes or (len(x),)), **arguments)
    step = 1 + len(result.frequencies)
    batches = [model.seen[i : i + step] for i in range(0, len(model.seen), step)]
    shown = [torch.stack(b[1:]).double() - b[0].double() for b in batches]
    return torch.cat(shown, dim=1)


def radii(size):
    """|ω| of every coefficient in units of π: π is the Nyquist frequency along an axis."""
    fy, fx = (np.minimum(np.arange(n), n - np.arange(n)) / (n / 2) for n in size)
    return np.sqrt(fy[:, None] ** 2 + fx[None, :] ** 2)


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (24, 33)], ids=str)
def test_all_power_lies_in_the_ring_and_the_norm_is_exact(size):
    x, y = images(4, size, channels=3)
    shown = noises(x, y, norm=0.05)
    assert shown.shape == (9, 4, 3, *size)
    rms = shown.square().mean((2, 3, 4)).sqrt()
    np.testing.assert_allclose(rms, 0.05, rtol=1e-9)
    power = torch.fft.fft2(shown).abs().square().numpy()
    radius = radii(size)
    for i, f in enumerate(np.arange(1, 10) / 10):
        inside = (radius >= f - 0.05 - 1e-9) & (radius < f + 0.05 - 1e-9)
        share = power[i][..., inside].sum((1, 2)) / power[i].sum((1, 2, 3))
        np.testing.assert_allclose(share, 1, rtol=1e-12)
        # Every coefficient of the ring has its share: the noise is white within it.
        assert (power[i].mean((0, 1))[inside] > 0).all()


def test_noise_is_the_filtered_gaussian_of_the_paper():
    x, y = images(1, (16, 12), channels=2)
    shown = noises(x, y, frequencies=[0.5], width=0.3, norm=0.2)[0, 0]
    delta = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.from_numpy((radii((16, 12)) >= 0.35) & (radii((16, 12)) < 0.65))
    expected = torch.fft.ifft2(torch.fft.fft2(delta) * mask)
    assert expected.imag.abs().max() < 1e-12
    expected = 0.2 * expected.real / expected.real.square().mean().sqrt()
    torch.testing.assert_close(shown, expected, rtol=1e-10, atol=1e-12)


def test_noise_within_a_ring_is_gaussian_and_the_same_in_all_directions():
    x, y = images(200, (16, 16), channels=1)
    shown = noises(x, y, frequencies=[0.5], width=0.3)[0, :, 0]
    power = torch.fft.fft2(shown).abs().square().mean(0).numpy()
    radius = radii((16, 16))
    inside = (radius >= 0.35) & (radius < 0.65)
    expected = 0.01 * 16**4 / inside.sum()  # Parseval
    np.testing.assert_allclose(power[inside], expected, rtol=0.4)
    quarters = [power[1:8, 1:8].sum(), power[9:, 1:8].sum()]
    assert quarters[0] == pytest.approx(quarters[1], rel=0.1)
    fourth = (shown**4).mean() / (shown**2).mean() ** 2
    assert float(fourth) == pytest.approx(3, abs=0.15)


def test_rings_of_touching_widths_partition_the_plane():
    for size in [(32, 32), (28, 28), (15, 22)]:
        centres = np.arange(0.05, radii(size).max() + 0.05, 0.1)
        masks = [ring(size, f, 0.1) for f in centres]
        assert (torch.stack(masks).sum(0) == 1).all(), size
    # 0.35π is a frequency of 40 × 40 images; 0.3 + 0.05 and 0.4 − 0.05 differ by rounding.
    masks = torch.stack([ring((40, 40), f, 0.1) for f in FREQUENCIES])
    assert masks.sum(0)[0, 1:19].eq(1).all()
    assert masks[3, 0, 7]
    # 0.25π is a frequency of 32 × 32 images and an edge: it belongs to the upper ring alone.
    assert not ring((32, 32), 0.2, 0.1)[0, 4]
    assert ring((32, 32), 0.3, 0.1)[0, 4]
    assert ring((32, 32), 1.0, 0.1)[0, 16]  # the Nyquist frequency along an axis is π


class BandDetector(nn.Module):
    """Logits (k·(threshold − power in a band), 0): class 0 unless the band has power."""

    def __init__(self, low, high, size=16, threshold=0.5e-2, k=400.0):
        super().__init__()
        radius = torch.from_numpy(radii((size, size)))
        self.register_buffer("mask", ((radius >= low) & (radius < high)).double())
        self.threshold, self.k, self.size = threshold, k, size

    def forward(self, x):
        power = (torch.fft.fft2(x).abs().square() * self.mask).sum((2, 3)) / self.size**4
        z = self.k * (self.threshold - power.mean(1))
        return torch.stack([z, torch.zeros_like(z)], dim=1)


@pytest.mark.parametrize("band", range(1, 9))
def test_a_model_of_one_band_reacts_at_that_band_alone(band):
    low, high = (band - 0.5) / 8 - 1e-9, (band + 0.5) / 8 - 1e-9
    model = BandDetector(low, high)
    x = 0.5 * torch.ones(10, 2, 16, 16, dtype=torch.float64)
    y = (torch.arange(10) >= 7).long()  # seven of class 0
    result = frequency_robustness(
        model, cut(x, y, (6, 4)), frequencies=np.arange(1, 9) / 8, width=1 / 8, norm=0.1
    )
    there = np.arange(1, 9) == band
    # Power 0.1² in the band or none: logits 400·(0.005 − 0.01) = −2 or 400·0.005 = 2.
    right, wrong = np.log1p(np.exp(-2)), np.log1p(np.exp(2))
    np.testing.assert_allclose(result.accuracy, np.where(there, 0.3, 0.7))
    np.testing.assert_allclose(result.delta_accuracy, np.where(there, -0.4, 0), atol=1e-15)
    clean_nll = 0.7 * right + 0.3 * wrong
    noisy_nll = 0.3 * right + 0.7 * wrong
    np.testing.assert_allclose(result.nll, np.where(there, noisy_nll, clean_nll), rtol=1e-9)
    delta = np.where(there, noisy_nll - clean_nll, 0)
    np.testing.assert_allclose(result.delta_nll, delta, atol=1e-12)
    assert (result.clean_accuracy, result.clean_nll) == (0.7, pytest.approx(clean_nll))
    change = np.where(np.arange(10) < 7, -1.0, 1.0)  # of every sample's accuracy, in the band
    stderr = np.where(there, change.std(ddof=1) / np.sqrt(10), 0)
    np.testing.assert_allclose(result.delta_accuracy_stderr, stderr, atol=1e-12)


def small_model(channels=2, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 2),
        )
    model = model.to(dtype).eval()
    with torch.no_grad():  # half of the images on either side of the decision
        margin = model(images(40, channels=channels)[0].to(dtype)).diff(dim=1)
        model[-1].bias[0] += margin.median()
    return model.train()


def assert_equal(a, b, **tolerance):
    for name in (*ARRAYS, *CLEAN):
        np.testing.assert_allclose(
            getattr(a, name), getattr(b, name), err_msg=name, **{"rtol": 0, **tolerance}
        )


def test_means_and_paired_errors_are_those_of_the_samples():
    x, y = images(40)
    model, shown = small_model(), noises(x, y, norm=0.3)
    result = frequency_robustness(model, cut(x, y, (15, 15, 10)), norm=0.3)
    model.eval()

    def terms(x):
        logits = model(x).detach()
        nll = F.cross_entropy(logits, y, reduction="none").numpy()
        return {"nll": nll, "accuracy": (logits.argmax(1) == y).double().numpy()}

    def stderr(values):
        return values.std(ddof=1) / np.sqrt(40)

    clean = terms(x)
    for i, noise in enumerate(shown):
        for name, values in terms(x + noise).items():
            assert getattr(result, name)[i] == pytest.approx(values.mean(), rel=1e-9)
            assert getattr(result, f"{name}_stderr")[i] == pytest.approx(stderr(values), rel=1e-9)
            change = values - clean[name]
            ours = getattr(result, f"delta_{name}")[i]
            assert ours == pytest.approx(change.mean(), rel=1e-6, abs=1e-12)
            ours = getattr(result, f"delta_{name}_stderr")[i]
            assert ours == pytest.approx(stderr(change), rel=1e-6, abs=1e-12)
    for name, values in clean.items():
        assert getattr(result, f"clean_{name}") == pytest.approx(values.mean(), rel=1e-9)
        ours = getattr(result, f"clean_{name}_stderr")
        assert ours == pytest.approx(stderr(values), rel=1e-9)
    assert (result.delta_accuracy != 0).any()


def test_batching_changes_nothing():
    x, y = images(17, (15, 20))
    results = [
        frequency_robustness(small_model(), cut(x, y, sizes), norm=0.3)
        for sizes in [(17,), (8, 8, 1), (1,) * 17]
    ]
    for other in results[1:]:
        assert_equal(results[0], other, rtol=1e-9, atol=1e-12)
    assert torch.equal(noises(x, y), noises(x, y, (5, 7, 5)))


def test_noise_is_common_to_frequencies_models_and_calls():
    x, y = images(5)
    both = noises(x, y, frequencies=[0.3, 0.7])
    assert torch.equal(both[1:], noises(x, y, frequencies=[0.7]))
    assert not torch.equal(both[:, 0], both[:, 1])  # a draw for each sample
    generator = torch.Generator().manual_seed(4)
    first = noises(x, y, generator=generator)
    torch.rand(3, generator=generator)
    torch.manual_seed(9)
    assert torch.equal(first, noises(x, y, generator=generator))
    assert not torch.equal(first, noises(x, y))
    # The same δ whatever the precision of the model and however few samples come after.
    single = noises(x[:2].float(), y[:2], dtype=torch.float32, generator=generator)
    torch.testing.assert_close(single, first[:, :2], rtol=1e-4, atol=1e-6)


def test_norm_is_in_pixel_units_whatever_the_normalisation():
    x, y = images(4, channels=3)
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.5, 0.1)
    plain = noises(x, y)
    shift, scale = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
    shown = noises((x - shift) / scale, y, mean=mean, std=std)
    torch.testing.assert_close(shown * scale, plain, rtol=1e-9, atol=1e-12)
    one = noises((x - 0.5) / 0.25, y, mean=0.5, std=0.25)
    torch.testing.assert_close(one * 0.25, plain, rtol=1e-9, atol=1e-12)


def test_clipping_keeps_pixels_within_full_scale():
    x, y = images(4)
    x[:, :, :4] = 0.0  # black, where noise can only be positive
    pixels = x[None] + noises(x, y, norm=0.3)
    clipped = noises((x - 0.5) / 0.25, y, norm=0.3, clip=True, mean=0.5, std=0.25) * 0.25
    torch.testing.assert_close(x + clipped, pixels.clamp(0, 1), rtol=1e-9, atol=1e-12)
    assert pixels.min() < -0.1
    assert pixels.max() > 1.1


def test_normalisation_is_read_off_device_images():
    g = torch.Generator().manual_seed(0)
    data = DeviceImages(
        torch.randint(256, (9, 3, 16, 16), generator=g, dtype=torch.uint8),
        torch.randint(2, (9,), generator=g),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.1),
        batch_size=4,
    )
    model = small_model(3)
    result = frequency_robustness(model, data)
    assert result.provenance.settings["std"] == [0.2, 0.3, 0.1]
    explicit = frequency_robustness(model, list(data), mean=data.mean, std=torch.tensor(data.std))
    assert_equal(result, explicit, rtol=1e-6)
    with pytest.raises(ValueError, match="pass the `mean` and `std` that x was normalised with"):
        frequency_robustness(model, list(data))


def test_mappings_and_soft_targets_are_data():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_model()

        def forward(self, pixel_values, mask):
            assert mask.shape == pixel_values.shape[:1]
            return {"logits": self.inner(pixel_values)}

    x, y = images(8)
    expected = frequency_robustness(small_model(), [(x, y)])
    data = [{"mask": torch.ones(8), "pixel_values": x, "labels": y}]
    assert_equal(frequency_robustness(Keywords(), data), expected)
    one_hot = F.one_hot(y, 2).double()
    assert_equal(frequency_robustness(small_model(), [(x, one_hot)]), expected, rtol=1e-12)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), RuntimeError("broken")], ids=repr)
def test_the_model_is_left_as_found(error):
    model = small_model().train()
    model[0].eval()
    model[0].weight.requires_grad_(False)
    x, y = images(6)
    F.cross_entropy(model(x), y).backward()
    calls = []

    def hook(*_):
        calls.append(1)
        if error is not None and len(calls) > 12:
            raise error

    model.register_forward_hook(hook)
    before = snapshot(model)
    if error is None:
        frequency_robustness(model, cut(x, y, (3, 3)))
        assert len(calls) == 20
    else:
        with pytest.raises(type(error)):
            frequency_robustness(model, cut(x, y, (3, 3)))
    assert_untouched(model, before)


def test_result_comes_back_from_disk_and_says_what_was_done(tmp_path):
    x, y = images(6)
    generator = torch.Generator().manual_seed(11)
    result = frequency_robustness(small_model(), [(x, y)], norm=0.2, width=0.2, generator=generator)
    loaded = RobustnessCurve.load(result.save(tmp_path / "curve"))
    assert_equal(loaded, result)
    np.testing.assert_allclose(loaded.frequencies, np.arange(1, 10) / 10)
    assert (loaded.norm, loaded.width, loaded.clip, loaded.seed) == (0.2, 0.2, False, 11)
    assert loaded.provenance.num_forwards == 10
    assert loaded.provenance.num_samples == 6
    assert loaded.provenance.seed == 11
    assert loaded.provenance.settings["norm"] == 0.2


class Forbidden(nn.Module):
    def forward(self, x):
        raise AssertionError("work was done")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frequencies": []}, r"`frequencies` must be numbers from 0 upwards that increase"),
        ({"frequencies": [0.3, 0.2]}, "`frequencies` must be numbers .* increase"),
        ({"frequencies": [-0.1]}, "`frequencies` must be numbers from 0"),
        ({"frequencies": [np.nan]}, "`frequencies` must be numbers from 0"),
        ({"frequencies": [0.5, 1.6]}, r"none in 1.55π … 1.65π; the nearest is 1.41π"),
        ({"width": 0.0}, "`width` must be positive and finite, got 0.0"),
        ({"norm": -1.0}, "`norm` must be positive and finite, got -1.0"),
        ({"norm": np.inf}, "`norm` must be positive and finite"),
        ({"mean": 0.5}, "`mean` and `std` must be given both or neither"),
        ({"mean": 0.5, "std": 0.0}, "`std` positive, got .* and .*0.0"),
        ({"mean": (0, 0, 0), "std": 1.0}, r"`mean` must have one value per channel \(2\), got 3"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        frequency_robustness(Forbidden(), [images()], **arguments)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "at least one sample"),
        ([(torch.zeros(2, 5), torch.zeros(2))], r"images of shape \(n, c, h, w\).*\(2, 5\)"),
        ([(torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2))], "floating-point images.*uint8"),
        ([{"a": torch.zeros(2, 1, 4, 4), "b": torch.zeros(2, 1, 4, 4)}], "`pixel_values`"),
        ([(2 * images()[0], images()[1])], "must have pixels in 0 … 1 .* got .* to 2"),
    ],
)
def test_bad_data_are_refused_before_any_work(data, message):
    with pytest.raises(ValueError, match=message):
        frequency_robustness(Forbidden(), data)


def test_bad_later_batches_are_refused():
    x, y = images()
    model, calls = small_model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="labels in 0 … 1 for the 2 outputs"):
        frequency_robustness(model, [(x, y), (x, y + 1), *[(x, y)] * 50])
    assert len(calls) < 50  # not after all of them
    with pytest.raises(ValueError, match="must have pixels in 0 … 1 .* to 3"):
        frequency_robustness(small_model(), [(x, y), (x + 2, y), (x, y)])
    with pytest.raises(ValueError, match="labels in 0 … 1 for the 2 outputs"):
        frequency_robustness(small_model(), [(x, y), (x, y + 1), (x, y)])
    with pytest.raises(TypeError, match="one-shot"):
        frequency_robustness(small_model(), iter([(x, y)]))
