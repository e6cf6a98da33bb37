"""`Watch`: what it measures when, what it costs, what it keeps, and what it leaves alone."""

import random
import sys
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from landscape import Objective, Result, evaluate, feature_variance, hessian_max_spectrum
from landscape.models import resnet20
from landscape.training import (
    DeviceImages,
    LightningWatch,
    TrainerWatch,
    Watch,
    WatchHistory,
    fit,
)
from tests.cases import assert_untouched, snapshot


@dataclass(frozen=True)
class Reading(Result):
    """A number, an array, and a result inside."""

    value: float
    pair: tuple[float, float]
    array: np.ndarray
    text: str = ""
    inner: "Reading | None" = None


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sys.modules["landscape.training.watch"], "perf_counter", clock)
    return clock


def taking(clock, seconds, calls):
    """Return a probe that takes some time, and notes when."""

    def probe(model):
        clock.now += seconds
        calls.append(clock.now)
        return Reading(float(len(calls)), (1.0, 2.0), np.zeros(2))

    return probe


def weight_norm(model):
    value = float(next(model.parameters()).detach().norm())
    return Reading(
        value, (value, 2 * value), np.array([value]), "x", Reading(1, (0, 0), np.ones(3))
    )


def rows(folder):
    return [line.split(",")[:3] for line in (folder / "watch.csv").read_text().splitlines()[1:]]


def test_it_measures_every_so_many_steps_and_reads_back_what_it_wrote(tmp_path):
    model = nn.Linear(2, 2)
    looking = Watch({"norm": weight_norm}, folder=tmp_path, every=2, budget=1e9)
    norms = []
    for epoch in range(6):
        looking(model, epoch)
        norms.append(float(model.weight.detach().norm()))
        with torch.no_grad():
            model.weight.mul_(1.5)
    history = looking.history("norm")
    assert history.step.tolist() == [0, 2, 4]
    assert (history.seconds > 0).all()
    assert history.skipped.size == 0
    values = history.values
    assert set(values) == {"value", "pair", "array", "inner.value", "inner.pair", "inner.array"}
    np.testing.assert_array_equal(values["value"], norms[::2])
    np.testing.assert_array_equal(values["pair"], np.outer(norms[::2], [1, 2]))
    assert values["inner.array"].shape == (3, 3)
    assert [result.text for result in history.results] == ["x"] * 3
    again = WatchHistory.read(tmp_path, "norm")
    np.testing.assert_array_equal(again.values["array"], values["array"])
    path = history.save(tmp_path / "history")
    np.testing.assert_array_equal(WatchHistory.load(path).values["value"], values["value"])
    assert Reading.load(tmp_path / "norm/000002.npz").value == norms[2]


def test_an_infinite_budget_skips_nothing(tmp_path):
    looking = Watch({"norm": weight_norm}, folder=tmp_path, budget=float("inf"))
    for epoch in range(3):
        looking(nn.Linear(2, 2), epoch)
    assert looking.history("norm").step.tolist() == [0, 1, 2]


def test_a_field_whose_shape_changes_is_left_out_of_the_table(tmp_path):
    sizes = iter([2, 3])

    def probe(model):
        return Reading(1.0, (0.0, 0.0), np.zeros(next(sizes)))

    looking = Watch({"size": probe}, folder=tmp_path, budget=1e9)
    looking(nn.Linear(2, 2), 0)
    looking(nn.Linear(2, 2), 1)
    assert set(looking.history("size").values) == {"value", "pair"}


def test_each_probe_keeps_within_its_share_of_the_training_time(tmp_path, clock):
    cheap, dear = [], []
    probes = {"cheap": taking(clock, 1, cheap), "dear": taking(clock, 6, dear)}
    looking = Watch(probes, folder=tmp_path, budget=0.2)
    clock.now += 50  # before step 0 nothing is trained
    for epoch in range(41):
        looking(nn.Linear(2, 2), epoch)
        clock.now += 10
    assert looking.training_seconds == 400
    assert looking.probe_seconds == len(cheap) + 6 * len(dear)
    # A tenth of the training each: after t epochs t seconds. The first ones are free of it.
    assert looking.history("cheap").step.tolist() == [0, *range(2, 41)]
    assert looking.history("dear").step.tolist() == [0, 12, 18, 24, 30, 36]
    assert looking.history("cheap").skipped.tolist() == [1]
    skipped = looking.history("dear").skipped.tolist()
    assert skipped == [epoch for epoch in range(41) if epoch not in (0, 12, 18, 24, 30, 36)]
    assert looking.probe_seconds <= 0.2 * looking.training_seconds
    assert rows(tmp_path)[:4] == [
        ["0", "cheap", "measured"],
        ["0", "dear", "measured"],
        ["1", "cheap", "skipped"],
        ["1", "dear", "skipped"],
    ]


def test_time_before_the_first_call_is_training_in_a_loop_that_begins_with_step_1(tmp_path, clock):
    looking = Watch({"a": taking(clock, 1, [])}, folder=tmp_path)
    clock.now += 7
    looking(nn.Linear(2, 2), 1)
    assert looking.training_seconds == 7
    clock.now += 5
    looking(nn.Linear(2, 2), 2)
    assert looking.training_seconds == 12  # without the second that the probe took


def make_data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (24, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(24) % 3
    return DeviceImages(images, labels, mean=(0.5,) * 3, std=(0.3,) * 3, batch_size=8, shuffle=True)


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return resnet20(width=2, depths=(1, 1), num_classes=3, drop_path=0.3)


class Stop(Exception):
    """Stands for whatever ends a process."""


def probes(data):
    batches = list(data.with_(batch_size=12, shuffle=False))
    objective = Objective(weight_decay=0.05)
    return {
        "hmes": lambda m: hessian_max_spectrum(m, batches, objective=objective, k=1, tol=0.05),
        "variance": partial(feature_variance, data=batches),
        "quality": partial(evaluate, data=batches),
    }


def train(data, folder, callbacks=(), epochs=4, resume=False):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    result = fit(
        model,
        data,
        epochs=epochs,
        optimizer=optimizer,
        folder=folder,
        resume=resume,
        callbacks=callbacks,
        validation=data,
    )
    return model, result


def test_training_is_the_same_with_and_without_it(tmp_path):
    data = make_data()
    looking = Watch(probes(data), folder=tmp_path / "watch", every=4, budget=1e9)
    model, result = train(data, tmp_path / "run", [looking])
    plain, expected = train(data, tmp_path / "plain")
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in model.state_dict().items())
    np.testing.assert_array_equal(result.train_loss, expected.train_loss)
    for name in ("hmes", "variance", "quality"):
        assert looking.history(name).step.tolist() == [0, 4]
    quality = looking.history("quality").values
    np.testing.assert_allclose(quality["nll"][1:], result.validation_loss[3:], rtol=1e-5)
    assert looking.history("hmes").values["eigenvalues"].shape == (2, 2, 1)
    assert looking.history("variance").values["variance"].shape[0] == 2


def test_a_loop_of_ones_own_is_the_same_with_and_without_it(tmp_path):
    """With a loader that shuffles, dropout, and draws from NumPy and Python; a probe draws too."""
    images = next(iter(make_data().with_(batch_size=24)))
    loader = DataLoader(TensorDataset(*images), batch_size=8, shuffle=True)

    looking = Watch(
        {"quality": lambda model: draw() and evaluate(model, loader)}, folder=tmp_path, budget=1e9
    )

    def draw():
        return random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002

    def train(callback):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for epoch in range(3):
            callback(model, epoch)
            for x, y in loader:
                noise = draw()
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x + noise), y).backward()
                optimizer.step()
        return model.state_dict()

    states = []
    for callback in (looking, lambda model, epoch: None):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        states.append(train(callback))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.gpu
def test_a_probe_leaves_the_random_state_of_a_gpu(tmp_path):
    model = nn.Linear(2, 2, device="cuda")
    state = torch.cuda.get_rng_state()

    def probe(model):
        torch.rand(3, device="cuda")
        return weight_norm(model)

    Watch({"norm": probe}, folder=tmp_path)(model, 0)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_the_model_is_left_as_it_was(tmp_path):
    data, model = make_data(), make_model()
    model(next(iter(data))[0]).square().sum().backward()
    model.stages[0].eval()
    before = snapshot(model)
    Watch(probes(data), folder=tmp_path)(model, 0)
    assert_untouched(model, before)


@pytest.mark.parametrize("stop", [("train", 3), ("measure", 2), ("measure", 3)], ids=str)
def test_a_killed_run_goes_on_and_its_record_is_that_of_an_uninterrupted_one(tmp_path, stop, clock):
    data = make_data()
    where, when = stop
    calls = []

    def killed(model):
        calls.append(0)
        if where == "measure" and len(calls) == when + 1:
            raise Stop
        return weight_norm(model)

    def end(model, epoch):
        if where == "train" and epoch == when:
            raise Stop

    def tick(model, epoch):
        clock.now += 10

    folder, run = tmp_path / "watch", tmp_path / "run"
    first = Watch({"norm": killed}, folder=folder, budget=1e9)
    with pytest.raises(Stop):
        train(data, run, [tick, first, end])
    second = Watch({"norm": weight_norm}, folder=folder, budget=1e9, resume=True)
    train(data, run, [tick, second], resume=True)
    whole = Watch({"norm": weight_norm}, folder=tmp_path / "whole", budget=1e9)
    train(data, tmp_path / "other", [tick, whole])
    assert second.history("norm").step.tolist() == [0, 1, 2, 3, 4]
    for name, values in whole.history("norm").values.items():
        np.testing.assert_array_equal(second.history("norm").values[name], values)
    assert first.training_seconds == 10 * when
    assert second.training_seconds == whole.training_seconds == 40


def test_what_lies_beyond_the_epoch_that_training_goes_back_to_is_measured_again(tmp_path, clock):
    model, calls = nn.Linear(2, 2), []
    first = Watch({"a": taking(clock, 1, calls)}, folder=tmp_path, budget=1e9)
    for epoch in range(5):
        clock.now += 10
        first(model, epoch)
    second = Watch({"a": taking(clock, 1, calls)}, folder=tmp_path, budget=1e9, resume=True)
    second(model, 2)
    assert len(calls) == 5  # that of epoch 2 is there
    assert rows(tmp_path) == [[str(epoch), "a", "measured"] for epoch in range(3)]
    assert not (tmp_path / "a/000003.npz").exists()
    clock.now += 10
    second(model, 3)
    assert second.training_seconds == 30
    assert second.history("a").values["value"].tolist() == [1, 2, 3, 6]


def test_what_was_spent_before_an_interruption_is_paid_off_after_it(tmp_path, clock):
    model, calls = nn.Linear(2, 2), []
    probes = {"dear": taking(clock, 6, calls)}
    looking = Watch(probes, folder=tmp_path, budget=0.2)
    for epoch in range(14):
        looking(model, epoch)
        if epoch == 3:
            looking = Watch(probes, folder=tmp_path, budget=0.2, resume=True)
            looking(model, epoch)
        clock.now += 10
    assert looking.history("dear").step.tolist() == [0, 6, 9, 12]  # 2 seconds an epoch
    assert looking.training_seconds == 130


def test_a_line_of_the_log_that_was_cut_off_is_measured_again(tmp_path):
    model, probes = nn.Linear(2, 2), {"a": weight_norm}
    first = Watch(probes, folder=tmp_path, budget=1e9)
    first(model, 0)
    first(model, 1)
    log = tmp_path / "watch.csv"
    log.write_bytes(log.read_bytes()[:-5])
    second = Watch(probes, folder=tmp_path, budget=1e9, resume=True)
    assert second.history("a").step.tolist() == [0]
    second(model, 1)
    second(model, 2)
    assert rows(tmp_path) == [[str(epoch), "a", "measured"] for epoch in range(3)]


def test_a_finished_run_is_not_measured_again(tmp_path):
    data = make_data()
    train(data, tmp_path / "run", [Watch({"norm": weight_norm}, folder=tmp_path / "w")], epochs=1)
    stamp = (tmp_path / "w/norm/000000.npz").stat().st_mtime_ns
    again = Watch({"norm": weight_norm}, folder=tmp_path / "w", resume=True)
    train(data, tmp_path / "run", [again], epochs=1, resume=True)
    assert (tmp_path / "w/norm/000000.npz").stat().st_mtime_ns == stamp


def test_what_cannot_be_is_refused(tmp_path):
    norm = {"norm": weight_norm}
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        Watch(norm, folder=tmp_path, every=0)
    with pytest.raises(ValueError, match="`budget` must be positive, a share .*, got 0"):
        Watch(norm, folder=tmp_path, budget=0)
    with pytest.raises(ValueError, match="`probes` must hold at least one"):
        Watch({}, folder=tmp_path)
    with pytest.raises(TypeError, match="`probes` must be functions of the model, got 3"):
        Watch({"norm": 3}, folder=tmp_path)
    for name in ("", "a/b", "..", ".hidden"):
        with pytest.raises(ValueError, match="names that are file names, got"):
            Watch({name: weight_norm}, folder=tmp_path)
    looking = Watch(norm, folder=tmp_path)
    with pytest.raises(ValueError, match="`name` must be a probe recorded in .* there are none"):
        looking.history("norm")
    looking(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match="got 'nrm'; there are norm"):
        looking.history("nrm")
    with pytest.raises(ValueError, match="`step` must not go back, got 2 after 3"):
        looking(nn.Linear(2, 2), 2)
    with pytest.raises(ValueError, match="`folder` must hold no record yet.*resume=True"):
        Watch(norm, folder=tmp_path)
    wrong = Watch({"norm": lambda model: 1.0}, folder=tmp_path / "wrong")
    with pytest.raises(TypeError, match="must return a Result, got a float from 'norm'"):
        wrong(nn.Linear(2, 2), 0)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x81\n",
        b"a,b\n1,2\n",
        b"step,probe,status,seconds,training\n1,norm\n",
        b"step,probe,status,seconds,training\nx,norm,measured,1,2\n",
    ],
    ids=["bytes", "columns", "short", "word"],
)
def test_what_is_no_log_is_refused(tmp_path, content):
    (tmp_path / "watch.csv").write_bytes(content)
    with pytest.raises(ValueError, match="`folder` must hold the log of a Watch, got .*watch.csv"):
        Watch({"norm": weight_norm}, folder=tmp_path, resume=True)


def test_fit_calls_back_before_the_first_epoch_and_after_each(tmp_path):
    calls = []
    model, _ = train(make_data(), tmp_path, [lambda m, e: calls.append((m, e, m.training))])
    assert calls == [(model, epoch, True) for epoch in range(5)]
    calls.clear()
    train(make_data(), tmp_path, [lambda m, e: calls.append(e)], resume=True)
    assert calls == [4]


@pytest.mark.thirdparty
def test_the_trainer_of_hugging_face(tmp_path):
    callback = pytest.importorskip("transformers.trainer_callback", reason="needs transformers")
    model = nn.Linear(2, 2)
    looking = Watch({"norm": weight_norm}, folder=tmp_path, budget=1e9)
    handler = callback.CallbackHandler([TrainerWatch(looking)], model, None, None, None)
    state, control = callback.TrainerState(), callback.TrainerControl()
    handler.on_train_begin(None, state, control)
    for epoch in (1, 2):
        with torch.no_grad():
            model.weight.mul_(2)
        state.epoch = epoch - 1e-9
        handler.on_step_end(None, state, control)
        handler.on_epoch_end(None, state, control)
    assert looking.history("norm").step.tolist() == [0, 1, 2]
    norms = looking.history("norm").values["value"]
    np.testing.assert_allclose(norms, norms[0] * np.array([1, 2, 4]), rtol=1e-6)
    state.is_world_process_zero, state.epoch = False, 3
    handler.on_epoch_end(None, state, control)
    assert looking.history("norm").step.tolist() == [0, 1, 2]


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    looking = Watch({"norm": weight_norm}, folder=tmp_path, budget=1e9)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[LightningWatch(looking)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    batches = [(torch.randn(4, 2), torch.arange(4) % 3)]
    trainer.fit(Module(), torch.utils.data.DataLoader(batches, batch_size=None))
    assert looking.history("norm").step.tolist() == [0, 1, 2]


def test_what_lightning_calls_reaches_the_watch(tmp_path, monkeypatch):
    """Against a stand-in for Lightning, whose hooks and their arguments these are."""
    module = ModuleType("lightning.pytorch")
    module.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", module)
    looking = Watch({"norm": weight_norm}, folder=tmp_path, budget=1e9)
    callback = LightningWatch(looking)
    assert isinstance(callback, module.Callback)
    model = nn.Linear(2, 2)
    trainer = SimpleNamespace(current_epoch=0, is_global_zero=True)
    callback.on_train_start(trainer, model)
    callback.on_train_epoch_end(trainer, model)
    trainer.current_epoch, trainer.is_global_zero = 1, False
    callback.on_train_epoch_end(trainer, model)
    assert looking.history("norm").step.tolist() == [0, 1]


@pytest.mark.gpu
def test_on_a_gpu_what_training_has_queued_is_not_the_time_of_a_probe(tmp_path):
    model = nn.Linear(4096, 4096, device="cuda")
    x = torch.randn(4096, 4096, device="cuda")
    looking = Watch({"norm": weight_norm}, folder=tmp_path, budget=1e9)
    looking(model, 0)
    torch.cuda.synchronize()
    for _ in range(200):
        x = model(x).detach()
    looking(model, 1)
    assert looking.history("norm").seconds[1] < 0.1 * looking.training_seconds


def test_a_probe_that_leaves_evaluation_mode_disturbs_no_training(tmp_path):
    x, y = torch.randn(12, 4), torch.arange(12) % 3

    def careless(model):
        model.train()(x)  # moves the running statistics
        model.eval().requires_grad_(False)
        return evaluate(model, [(x, y)])

    def train(callbacks):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
        fit(model, [(x, y)], epochs=3, callbacks=callbacks)
        return model

    plain = train([])
    watched = train([Watch({"a": careless}, folder=tmp_path, budget=1e3)])
    own = train([lambda model, epoch: model.eval()])
    for other in (watched, own):
        assert other[1].num_batches_tracked == 3
        for a, b in zip(plain.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_probe_that_fails_counts_as_no_training(tmp_path, clock):
    def fails(model):
        clock.now += 5
        raise RuntimeError

    watch, model = Watch({"a": fails}, folder=tmp_path, budget=10), nn.Linear(2, 2)
    for step in range(4):
        clock.now += 1
        with pytest.raises(RuntimeError):
            watch(model, step)
    assert watch.training_seconds == 3


@pytest.mark.parametrize("step", [0.0, 1.5, -1, "1"])
def test_steps_are_whole_numbers(step, tmp_path):
    watch = Watch({"a": lambda model: Reading(1.0, (1.0, 2.0), np.ones(1))}, folder=tmp_path)
    with pytest.raises(ValueError, match="`step` must be"):
        watch(nn.Linear(2, 2), step)
    watch(nn.Linear(2, 2), torch.tensor(0))
    assert watch.history("a").step.tolist() == [0]
