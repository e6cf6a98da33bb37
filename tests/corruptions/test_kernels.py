"""Kernels against SciPy, Pillow and plain loops."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from landscape.corruptions import blur, digital, frost, jpeg, linear, noise, weather
from landscape.corruptions.severities import CIFAR, IMAGENET
from tests.corruptions.cases import grey_levels, last, pictures, streams

SIZES = [(32, 32), (33, 50), (61, 40), (64, 48)]


@pytest.mark.parametrize("sigma", [0.05, 0.4, 0.7, 1.5, 6.4])
@pytest.mark.parametrize("boundary", ["nearest", "reflect"])
def test_smoothing_is_scipys(sigma, boundary):
    x = np.random.default_rng(0).normal(size=(3, 37))
    matrix = linear.gaussian_matrix(37, sigma, 3.0, boundary).numpy()
    expected = ndimage.gaussian_filter1d(x, sigma, mode=boundary, truncate=3.0)
    np.testing.assert_allclose(x @ matrix.T, expected, rtol=1e-12, atol=1e-12)


def test_smoothing_mirrors_more_than_once_where_the_kernel_is_longer():
    x = np.random.default_rng(0).normal(size=7)
    matrix = linear.gaussian_matrix(7, 5.0, 4.0, "reflect").numpy()
    expected = ndimage.gaussian_filter1d(x, 5.0, mode="reflect", truncate=4.0)
    np.testing.assert_allclose(matrix @ x, expected, rtol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("factor", [1, 1.01, 1.07, 1.12, 1.25, 1.3, 2, 2.5, 3, 4.5])
def test_zoom_is_scipys(size, factor):
    x = pictures(2, *size)
    ours = linear.clipped_zoom(x.double(), factor, centred=False)
    cut = [math.ceil(length / factor) for length in size]
    top, left = ((length - few) // 2 for length, few in zip(size, cut, strict=True))
    part = x[:, :, top : top + cut[0], left : left + cut[1]].double().numpy()
    expected = ndimage.zoom(part, (1, 1, factor, factor), order=1)
    np.testing.assert_allclose(ours, expected, atol=1e-9)
    if size[0] == size[1]:
        trim = (expected.shape[2] - size[0]) // 2
        middle = expected[:, :, trim : trim + size[0], trim : trim + size[0]]
        np.testing.assert_allclose(
            linear.clipped_zoom(x.double(), factor, centred=True), middle, atol=1e-9
        )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("cifar", [False, True])
def test_pixelation_is_pillows(size, cifar):
    x = pictures(3, *size)
    back = Image.Resampling.BOX if cifar else Image.Resampling.NEAREST
    for (factor,) in (*IMAGENET["pixelate"], *CIFAR["pixelate"]):
        ours = grey_levels(digital.pixelate(x.float(), factor, streams(3), cifar=cifar))
        small = (int(size[1] * factor), int(size[0] * factor))
        for image, own in zip(x, ours, strict=True):
            pil = Image.fromarray(last(image)).resize(small, Image.Resampling.BOX)
            expected = np.array(pil.resize(size[::-1], back))
            np.testing.assert_array_equal(last(own), expected)


@pytest.mark.parametrize("size", [*SIZES, (34, 34), (40, 56), (47, 41)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_libjpegs_to_the_byte(size, channels):
    x = pictures(2, *size, channels)
    for quality in (7, 10, 15, 18, 25, 40, 50, 58, 65, 80, 95):
        ours = jpeg.jpeg_compression(x.float(), quality, streams(2)).long()
        for image, own in zip(x, ours, strict=True):
            buffer = io.BytesIO()
            rgb = Image.fromarray(last(image.expand(3, -1, -1)))
            rgb.save(buffer, "JPEG", quality=quality)
            expected = np.array(Image.open(buffer))[..., :channels]
            np.testing.assert_array_equal(last(own), expected)


@pytest.mark.parametrize("radius", [0.3, 1, 1.5, 3, 4, 6, 8, 10])
def test_defocus_is_a_convolution_with_the_disk(radius):
    x = pictures(2, 33, 40)
    kernel = blur.disk_kernel(radius, 0.5)
    assert kernel.sum() == pytest.approx(1, abs=0.02)
    if radius < 1:  # one pixel, smoothed by σ = ½
        line = np.array([math.exp(-2), 1, math.exp(-2)])
        np.testing.assert_allclose(kernel, np.outer(line, line) / line.sum() ** 2)
    ours = blur.defocus_blur(x.float(), radius, 0.5, streams(2))
    expected = ndimage.convolve(x.double().numpy(), kernel.numpy()[None, None], mode="mirror")
    np.testing.assert_allclose(ours, expected, atol=2e-3)


@pytest.mark.parametrize(("sigma", "reach", "iterations"), [(0.7, 1, 2), (1.0, 2, 3), (1.5, 4, 2)])
def test_glass_copies_pixel_by_pixel(sigma, reach, iterations):
    h, w = 32, 41
    x = pictures(2, h, w)
    ours = blur.glass_blur(x.float(), sigma, reach, iterations, streams(2))
    drawn = streams(2)
    shape = (h - 2 * reach, w - 2 * reach, 2)
    moves = [drawn.integers(-reach, reach, *shape).numpy() for _ in range(iterations)]
    for sample in range(2):
        smooth = ndimage.gaussian_filter(
            x[sample].double().numpy(), (0, sigma, sigma), mode="nearest", truncate=4.0
        )
        pixels = np.floor(smooth + 1e-4)
        for move in moves:
            for row in range(h - reach, reach, -1):
                for column in range(w - reach, reach, -1):
                    dx, dy = move[sample, row - reach - 1, column - reach - 1]
                    pixels[:, row, column] = pixels[:, row + dy, column + dx]
        expected = ndimage.gaussian_filter(pixels, (0, sigma, sigma), mode="nearest", truncate=4.0)
        np.testing.assert_allclose(ours[sample], expected, atol=1e-3)


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("angle", [-135.0, -44.0, 0.0, 17.0, 45.0, 90.0])
def test_motion_is_a_sum_of_shifts(leave, angle):
    h, w, radius, sigma = 32, 35, 20, 15
    x = pictures(1, h, w)
    ours = blur.blur_along(x.float(), radius, sigma, torch.tensor([angle]), leave=leave)
    weight = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    weight /= weight.sum()
    theta = math.radians(angle)
    expected = np.zeros((3, h, w))
    rows, columns = np.arange(h)[:, None], np.arange(w)
    for i, k in enumerate(weight):
        down, right = (math.ceil(i * f - 0.5) for f in (math.sin(theta), math.cos(theta)))
        if leave and (abs(down) >= h or abs(right) >= w):
            continue
        source = x[0].numpy()[:, np.clip(rows + down, 0, h - 1), np.clip(columns + right, 0, w - 1)]
        expected += k * source
    np.testing.assert_allclose(ours[0], expected, atol=1e-3)


def test_motion_turns_by_an_angle_of_each_sample():
    x = pictures(3)
    angles = torch.tensor([-30.0, 0.0, 30.0])
    together = blur.blur_along(x.float(), 6, 2, angles, leave=False)
    for i in range(3):
        alone = blur.blur_along(x[i : i + 1].float(), 6, 2, angles[i : i + 1], leave=False)
        assert torch.equal(together[i], alone[0])
    drawn = streams(2000).uniform() * 90 - 45
    assert -45 < drawn.min() < -44.5
    assert 44.5 < drawn.max() < 45


def test_plasma_is_diamond_square():
    size, decay = 16, 1.7
    ours = weather.plasma(size, decay, streams(2)).numpy()
    drawn = streams(2)
    heights = np.zeros((2, size, size))
    step, rough = size, 100.0
    while step >= 2:
        half = step // 2
        few = size // step
        noises = [drawn.uniform(few, few).double().numpy() * 2 - 1 for _ in range(3)]
        for kind, (row0, column0) in enumerate([(half, half), (0, half), (half, 0)]):
            for i in range(few):
                for j in range(few):
                    r, c = row0 + i * step, column0 + j * step
                    steps = (
                        [(-half, -half), (-half, half), (half, -half), (half, half)]
                        if kind == 0
                        else [(-half, 0), (half, 0), (0, -half), (0, half)]
                    )
                    around = [heights[:, (r + a) % size, (c + b) % size] for a, b in steps]
                    random = rough**2 * noises[kind][:, i, j]
                    heights[:, r, c] = sum(around) / 4 + random
        step, rough = half, rough / decay
    heights -= heights.min((1, 2), keepdims=True)
    expected = heights / heights.max((1, 2), keepdims=True)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_fog_keeps_the_brightest_value_and_black_images_black():
    x = pictures(3)
    x[2] = 0
    out = weather.fog(x.float(), 2.0, 2.0, streams(3))
    assert (out.amax((1, 2, 3)) <= x.amax((1, 2, 3)) + 1e-3).all()
    assert (out[2] == 0).all()


def test_brightness_is_the_value_of_hsv():
    x = torch.tensor([[0, 0, 0], [10, 20, 40], [255, 0, 0], [250, 240, 230]]).float()
    out = weather.brightness(x.T.reshape(1, 3, 2, 2), 0.2, streams(1)).reshape(3, 4).T
    expected = [[51, 51, 51], [22.75, 45.5, 91], [255, 0, 0], [255, 244.8, 234.6]]
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_contrast_keeps_the_mean_of_each_channel():
    x = pictures(2).float()
    out = digital.contrast(x, 0.3, streams(2))
    np.testing.assert_allclose(out.mean((2, 3)), x.mean((2, 3)), rtol=1e-5)
    np.testing.assert_allclose(out.std((2, 3)), 0.3 * x.std((2, 3)), rtol=1e-4)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_elastic_samples_as_scipy_does(size):
    h, w = size
    x = pictures(2, h, w)
    ours = digital.elastic_transform(x.float(), 0.15, streams(2))
    noises = (streams(2).uniform(2, h, w).double().numpy() * 2 - 1) * 0.15 * h
    sigma = (0, 0.01 * h, 0.01 * w)
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    for sample in range(2):
        dx, dy = ndimage.gaussian_filter(noises[sample], sigma, mode="reflect", truncate=3)
        for channel in range(3):
            expected = ndimage.map_coordinates(
                x[sample, channel].double().numpy(),
                [rows + dy, columns + dx],
                order=1,
                mode="reflect",
            )
            np.testing.assert_allclose(ours[sample, channel], expected, atol=0.02)


def test_affine_map_takes_moved_corners_to_corners():
    h, w = 32, 40
    moves = streams(3).uniform(3, 2) * 5 - 2.5
    x, y = digital.affine_points(moves, h, w)
    corners = torch.tensor([[26.0, 30.0], [26.0, 10.0], [6.0, 10.0]])  # (16, 20) ± 10
    for sample in range(3):
        # Both maps are affine, so three pixels determine them.
        step = torch.stack([x[sample, 0, 1] - x[sample, 0, 0], x[sample, 1, 0] - x[sample, 0, 0]])
        down = torch.stack([y[sample, 0, 1] - y[sample, 0, 0], y[sample, 1, 0] - y[sample, 0, 0]])
        at = corners + moves[sample]
        back = torch.stack([x[sample, 0, 0] + at @ step, y[sample, 0, 0] + at @ down], dim=1)
        torch.testing.assert_close(back, corners, rtol=1e-4, atol=1e-3)
    still = digital.affine_points(torch.zeros(1, 3, 2), h, w)
    torch.testing.assert_close(still[0][0], torch.arange(w).float().expand(h, w))


def test_no_shift_leaves_images_alone():
    x = pictures(2)
    out = digital.elastic_transform_affine(x.float(), 0.0, 0.1, 0.0, streams(2))
    torch.testing.assert_close(out, x.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("photons", [3, 12, 60, 500])
def test_alias_tables_hold_the_poisson_distribution(photons):
    lowest, threshold, alias = noise.alias_tables(float(photons))
    k = threshold.shape[1]
    share = threshold.double() / 2**20
    mass = share.clone().scatter_add_(1, alias.long(), 1 - share) / k
    count = lowest[:, None] + torch.arange(k)
    mean = photons * np.arange(256)[:, None] / 255
    np.testing.assert_allclose(mass, stats.poisson.pmf(count, mean), atol=2e-6)


@pytest.mark.parametrize(("level", "photons"), [(100, 12), (200, 500)])
def test_shot_noise_follows_the_tables(level, photons):
    x = torch.full((40, 3, 32, 32), level).float()
    counts = noise.poisson(x, photons, streams(40)).numpy().ravel()
    mean = photons * level / 255
    count = np.arange(int(mean - 2 * mean**0.5), int(mean + 2 * mean**0.5))
    expected = stats.poisson.pmf(count, mean) * len(counts)
    seen = np.bincount(counts, minlength=count[-1] + 1)[count]
    assert np.abs((seen - expected) / np.sqrt(expected)).max() < 4
    assert counts.mean() == pytest.approx(mean, rel=0.005)


def test_shot_noise_is_rounded_down_and_leaves_black_alone():
    photons = 12
    values = noise.shot_values(torch.tensor([0, 1, 6, 12, 40]), photons).tolist()
    assert values == [0, 21, 127, 255, 255]
    black = noise.shot_noise(torch.zeros(2, 1, 32, 32), photons, streams(2))
    assert (black == 0).all()


def test_impulses_are_black_and_white_in_equal_shares():
    x = torch.full((40, 3, 32, 32), 100.0)
    out = noise.impulse_noise(x, 0.2, streams(40))
    share = [(out == value).double().mean() for value in (0, 255, 100)]
    np.testing.assert_allclose(share, [0.1, 0.1, 0.8], atol=0.004)


def test_snow_adds_flakes_and_their_mirror_image():
    x = torch.full((3, 3, 32, 32), 100.0)
    level = IMAGENET["snow"][3]
    out = weather.snow(x, *level, streams(3))
    white = 0.65 * 100 + 0.35 * (1.5 * 100 + 127.5)
    flakes = out - white
    assert (flakes > -1e-3).all()
    torch.testing.assert_close(flakes, flakes.flip(2, 3), rtol=1e-4, atol=1e-3)
    assert (flakes[:, 0] == flakes[:, 2]).all()
    torch.testing.assert_close(flakes, flakes.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("cifar", [False, True])
def test_frost_adds_ice_to_the_weighted_image(cifar):
    x = torch.full((3, 3, 32, 40), 100.0)
    frosted, ice = (weather.frost(each, 0.7, 0.6, streams(3), cifar=cifar) for each in (x, 0 * x))
    torch.testing.assert_close(frosted - ice, 0.7 * x)
    assert ice.max() <= 0.6 * 255


def test_frost_has_the_moments_of_the_photographs():
    texture = frost.frost_texture(32, 32, streams(3000), small=False)
    table = frost._PHOTOGRAPHS.double()
    mean = table[:, :3].mean(0)
    spread = (table[:, 3:6].square() + table[:, :3].square()).mean(0) - mean.square()
    np.testing.assert_allclose(texture.double().mean((0, 2, 3)), mean, atol=3.5)
    std = texture.double().permute(1, 0, 2, 3).flatten(1).std(1)
    np.testing.assert_allclose(std, spread.sqrt(), rtol=0.04)
    assert texture.min() >= 0
    assert texture.max() <= 255


@pytest.mark.parametrize("exponent", [0.0, 1.1, 2.5])
def test_frost_has_the_power_law(exponent):
    field = frost.power_law(64, 48, torch.full((200,), exponent), streams(200)).double()
    assert float(field.square().mean()) == pytest.approx(1, abs=0.05)
    power = torch.fft.fft2(field).abs().square().mean(0).numpy()
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(48))
    bands = [(frequency > low) & (frequency < 1.3 * low) for low in (0.05, 0.1, 0.2, 0.35)]
    slope = np.polyfit(
        [np.log(frequency[b]).mean() for b in bands], [np.log(power[b]).mean() for b in bands], 1
    )[0]
    assert slope == pytest.approx(-exponent, abs=0.05)


def test_the_frost_of_cifar_has_photographs_and_a_scale_of_its_own(monkeypatch):
    """It leaves the last one out, and has the exponent and the offset of scale 0.2."""
    flat = torch.zeros(6, 10)
    flat[:, :3] = 40 * torch.arange(6.0)[:, None]
    monkeypatch.setattr(frost, "_PHOTOGRAPHS", flat)
    for small, count in ((True, 5), (False, 6)):
        texture = frost.frost_texture(32, 32, streams(200), small=small)
        assert texture.unique().tolist() == [40 * i for i in range(count)]
    for small, share in ((True, 9), (False, 7)):
        table = torch.tensor([128.0] * 3 + [10.0] * 3 + [0.0] * 4).repeat(6, 1)
        table[:, share] = 1.0  # one offset a crop
        monkeypatch.setattr(frost, "_PHOTOGRAPHS", table)
        texture = frost.frost_texture(32, 32, streams(4), small=small)
        assert texture.std((1, 2, 3)).max() == 0
        assert texture.mean((1, 2, 3)).std() > 0
