"""Label smoothing, mixup, cutmix in closed form; the recipe in an objective and in `fit`."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape.objective import Objective
from landscape.training import (
    Compose,
    CutMix,
    HorizontalFlip,
    LabelSmoothing,
    Mixup,
    OneOf,
    RandAugment,
    RandomCrop,
    fit,
    load_images,
    recipe,
)
from tests.cases import float64_by_default


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def paper(data, **changes):
    return recipe(data.mean, data.std, data.num_classes, **changes)


@pytest.fixture
def batch():
    """Sample i has the constant value i and the class i, so that a mixture shows its parts."""
    x = torch.arange(16.0).view(-1, 1, 1, 1).expand(-1, 2, 12, 10).contiguous()
    y = torch.arange(16)
    return LabelSmoothing(16, 0.0)(x, y, generator())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_in_closed_form(smoothing):
    y = torch.tensor([2, 0, 1, 2])
    x, soft = LabelSmoothing(3, smoothing)(torch.zeros(4, 1, 2, 2), y, generator())
    expected = (1 - smoothing) * F.one_hot(y, 3).float() + smoothing / 3
    torch.testing.assert_close(soft, expected)
    logits = torch.randn(4, 3, generator=generator())
    torch.testing.assert_close(
        F.cross_entropy(logits, soft), F.cross_entropy(logits, y, label_smoothing=smoothing)
    )


@pytest.mark.parametrize("per_sample", [False, True])
def test_mixup_mixes_images_and_targets_alike(batch, per_sample):
    x, y = batch
    mixed, target = Mixup(1.0, per_sample)(x, y, generator())
    assert torch.equal(mixed.amax((1, 2, 3)), mixed.amin((1, 2, 3)))
    # the class indices are the pixel values: the mean class is the mixed value
    torch.testing.assert_close(target @ torch.arange(16.0), mixed[:, 0, 0, 0])
    torch.testing.assert_close(target.sum(1), torch.ones(16))
    assert (target > 0).sum(1).max() == 2
    own = target.diagonal()
    shares = own[(target > 0).sum(1) == 2]
    assert len(shares) > 8
    if per_sample:
        assert len(shares.unique()) == len(shares)
    else:
        torch.testing.assert_close(shares, shares[0].expand(len(shares)))


@pytest.mark.parametrize("per_sample", [False, True])
def test_cutmix_target_is_the_share_of_pixels(batch, per_sample):
    x, y = batch
    boxes = set()
    for seed in range(20):
        mixed, target = CutMix(1.0, per_sample)(x, y, generator(seed))
        for i in range(16):
            share = torch.bincount(mixed[i, 0].flatten().long(), minlength=16) / 120
            torch.testing.assert_close(target[i], share)
            pasted = mixed[i, 0] != i
            rows, columns = pasted.any(1), pasted.any(0)
            assert torch.equal(pasted, rows[:, None] & columns)  # a box
            assert torch.equal(mixed[i, 0], mixed[i, 1])
            if pasted.any():
                boxes.add((seed, tuple(rows.tolist()), tuple(columns.tolist())))
    assert len(boxes) > 200 if per_sample else 15 <= len(boxes) <= 20


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_share_follows_the_beta_distribution(alpha):
    x = torch.arange(4000.0).view(-1, 1, 1, 1)
    y = torch.stack((torch.ones(4000), torch.arange(4000.0)), 1)
    mixed, _ = Mixup(alpha, per_sample=True)(x, y, generator())
    other = torch.randperm(4000, generator=generator())
    share = (mixed.flatten() - other) / (x.flatten() - other)
    share = share[(x.flatten() - other).abs() > 100].double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert share.min() > -1e-3
    assert share.max() < 1 + 1e-3
    assert abs(share.mean() - 0.5) < 4 * (variance / len(share)) ** 0.5
    assert abs(share.var() - variance) < 0.006


def test_cutmix_box_is_beta_before_it_is_cut_off():
    """Where is pasted how often, simulated sample by sample with NumPy, for Beta(0.8, 0.8)."""
    rng = np.random.default_rng(0)
    expected = np.zeros((24, 32))
    for _ in range(20_000):
        side = (1 - rng.beta(0.8, 0.8)) ** 0.5
        edges = []
        for size in (24, 32):
            length, middle = int(side * size), int(rng.random() * size)
            first = middle - length // 2
            edges.append(slice(max(first, 0), first + length))
        expected[tuple(edges)] += 1 / 20_000
    x = torch.zeros(8000, 1, 24, 32)
    x[::2] = 1  # a pasted pixel shows half of the time
    y = torch.stack((x[:, 0, 0, 0], 1 - x[:, 0, 0, 0]), 1)
    mixed, _ = CutMix(0.8, per_sample=True)(x, y, generator())
    pasted = 2 * (mixed != x).double().mean((0, 1)).numpy()
    assert abs(pasted.mean() - expected.mean()) < 0.015
    np.testing.assert_allclose(pasted, expected, atol=0.05)


def test_one_of_draws_evenly_and_with_its_probability():
    add = [lambda x, y, g, value=value: (x + value, y) for value in (1, 10)]
    chosen = OneOf(add, probability=0.8)
    source, x = generator(), torch.zeros(1)
    values = torch.cat([chosen(x, x, source)[0] for _ in range(2000)])
    for value, share in ((0, 0.2), (1, 0.4), (10, 0.4)):
        count = int((values == value).sum())
        assert abs(count - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("transform", [Mixup(), CutMix(), Mixup(0.4, True), CutMix(0.4, True)])
def test_draws_come_from_the_generator_alone(batch, transform):
    x, y = batch
    state, before = torch.get_rng_state(), x.clone()
    runs = [transform(x, y, generator(seed)) for seed in (0, 1, 0)]
    assert torch.equal(runs[0][0], runs[2][0])
    assert torch.equal(runs[0][1], runs[2][1])
    assert not torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)


@pytest.mark.parametrize("transform", [Mixup(), CutMix()])
def test_float64_stays_float64(batch, transform):
    x, y = (tensor.double() for tensor in batch)
    mixed, target = transform(x, y, generator())
    assert (mixed.dtype, target.dtype) == (torch.float64, torch.float64)


def test_recipe_has_the_papers_parts_in_order():
    data = load_images("fashion_mnist_mini", channels=3)
    names = [type(part).__name__ for part in paper(data, erasing=0.25).transforms]
    assert names == [
        "Denormalize",
        "RandomCrop",
        "HorizontalFlip",
        "RandAugment",
        "Normalize",
        "RandomErasing",
        "LabelSmoothing",
        "OneOf",
    ]
    *_, randaugment, _, smoothing, mixing = paper(data).transforms
    assert randaugment == RandAugment(2, 9.0, 1.0, 0.5, fill=(73, 73, 73))
    assert smoothing == LabelSmoothing(10) == LabelSmoothing(10, 0.1)
    assert list(mixing.transforms) == [Mixup(1.0), CutMix(0.8)]
    off = paper(
        data, padding=0, flip=0, randaugment=RandAugment(num_ops=0), mixup=0, cutmix=0, smoothing=0
    )
    x, y = next(iter(data))
    same, target = off(x, y, generator())
    torch.testing.assert_close(same, x, rtol=0, atol=1e-6)
    assert torch.equal(target, F.one_hot(y, 10).float())


def test_recipe_augments_as_the_parts_do_before_normalisation():
    data = load_images("fashion_mnist_mini", split="test", size=32, channels=3, batch_size=64)
    transform = paper(data, mixup=0, cutmix=0, smoothing=0)
    x, y = next(iter(data))
    whole, _ = transform(x, y, generator(5))
    parts = Compose([RandomCrop(4), HorizontalFlip(), RandAugment(fill=(73, 73, 73))])
    augmented, _ = parts(data.images[:64], y, generator(5))
    images = data.with_(images=augmented, labels=y)
    torch.testing.assert_close(whole, next(iter(images))[0])


@pytest.mark.parametrize("seed", range(4))
def test_recipe_does_not_depend_on_the_default_type(seed):
    data = load_images("fashion_mnist_mini", split="test", channels=3, batch_size=200)
    transform = paper(data, erasing=0.5)
    x, y = next(iter(data))
    expected = transform(x, y, generator(seed))
    with float64_by_default():
        for images in (x, x.double()):
            for part, same in zip(transform(images, y, generator(seed)), expected, strict=True):
                assert torch.equal(part, same)


def test_a_mean_beyond_full_scale_is_filled_with_a_byte():
    chain = recipe((-0.5, 0.5, 1.5), (0.2,) * 3, 10).transforms
    assert next(part.fill for part in chain if isinstance(part, RandAugment)) == (0, 128, 255)


def test_recipe_trains_a_model_in_float64():
    data = load_images("fashion_mnist_mini", split="test", batch_size=50).subset(50)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
    assert np.isfinite(fit(model, data, epochs=1, transform=paper(data)).train_loss).all()


def test_same_recipe_serves_objective_and_fit():
    data = load_images("fashion_mnist_mini", split="test", batch_size=50).subset(150)
    transform = paper(data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    result = fit(model, data, epochs=6, optimizer=optimizer, transform=transform)
    assert result.train_loss[-1] < result.train_loss[0]
    objective = Objective(transform=transform, weight_decay=0.05)
    frozen = objective.freeze(model, data)
    assert frozen.value() == frozen.value()
    assert "RandAugment" in objective.describe()
    targets = torch.cat([batch.targets for batch in frozen.batches])
    torch.testing.assert_close(targets.sum(1), torch.ones(150))
    assert targets.min() >= 0.1 / 10 - 1e-6


@pytest.mark.parametrize("transform", [Mixup(), CutMix()])
def test_bytes_and_hard_labels_are_refused(batch, transform):
    x, y = batch
    with pytest.raises(ValueError, match="put `Normalize` first"):
        transform(x.to(torch.uint8), y, generator())
    with pytest.raises(ValueError, match="`y` must be soft targets .* put `LabelSmoothing` first"):
        transform(x, torch.arange(16), generator())


@pytest.mark.parametrize("transform", [Mixup(), Mixup(per_sample=True), CutMix()])
def test_other_shapes_are_refused(transform, generator):
    for x, y in (
        (torch.randn(4, 3, 8, 8), torch.arange(4.0)),
        (torch.randn(4, 7), torch.rand(4, 3)),
        (torch.randn(4, 3, 8, 8), torch.rand(3, 3)),
    ):
        with pytest.raises(ValueError, match="must be images .* and soft targets"):
            transform(x, y, generator)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"flip": -1}, r"`flip` must lie in \[0, 1\], got -1"),
        ({"erasing": "x"}, r"`erasing` must be a finite number, got 'x'"),
        ({"probability": 2}, r"`probability` must lie in \[0, 1\], got 2"),
        ({"mixup": -1}, "`mixup` must be at least 0, got -1"),
        ({"cutmix": -1}, "`cutmix` must be at least 0, got -1"),
    ],
)
def test_a_recipe_refuses_its_own_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        recipe((0.5,), (0.25,), 3, **arguments)


def test_a_recipe_for_other_channels_says_what_to_leave_out():
    mean, std, x = (0.5,) * 4, (0.25,) * 4, torch.randn(4, 4, 8, 8)
    with pytest.raises(ValueError, match=r"`mean` must have 1 or 3 .*, got 4; .*num_ops=0"):
        recipe(mean, std, 3)
    transform = recipe(mean, std, 3, randaugment=RandAugment(num_ops=0))
    assert transform(x, torch.arange(4) % 3, generator())[0].shape == x.shape


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="`alpha` must be positive, got 0"):
        Mixup(0.0)
    with pytest.raises(ValueError, match="`alpha` must be positive, got -1"):
        CutMix(-1)
    with pytest.raises(ValueError, match="`alpha` must be a finite number, got inf"):
        Mixup(np.inf)
    with pytest.raises(ValueError, match="`alpha` must be a finite number, got 'x'"):
        CutMix("x")
    with pytest.raises(ValueError, match="`std` must be positive"):
        recipe((0.5,) * 3, (0, 0, 0), 10)
    with pytest.raises(ValueError, match="`mean` must be finite"):
        recipe((np.nan,) * 3, (0.2,) * 3, 10)
    with pytest.raises(ValueError, match="`transforms` must hold at least one"):
        OneOf([])
    with pytest.raises(ValueError, match=r"`smoothing` must lie in \[0, 1\], got 1.1"):
        LabelSmoothing(10, 1.1)
    integers = [torch.zeros(shape, dtype=torch.int64) for shape in ((2, 1), (2, 2, 2), ())]
    for y in (torch.zeros(2, 3), *integers):
        with pytest.raises(ValueError, match="`y` must be class indices .* LabelSmoothing once"):
            LabelSmoothing(3)(torch.zeros(2, 1, 2, 2), y, generator())
    with pytest.raises(ValueError, match="from 0 to num_classes - 1 = 2, got -100 to 3"):
        LabelSmoothing(3)(torch.zeros(2, 1, 2, 2), torch.tensor([-100, 3]), generator())


def test_labels_of_any_integer_type_are_smoothed():
    x, y = torch.zeros(3, 1, 2, 2), torch.tensor([2, 0, 1])
    expected = LabelSmoothing(3)(x, y, generator())[1]
    for dtype in (torch.uint8, torch.int32):
        torch.testing.assert_close(LabelSmoothing(3)(x, y.to(dtype), generator())[1], expected)
