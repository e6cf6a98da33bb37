"""Crop, flip, erasing: against plain loops over samples, and their statistics."""

import math

import pytest
import torch
import torch.nn.functional as F

from landscape.training import (
    Compose,
    Denormalize,
    HorizontalFlip,
    Normalize,
    RandomCrop,
    RandomErasing,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def bytes_():
    """Images whose pixels are all different within a sample, so that a crop says where it is."""
    return (
        torch.stack([torch.randperm(256, generator=generator(i)) for i in range(60)])
        .view(20, 3, 16, 16)
        .to(torch.uint8)
    )


def windows(image, padding, fill):
    """Return every crop of one image, by its corner."""
    padded = F.pad(image, (padding,) * 4, value=fill)
    h, w = image.shape[1:]
    corners = range(2 * padding + 1)
    return {(i, j): padded[:, i : i + h, j : j + w] for i in corners for j in corners}


@pytest.mark.parametrize(("padding", "fill"), [(2, 0), (1, 7), (0, 0)])
@pytest.mark.parametrize("shape", [(20, 3, 16, 16), (40, 1, 24, 16)], ids=str)
def test_crop_is_one_of_the_windows_of_its_own_sample(bytes_, padding, fill, shape):
    x = bytes_.flatten()[: torch.Size(shape).numel()].view(shape)
    y = torch.arange(len(x))
    cropped, labels = RandomCrop(padding, fill)(x, y, generator())
    assert torch.equal(labels, y)
    corners = []
    for image, crop in zip(x, cropped, strict=True):
        corners += [
            corner
            for corner, window in windows(image, padding, fill).items()
            if torch.equal(window, crop)
        ]
    assert len(corners) == len(x)
    assert len(set(corners)) > min(2 * padding, 3)


def test_crops_do_not_depend_on_the_memory_format(bytes_):
    x, y, crop = bytes_ / 255.0, torch.arange(20), RandomCrop(2)
    expected = crop(x, y, generator())[0]
    found = crop(x.contiguous(memory_format=torch.channels_last), y, generator())[0]
    assert torch.equal(found, expected)


def test_every_crop_is_equally_likely():
    pixels = torch.arange(9.0).view(1, 1, 3, 3).expand(9000, -1, -1, -1)
    cropped, _ = RandomCrop(1, fill=-1.0)(pixels, torch.zeros(9000), generator())
    images, counts = cropped.flatten(1).unique(dim=0, return_counts=True)
    assert len(images) == 9
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flip_mirrors_the_expected_share(bytes_, probability):
    x = bytes_.repeat(50, 1, 1, 1)
    flipped, _ = HorizontalFlip(probability)(x, torch.zeros(1000), generator())
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    kept = (flipped == x).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    error = 4 * (1000 * probability * (1 - probability)) ** 0.5
    assert abs(int(mirrored.sum()) - 1000 * probability) <= error


def test_erasing_replaces_one_box_of_allowed_shape():
    x = torch.zeros(500, 2, 40, 30)
    erasing = RandomErasing(1.0, area=(0.1, 0.3), ratio=(0.5, 2.0), value=1.0)
    erased, _ = erasing(x, torch.zeros(500), generator())
    assert torch.equal(erased[:, 0], erased[:, 1])
    inside = erased[:, 0] == 1
    heights, widths = inside.any(2).sum(1).double(), inside.any(1).sum(1).double()
    assert torch.equal(inside.sum((1, 2)).double(), heights * widths)  # the box is full
    for rows in (inside.any(2), inside.any(1)):  # and in one piece
        assert (rows.int().diff(dim=1, prepend=torch.zeros(500, 1)) == 1).sum(1).max() == 1
    share = heights * widths / 1200
    assert share.min() > 0.09
    assert share.max() < 0.32
    assert abs(share.mean() - 0.2) < 0.01
    assert (heights / widths).min() > 0.45
    assert (heights / widths).max() < 2.2


def test_erasing_probability_and_noise():
    x = torch.full((1000, 3, 16, 16), 50.0)
    erased, _ = RandomErasing(0.25)(x, torch.zeros(1000), generator())
    changed = (erased != x).flatten(1).any(1)
    assert abs(int(changed.sum()) - 250) < 4 * (1000 * 0.25 * 0.75) ** 0.5
    noise = erased[erased != 50]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_every_place_of_a_box_is_equally_likely():
    """Also at the borders, and none beyond."""
    x = torch.zeros(4000, 1, 8, 8)
    erasing = RandomErasing(1.0, area=(0.25, 0.25), ratio=(1.0, 1.0), value=1.0)
    erased, _ = erasing(x, torch.zeros(4000), generator())
    inside = erased[:, 0] == 1
    assert (inside.sum((1, 2)) == 4 * 4).all()
    for rows in (inside.any(2), inside.any(1)):
        first = rows.int().argmax(1).bincount(minlength=8)
        assert not first[5:].any()
        assert (abs(first[:5] - 800) < 4 * (4000 * 0.2 * 0.8) ** 0.5).all()


def test_normalize_and_denormalize_are_inverse(bytes_):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    y = torch.zeros(20)
    there, _ = Normalize(mean, std)(bytes_, y, generator())
    back, _ = Denormalize(mean, std)(there, y, generator())
    assert torch.equal(back, bytes_)
    expected = (bytes_.double() / 255 - torch.tensor(mean).view(3, 1, 1).double()) / torch.tensor(
        std
    ).view(3, 1, 1).double()
    torch.testing.assert_close(there.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "transform",
    [RandomCrop(2), HorizontalFlip(), RandomErasing(0.5)],
    ids=lambda t: type(t).__name__,
)
def test_draws_come_from_the_generator_alone(bytes_, transform):
    x = bytes_.float()
    state, before = torch.get_rng_state(), x.clone()
    one, other, same = (transform(x, torch.zeros(20), generator(seed))[0] for seed in (0, 1, 0))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)


def test_samples_are_drawn_one_by_one(bytes_):
    x = bytes_[:1].expand(64, -1, -1, -1)
    chain = Compose([RandomCrop(4), HorizontalFlip()])
    out, _ = chain(x, torch.zeros(64), generator())
    assert len(out.flatten(1).unique(dim=0)) > 45  # of 162 possible ones


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: RandomCrop(-1), "`padding` must be at least 0, got -1"),
        (lambda: HorizontalFlip(1.5), r"`probability` must lie in \[0, 1\], got 1.5"),
        (lambda: RandomErasing(area=(0.0, 0.3)), "`area` must be positive and increasing"),
        (lambda: HorizontalFlip("x"), "`probability` must be a finite number, got 'x'"),
        (lambda: RandomErasing(ratio=(2.0, 0.3)), "`ratio` must be positive and increasing"),
        (lambda: RandomErasing(ratio=(0.3, math.inf)), "`ratio` must be positive and increasing"),
        (lambda: RandomErasing(value=math.nan), "`value` must be a finite number, got nan"),
        (lambda: RandomCrop(2, math.nan), "`fill` must be a finite number, got nan"),
        (lambda: Normalize((0.5,) * 3, (0.2, 0.0, 0.2)), "`std` must be positive, got .*; take 1"),
        (lambda: Normalize((0.5,) * 3, (-1.0,) * 3), "`std` must be positive"),
        (
            lambda: Normalize((0.5,) * 3, (0.2,)),
            r"`std` must have one value per channel \(3\), got",
        ),
        (
            lambda: Normalize(0.5, 0.2),
            "`mean` must be a sequence of numbers, one per chan.*got 0.5",
        ),
        (lambda: Denormalize((math.nan,), (0.2,)), "`mean` must be finite"),
        (lambda: Denormalize((0.5,), (0,)), "`std` must be positive"),
    ],
)
def test_bad_settings_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("fill", [300, -1])
def test_bytes_are_not_padded_with_what_is_no_byte(bytes_, fill):
    with pytest.raises(ValueError, match=rf"`fill` must lie in \[0, 255\], got {fill}"):
        RandomCrop(2, fill)(bytes_, torch.zeros(20), generator())


def test_erasing_refuses_bytes(bytes_):
    with pytest.raises(ValueError, match="`x` must be normalised floats .* put `Normalize` first"):
        RandomErasing()(bytes_, torch.zeros(20), generator())


def test_erased_boxes_are_as_often_taller_as_wider():
    x = torch.zeros(400, 1, 64, 64)
    erase = RandomErasing(probability=1.0, area=(0.05, 0.05), value=1.0)
    erased, _ = erase(x, torch.zeros(400), torch.Generator().manual_seed(0))
    height, width = erased.amax((1, 3)).sum(1), erased.amax((1, 2)).sum(1)
    assert 0.4 < (height > width).double().mean() < 0.6
