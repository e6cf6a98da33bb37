"""Against `imagecorruptions-imaug`, and against OpenCV and scikit-image where CIFAR-C differs."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from landscape.corruptions import SEVERITIES, blur, corrupt, digital, noise, weather
from landscape.corruptions.linear import zoom_source
from landscape.corruptions.severities import CIFAR, IMAGENET
from tests.corruptions.cases import grey_levels, last, pictures, streams

pytestmark = pytest.mark.thirdparty

imagecorruptions = pytest.importorskip(
    "imagecorruptions", reason="needs imagecorruptions-imaug", exc_type=ImportError
)
cv2 = pytest.importorskip("cv2", reason="needs OpenCV", exc_type=ImportError)
oracle = pytest.importorskip("imagecorruptions.corruptions", exc_type=ImportError)

SIZES = [(32, 32), (45, 61)]


def package(x, name, severity):
    """The package's version of bytes (n, c, h, w), int64."""
    # These two draw from a generator of their own, the others from NumPy's global one.
    seeds = [{"seed": i} if name in ("impulse_noise", "glass_blur") else {} for i in range(len(x))]
    out = [
        imagecorruptions.corrupt(last(image), severity, name, **seed)
        for image, seed in zip(x, seeds, strict=True)
    ]
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).long()


# Largest share of the values that may differ, and by how much. JPEG and pixelation are exact.
# Where float64 leaves an integer at 50.999…, the package rounds down to 50: sums of 1/29 of a grey
# level (disk of radius 3), and values raised by 0.2 · 255 = 51 (brightness).
DETERMINISTIC = {
    "defocus_blur": 0.05, "zoom_blur": 0.001, "brightness": 0.05, "contrast": 0.005,
    "pixelate": 0, "jpeg_compression": 0,
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_functions_of_the_image_are_those_of_the_package(name, size):
    x = pictures(12, *size)
    for severity in SEVERITIES:
        difference = (corrupt(x, name, severity).long() - package(x, name, severity)).abs()
        assert difference.max() <= 1, severity
        assert (difference > 0).double().mean() <= DETERMINISTIC[name], severity


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_grey_images_are_those_of_the_package(name):
    x = pictures(6, channels=1)
    for severity in (1, 5):
        expected = package(x, name, severity)
        assert (expected - expected[:, :1]).abs().max() <= 1  # it returns three channels
        difference = (corrupt(x, name, severity).long() - expected[:, :1]).abs()
        assert difference.max() <= 1
        assert difference.double().mean() < 0.06


def with_draws(name, image, severity, **draws):
    """The package's corruption of one image with its random numbers replaced."""
    patches = [patch(f"numpy.random.{key}", value) for key, value in draws.items()]
    for each in patches:
        each.start()
    try:
        out = np.uint8(getattr(oracle, name)(Image.fromarray(last(image)), severity))
    finally:
        for each in patches:
            each.stop()
    return torch.from_numpy(out).permute(2, 0, 1).long()


def assert_close(ours, theirs):
    """At most one grey level apart, and that in few places: float32 against float64."""
    difference = (grey_levels(ours) - theirs).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 0.01


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_the_same_draws_give_the_same_images(severity, size):
    x, (h, w), at = pictures(3, *size), size, severity - 1
    pixels, i = x.float(), 1

    scale = IMAGENET["gaussian_noise"][at][0]
    z = streams(3).normal(3, h, w)[i].permute(1, 2, 0).double().numpy()
    theirs = with_draws("gaussian_noise", x[i], severity, normal=lambda size, scale: z * scale)
    assert_close(noise.gaussian_noise(pixels, scale, streams(3))[i], theirs)

    photons = IMAGENET["shot_noise"][at][0]
    counts = noise.poisson(pixels, photons, streams(3))[i].permute(1, 2, 0).numpy()
    theirs = with_draws("shot_noise", x[i], severity, poisson=lambda mean: counts)
    assert (noise.shot_noise(pixels, photons, streams(3))[i].long() == theirs).all()

    angle = float(streams(3).uniform()[i]) * 90
    theirs = with_draws("motion_blur", x[i], severity, uniform=lambda low, high: angle + low)
    assert_close(blur.motion_blur(pixels, *IMAGENET["motion_blur"][at], streams(3))[i], theirs)

    drawn, level = streams(3), IMAGENET["snow"][at]
    (top, rows), (left, columns) = zoom_source(h, level[2]), zoom_source(w, level[2])
    flakes = np.zeros(size)
    middle = drawn.normal(rows, columns)[i].double().numpy()
    flakes[top : top + rows, left : left + columns] = middle * level[1] + level[0]
    angle = float(drawn.uniform()[i]) * 90
    theirs = with_draws(
        "snow", x[i], severity,
        normal=lambda size, loc, scale: flakes, uniform=lambda low, high: angle + low,
    )  # fmt: skip
    assert_close(weather.snow(pixels, *level, streams(3))[i], theirs)

    drawn = streams(3)
    theirs = with_draws(
        "fog", x[i], severity,
        uniform=lambda low, high, shape: (drawn.uniform(*shape)[i].numpy() * 2 - 1) * high,
    )  # fmt: skip
    assert_close(weather.fog(pixels, *IMAGENET["fog"][at], streams(3))[i], theirs)

    shifts = iter(streams(3).uniform(2, h, w)[i].double().numpy() * 2 - 1)
    theirs = with_draws(
        "elastic_transform", x[i], severity, uniform=lambda low, high, size: next(shifts) * high
    )
    level = IMAGENET["elastic_transform"][at]
    assert_close(digital.elastic_transform(pixels, *level, streams(3))[i], theirs)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_copies_as_the_package_does(severity):
    """The package's "swap" of two views copies: its pixels are ours if the moves are."""
    x, level = pictures(2), IMAGENET["glass_blur"][severity - 1]
    _, reach, iterations = level
    drawn = streams(2)
    shape = (32 - 2 * reach, 32 - 2 * reach, 2)
    moves = [drawn.integers(-reach, reach, *shape)[1].numpy() for _ in range(iterations)]
    plain = oracle._shuffle_pixels_njit_glass_blur.py_func
    flat = iter(np.concatenate([m[::-1, ::-1].reshape(-1, 2) for m in moves]))
    with (
        patch.object(oracle, "_shuffle_pixels_njit_glass_blur", plain),
        patch("numpy.random.seed"),
        patch("numpy.random.randint", lambda low, high, size: next(flat)),
    ):
        out = np.uint8(oracle.glass_blur(Image.fromarray(last(x[1])), severity, seed=0))
    theirs = torch.from_numpy(out).permute(2, 0, 1).long()
    assert_close(blur.glass_blur(x.float(), *level, streams(2))[1], theirs)


def spectrum(difference):
    """Power of differences (n, c, h, w) in four rings of the frequency, and at frequency 0."""
    power = torch.fft.fft2(difference).abs().square().mean((0, 1)).numpy()
    line = np.fft.fftfreq(power.shape[0])
    radius = np.hypot(line[:, None], line)
    edges = [-1, 1e-9, 0.12, 0.25, 0.4, 1]
    return np.array(
        [power[(radius > a) & (radius <= b)].mean() for a, b in zip(edges, edges[1:], strict=False)]
    )


@pytest.mark.parametrize(
    "name",
    [
        "gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "fog",
        "elastic_transform",
    ],
)  # fmt: skip
def test_random_corruptions_are_alike_in_distribution(name):
    n = 240
    # One image many times, so that images add nothing to the spread.
    x = pictures(1).expand(n, -1, -1, -1).contiguous()
    for severity in (1, 5):
        ours = corrupt(x, name, severity)
        np.random.seed(0)  # noqa: NPY002 (the package draws from the global state)
        theirs = package(x, name, severity)
        ours, theirs = ours.double() - x, theirs.double() - x
        means = torch.stack([d.mean((2, 3)) for d in (ours, theirs)])  # (2, n, c)
        stds = torch.stack([d.std((2, 3)) for d in (ours, theirs)])
        for each in (means, stds):
            error = (each.var(1).sum(0) / n).sqrt() + 0.02
            assert ((each[0].mean(0) - each[1].mean(0)).abs() < 4.5 * error).all(), severity
            for channel in range(3):
                p = stats.ks_2samp(each[0, :, channel], each[1, :, channel]).pvalue
                assert p > 1e-4, (severity, channel)
        ratio = spectrum(ours) / spectrum(theirs)
        np.testing.assert_allclose(ratio[1:], 1, atol=0.2)
        # Marginal distribution of the corrupted values: pixels of one image are not independent,
        # so the statistic is bounded, not its p-value.
        statistic = stats.ks_2samp(ours.flatten(), theirs.flatten()).statistic
        assert statistic < 0.03, severity


def test_frost_is_alike_in_kind():
    """Procedural textures: brightness and contrast of the change, not its shape."""
    x = pictures(60)
    for severity in (1, 5):
        ours = corrupt(x, "frost", severity).double()
        np.random.seed(0)  # noqa: NPY002
        theirs = package(x, "frost", severity).double()
        difference = ours.mean((0, 2, 3)) - theirs.mean((0, 2, 3))
        assert (difference.abs() < 25).all()
        ratio = (ours - x).std((1, 2, 3)).mean() / (theirs - x).std((1, 2, 3)).mean()
        assert float(ratio) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_cifar_defocus_is_opencvs(severity):
    x = pictures(3)
    radius, alias_blur = CIFAR["defocus_blur"][severity - 1]
    kernel = oracle.disk(radius, alias_blur)
    ours = blur.defocus_blur(x.float(), radius, alias_blur, streams(3))
    for image, own in zip(x, ours, strict=True):
        theirs = cv2.filter2D(last(image) / 255.0, -1, kernel) * 255
        np.testing.assert_allclose(last(own), theirs, atol=1e-3)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_cifar_elastic_is_opencvs_and_scikit_images(severity):
    from scipy.ndimage import map_coordinates
    from skimage.filters import gaussian

    x, i = pictures(3), 2
    amplitude, sigma, shift = CIFAR["elastic_transform"][severity - 1]
    ours = digital.elastic_transform_affine(x.float(), amplitude, sigma, shift, streams(3))[i]
    drawn = streams(3)
    moves = ((drawn.uniform(3, 2)[i] * 2 - 1) * shift * 32).numpy()
    corners = np.array([[26, 26], [26, 6], [6, 6]], dtype=np.float32)
    matrix = cv2.getAffineTransform(corners, corners + moves)
    image = last(x[i]).astype(np.float32)
    image = cv2.warpAffine(image, matrix, (32, 32), borderMode=cv2.BORDER_REFLECT_101)
    noises = drawn.uniform(2, 32, 32)[i].double().numpy() * 2 - 1
    smooth = {"sigma": sigma * 32, "mode": "reflect", "truncate": 3}
    dx, dy = (gaussian(each, **smooth) * amplitude * 32 for each in noises)
    rows, columns = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    for channel in range(3):
        at = [rows + dy, columns + dx]
        theirs = map_coordinates(image[..., channel], at, order=1, mode="reflect")
        difference = np.abs(ours[channel].numpy() - theirs)
        assert difference.mean() < 0.5  # OpenCV samples at multiples of 1/32 pixel
        assert difference.max() < 6
