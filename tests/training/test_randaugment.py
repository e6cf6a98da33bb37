"""RandAugment: each operation against Pillow, the draws against their distribution."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from landscape.training import RandAugment, load_images
from landscape.training.randaugment import NONE, OPS, apply_sorted, strengths

FILL = (10, 120, 240)
INDEX = {op.name: index for index, op in enumerate(OPS)}


def affine(image, *matrix):
    fill = FILL if image.mode == "RGB" else FILL[1]
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill
    )


def solarize_add(image, amount):
    table = [min(255, value + int(amount)) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def rotate(image, degrees):
    fill = FILL if image.mode == "RGB" else FILL[1]
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill)


PILLOW = {
    "posterize": lambda image, s: ImageOps.posterize(image, int(s)),
    "solarize": lambda image, s: ImageOps.solarize(image, int(s)),
    "solarize_add": solarize_add,
    "equalize": lambda image, s: ImageOps.equalize(image),
    "invert": lambda image, s: ImageOps.invert(image),
    "auto_contrast": lambda image, s: ImageOps.autocontrast(image),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(s),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(s),
    "color": lambda image, s: ImageEnhance.Color(image).enhance(s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(s),
    "rotate": rotate,
    "shear_x": lambda image, s: affine(image, 1, s, 0, 0, 1, 0),
    "shear_y": lambda image, s: affine(image, 1, 0, 0, s, 1, 0),
    "translate_x": lambda image, s: affine(image, 1, 0, s * image.width, 0, 1, 0),
    "translate_y": lambda image, s: affine(image, 1, 0, 0, 0, 1, s * image.height),
}
# no round numbers: they give whole results, which Pillow rounds down where its own rounding error
# happens to be negative
FACTORS = (0.1037, 0.7211, 1.0, 1.3177, 1.8993)
SHIFTS = (-0.4473, -0.1019, 0.0, 0.2131, 0.2977)
STRENGTHS = {
    "posterize": (1, 2, 3, 4),
    "solarize": (0, 1, 100, 255, 256),
    "solarize_add": (0, 50, 110),
    "rotate": (-29.77, -7.31, 0.13, 12.19, 29.93),
    "shear_x": SHIFTS,
    "shear_y": SHIFTS,
    "translate_x": SHIFTS,
    "translate_y": SHIFTS,
    "brightness": FACTORS,
    "contrast": FACTORS,
    "color": FACTORS,
    "sharpness": FACTORS,
}
EXACT = {"posterize", "solarize", "solarize_add", "equalize", "invert"}


def pictures(channels):
    """Return noise, smooth ramps, few grey levels, low contrast, one value, real images."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (3, 3, 20, 28), generator=generator)
    ramp = (torch.arange(20).view(-1, 1) * 9 + torch.arange(28) * 3).clamp(0, 255)
    ramps = torch.stack((ramp, ramp.flip(0), ramp.flip(1)))[None]
    few = torch.randint(3, (1, 3, 20, 28), generator=generator) * 100 + 20
    low = torch.randint(90, 97, (1, 3, 20, 28), generator=generator)
    constant = torch.full((1, 3, 20, 28), 77)
    constant[:, 0, 0, 0] = 78
    real = load_images("fashion_mnist_mini", split="test", channels=3).images[:4, :, 4:24]
    images = torch.cat((noise, ramps, few, low, constant, real)).to(torch.uint8)
    return images[:, :channels].contiguous()


def pillow(images, name, strength):
    out = []
    for image in images:
        array = image.permute(1, 2, 0).numpy()
        picture = Image.fromarray(array if len(image) == 3 else array[..., 0])
        result = np.asarray(PILLOW[name](picture, strength))
        out.append(torch.from_numpy(result.copy()).reshape(*image.shape[1:], -1).permute(2, 0, 1))
    return torch.stack(out)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [op.name for op in OPS])
def test_operation_equals_pillow(name, channels):
    images = pictures(channels)
    for strength in STRENGTHS.get(name, (0,)):
        expected = pillow(images, name, strength).int()
        got = images.clone()
        ops = torch.full((len(images),), INDEX[name])
        fill = FILL if channels == 3 else FILL[1]
        apply_sorted(got, ops, torch.full((len(images),), float(strength)), fill)
        difference = (got.int() - expected).abs()
        assert difference.max() <= (name not in EXACT)
        assert (difference > 0).double().mean() < 0.005  # rounding down meets rounding errors


def test_sorted_mixture_equals_each_operation_alone():
    images = pictures(3).repeat(6, 1, 1, 1)
    generator = torch.Generator().manual_seed(3)
    ops = torch.randint(NONE + 1, (len(images),), generator=generator).sort().values
    level = torch.full((len(images),), 7.3)
    strength = strengths(ops, level, torch.arange(len(images)) % 2 == 0)
    together = images.clone()
    apply_sorted(together, ops, strength, FILL)
    for i in range(len(images)):
        alone = images[i : i + 1].clone()
        apply_sorted(alone, ops[i : i + 1], strength[i : i + 1], FILL)
        assert torch.equal(alone[0], together[i])
        assert ops[i] != NONE or torch.equal(alone[0], images[i])


@pytest.mark.parametrize(
    ("name", "at_0", "at_7", "at_10"),
    [
        ("rotate", 0, 21, 30),
        ("shear_x", 0, 0.21, 0.3),
        ("translate_y", 0, 0.315, 0.45),
        ("posterize", 0, 2, 4),
        ("solarize", 0, 179, 256),
        ("solarize_add", 0, 77, 110),
        ("brightness", 0.1, 1.36, 1.9),
        ("sharpness", 0.1, 1.36, 1.9),
        ("equalize", 0, 0, 0),
    ],
)
def test_strength_of_a_level(name, at_0, at_7, at_10):
    ops = torch.full((3,), INDEX[name])
    level = torch.tensor([0.0, 7.0, 10.0])
    positive = strengths(ops, level, torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(positive, torch.tensor([at_0, at_7, at_10], dtype=torch.float32))
    negative = strengths(ops, level, torch.ones(3, dtype=torch.bool))
    signed = name in {"rotate", "shear_x", "translate_y"}
    torch.testing.assert_close(negative, -positive if signed else positive)


def spy_on_draws(monkeypatch, n=4000, **settings):
    """Return the operations and strengths that reach the images, by layer, in sample order."""
    seen = []
    monkeypatch.setattr(
        "landscape.training.randaugment.apply_sorted",
        lambda images, ops, strength, fill: seen.append((images.flatten(), ops, strength)),
    )
    x = torch.arange(n, dtype=torch.int64).view(-1, 1, 1, 1).to(torch.uint8)
    RandAugment(**settings)(x, torch.zeros(n), torch.Generator().manual_seed(0))
    return seen


def test_operations_are_drawn_evenly_and_kept_half_the_time(monkeypatch):
    for _, ops, _ in (draws := spy_on_draws(monkeypatch)):
        counts = torch.bincount(ops, minlength=NONE + 1)
        assert abs(int(counts[NONE]) - 2000) < 4 * 1000**0.5
        expected = 2000 / NONE
        assert ((counts[:NONE] - expected).abs() < 4.5 * expected**0.5).all()
    assert len(draws) == 2


def test_levels_follow_the_cut_off_normal(monkeypatch):
    for _, ops, strength in spy_on_draws(monkeypatch, n=40_000):
        level = 10 * (strength[ops == INDEX["brightness"]] - 0.1) / 1.8
        # N(9, 1) cut off at 10: mean 9 - pdf(1) + (1 - cdf(1)), and 16 % of it at 10 exactly
        beyond = 0.5 * math.erfc(1 / math.sqrt(2))
        mean = 9 - math.exp(-0.5) / math.sqrt(2 * math.pi) + beyond
        assert abs(level.mean() - mean) < 4 * 0.85 / len(level) ** 0.5
        share = (level > 9.9999).double().mean()
        assert abs(share - beyond) < 4 * (beyond / len(level)) ** 0.5
        degrees = strength[ops == INDEX["rotate"]]
        assert abs((degrees > 0).double().mean() - 0.5) < 4 * 0.5 / len(degrees) ** 0.5
        assert degrees.abs().max() <= 30


def test_without_spread_every_level_is_the_magnitude(monkeypatch):
    (_, ops, strength), *_ = spy_on_draws(monkeypatch, magnitude=5.0, magnitude_std=0.0)
    torch.testing.assert_close(
        strength[ops == INDEX["rotate"]].abs().unique(), torch.tensor([15.0])
    )


def test_samples_keep_their_places():
    """Images of one value each, which no operation can move, come back in order."""
    x = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    y = torch.arange(200)
    out, labels = RandAugment(probability=0.0)(x, y, torch.Generator().manual_seed(0))
    assert torch.equal(out, x)
    assert torch.equal(labels, y)
    # with operations on: samples left alone by both layers are where they were
    x = load_images("fashion_mnist_mini", split="test").images[:400]
    out, _ = RandAugment()(x, y, torch.Generator().manual_seed(0))
    same = (out == x).flatten(1).all(1).double().mean()
    assert 0.25 < same < 0.40  # a quarter by the draws, and operations that change nothing


def test_identical_images_give_many_results():
    image = load_images("fashion_mnist_mini", size=32, channels=3).images[7]
    x = image.expand(64, -1, -1, -1)
    out, _ = RandAugment(probability=1.0)(x, torch.zeros(64), torch.Generator().manual_seed(0))
    assert len(out.flatten(1).unique(dim=0)) > 55


def test_result_is_a_function_of_the_generator():
    x = load_images("fashion_mnist_mini", split="test", channels=3).images[:50]
    before, state = x.clone(), torch.get_rng_state()
    one, other, same = (
        RandAugment()(x, torch.zeros(50), torch.Generator().manual_seed(seed))[0]
        for seed in (0, 1, 0)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_tiny_batches(batch):
    x = torch.zeros(batch, 3, 8, 8, dtype=torch.uint8)
    out, _ = RandAugment()(x, torch.zeros(batch), torch.Generator().manual_seed(0))
    assert out.shape == x.shape


def test_bad_input_is_refused():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="bytes with 1 or 3 channels .* put it before `Normalize`"):
        RandAugment()(torch.zeros(2, 3, 4, 4), torch.zeros(2), generator)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        RandAugment()(torch.zeros(2, 2, 4, 4, dtype=torch.uint8), torch.zeros(2), generator)
    with pytest.raises(ValueError, match="`num_ops` must be at least 0, got -1"):
        RandAugment(num_ops=-1)
    with pytest.raises(ValueError, match=r"`probability` must lie in \[0, 1\], got 2"):
        RandAugment(probability=2)
    gray = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="`fill` must have one value per channel .*, 1, got 3"):
        RandAugment(fill=(1, 2, 3))(gray, torch.zeros(2), generator)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"magnitude": float("nan")}, "`magnitude` must be a finite number, got nan"),
        ({"magnitude": -5}, r"`magnitude` must lie in \[0, 10\], got -5"),
        ({"magnitude": "x"}, "`magnitude` must be a finite number, got 'x'"),
        ({"fill": 300}, r"`fill` must lie in \[0, 255\], got 300"),
        ({"fill": (0, -1, 0)}, r"`fill` must lie in \[0, 255\], got -1"),
        ({"fill": (1, 2)}, "`fill` must be one value, or one for each of 1 or 3 channels, got 2"),
    ],
    ids=str,
)
def test_settings_without_a_meaning_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        RandAugment(**settings)


@pytest.mark.parametrize("name", ["shear", "translate"])
@pytest.mark.parametrize("negative", [False, True])
def test_both_axes_are_moved_alike(name, negative):
    level = torch.tensor([0.0, 7.0, 10.0])
    x, y = (
        strengths(torch.full((3,), INDEX[f"{name}_{axis}"]), level, torch.full((3,), negative))
        for axis in "xy"
    )
    torch.testing.assert_close(x, y)
