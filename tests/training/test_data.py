"""`DeviceImages`: batches, order, normalisation, subsets, resizing, errors."""

import numpy as np
import pytest
import torch

from landscape.training import DeviceImages, denormalize, normalize
from landscape.training.data import _AUGMENT, _ORDER
from landscape.training.run import _GLOBAL, _TRANSFORM
from landscape.training.seeding import stream_seed

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (50, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return DeviceImages(images, torch.arange(50) % 10, mean=MEAN, std=STD, batch_size=16)


def gather(batches):
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


def shift_pixels(x, y, generator):
    noise = torch.randint(0, 9, x.shape, generator=generator)
    return (x // 2 + noise).to(torch.uint8), y


def test_batches_are_the_images_in_order_normalised_by_the_formula(data):
    x, y = gather(data)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(
        x.double(), (data.images.double() / 255 - mean) / std, rtol=0, atol=1e-5
    )
    assert torch.equal(y, data.labels)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert [len(y) for _, y in data] == [16, 16, 16, 2]
    assert len(data) == 4
    assert data.num_samples == 50
    assert data.num_classes == 10


def test_mean_and_deviation_may_be_tensors(data):
    tensors = data.with_(mean=torch.tensor(MEAN), std=torch.tensor(STD))
    torch.testing.assert_close(next(iter(tensors)), next(iter(data)))


def test_denormalize_recovers_every_byte():
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    assert torch.equal(denormalize(normalize(images, MEAN, STD), MEAN, STD), images)


def test_plain_iteration_is_the_same_each_time_even_shuffled_and_augmented(data):
    data = data.with_(shuffle=True, augment=shift_pixels)
    torch.manual_seed(0)
    first = gather(data)
    torch.manual_seed(1)
    for one, other in zip(first, gather(data), strict=True):
        assert torch.equal(one, other)


def test_order_is_a_function_of_seed_and_epoch_and_covers_every_sample(data):
    data = data.with_(labels=torch.arange(50), classes=None, shuffle=True)
    orders = {
        (seed, epoch): gather(data.with_(seed=seed).batches(epoch))[1].tolist()
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len({tuple(order) for order in orders.values()}) == 6
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    again = gather(data.with_(seed=1).batches(2))[1].tolist()
    assert again == orders[1, 2]
    assert gather(data.batches(2))[1].tolist() == orders[0, 2]  # the default


@pytest.mark.parametrize("augment", [None, lambda x, y, generator: (x, y)])
def test_labels_stay_with_their_images(data, augment):
    marked = data.labels.to(torch.uint8).view(-1, 1, 1, 1).expand_as(data.images)
    data = data.with_(images=marked.contiguous(), shuffle=True, augment=augment)
    for x, y in data.batches(4):
        shown = denormalize(x, MEAN, STD)[:, 0, 0, 0]
        assert torch.equal(shown.long(), y)
    subset = data.subset(17)
    assert torch.equal(subset.images[:, 0, 0, 0].long(), subset.labels)


def test_streams_of_different_places_differ():
    places = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 0, 0), (5,), (5, 0)]
    seeds = {stream_seed(seed, *place) for seed in (0, 1) for place in places}
    assert len(seeds) == 2 * len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_streams_of_an_epoch_differ():
    assert len({_ORDER, _AUGMENT, _TRANSFORM, _GLOBAL}) == 4


def test_order_does_not_depend_on_the_batch_size(data):
    data = data.with_(labels=torch.arange(50), classes=None, shuffle=True)
    one, other = (gather(data.with_(batch_size=size).batches(3)) for size in (7, 50))
    assert torch.equal(one[1], other[1])
    assert torch.equal(one[0], other[0])


def test_augmentation_acts_on_bytes_before_normalisation_and_differs_by_epoch(data):
    seen = []

    def spy(x, y, generator):
        seen.append(x.dtype)
        return shift_pixels(x, y, generator)

    data = data.with_(augment=spy)
    x0, x1 = gather(data.batches(0))[0], gather(data.batches(1))[0]
    assert set(seen) == {torch.uint8}
    assert not torch.equal(x0, x1)
    assert denormalize(x0, MEAN, STD).max() <= 255 // 2 + 8


def test_iterating_leaves_the_global_random_state_and_the_images_alone(data):
    data = data.with_(shuffle=True, augment=shift_pixels)
    state, images, labels = torch.get_rng_state(), data.images.clone(), data.labels.clone()
    for x, y in data.with_(shuffle=False):
        x.zero_()
        y.zero_()
    gather(data.batches(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data.images, images)
    assert torch.equal(data.labels, labels)


def test_drop_last_leaves_out_the_uneven_batch(data):
    data = data.with_(drop_last=True)
    assert [len(y) for _, y in data] == [16, 16, 16]
    assert len(data) == 3


@pytest.mark.parametrize("count", [1, 13, 20, 50])
def test_stratified_subset_keeps_the_proportions_of_unequal_classes(data, count):
    labels = torch.tensor([0] * 30 + [1] * 15 + [2] * 5)
    subset = data.with_(labels=labels, classes=None).subset(count)
    counts = torch.bincount(subset.labels, minlength=3)
    expected = torch.tensor([30, 15, 5]) * count / 50
    assert counts.sum() == count
    assert ((counts - expected).abs() <= 1).all()
    assert subset.num_classes == 3


def test_subset_draws_without_replacement_nested_and_by_generator(data):
    data = data.with_(labels=torch.arange(50), classes=None)
    small, large = (set(data.subset(k, stratified=False).labels.tolist()) for k in (10, 20))
    assert len(small) == 10
    assert small < large
    other = data.subset(10, stratified=False, generator=torch.Generator().manual_seed(5))
    assert set(other.labels.tolist()) != small


def test_subset_takes_numpy_counts_as_counts(data):
    assert torch.equal(data.subset(np.int64(13)).images, data.subset(13).images)
    with pytest.raises(ValueError, match="`which` must be between 1 and 50, got 51"):
        data.subset(np.int64(51))


def test_subset_by_bools_takes_those_that_are_true(data):
    mask = data.labels == 2
    for which in (mask, mask.numpy(), mask.tolist()):
        assert torch.equal(data.subset(which).images, data.images[mask])
    for which in (mask[:7], [0.9, 2.7]):
        with pytest.raises(ValueError, match="`which` must be a count, indices, or one bool an im"):
            data.subset(which)


def test_an_augmentation_may_write_in_place(data):
    inverted = data.with_(augment=lambda x, y, generator: (x.bitwise_not_(), y))
    before = data.images.clone()
    first, again = (gather(inverted)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(data.images, before)


def test_subset_by_indices_takes_them_as_they_are(data):
    subset = data.subset([3, 1, 1])
    assert torch.equal(subset.images, data.images[[3, 1, 1]])
    assert subset.labels.tolist() == [3, 1, 1]
    assert subset.num_classes == 10


def test_resized_pads_with_zeros_and_repeats_the_channel():
    images = torch.full((2, 1, 5, 4), 9, dtype=torch.uint8)
    data = DeviceImages(images, torch.tensor([0, 1]), mean=(0.3,), std=(0.2,))
    wide = data.resized(8, 3)
    assert wide.images.shape == (2, 3, 8, 8)
    assert torch.equal(wide.images[:, 2, 1:6, 2:6], images[:, 0])
    assert wide.images.long().sum() == 3 * images.long().sum()
    assert wide.mean == (0.3, 0.3, 0.3)
    assert torch.equal(data.resized().images, images)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"labels": torch.full((50,), 10)},
            r"`labels` must lie in \[0, 9\] for 10 classes, got 10",
        ),
        ({"labels": -torch.ones(50, dtype=torch.int64)}, "got -1 to -1"),
        ({"labels": torch.zeros(49, dtype=torch.int64)}, r"int64 of shape \(50,\)"),
        ({"labels": torch.zeros(50)}, "must be int64"),
        ({"images": torch.zeros(50, 3, 8, 8)}, "must be unsigned bytes"),
        ({"mean": (0.5,)}, r"`mean` must have one value per channel \(3\), got 1"),
        ({"std": (0.2, 0.0, 0.1)}, "`std` must be positive"),
        ({"mean": (0.2, float("nan"), 0.1)}, "`mean` must be finite"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(data, changes, match):
    with pytest.raises(ValueError, match=match):
        data.with_(**changes)


def test_bad_calls_are_refused(data):
    with pytest.raises(ValueError, match="`which` must be between 1 and 50, got 51"):
        data.subset(51)
    with pytest.raises(ValueError, match="`epoch` must be at least 0, got -1"):
        next(data.batches(-1))
    with pytest.raises(ValueError, match="`size` must be at least 8"):
        data.resized(7)
    with pytest.raises(ValueError, match="`channels` must be 3"):
        data.resized(None, 1)
