"""`fit_ensemble`: each member equals a training of its own, dropout and BatchNorm included."""

import copy
import csv
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

from landscape import evaluate
from landscape.models import create_model
from landscape.training import DeviceImages, Watch, adamw, fit
from landscape.training.ensemble import EnsembleResult, fit_ensemble
from landscape.training.schedule import WarmupCosine
from tests.training.runs import Stop

RATES, DECAYS, SEEDS = (0.003, 0.01, 0.002), (0.05, 0.0, 0.3), (4, 0, 7)
EPOCHS = 3
SIZES = {
    "resnet20": {"width": 4, "depths": (1, 1), "num_classes": 3},
    "vit_nano": {"image_size": 8, "dim": 12, "depth": 2, "num_classes": 3, "dropout": 0.2},
    "alternet18": {
        "depths": (2,),
        "msas": (1,),
        "heads": (2,),
        "head_dim": 4,
        "width": 4,
        "num_classes": 3,
    },
}


def make_models(name="resnet20", count=3, dtype=torch.float64, drop_path=0.3, **sizes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = SIZES[name] | {"drop_path": drop_path} | sizes
        return [create_model(name, **sizes).to(dtype) for _ in range(count)]


def make_optimizers(models, make=adamw, **settings):
    return [
        make(model, lr=rate, weight_decay=decay, **settings)
        for model, rate, decay in zip(models, RATES, DECAYS, strict=False)
    ]


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), momentum=0.9, **settings)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (22, 3, 8, 8), generator=generator, dtype=torch.uint8)
    settings = {"mean": (0.5,) * 3, "std": (0.3,) * 3, "batch_size": 8, "shuffle": True}
    return DeviceImages(images, torch.arange(22) % 3, **settings)


def soften(x, y, generator):
    share = torch.rand((), generator=generator)
    soft = share * F.one_hot(y, 3) + (1 - share) / 3
    return x + 0.1 * torch.randn(x.shape, generator=generator), soft


def assert_close(one, other, rtol=1e-10):
    """Compare two models, buffers included."""
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=lambda m, name=name: name + m)


COLUMNS = ("learning_rate", "train_loss", "train_accuracy", "validation_loss")


@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize(
    ("name", "make", "settings"),
    [
        ("resnet20", adamw, {}),
        ("vit_nano", adamw, {"decay_1d": False}),
        ("vit_nano", sgd, {}),
        ("alternet18", adamw, {}),
    ],
    ids=["BatchNorm", "ViT, two groups", "ViT, SGD", "AlterNet"],
)
def test_members_equal_separate_trainings(data, tmp_path, method, name, make, settings):
    """With stochastic depth, dropout, soft targets, clipping, rates and orders of each's own."""
    own = [data.with_(seed=seed) for seed in SEEDS]
    common = {"epochs": EPOCHS, "transform": soften, "clip": 0.5, "validation": data}
    common |= {"schedule": WarmupCosine(EPOCHS, 1)}
    alone = make_models(name)
    optimizers = make_optimizers(alone, make, **settings)
    results = [
        fit(m, d, optimizer=o, seed=s, channels_last=None if method == "loop" else False, **common)
        for m, d, o, s in zip(alone, own, optimizers, SEEDS, strict=True)
    ]
    models = make_models(name)
    optimizers = make_optimizers(models, make, **settings)
    result = fit_ensemble(
        models, own, optimizers=optimizers, seeds=SEEDS, method=method, folder=tmp_path, **common
    )
    assert result.method == method
    for k in range(3):
        assert_close(models[k], alone[k])
        for column in COLUMNS:
            mine, theirs = (getattr(r, column) for r in (result.members[k], results[k]))
            np.testing.assert_allclose(mine, theirs, rtol=1e-9)
        with (tmp_path / f"member-{k:03d}" / "log.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        losses = [float(row["train_loss"]) for row in rows]
        assert losses == result.members[k].train_loss.tolist()
    assert len({r.train_loss[-1] for r in result.members}) == 3


def test_killed_ensemble_resumes_with_either_method(data, tmp_path):
    def train(folder, method="vmap", resume=False, callbacks=None):
        models = make_models()
        optimizers = make_optimizers(models)
        result = fit_ensemble(
            models,
            data,
            epochs=4,
            optimizers=optimizers,
            schedule=WarmupCosine(4, 1),
            transform=soften,
            folder=folder,
            checkpoints=("init", "last"),
            trajectory=2,
            method=method,
            resume=resume,
            callbacks=callbacks,
        )
        return models, optimizers, result

    def stop(model, done):
        if done == 2:
            raise Stop

    whole = train(tmp_path / "whole")
    for method in ("vmap", "loop"):
        folder = tmp_path / method
        with pytest.raises(Stop):
            train(folder, callbacks=[[], [], [stop]])
        # As if killed between the states of the members: the first is an epoch ahead.
        (folder / "member-001" / "resume-00002.pt").unlink()
        (folder / "member-002" / "resume-00002.pt").write_bytes(b"")
        with pytest.warns(UserWarning, match="member-002/resume-00002.pt` is damaged"):
            models, optimizers, result = train(folder, method, resume=True)
        for k in range(3):
            assert_close(models[k], whole[0][k], rtol=0 if method == "vmap" else 1e-10)
            assert result.members[k].epoch.tolist() == [1, 2, 3, 4]
            assert list(result.members[k].checkpoints) == ["init", "last"]
            states = [o.state_dict()["state"] for o in (optimizers[k], whole[1][k])]
            for a, b in zip(states[0].values(), states[1].values(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            names = {path.name for path in (folder / f"member-{k:03d}").iterdir()}
            assert names == {
                *(f"epoch-{epoch:05d}.pt" for epoch in (0, 2, 4)),
                "resume-00003.pt",
                "resume-00004.pt",
                "log.csv",
            }


def test_member_can_be_gone_on_with_alone(data, tmp_path):
    models = make_models()
    fit_ensemble(models, data, epochs=2, folder=tmp_path, method="vmap")
    model = make_models()[1]
    result = fit(model, data, epochs=2, seed=1, folder=tmp_path / "member-001", resume=True)
    assert len(result.epoch) == 2
    assert_close(model, models[1], rtol=0)


def test_saved_result_and_files_are_those_of_single_models(data, tmp_path):
    models = make_models()
    checkpoints = {"folder": tmp_path, "checkpoints": ["last"]}
    result = fit_ensemble(models, data, epochs=1, method="vmap", **checkpoints)
    path = result.members[2].checkpoints["last"]
    twin = make_models()[0]
    twin.load_state_dict(torch.load(path, weights_only=True))
    assert_close(twin, models[2], rtol=0)
    size = sum(t.nbytes for t in twin.state_dict().values())
    assert (tmp_path / "member-002" / "epoch-00001.pt").stat().st_size < 1.5 * size + 2e4
    loaded = EnsembleResult.load(result.save(tmp_path / "result"))
    assert loaded.method == "vmap"
    assert loaded.members[1].train_loss == result.members[1].train_loss


def test_models_and_optimizers_are_their_own_again(data):
    models = make_models()
    models[1].eval()
    optimizers = make_optimizers(models)
    tensors = [t for m in models for t in (*m.parameters(), *m.buffers())]
    storages = [t.data_ptr() for t in tensors]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    fit_ensemble(models, data, epochs=1, optimizers=optimizers, transform=soften, method="vmap")
    assert torch.equal(torch.get_rng_state(), state)
    assert [t.data_ptr() for t in tensors] == storages
    assert all(p.grad is None for m in models for p in m.parameters())
    assert [m.training for m in models] == [True, False, True]
    assert [o.param_groups[0]["lr"] for o in optimizers] == list(RATES)
    kept = [v.data_ptr() for o in optimizers for s in o.state.values() for v in s.values()]
    assert len(set(kept)) == len(kept)
    for optimizer in optimizers:
        for own in optimizer.state.values():
            assert own["step"] == 3
            assert own["exp_avg"].untyped_storage().nbytes() == own["exp_avg"].nbytes


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_diverging_member_stops_all_at_the_last_good_epoch(data, tmp_path, method):
    models = make_models()
    kept = {}

    def remember(model, done):
        kept[models.index(model)] = copy.deepcopy(model.state_dict())

    optimizers = [
        torch.optim.SGD(m.parameters(), lr=rate) for m, rate in zip(models, (0, 1, 0), strict=True)
    ]
    with pytest.raises(FloatingPointError, match="Member 1: The .* in epoch 2 became NaN"):
        fit_ensemble(
            models,
            data,
            epochs=3,
            optimizers=optimizers,
            schedule=lambda t: 1e200 if t > 1 else 0.01,
            clip=None,
            folder=tmp_path,
            method=method,
            callbacks=[[remember]] * 3,
        )
    for k, model in enumerate(models):
        for name, value in model.state_dict().items():
            assert torch.equal(value, kept[k][name])
        resumes = {path.name for path in (tmp_path / f"member-{k:03d}").glob("resume*")}
        assert resumes == {"resume-00000.pt", "resume-00001.pt"}


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_callbacks_of_each_member_are_those_of_a_training_of_its_own(data, tmp_path, method):
    calls = []

    def note(model, done):
        calls.append((model, done))

    def probe(model):
        return evaluate(model, [(x.double(), y) for x, y in data])

    def watch(name):
        return Watch({"quality": probe}, folder=tmp_path / name, budget=1e9)

    common = {"epochs": 2, "transform": soften}
    alone = watch("alone")
    fit(make_models()[1], data, seed=1, channels_last=False, callbacks=[alone], **common)
    models, watches = make_models(), [watch("first"), watch("second")]
    callbacks = [[watches[0], note], [watches[1]], [note]]
    fit_ensemble(models, data, method=method, callbacks=callbacks, **common)
    assert calls == [(models[k], done) for done in (0, 1, 2) for k in (0, 2)]
    nll = [one.history("quality").values["nll"] for one in (alone, *watches)]
    np.testing.assert_allclose(nll[2], nll[0], rtol=1e-9)
    assert len(set(nll[1]) | set(nll[2])) == 6


def test_shuffling_loader_mappings_and_frozen_or_unused_parameters(data):
    """What `fit` draws from the global stream, and parameters without a gradient."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
            self.unused = nn.Parameter(torch.ones(2))

        def forward(self, pixels):
            return {"logits": self.net(pixels) * self.frozen}

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return [Wrapped().double() for _ in range(2)]

    x, y = next(iter(data.with_(batch_size=16)))
    collate = [{"pixels": a, "labels": b} for a, b in zip(x, y, strict=True)]
    loader = DataLoader(collate, batch_size=8, shuffle=True)
    models, alone = make(), make()
    fit_ensemble(models, loader, epochs=2, method="vmap")
    for k in range(2):
        fit(alone[k], loader, epochs=2, seed=k)
        assert_close(models[k], alone[k])
        assert torch.equal(models[k].unused, torch.ones(2).double())
    assert not torch.allclose(models[0].net[1].weight, models[1].net[1].weight)


@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize("shared", [True, False])
def test_members_see_the_order_of_a_loader_with_a_generator_as_if_alone(method, shared, generator):
    x, y = torch.randn(24, 6, generator=generator, dtype=torch.float64), torch.arange(24) % 3

    def loader():
        own = torch.Generator().manual_seed(5)
        return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=own)

    start = [nn.Linear(6, 3, dtype=torch.float64) for _ in range(2)]
    together, alone = (copy.deepcopy(start) for _ in range(2))
    data = loader() if shared else [loader(), loader()]
    fit_ensemble(together, data, epochs=3, method=method)
    for k, model in enumerate(alone):
        expected = loader()
        fit(model, expected, epochs=3, seed=k)
        torch.testing.assert_close(together[k].weight, model.weight)
        used = data if shared else data[k]
        assert torch.equal(used.generator.get_state(), expected.generator.get_state())


def test_weighted_loss_with_ignored_labels_and_uneven_batches(data):
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double(), ignore_index=1)
    models, alone = make_models("vit_nano"), make_models("vit_nano")
    result = fit_ensemble(models, data, epochs=2, loss=loss, validation=data, method="vmap")
    for k in range(3):
        single = fit(alone[k], data, epochs=2, loss=loss, validation=data, seed=k)
        assert_close(models[k], alone[k])
        for column in COLUMNS:
            mine, theirs = (getattr(r, column) for r in (result.members[k], single))
            np.testing.assert_allclose(mine, theirs, rtol=1e-9)


def test_other_random_layers_differ_between_members_and_are_reproducible(data):
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * (x + torch.randn_like(x)).flatten(1)[:, :3]

    losses = []
    for _ in range(2):
        result = fit_ensemble([Noise(), Noise()], data, epochs=1, method="vmap")
        losses.append([float(member.train_loss[0]) for member in result.members])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_dropout_differs_between_members_with_the_same_weights(data):
    models = [copy.deepcopy(make_models("vit_nano")[0]) for _ in range(3)]
    result = fit_ensemble(models, data, epochs=1, seeds=(0, 1, 1), method="vmap")
    losses = [float(member.train_loss[0]) for member in result.members]
    assert losses[0] != losses[1]
    assert losses[1] == losses[2]


@pytest.mark.parametrize(
    ("batch_size", "count", "method"),
    [(8, 3, "vmap"), (16, 3, "vmap"), (22, 3, "loop"), (8, 1, "loop")],
)
def test_method_is_chosen_by_the_batch_size_on_a_cpu(data, batch_size, count, method):
    batches = data.with_(batch_size=batch_size)
    samples = TensorDataset(*next(iter(data.with_(batch_size=22))))
    for given in (batches, list(batches), DataLoader(samples, batch_size)):
        assert fit_ensemble(make_models(count=count), given, epochs=1).method == method


def test_what_vmap_cannot_run_goes_in_a_loop(data):
    """A cross-entropy with class weights and label smoothing has no batching rule."""
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    settings = {"epochs": 1, "loss": nn.CrossEntropyLoss(weight, label_smoothing=0.1)}
    models = make_models(count=2)
    alone = copy.deepcopy(models[1])
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert fit_ensemble(models, data, **settings).method == "loop"
    assert torch.equal(torch.get_rng_state(), state)
    fit(alone, data, seed=1, **settings)
    assert_close(models[1], alone, rtol=0.0)
    with pytest.raises(RuntimeError):
        fit_ensemble(models, data, method="vmap", **settings)
    assert fit_ensemble([net(3), net(3)], [data, data.subset(8)], epochs=1).method == "loop"


class Scaled(nn.Linear):
    """Has an attribute and a constant of its own."""

    def __init__(self, scale, constant=1.0):
        super().__init__(5, 3)
        self.scale = scale
        self.register_buffer("constant", torch.full((5,), constant), persistent=False)

    def forward(self, x):
        return self.scale * super().forward(x * self.constant)


class Averaged(nn.Linear):
    """Assigns a buffer where a batch norm would write to it."""

    def __init__(self):
        super().__init__(5, 3)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return super().forward(x - self.mean)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x[:, None])[0][:, -1])


class Words(nn.Module):
    """The row of the padding has no gradient."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.words(x.long().abs()).mean(1))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda k: Scaled((1.0, 5.0)[k]), "differ in their weights alone"),
        (lambda k: Scaled(1.0, (1.0, 5.0)[k]), "the same buffers where these are not in the state"),
        (lambda k: Averaged(), "differ in their weights alone"),
        (lambda k: Words(), "differ in their weights alone"),
        (lambda k: Recurrent(), 'on the first batch; see if method="loop" runs it'),
    ],
    ids=["attribute", "constant", "assigned buffer", "padding", "no batching rule"],
)
def test_what_vmap_would_train_otherwise_goes_in_a_loop(make, match, generator):
    data = [(3 * torch.randn(8, 5, generator=generator), torch.arange(8) % 3) for _ in range(3)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [make(k) for k in range(2)]
    alone = copy.deepcopy(models)
    with pytest.raises((ValueError, RuntimeError), match=match):
        fit_ensemble(models, data, epochs=1, method="vmap")
    assert fit_ensemble(models, data, epochs=2).method == "loop"
    for k, model in enumerate(alone):
        fit(model, data, epochs=2, seed=k)
        assert_close(models[k], model, rtol=0.0)


class Kink(nn.Linear):
    """In float32 it is another function under `vmap`, as where rounding moves a ReLU's input."""

    def forward(self, x):
        batched = torch._C._functorch.is_batchedtensor(x)
        return super().forward(1.1 * x if batched and x.dtype == torch.float32 else x)


def test_what_rounding_makes_of_gradients_is_told_in_float64(generator):
    data = [(torch.randn(8, 5, generator=generator), torch.arange(8) % 3)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [Kink(5, 3) for _ in range(2)]
    for model in models:
        model.register_buffer("count", torch.zeros(1))
        model.weight.grad = torch.ones_like(model.weight)
    optimizers = make_optimizers(models)
    before = [(t, t.data_ptr()) for m in models for t in (*m.parameters(), *m.buffers())]
    assert fit_ensemble(models, data, epochs=2, optimizers=optimizers, method="vmap")
    assert all(t.dtype == torch.float32 and t.data_ptr() == place for t, place in before)
    moments = [s["exp_avg"] for o in optimizers for s in o.state.values()]
    assert moments
    assert all(m.dtype == torch.float32 for m in moments)


class Rated(nn.Module):
    """Functional dropout, whose rate no repr tells."""

    def __init__(self, rate):
        super().__init__()
        self.rate, self.first, self.norm = rate, nn.Linear(12, 8), nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.first(x.flatten(1))).relu()
        return self.last(F.dropout(x, self.rate, self.training))


def less(model, done):
    model.rate = 0.5 - 0.25 * done


def shrink(model, done):
    weights = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(0.9 * weights, model.parameters())


def forget(model, done):
    if done == 1:
        model.norm.running_mean = torch.zeros(8, dtype=torch.float64)


def compare(rates, callbacks, generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [Rated(rate).double() for rate in rates]
    data = [
        (torch.randn(8, 3, 2, 2, generator=generator).double(), torch.arange(8) % 3)
        for _ in range(3)
    ]
    alone = [copy.deepcopy(model) for model in models]
    for seed, model in enumerate(alone):
        fit(model, data, epochs=3, seed=seed, callbacks=callbacks, bfloat16=False)
    fit_ensemble(models, data, epochs=3, method="vmap", callbacks=[callbacks] * len(models))
    for model, other in zip(models, alone, strict=True):
        torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("callbacks", [[], [less]], ids=["as it is", "changed by a callback"])
@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.1, 0.6)], ids=["alike", "own"])
def test_each_member_has_its_rate_of_dropout(rates, callbacks, generator):
    compare(rates, callbacks, generator)


@pytest.mark.parametrize("callback", [shrink, forget])
def test_tensors_that_a_callback_exchanges_are_refused(callback, generator):
    with pytest.raises(ValueError, match="`callbacks` must leave what is trained"):
        compare((0.5, 0.5), [callback], generator)


def small():
    layers = nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_a_member_without_a_state_begins_all_anew(method, tmp_path, generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [small() for _ in range(2)]
    data = [(torch.randn(8, 3, 2, 2, generator=generator).double(), torch.arange(8) % 3)]
    kept = [copy.deepcopy(model) for model in models]
    fit_ensemble(models, data, epochs=1, method=method, folder=tmp_path)
    shutil.rmtree(tmp_path / "member-001")
    again = fit_ensemble(kept, data, epochs=1, method=method, folder=tmp_path, resume=True)
    for member, model, other in zip(again.members, models, kept, strict=True):
        assert member.epoch.tolist() == [1]
        assert 0 < member.seconds[0] < 60
        torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_parameters_of_two_precisions_are_not_stacked():
    models = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double()) for _ in range(2)]
    with pytest.raises(ValueError, match="must have parameters of one dtype"):
        fit_ensemble(models, [(torch.zeros(2, 3), torch.zeros(2).long())], epochs=1, method="vmap")


def test_settings_that_schedulers_change_are_each_members(data):
    """OneCycleLR moves the betas of AdamW too, of each member in its own way."""

    def make(models):
        optimizers = make_optimizers(models)
        cycle = torch.optim.lr_scheduler.OneCycleLR
        pairs = zip(optimizers, (0.2, 0.8), strict=False)
        return {
            "optimizers": optimizers,
            "schedule": [cycle(o, 0.01, total_steps=6, pct_start=share) for o, share in pairs],
        }

    models = make_models(count=2)
    alone = copy.deepcopy(models)
    fit_ensemble(models, data, epochs=4, method="vmap", **make(models))
    given = make(alone)
    for k, model in enumerate(alone):
        own = {"optimizer": given["optimizers"][k], "schedule": given["schedule"][k]}
        fit(model, data, epochs=4, seed=k, **own)
        assert_close(models[k], model)


def test_hooks_of_optimizers_and_parameters_are_heard(data):
    def clamp(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.data.clamp_(-0.05, 0.05)

    models = make_models(count=2)
    optimizers = make_optimizers(models)
    for optimizer in optimizers:
        optimizer.register_step_post_hook(clamp)
    fit_ensemble(models, data, epochs=1, optimizers=optimizers, method="vmap")
    assert max(float(p.detach().abs().max()) for m in models for p in m.parameters()) <= 0.05
    next(models[1].parameters()).register_hook(lambda gradient: 0 * gradient)
    with pytest.raises(ValueError, match="`models` must have no hooks on parameters"):
        fit_ensemble(models, data, epochs=1, method="vmap")
    assert fit_ensemble(models, data, epochs=1).method == "loop"


@pytest.mark.parametrize("change", [lambda m: m[1].eval(), lambda m: m[1].requires_grad_(False)])
def test_callbacks_may_not_make_members_differ(data, change):
    models = [nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Linear(3, 3)) for _ in range(2)]
    freeze = [[lambda model, done: change(model) if done else None], []]
    with pytest.raises(ValueError, match="`callbacks` must leave what is trained as it is"):
        fit_ensemble(models, data, epochs=2, callbacks=freeze, method="vmap")
    models[0].requires_grad_(True)
    fit_ensemble(models, data, epochs=2, callbacks=freeze, method="loop")


def net(width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, width))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"models": []}, "`models` must hold at least one"),
        ({"models": [net(), net(5)]}, "number 1 differs from number 0"),
        ({"models": [net(), net().double()]}, "one architecture, precision and device"),
        ({"seeds": [1]}, "`seeds` must have one entry per model, 2, got 1"),
        ({"schedule": [None] * 3}, "`schedule` must have one entry per model, 2, got 3"),
        ({"callbacks": [[]]}, "`callbacks` must have one entry per model, 2, got 1"),
        ({"callbacks": [print, print]}, "`callbacks` must have one list per model, got functions"),
        ({"callbacks": print}, "`callbacks` must have one list per model, got functions"),
        ({"seeds": 3}, "`seeds` must have one entry per model, 2, got int"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "`loss` must reduce by 'mean'"),
        ({"optimizers": []}, "`optimizers` must have one entry per model, 2, got 0"),
        ({"method": "jit"}, "`method` must be one of 'auto', 'vmap', 'loop', got 'jit'"),
        ({"bfloat16": True}, '`bfloat16` needs method="loop"'),
        ({"epochs": 0}, "`epochs` must be at least 1"),
        ({"trajectory": True}, "`folder` must be given"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments_are_refused(data, arguments, match):
    arguments = {"models": [net(), net()], "epochs": 1, "method": "vmap", **arguments}
    with pytest.raises(ValueError, match=match):
        fit_ensemble(arguments.pop("models"), data, **arguments)


def test_what_cannot_be_stacked_is_refused(data):
    models = [net(), net()]
    with pytest.raises(ValueError, match="got one of them twice"):
        fit_ensemble([models[0]] * 2, data, epochs=1)
    other = [torch.optim.SGD(models[0].parameters(), lr=0.1)] * 2
    for method in ("vmap", "loop"):
        with pytest.raises(
            ValueError, match=r"`optimizers\[1\]` must be on the parameters of `mod"
        ):
            fit_ensemble(models, data, epochs=1, optimizers=other, method=method)
    halves = [
        torch.optim.SGD(models[0].parameters(), lr=0.1),
        torch.optim.SGD([models[1][1].bias], lr=0.1),
    ]
    with pytest.raises(ValueError, match="`optimizers` must be on the same parameters"):
        fit_ensemble(models, data, epochs=1, optimizers=halves, method="vmap")
    extra = [nn.Parameter(torch.ones(())) for _ in models]
    more = [
        torch.optim.SGD([*m.parameters(), p], lr=0.1) for m, p in zip(models, extra, strict=True)
    ]
    with pytest.raises(ValueError, match="parameters of the models alone, but number 0 has others"):
        fit_ensemble(models, data, epochs=1, optimizers=more, method="vmap")
    with pytest.raises(ValueError, match=r"equally many batches, got \[3, 1\]"):
        fit_ensemble(models, [data, data.subset(8)], epochs=1, method="vmap")
    before = [p.clone() for model in models for p in model.parameters()]
    with pytest.raises(ValueError, match=r"one shape .* got \(6, 3, 8, 8\) and \(7, 3, 8, 8\)"):
        fit_ensemble(models, [data, data.subset([*range(22), 0])], epochs=1, method="vmap")
    after = [p for model in models for p in model.parameters()]
    assert [a.shape for a in after] == [b.shape for b in before]


def test_mapping_with_more_than_tensors_is_refused():
    class Flagged(nn.Linear):
        def forward(self, x, flag):
            return super().forward(x)

    batches = [{"x": torch.zeros(4, 2), "flag": True, "labels": torch.zeros(4).long()}]
    models = [Flagged(2, 3), Flagged(2, 3)]
    with pytest.raises(ValueError, match="must hold tensors alone to be stacked, got a bool"):
        fit_ensemble(models, batches, epochs=1, method="vmap")
    assert fit_ensemble(models, batches, epochs=1, method="loop").method == "loop"


def test_steps_are_shown_on_request(data, capsys):
    fit_ensemble([net(), net()], data, epochs=1, method="vmap")
    assert capsys.readouterr() == ("", "")
    fit_ensemble([net(), net()], data, epochs=1, method="vmap", progress=True)
    assert "6/6" in capsys.readouterr().err
