from functools import partial

import numpy as np
import pytest
import torch

from landscape.corruptions import CORRUPTIONS, SEVERITIES, apply, blur, corrupt, digital, weather
from landscape.corruptions.severities import CIFAR, IMAGENET
from landscape.switches import rounding
from tests.cases import float64_by_default
from tests.corruptions.cases import grey_levels, pictures, streams

PROFILES = ("imagenet", "cifar")
# What random numbers decide; the others are functions of the image.
RANDOM = {
    "gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost",
    "fog", "elastic_transform",
}  # fmt: skip
# Distances need not grow with every severity, because the strengths do not: fewer iterations with a
# larger reach (glass), less but stronger snow, a longer kernel of one σ (motion), as much frost on
# more of the image, and, for CIFAR-C, stronger displacements after weaker affine maps.
UNORDERED = {
    ("imagenet", "glass_blur"), ("cifar", "glass_blur"), ("imagenet", "snow"), ("cifar", "snow"),
    ("cifar", "motion_blur"), ("cifar", "frost"), ("cifar", "elastic_transform"),
}  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_results_do_not_depend_on_batching_or_on_global_state(name, profile):
    x, severity = pictures(7), 4
    kept = x.clone()
    whole = corrupt(x, name, severity, profile=profile, generator=seeded())
    assert torch.equal(x, kept)
    assert whole.dtype == torch.uint8
    assert whole.shape == x.shape
    torch.rand(3)
    with float64_by_default():
        same = corrupt(x, name, severity, profile=profile, generator=seeded())
    assert torch.equal(same, whole)
    for cuts in ((4, 3), (1,) * 7):
        parts, start = [], 0
        for part in x.split(cuts):
            parts.append(
                corrupt(part, name, severity, profile=profile, generator=seeded(), start=start)
            )
            start += len(part)
        assert torch.equal(torch.cat(parts), whole)
    other = corrupt(x, name, severity, profile=profile, generator=seeded(1))
    assert torch.equal(other, whole) == (name not in RANDOM)
    assert not torch.equal(whole, x)


def test_a_generator_goes_on_and_none_is_seed_0():
    x, generator = pictures(2), seeded()
    state = torch.get_rng_state()
    first = corrupt(x, "fog", 3, generator=generator)
    assert torch.equal(corrupt(x, "fog", 3), first)
    assert not torch.equal(corrupt(x, "fog", 3, generator=generator), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_corruptions_and_severities_have_streams_of_their_own():
    x = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    noises = [
        corrupt(x, name, severity).double().flatten(1)
        for name, severity in [("gaussian_noise", 1), ("gaussian_noise", 2), ("shot_noise", 1)]
    ]
    correlation = torch.corrcoef(torch.cat(noises)) - torch.eye(6)
    assert float(correlation.abs().max()) < 0.08


def test_many_images_are_treated_in_chunks(monkeypatch):
    x = pictures(9)
    whole = {name: corrupt(x, name, 2) for name in CORRUPTIONS}
    monkeypatch.setitem(corrupt.__globals__["_CHUNK"], "cpu", 2 * x[0].numel())
    for name in CORRUPTIONS:
        assert torch.equal(corrupt(x, name, 2), whole[name]), name


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"gaussian_noise", "shot_noise",
                                                            "impulse_noise", "frost"}))  # fmt: skip
def test_grey_images_are_rgb_images_with_equal_channels(name, profile):
    x = pictures(3, channels=1)
    for severity in SEVERITIES:
        grey = corrupt(x, name, severity, profile=profile)
        rgb = corrupt(x.expand(-1, 3, -1, -1), name, severity, profile=profile)
        difference = (rgb.int() - grey.int()).abs()
        assert difference.max() <= 1  # the luminance weights sum to 1 up to rounding
        assert (difference > 0).double().mean() < 1e-3


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "frost"])
def test_grey_images_get_noise_of_the_same_strength(name):
    x = pictures(40, channels=1)
    for severity in (1, 5):
        grey = corrupt(x, name, severity).double() - x
        rgb = corrupt(x.expand(-1, 3, -1, -1), name, severity).double() - x
        assert grey.shape == x.shape
        assert float(grey.std()) == pytest.approx(float(rgb.std()), rel=0.12)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_distance_from_clean_grows_with_severity(name, profile):
    x = pictures(100, seed=3)
    distances = [
        float((corrupt(x, name, severity, profile=profile).double() - x).square().mean().sqrt())
        for severity in SEVERITIES
    ]
    assert min(distances) > 1
    if (profile, name) not in UNORDERED:
        assert (np.diff(distances) > 0).all(), distances
    assert distances[-1] > distances[0] or (profile, name) == ("cifar", "elastic_transform")


@pytest.mark.parametrize("size", [(32, 57), (61, 33), (96, 96)], ids=str)
def test_any_size_from_32_on(size):
    x = pictures(2, *size)
    for profile in PROFILES:
        for name in CORRUPTIONS:
            for severity in (1, 5):
                assert corrupt(x, name, severity, profile=profile).shape == x.shape


@pytest.mark.parametrize(
    "name", ["contrast", "glass_blur", "elastic_transform", "motion_blur", "pixelate"]
)
def test_flat_images_stay_as_they_are(name):
    x = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(-1, 3, 32, 32)
    for severity in SEVERITIES:
        out = corrupt(x, name, severity, profile="cifar")
        assert torch.equal(out, x), severity  # rounding down must not turn 199.99999 into 199


def test_the_order_in_memory_does_not_matter():
    x = pictures(3)
    for name in CORRUPTIONS:
        last = corrupt(x.contiguous(memory_format=torch.channels_last), name, 3)
        assert torch.equal(last, corrupt(x, name, 3)), name


def test_no_images_give_no_images():
    x = torch.empty(0, 3, 32, 32, dtype=torch.uint8)
    assert corrupt(x, "snow", 1).shape == x.shape


def test_tables_are_those_of_the_paper():
    for table in (IMAGENET, CIFAR):
        assert tuple(table) == CORRUPTIONS
        assert all(len(levels) == 5 for levels in table.values())
    assert [level for (level,) in IMAGENET["gaussian_noise"]] == [0.08, 0.12, 0.18, 0.26, 0.38]
    assert [level for (level,) in CIFAR["jpeg_compression"]] == [80, 65, 58, 50, 40]
    ends = {"imagenet": (1.11, 1.16, 1.21, 1.26, 1.31), "cifar": (1.06, 1.11, 1.16, 1.21, 1.26)}
    for profile, table in (("imagenet", IMAGENET), ("cifar", CIFAR)):
        for (step, number), end in zip(table["zoom_blur"], ends[profile], strict=True):
            assert len(np.arange(1, end, step)) == number  # 1.11 and 1.06 are reached by rounding


def test_the_profile_of_cifar_has_kernels_of_its_own(monkeypatch):
    monkeypatch.setattr(apply, "Streams", lambda key, start, count: streams(count))
    x = pictures(2, 33, 33)  # of 32 pixels all pixelations are alike
    for name, kernel in (
        ("motion_blur", partial(blur.motion_blur, cifar=True)),
        ("zoom_blur", partial(blur.zoom_blur, cifar=True)),
        ("snow", partial(weather.snow, cifar=True)),
        ("frost", partial(weather.frost, cifar=True)),
        ("elastic_transform", digital.elastic_transform_affine),
        ("pixelate", partial(digital.pixelate, cifar=True)),
    ):
        expected = grey_levels(kernel(x.float(), *CIFAR[name][3], streams(2)))
        assert torch.equal(corrupt(x, name, 4, profile="cifar").long(), expected), name


def test_no_number_of_the_tables_has_changed():
    """Sums over all severities, which tell a slip of a single number."""
    tables = (IMAGENET, CIFAR)
    sums = {n: tuple(round(sum(map(sum, t[n])), 6) for t in tables) for n in CORRUPTIONS}
    assert sums == {
        "gaussian_noise": (1.02, 0.37), "shot_noise": (105, 975), "impulse_noise": (0.62, 0.18),
        "defocus_blur": (33.1, 5.5), "glass_blur": (27.2, 13.35), "motion_blur": (118, 44),
        "zoom_blur": (63.09, 82.05), "snow": (120.45, 99.75), "frost": (6.9, 6.25),
        "fog": (20.1, 16.2), "brightness": (1.5, 0.8), "contrast": (1.05, 2.1),
        "elastic_transform": (0.525, 0.95), "pixelate": (2.05, 4.1), "jpeg_compression": (75, 293),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sepia"}, r"`name` must be one of 'gaussian_noise', .* got 'sepia'"),
        ({"severity": 0}, r"`severity` must be one of 1, 2, 3, 4, 5, got 0"),
        ({"profile": "mnist"}, r"`profile` must be one of 'imagenet', 'cifar', got 'mnist'"),
        ({"start": -1}, r"`start` must be at least 0, got -1"),
        ({"images": torch.zeros(2, 3, 32, 32)}, r"`images` must be bytes .* got torch.float32"),
        ({"images": torch.zeros(3, 32, 32).byte()}, r"`images` must be bytes .* \(3, 32, 32\)"),
        ({"images": torch.zeros(2, 4, 32, 32).byte()}, r"1 or 3 channels .* \(2, 4, 32, 32\)"),
        ({"images": torch.zeros(2, 3, 28, 32).byte()}, r"at least 32 pixels .* pad smaller"),
    ],
)
def test_errors_say_what_to_do(changes, message):
    arguments = {"images": pictures(2), "name": "fog", "severity": 1, **changes}
    images, name, severity = (arguments.pop(key) for key in ("images", "name", "severity"))
    with pytest.raises(ValueError, match=message):
        corrupt(images, name, severity, **arguments)


def test_a_seed_is_no_generator():
    with pytest.raises(TypeError, match="`generator` must be a torch.Generator"):
        corrupt(pictures(1), "fog", 1, generator=3)


@pytest.mark.gpu
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_gpu_makes_the_same_images(name, profile):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = pictures(16)
    for severity in SEVERITIES:
        here = corrupt(x, name, severity, profile=profile).int()
        there = corrupt(x.cuda(), name, severity, profile=profile)
        assert there.is_cuda
        difference = (there.cpu().int() - here).abs()
        assert difference.double().mean() < 0.02


@pytest.mark.parametrize("profile", PROFILES)
def test_products_are_not_rounded_because_the_user_lets_a_gpu(profile, monkeypatch):
    """TF32 would move a blurred value by a tenth of a grey level, and another is rounded down."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    seen = []

    def kernel(x, *rest):
        seen.extend(backend.fp32_precision for backend in backends)
        return x

    monkeypatch.setitem(apply._PROFILES[profile][0], "glass_blur", kernel)
    with rounding("tf32"):
        corrupt(pictures(), "glass_blur", 3, profile=profile)
        assert [backend.fp32_precision for backend in backends] == ["tf32", "tf32"]
    assert seen == ["ieee", "ieee"]
