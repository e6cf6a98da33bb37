"""`fit`: what it computes, what it writes, what it leaves alone."""

import copy
import csv
import math
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from landscape.training import DeviceImages, FitResult, WarmupCosine, fit, fit_ensemble


def make_model(seed=0, dropout=0.2):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 3),
        )


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (22, 1, 6, 6), generator=generator, dtype=torch.uint8)
    labels = torch.arange(22) % 3
    return DeviceImages(images, labels, mean=(0.5,), std=(0.3,), batch_size=8, shuffle=True)


def jitter(x, y, generator):
    soft = F.one_hot(y, 3).float() * 0.9 + 0.1 / 3
    return x + 0.1 * torch.randn(x.shape, generator=generator), soft


def states_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_weights_equal_those_of_a_plain_loop(data):
    model, twin = make_model(dropout=0.0), make_model(dropout=0.0)
    fit(
        model,
        data,
        epochs=3,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
        schedule=WarmupCosine(3, 1),
        clip=0.5,
        channels_last=False,
    )
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    clipped = 0
    for epoch in range(3):
        for index, (x, y) in enumerate(data.batches(epoch)):
            t = epoch + index / 3
            optimizer.param_groups[0]["lr"] = 0.01 * (
                t if t < 1 else (1 + math.cos(math.pi * (t - 1) / 2)) / 2
            )
            optimizer.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            clipped += int(nn.utils.clip_grad_norm_(twin.parameters(), 0.5) > 0.5)
            optimizer.step()
    assert clipped > 0
    assert states_equal(model.state_dict(), twin.state_dict())


def test_sparse_gradients_are_clipped_as_dense_ones_are(generator):
    data = [(torch.randint(5, (8, 3), generator=generator), torch.arange(8) % 4)]
    weights = []
    for sparse in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            words = nn.Embedding(5, 2, sparse=sparse)
            model = nn.Sequential(words, nn.Flatten(), nn.Linear(6, 4))
        sgd = torch.optim.SGD(model.parameters(), 1.0)
        fit(model, data, epochs=3, optimizer=sgd, clip=0.1)
        weights.append(words.weight.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("batch_size", [7, 8, 22])
def test_history_holds_means_over_samples_however_batched(data, batch_size):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    x, y = next(iter(data.with_(batch_size=22)))
    expected_loss = F.cross_entropy(model(x), y).item()
    expected_accuracy = (model(x).argmax(1) == y).float().mean().item()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    data = data.with_(batch_size=batch_size)
    result = fit(model, data, epochs=1, optimizer=still, validation=data)
    for part in ("train", "validation"):
        assert getattr(result, f"{part}_loss")[0] == pytest.approx(expected_loss, rel=1e-6)
        accuracy = getattr(result, f"{part}_accuracy")[0]
        assert accuracy == pytest.approx(expected_accuracy, rel=1e-6)


def measured(model, data, validation, loss):
    """Histories of one epoch that moves nothing: of `fit`, and of members trained at once."""

    def still(model):
        return torch.optim.SGD(model.parameters(), lr=0.0)

    common = {"epochs": 1, "validation": validation, "loss": loss}
    twins = [copy.deepcopy(model) for _ in range(2)]
    both = fit_ensemble(twins, data, optimizers=[*map(still, twins)], method="vmap", **common)
    return [fit(model, data, optimizer=still(model), **common), *both.members]


def several(outputs, targets):
    return (outputs - targets).square().mean()


@pytest.mark.parametrize(
    ("loss", "targets", "classes"),
    [
        (nn.BCEWithLogitsLoss(), torch.ones(8, 1), False),
        (nn.BCEWithLogitsLoss(), torch.ones(8, 3).tril(), False),
        (nn.BCEWithLogitsLoss(), torch.eye(3)[torch.arange(8) % 3], True),
        (nn.CrossEntropyLoss(), torch.eye(2)[torch.arange(8) % 2], True),
        (nn.MSELoss(), torch.ones(8, 1), False),
        (F.mse_loss, torch.eye(3)[torch.arange(8) % 3], True),
        (several, torch.arange(24.0).view(8, 3), False),
        (several, torch.tensor([[2.0, -1.0, 0.0]]).repeat(8, 1), False),
        (several, torch.arange(24).view(8, 3), False),
        (lambda o, t: several(o[:, 0], t), torch.zeros(8).long(), False),
        (lambda o, t: several(o.log_softmax(1), t), torch.tensor([[0.7, 0.2, 0.1]] * 8), True),
        (nn.CrossEntropyLoss(), torch.tensor([[0.7, 0.2, 0.2]] * 8), True),
        (partial(F.cross_entropy, label_smoothing=0.1), torch.arange(8) % 3, True),
    ],
)
def test_accuracy_is_nan_where_the_targets_are_no_classes(loss, targets, classes):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(4, targets.shape[1] if targets.ndim > 1 else 1 + 2 * classes)
    batches = list(zip(x.split((5, 3)), targets.split((5, 3)), strict=True))
    labels = targets.argmax(1) if targets.is_floating_point() else targets
    right = (model(x).argmax(1) == labels).double().mean().item() if classes else np.nan
    for result in measured(model, batches, batches, loss):
        np.testing.assert_allclose(result.train_accuracy, [right])
        np.testing.assert_allclose(result.validation_accuracy, [right])


def test_ignored_labels_count_for_nothing():
    """Of pixels, in batches of unequal size and share, one of which holds nothing else."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 5, 5, generator=generator)
    y = torch.randint(3, (6, 5, 5), generator=generator)
    y[torch.rand(y.shape, generator=generator) < torch.rand(6, 1, 1, generator=generator)] = 255
    y[5] = 255
    model, loss = nn.Conv2d(2, 3, 1), nn.CrossEntropyLoss(ignore_index=255)
    batches = list(zip(x.split((4, 1, 1)), y.split((4, 1, 1)), strict=True))
    right = (model(x).argmax(1) == y)[y != 255].double().mean().item()
    for result in measured(model, batches[:2], batches, loss):
        np.testing.assert_allclose(result.train_accuracy, [right])
        np.testing.assert_allclose(result.validation_accuracy, [right])
        np.testing.assert_allclose(result.validation_loss, [loss(model(x), y).item()], rtol=1e-6)


def test_a_batch_of_ignored_labels_alone_ends_no_training(generator):
    x, y = torch.randn(12, 4, generator=generator), torch.arange(12) % 3
    ignored = torch.full((6,), -100)
    model = nn.Linear(4, 3)
    start = model.weight.detach().clone()
    settings = {"epochs": 1, "schedule": lambda t: 1.0}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="loss of step 1 in epoch 1 became NaN"):
        fit(model, [(x[:6], ignored)], optimizer=optimizer, **settings)
    assert torch.equal(model.weight, start)
    expected = F.cross_entropy(model(x[6:]), y[6:])
    result = fit(model, [(x[:6], ignored), (x[6:], y[6:])], optimizer=optimizer, **settings)
    assert result.train_loss[0] == pytest.approx(expected.item())


def test_an_ignored_class_counts_for_nothing_where_it_is_predicted():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=generator), torch.arange(30) % 3
    model, loss = nn.Linear(4, 3), nn.CrossEntropyLoss(ignore_index=0)
    nn.init.eye_(model.weight)
    right = model(x).argmax(1) == y
    assert right[y == 0].any()
    for result in measured(model, [(x, y)], [(x, y)], loss):
        np.testing.assert_allclose(result.train_accuracy, [right[y != 0].double().mean().item()])
        np.testing.assert_allclose(result.validation_accuracy, result.train_accuracy)


def test_a_history_says_what_trained_the_model(data, tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    result = fit(
        model, data, epochs=2, optimizer=optimizer, schedule=WarmupCosine(2, 1), transform=jitter,
        seed=7,
    )  # fmt: skip
    told, settings = result.provenance, result.provenance.settings
    assert (told.model, told.seed, told.num_samples) == ("Sequential", 7, 22)
    assert told.num_parameters == sum(p.numel() for p in model.parameters())
    assert (settings["optimizer"], settings["learning_rates"]) == ("SGD", (0.1,))
    assert settings["schedule"] == "WarmupCosine(epochs=2, warmup_epochs=1, per_epoch=False)"
    assert (settings["loss"], settings["transform"]) == ("cross_entropy", "jitter")
    assert FitResult.load(result.save(tmp_path / "history")) == result


class Known(IterableDataset):
    def __len__(self):
        return 6

    def __iter__(self):
        return iter([(torch.ones(4), index % 3) for index in range(6)])


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (lambda pairs: [(torch.ones(4, 4), torch.arange(4) % 3), pairs], 10),
        (lambda pairs: [{"input": torch.ones(4, 4), "labels": torch.arange(4) % 3}], 4),
        (lambda pairs: DataLoader(TensorDataset(*pairs), batch_size=4), 6),
        (lambda pairs: DataLoader(TensorDataset(*pairs), sampler=[0, 3, 4], batch_size=2), 3),
        (lambda pairs: DataLoader(TensorDataset(*pairs), batch_sampler=[[0, 1], [2, 3, 4, 5]]), 6),
        (lambda pairs: DataLoader(Known(), batch_size=4), 6),
        (lambda pairs: DataLoader([pairs, pairs], batch_size=None), 0),
    ],
    ids=["list", "mappings", "loader", "sampler", "batch sampler", "iterable", "whole batches"],
)
def test_a_history_says_how_many_samples_where_that_is_known(make, known):
    pairs = torch.ones(6, 4), torch.arange(6) % 3
    result = fit(nn.Linear(4, 3), make(pairs), epochs=1)
    assert result.provenance.num_samples == known


def test_validation_runs_in_evaluation_mode_and_without_the_transform(data):
    model = make_model(dropout=0.5)
    result = fit(model, data, epochs=1, transform=jitter, validation=data)
    x, y = next(iter(data.with_(batch_size=22)))
    expected = F.cross_entropy(model.eval()(x), y).item()
    assert result.validation_loss[0] == pytest.approx(expected, rel=1e-6)


def test_a_plateau_is_one_of_the_validation_loss_where_there_is_one(data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    data = data.with_(batch_size=22)
    wrong = [(x, (y + 1) % 3) for x, y in data]
    result = fit(model, data, epochs=4, optimizer=optimizer, schedule=schedule, validation=wrong)
    assert (np.diff(result.train_loss) < 0).all()
    assert (np.diff(result.validation_loss) > 0).all()
    assert result.learning_rate[-1] < 0.05


def test_training_learns_and_the_history_says_so(data):
    model = make_model(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    result = fit(model, data, epochs=30, optimizer=optimizer, transform=jitter)
    assert result.train_accuracy[-1] > 0.7 > 0.5 > result.train_accuracy[0]
    assert result.train_loss[-1] < result.train_loss[0]
    assert result.epoch.tolist() == list(range(1, 31))
    assert np.isnan(result.validation_loss).all()
    assert (result.seconds > 0).all()


def test_everything_but_the_weights_is_left_as_found(data):
    model = make_model()
    model[1].eval()
    optimizer = torch.optim.SGD(model[1:].parameters(), lr=0.1)
    modes = [module.training for module in model.modules()]
    parameters = dict(model.named_parameters())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    fit(model, data, epochs=2, optimizer=optimizer, transform=jitter, validation=data)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[0].weight.is_contiguous()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_norms_that_are_frozen_stay_so_and_what_has_no_optimizer_gathers_nothing(data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[2].eval()
    before, seen = model[2].running_mean.clone(), []
    model[3].register_forward_hook(lambda *_: seen.append(model[1].weight.grad))
    head = torch.optim.SGD(model[3].parameters(), lr=0.0)
    fit(model, [next(iter(data))] * 3, epochs=1, optimizer=head)
    torch.testing.assert_close(seen[2], seen[1])  # that of one step, not of two
    assert torch.equal(model[2].running_mean, before)
    assert not model[2].training
    model.eval()
    fit(model, data, epochs=1)
    assert not torch.equal(model[2].running_mean, before)


def test_an_optimizer_may_hold_what_is_frozen(data):
    model = make_model()
    model[0].requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    fit(model, data, epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    same = [torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True)]
    assert same == [True, True, False, False, False, False]


def test_labels_of_any_integer_type_and_an_empty_batch_at_the_end(data):
    x, y = next(iter(data))
    models = [make_model() for _ in range(2)]
    fit(models[0], [(x, y)], epochs=2)
    fit(models[1], [(x, y.int()), (x[:0], y[:0].int())], epochs=2, schedule=WarmupCosine(2, 1))
    assert math.isfinite(fit(models[1], [(x, y.int()), (x[:0], y[:0])], epochs=1).train_loss[0])


def test_data_may_draw_from_any_global_stream():
    class Noisy(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return torch.full((1, 6, 6), random.random()), index % 3

    weights = []
    for seed in (0, 1):
        random.seed(seed)
        state = random.getstate()
        model = make_model()
        fit(model, DataLoader(Noisy(), 4), epochs=2)
        assert random.getstate() == state
        weights.append(model[0].weight.detach().clone())
    assert torch.equal(*weights)


def test_flags_are_put_back_after_an_exception(data):
    model = make_model().eval()

    def fail(x, y, generator):
        raise RuntimeError("broken transform")

    with pytest.raises(RuntimeError, match="broken transform"):
        fit(model, data, epochs=1, transform=fail)
    assert not any(module.training for module in model.modules())


def test_same_seed_same_weights_whatever_the_global_state(data):
    states = []
    for global_seed, seed in ((0, 0), (1, 0), (0, 1)):
        model = make_model(dropout=0.5)
        torch.manual_seed(global_seed)
        fit(model, data, epochs=2, transform=jitter, seed=seed)
        states.append(model.state_dict())
    assert states_equal(states[0], states[1])
    assert not states_equal(states[0], states[2])


def test_transform_is_drawn_anew_for_every_batch_and_epoch(data):
    draws = []

    def remember(x, y, generator):
        draws.append(torch.rand((), generator=generator).item())
        return x, y

    fit(make_model(), data, epochs=3, transform=remember)
    assert len(set(draws)) == 9


def test_named_checkpoints_and_trajectory_are_the_weights_of_their_epochs(data, tmp_path):
    model = make_model()
    seen = {}

    def remember(model, done):
        seen[done] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    result = fit(
        model,
        data,
        epochs=5,
        schedule=WarmupCosine(5, 2),
        folder=tmp_path,
        checkpoints=("init", "warmup", 3, "last"),
        trajectory=2,
        callbacks=[remember],
    )
    assert list(seen) == [0, 1, 2, 3, 4, 5]
    assert list(result.checkpoints) == ["init", "warmup", 3, "last"]
    for name, epoch in (("init", 0), ("warmup", 2), (3, 3), ("last", 5)):
        state = torch.load(result.checkpoints[name], weights_only=True)
        assert states_equal(state, seen[epoch])
        make_model(seed=9).load_state_dict(state)
    trajectory = [torch.load(path, weights_only=True) for path in result.trajectory]
    assert len(trajectory) == 4
    for state, epoch in zip(trajectory, (0, 2, 4, 5), strict=True):
        assert states_equal(state, seen[epoch])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"epoch-{epoch:05d}.pt" for epoch in (0, 2, 3, 4, 5)} | {
        "resume-00004.pt",
        "resume-00005.pt",
        "log.csv",
    }


def test_trajectory_true_keeps_every_epoch(data, tmp_path):
    result = fit(make_model(), data, epochs=3, folder=tmp_path, trajectory=True)
    assert [path[-8:-3] for path in result.trajectory] == ["00000", "00001", "00002", "00003"]


def test_log_and_saved_result_hold_the_history(data, tmp_path):
    result = fit(make_model(), data, epochs=3, folder=tmp_path, validation=data, checkpoints=[1])
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for column in rows[0]:
        values = [float(row[column]) for row in rows]
        assert values == getattr(result, column).tolist()
    loaded = FitResult.load(result.save(tmp_path / "result"))
    assert loaded.checkpoints == result.checkpoints
    assert np.array_equal(loaded.train_loss, result.train_loss)


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_nan_stops_with_the_last_good_weights(data, tmp_path, where):
    model = make_model(dropout=0.0)
    calls = []

    def loss(outputs, targets):
        calls.append(0)
        value = F.cross_entropy(outputs, targets)
        if len(calls) == 5 and where == "loss":
            return value * float("nan")
        if len(calls) == 6 and where == "weights":  # a finite loss with a broken gradient
            outputs.register_hook(lambda gradient: gradient * float("inf"))
        return value

    kept = {}

    def remember(model, done):
        kept.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    message = {
        "loss": "loss of step 2 in epoch 2 .* end of epoch 1",
        "weights": "The weights in epoch 2",
    }
    with pytest.raises(FloatingPointError, match=message[where]):
        fit(model, data, epochs=4, loss=loss, folder=tmp_path, callbacks=[remember], clip=None)
    assert states_equal(model.state_dict(), kept)
    assert {path.name for path in tmp_path.glob("resume*")} == {
        "resume-00000.pt",
        "resume-00001.pt",
    }


def test_pytorch_scheduler_is_stepped_once_an_epoch(data):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    result = fit(model, data, epochs=5, optimizer=optimizer, schedule=schedule)
    np.testing.assert_allclose(result.learning_rate, [1, 1, 0.1, 0.1, 0.01])


def test_default_schedule_warms_up_and_ends_near_zero(data):
    result = fit(make_model(), data, epochs=8)
    rates = result.learning_rate / 1.25e-4
    last_step = np.arange(8) + 2 / 3
    expected = [WarmupCosine(8, 5)(position) for position in last_step]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_mapping_batches_and_outputs_with_logits(data):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_model(dropout=0.0)

        def forward(self, pixel_values):
            return SimpleNamespace(logits=self.net(pixel_values))

    model, plain = Wrapped(), make_model(dropout=0.0)
    mappings = [{"pixel_values": x, "labels": y} for x, y in data]
    fit(model, mappings, epochs=2)
    fit(plain, list(data), epochs=2)
    assert states_equal(model.net.state_dict(), plain.state_dict())


def test_float64_model_trains_in_float64(data):
    model = make_model(dropout=0.0).double()
    fit(model, data, epochs=1, transform=jitter)
    assert model[0].weight.dtype == torch.float64


@pytest.mark.parametrize("option", ["channels_last", "bfloat16"])
def test_options_for_speed_change_only_rounding(data, option):
    losses = {}
    for value in (False, True):
        model = make_model(dropout=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        result = fit(model, data, epochs=3, optimizer=optimizer, **{option: value})
        losses[value] = result.train_loss
        assert model[0].weight.is_contiguous()
    tolerance = {"channels_last": 1e-5, "bfloat16": 2e-2}[option]
    np.testing.assert_allclose(losses[True], losses[False], rtol=tolerance)
    if option == "bfloat16":
        assert not np.array_equal(losses[True], losses[False])


@pytest.mark.parametrize(
    ("kernel", "after", "channels_last"),
    [
        (3, nn.Identity(), True),
        (2, nn.Identity(), False),  # patches side by side
        (3, nn.Conv2d(4, 4, 1), True),
        (3, nn.Conv2d(4, 4, 1, stride=2), False),  # its gradient would be wrong or crash
    ],
)
def test_channels_last_is_the_default_for_conv_nets_that_it_does_not_break(
    kernel, after, channels_last, data
):
    formats = []

    def spy(outputs, targets):
        formats.append(not model[0].weight.is_contiguous())
        return F.cross_entropy(outputs, targets)

    pool = nn.AdaptiveAvgPool2d(1)
    conv = nn.Conv2d(2, 4, kernel, stride=2)
    model = nn.Sequential(conv, after, pool, nn.Flatten(), nn.Linear(4, 3))
    widen = DeviceImages(
        data.images.repeat(1, 2, 1, 1), data.labels, mean=(0.5,) * 2, std=(0.3,) * 2
    )
    fit(model, widen, epochs=1, loss=spy)
    assert formats == [channels_last]


def test_a_spectral_norm_takes_the_steps_of_the_forward_passes_alone(data):
    norm = nn.utils.parametrizations.spectral_norm
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv2d(1, 4, 3)), nn.Flatten(1), nn.LazyLinear(3))
    model(data.images[:2].float())
    alone = copy.deepcopy(model)
    batch = next(iter(data.batches(0)))
    fit(model, [batch], epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    alone(batch[0])
    vectors = [m[0].parametrizations.weight[0]._u for m in (model, alone)]
    torch.testing.assert_close(*vectors, rtol=1e-6, atol=1e-6)


def test_distributed_models_train_as_those_that_are_not(data, alone):
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(1), nn.LazyLinear(3))
    plain(data.images[:2].float())
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    for each in (plain, model):
        fit(each, data, epochs=2, optimizer=torch.optim.SGD(each.parameters(), lr=0.1))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="`channels_last` must be False for Distributed"):
        fit(model, data, epochs=1, channels_last=True)


def test_every_weight_gets_its_own_memory_format_back(data):
    formats = []

    def spy(outputs, targets):
        formats.append([conv.weight.stride() for conv in (first, second)])
        return F.cross_entropy(outputs, targets)

    first, second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 1, 3).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), first, second, nn.Flatten(), nn.Linear(4, 3))
    before = [(p.stride(), p.data_ptr()) for p in model.parameters()]
    fit(model, data, epochs=1, loss=spy)
    assert formats[0] == [(18, 1, 6, 2), (36, 1, 12, 4)]
    assert [(p.stride(), p.data_ptr()) for p in model.parameters()] == before


def test_bar_only_on_request(data, capsys):
    fit(make_model(), data, epochs=2)
    assert capsys.readouterr() == ("", "")
    fit(make_model(), data, epochs=2, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Epoch 2/2" in shown.err
    assert "6/6" in shown.err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"epochs": 0}, "`epochs` must be at least 1, got 0"),
        ({"epochs": 2.5}, "`epochs` must be a whole number, got 2.5"),
        ({"trajectory": 1.5}, "`trajectory` must be a whole number, got 1.5"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        (
            {"schedule": WarmupCosine(3, 1.5), "checkpoints": ["warmup"]},
            "where `schedule` has whole `warmup_epochs`, got 'warmup'",
        ),
        (
            {"schedule": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)]), 1)},
            "`schedule` must be a scheduler on the optimizer that trains",
        ),
        ({"clip": 0.0}, "`clip` must be positive or None, got 0.0"),
        ({"checkpoints": ["init"], "folder": None}, "`folder` must be given"),
        ({"trajectory": True, "folder": None}, "`folder` must be given"),
        ({"resume": True, "folder": None}, "`folder` must be given to `resume`"),
        ({"checkpoints": [4]}, "`checkpoints` must be epochs from 0 to 3, .* got 4"),
        ({"checkpoints": ["end"]}, "got 'end'"),
        ({"checkpoints": ["warmup"], "schedule": lambda _: 1.0}, "where `schedule` has"),
        ({"trajectory": -1}, "`trajectory` must be at least 0, got -1"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "'mean' over samples, got .*='sum'"),
        ({"callbacks": print}, "`callbacks` must be a list of functions, got a function"),
        (
            {"optimizer": torch.optim.SGD(make_model().parameters())},
            "`optimizer` must be on the parameters of `model`, got 6 of 6 that are not",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments_are_refused_before_training(data, tmp_path, arguments, match):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        fit(model, data, **{"epochs": 3, "folder": tmp_path, **arguments})
    assert states_equal(model.state_dict(), before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"loss": None}, "`loss` must be a function of outputs and targets, got None"),
        ({"loss": nn.CrossEntropyLoss}, "`loss` must be a function .* got <class"),
        ({"transform": "x"}, r"`transform` must be a function of \(x, y, generator\)"),
        ({"schedule": 3}, "`schedule` must be a function of the epoch, or a PyTorch sch.*, got 3"),
        ({"optimizer": 3}, "`optimizer` must be a torch.optim.Optimizer, got int"),
        ({"clip": "x"}, "`clip` must be positive or None, got 'x'"),
        ({"callbacks": [print, 3]}, "`callbacks` must be functions of the model .*, got 3"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_arguments_of_another_type_are_named(data, arguments, match):
    with pytest.raises((TypeError, ValueError), match=match):
        fit(make_model(), data, epochs=1, **arguments)
    with pytest.raises(TypeError, match="`model` must be a torch.nn.Module, got NoneType"):
        fit(None, data, epochs=1)


def test_a_model_made_in_inference_mode_is_refused(data):
    with torch.inference_mode():
        model = make_model()
    with pytest.raises(ValueError, match=r"`model` must have been made outside of `torch.infer"):
        fit(model, data, epochs=1)
    assert fit(copy.deepcopy(model), data, epochs=1).train_loss.size


def test_a_transform_that_returns_the_images_alone_is_told_what_to_return(data):
    with pytest.raises(TypeError, match=r"`transform` must return \(x, y\) .*, got a Tensor"):
        fit(make_model(), data, epochs=1, transform=lambda x, y, generator: x)


def test_what_cannot_train_is_refused(data):
    model = make_model()
    with pytest.raises(ValueError, match="must take its step from one gradient, got LBFGS"):
        fit(model, data, epochs=1, optimizer=torch.optim.LBFGS(model.parameters()))
    stale = torch.optim.SGD(model.parameters())
    model[-1] = nn.Linear(16, 3)
    with pytest.raises(ValueError, match="`optimizer` .* got 2 of 6 that are not; make it when"):
        fit(model, data, epochs=1, optimizer=stale)
    frozen = torch.optim.SGD(model.requires_grad_(False).parameters())
    with pytest.raises(ValueError, match="`optimizer` .* requires a gradient, got 6 that do not"):
        fit(model, data, epochs=1, optimizer=frozen)
    for untrained in (model, nn.Flatten()):
        with pytest.raises(ValueError, match="`model` must have a parameter that requires a grad"):
            fit(untrained, data, epochs=1)


@pytest.mark.parametrize("device", ["meta", "cpu"], ids=["meta", "lazy"])
def test_models_whose_weights_are_not_there_are_refused(data, device):
    with torch.device(device):
        model = make_model() if device == "meta" else nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    match = "`model` has .*(; load its weights first|; run one forward pass first)"
    with pytest.raises(ValueError, match=match):
        fit(model, data, epochs=1)
    with pytest.raises(ValueError, match=match):
        fit_ensemble([model], data, epochs=1)


def test_gradients_that_the_caller_has_switched_off(data):
    models = [make_model(), make_model()]
    fit(models[0], data, epochs=1)
    with torch.no_grad():
        fit(models[1], data, epochs=1)
        assert not torch.is_grad_enabled()
    assert states_equal(models[0].state_dict(), models[1].state_dict())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of `torch.inference"):
        fit(make_model(), data, epochs=1)


def test_bad_data_are_refused(data):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(data)

    class Empty(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(ValueError, match="`data` must have a length.*pass a list, or a DataLoader"):
        fit(make_model(), DataLoader(Endless(), batch_size=None), epochs=1)
    with pytest.raises(TypeError, match="one-shot"):
        fit(make_model(), iter(data), epochs=1)
    with pytest.raises(TypeError, match="`validation` must be an iterable of batches .* got int"):
        fit(make_model(), data, epochs=1, validation=3)
    with pytest.raises(TypeError, match=r"`validation` must be re-iterable .*list\(validation\)"):
        fit(make_model(), data, epochs=1, validation=iter(data))
    few = DataLoader(TensorDataset(torch.zeros(5, 1, 6, 6)), batch_size=9, drop_last=True)
    for validation in ([], few, DataLoader(Empty(), batch_size=None)):
        with pytest.raises(ValueError, match="`validation` must yield at least one batch"):
            fit(make_model(), data, epochs=1, validation=validation)
    with pytest.raises(ValueError, match="`data` must hold targets, got none in batch 0"):
        fit(make_model(), [{"input": torch.zeros(2, 1, 6, 6)}], epochs=1)
    with pytest.raises(ValueError, match="`data` must yield at least one batch"):
        fit(make_model(), [], epochs=1)


@pytest.mark.parametrize("where", ["training", "validation", "loop", "vmap", "auto"])
def test_targets_that_a_loss_would_broadcast_are_refused(where):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    bad, good = [(x, x[:, 0])], [(x, x[:, :1])]
    models = [nn.Linear(4, 1), nn.Linear(4, 1)]
    train = {
        "training": partial(fit, models[0], bad),
        "validation": partial(fit, models[0], good, validation=bad),
    }.get(where, partial(fit_ensemble, models, bad, method=where))
    match = r"`data` must have targets of shape \(8, 1\) .* got torch.float32 \(8,\)"
    with pytest.raises(ValueError, match=match):
        train(epochs=1, loss=F.mse_loss)


def kl_div(outputs, targets):
    return (targets * (targets.log() - outputs)).sum() / len(targets)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (kl_div, torch.full((8, 3), 1 / 3)),
        (lambda outputs, targets: several(outputs[:, 0], targets), torch.zeros(8)),
        (lambda outputs, targets: F.cross_entropy(outputs, targets[:, 0]), torch.ones(8, 1).long()),
    ],
    ids=["soft targets", "regression", "classes"],
)
def test_losses_of_ones_own_take_targets_as_they_want_them(loss, targets):
    batches = [(torch.ones(8, 4), targets)]
    for result in measured(nn.Linear(4, 3), batches, batches, loss):
        assert np.isfinite([result.train_loss, result.validation_loss]).all()


@pytest.mark.parametrize("bad", [3, -1])
@pytest.mark.parametrize("where", ["training", "validation", "loop", "vmap", "auto"])
def test_a_label_without_an_output_is_named(where, bad):
    x, y = torch.ones(8, 4), torch.arange(8) % 3
    good, wrong = (x, y), (x, torch.where(torch.arange(8) == 5, bad, y))
    models = [nn.Linear(4, 3), nn.Linear(4, 3)]
    train = {
        "training": partial(fit, models[0], [good, wrong]),
        "validation": partial(fit, models[0], [good], validation=[wrong]),
    }.get(where, partial(fit_ensemble, models, [good, wrong], method=where))
    match = f"`data` must have labels in 0 … 2 for the 3 outputs of `model`, got label {bad}"
    with pytest.raises(ValueError, match=match):
        train(epochs=1)


def test_an_error_of_the_first_batch_says_what_was_trained_on():
    batch = torch.zeros(2, 1, 6, 6, dtype=torch.uint8), torch.arange(2)
    with pytest.raises(RuntimeError) as caught:
        fit(make_model(), [batch], epochs=1)
    assert caught.value.__notes__ == [
        "It came from training on the first batch of `data`: torch.uint8 (2, 1, 6, 6), "
        "torch.int64 (2,)."
    ]


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_a_model_that_writes_into_its_input_leaves_the_data(method):
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x.sub_(1.0))

    x, y = torch.ones(8, 4), torch.arange(8) % 3
    fit(Centred(4, 3), [(x, y)], epochs=2, validation=[(x, y)])
    fit_ensemble([Centred(4, 3), Centred(4, 3)], [(x, y)], epochs=2, method=method)
    assert (x == 1).all()
