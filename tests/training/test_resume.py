"""An interrupted and resumed run equals the uninterrupted one bit for bit."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from landscape import Result
from landscape.training import DeviceImages, LabelSmoothing, WarmupCosine, fit, fit_ensemble
from tests.training.runs import (
    Stop,
    adam,
    assert_same,
    multi_step,
    plateau,
    run,
    soften,
    stop_after,
)


@pytest.mark.parametrize("make", [adam, multi_step, plateau])
@pytest.mark.parametrize("after", [1, 4])
def test_stopped_between_epochs(tmp_path, make, after):
    whole = run(tmp_path / "whole", make=make)
    with pytest.raises(Stop):
        run(tmp_path / "parts", make=make, callbacks=stop_after(after))
    torch.manual_seed(123)
    assert_same(run(tmp_path / "parts", make=make, resume=True), whole)


@pytest.mark.parametrize("after", [1, 7, 17], ids=["first epoch", "middle", "last step"])
def test_stopped_within_an_epoch(tmp_path, after):
    calls = []

    @functools.wraps(soften)  # a run goes on with a transform of the same name
    def stop_there(x, y, generator):
        calls.append(0)
        if len(calls) > after:
            raise Stop
        return soften(x, y, generator)

    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "parts", transform=stop_there)
    assert_same(run(tmp_path / "parts", resume=True), whole)


@pytest.mark.parametrize("ensemble", [False, True], ids=["fit", "fit_ensemble"])
def test_stopped_in_the_first_epoch_and_called_again_with_the_same_objects(tmp_path, ensemble):
    def training(folder):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, x, y = nn.Linear(4, 3), torch.randn(12, 4), torch.arange(12) % 3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=generator)

        def train(loss=F.cross_entropy, resume=True):
            settings = {"epochs": 2, "loss": loss, "checkpoints": ("init",), "resume": resume}
            if ensemble:
                fit_ensemble([model], loader, optimizers=[optimizer], folder=folder, **settings)
            else:
                fit(model, loader, optimizer=optimizer, folder=folder, **settings)
            own = folder / "member-000" if ensemble else folder
            return *torch.load(own / "epoch-00000.pt", weights_only=True).values(), model.weight

        return train

    @functools.wraps(F.cross_entropy)
    def stop_at_the_second(outputs, targets):
        calls.append(0)
        if len(calls) == 2:
            raise Stop
        return F.cross_entropy(outputs, targets)

    whole = training(tmp_path / "whole")()
    calls, again = [], training(tmp_path / "parts")
    with pytest.raises(Stop):
        again(stop_at_the_second)
    assert all(map(torch.equal, again(), whole))
    calls, again = [], training(tmp_path / "afresh")
    with pytest.raises(Stop):
        again(stop_at_the_second)
    again(resume=False)  # what no epoch has done is no run yet


def test_stopped_several_times(tmp_path):
    whole = run(tmp_path / "whole")
    for after in (1, 2, 5):
        with pytest.raises(Stop):
            run(tmp_path / "parts", resume=after > 1, callbacks=stop_after(after))
    assert_same(run(tmp_path / "parts", resume=True), whole)
    lines = (tmp_path / "parts" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", *(f"{e}.0" for e in range(1, 7))]


def test_stopped_between_epochs_with_a_loss_that_is_trained(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, outputs, targets):
            return F.cross_entropy(outputs * self.scale, targets)

    def training(folder, callbacks=(), resume=False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, x = nn.Linear(4, 3), torch.randn(12, 4)
        both = nn.ModuleList([model, Scaled()])
        optimizer = torch.optim.SGD(both.parameters(), lr=0.5, momentum=0.9)
        settings = {"folder": folder, "callbacks": callbacks, "resume": resume, "loss": both[1]}
        settings["validation"] = data = [(x, torch.arange(12) % 3)]
        return both, optimizer, fit(model, data, epochs=6, optimizer=optimizer, **settings)

    whole = training(tmp_path / "whole")
    with pytest.raises(Stop):
        training(tmp_path / "parts", stop_after(3))
    assert_same(training(tmp_path / "parts", resume=True), whole)
    assert_same(training(tmp_path / "parts", resume=True), whole)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "changed"])
def test_damaged_latest_state_is_refused_and_the_one_before_is_used(tmp_path, damage):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "parts", callbacks=stop_after(4))
    latest = tmp_path / "parts" / "resume-00004.pt"
    raw = bytearray(latest.read_bytes())
    if damage == "changed":
        raw[len(raw) // 2] ^= 1
    latest.write_bytes(raw[: {"truncated": len(raw) // 2, "emptied": 0}.get(damage, len(raw))])
    with pytest.warns(UserWarning, match="resume-00004.pt` is damaged .* state before it"):
        parts = run(tmp_path / "parts", resume=True)
    assert_same(parts, whole)


def test_all_states_damaged_is_an_error(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, callbacks=stop_after(2))
    for path in tmp_path.glob("resume*"):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="all in .* are damaged; empty it"),
    ):
        run(tmp_path, resume=True)


def test_finished_run_is_returned_without_training(tmp_path):
    whole = run(tmp_path)
    log = (tmp_path / "log.csv").read_bytes()
    (tmp_path / "log.csv").unlink()  # as after a kill between state and log

    @functools.wraps(soften)
    def refuse(x, y, generator):
        raise AssertionError("trained again")

    assert_same(run(tmp_path, resume=True, transform=refuse), whole)
    assert (tmp_path / "log.csv").read_bytes() == log


def test_resume_where_nothing_is_starts_afresh(tmp_path):
    assert_same(run(tmp_path / "new", resume=True), run(tmp_path / "whole"))


def test_numbers_of_numpy_are_rates_and_epochs(tmp_path):
    rates, data = np.logspace(-2, -1, 2), [(torch.ones(6, 4), torch.arange(6) % 3)]

    def train(folder, **arguments):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=rates[0])
        kept = np.linspace(0, 2, 3).astype(int)
        settings = {"epochs": 2, "schedule": lambda position: 1.0, "checkpoints": kept}
        result = fit(
            model, data, optimizer=optimizer, folder=tmp_path / folder, **settings, **arguments
        )
        return result, model.weight

    _, whole = train("whole")
    with pytest.raises(Stop):
        train("parts", callbacks=stop_after(1))
    resumed, weight = train("parts", resume=True)
    assert torch.equal(weight, whole)
    assert list(resumed.checkpoints) == [0, 1, 2]
    with pytest.raises(ValueError, match="`folder` must be given to keep `checkpoints`"):
        fit(nn.Linear(4, 3), data, epochs=2, checkpoints=np.arange(3))
    assert Result.load(resumed.save(tmp_path / "history")).checkpoints == resumed.checkpoints


class Noisy(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.randn(4), y


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}], ids=str)
def test_a_loader_goes_on_with_generator_and_workers_of_its_own(tmp_path, workers):
    def train(folder, **arguments):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, data = nn.Linear(4, 3), Noisy(torch.randn(12, 4), torch.arange(12) % 3)
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator, **workers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        settings = {"epochs": 4, "optimizer": optimizer, "folder": tmp_path / folder}
        fit(model, loader, **settings, **arguments)
        return model.weight, generator.get_state()

    whole = train("whole")
    with pytest.raises(Stop):
        train("parts", callbacks=stop_after(2))
    assert all(map(torch.equal, train("parts", resume=True), whole))


def test_weights_that_are_wanted_later_are_there_or_refused(tmp_path):
    def train(**arguments):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Linear(4, 3)
        before = model.weight.clone()
        data = [(torch.ones(6, 4), torch.arange(6) % 3)]
        try:
            return fit(model, data, epochs=4, folder=tmp_path, **arguments)
        except ValueError:
            assert torch.equal(model.weight, before)
            raise

    with pytest.raises(Stop):
        train(callbacks=stop_after(2))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    state = torch.load(tmp_path / "resume-00002.pt", weights_only=True)
    for wanted in ({"checkpoints": ("init", 2)}, {"checkpoints": (1,)}, {"trajectory": 1}):
        with pytest.raises(ValueError, match="must be what the run in `folder` has kept, got epo"):
            train(resume=True, **wanted)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    result = train(resume=True, checkpoints=(2, 3))
    assert torch.equal(
        torch.load(result.checkpoints[2], weights_only=True)["weight"], state["model"]["weight"]
    )
    assert Path(result.checkpoints[3]).exists()


def test_other_run_in_the_folder_is_refused(tmp_path):
    run(tmp_path, epochs=3)
    with pytest.raises(ValueError, match="`folder` must hold no run yet, .* pass `resume=True`"):
        run(tmp_path, epochs=3)
    with pytest.raises(ValueError, match="there `epochs` is 3 and here 6; choose another folder"):
        run(tmp_path, resume=True)
    with pytest.raises(ValueError, match="there `optimizer` is 'AdamW' and here 'SGD'"):
        run(tmp_path, resume=True, epochs=3, make=multi_step)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lr": 0.5}, "there `learning_rates` is"),
        ({"weight_decay": 0.5}, "there `weight_decays`"),
        ({"momentum": 0.5}, "there `optimizer_defaults` is"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(changes, match, tmp_path):
    def training(epochs_kept, resume=False, **settings):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, **settings})
        data = [(torch.ones(6, 4), torch.arange(6) % 3)]
        fit(
            model,
            data,
            epochs=4,
            optimizer=optimizer,
            folder=tmp_path,
            resume=resume,
            callbacks=stop_after(epochs_kept),
        )

    with pytest.raises(Stop):
        training(2)
    with pytest.raises(ValueError, match=match):
        training(4, resume=True, **changes)
    training(5, resume=True)


class Offset:
    """A transform whose `repr` says where it lies in memory."""

    def __call__(self, x, y, generator):
        return x + 1, y


def shifted(amount, x, y, generator):
    return x + amount, y


def few_images(first_byte=0, first_label=0, **changes):
    images = torch.arange(12 * 16).to(torch.uint8).view(12, 1, 4, 4)
    labels = torch.arange(12) % 3
    images[0, 0, 0, 0], labels[0] = first_byte, first_label
    settings = {"mean": (0.5,), "std": (0.3,), "batch_size": 4, "shuffle": True} | changes
    return DeviceImages(images, labels, **settings)


@pytest.mark.parametrize("ensemble", [False, True], ids=["fit", "fit_ensemble"])
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.9)}, "`loss` is 'cross_entropy' and here"),
        ({"clip": 1e-4}, "`clip` is 5.0 and here 0.0001"),
        ({"transform": LabelSmoothing(3, 0.9)}, "`transform` is '<.*Offset object>' and here 'Lab"),
        ({"transform": None}, "`transform` is '<.*Offset object>' and here None"),
        ({"transform": functools.partial(shifted, 2)}, "`transform` is '.*' and here 'shifted.2."),
        ({"schedule": WarmupCosine(4, 1, per_epoch=True)}, "`schedule` is 'WarmupCosine"),
        ({"bfloat16": True}, "`bfloat16` is False and here True"),
        ({"data": few_images(first_byte=1)}, "`data.checksum` is"),
        ({"data": few_images(first_label=1)}, "`data.checksum` is"),
        ({"data": few_images(batch_size=5)}, "`data.batch_size` is 4 and here 5"),
        ({"data": few_images(seed=3)}, "`data.seed` is 0 and here 3"),
        ({"data": few_images(std=(0.2,))}, "`data.std` is"),
        ({"data": few_images(augment=Offset())}, "`data.augment` is None and here '<.*Offset obj"),
        ({"data": list(few_images())}, "`data` is 'DeviceImages' and here 'no DeviceImages'"),
        ({"validation": few_images(shuffle=False)}, "`validation.shuffle` is True and here False"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(*value),
)
def test_other_settings_and_images_are_refused(tmp_path, ensemble, changes, match):
    def train(resume=False, **changed):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        settings = {"data": few_images(), "validation": few_images(), "transform": Offset()}
        settings |= {"epochs": 4, "folder": tmp_path, "resume": resume} | changed
        if ensemble:
            fit_ensemble([model], **settings)
        else:
            fit(model, **settings)
        return model[1].weight

    weight = train()
    assert torch.equal(train(resume=True), weight)
    with pytest.raises(ValueError, match=f"must hold the same run, but there {match}.*; choose an"):
        train(resume=True, **changes)


def test_a_state_of_old_that_says_less_can_be_gone_on_with(tmp_path):
    whole = run(tmp_path)
    for path in tmp_path.glob("resume-*"):
        state = torch.load(path, weights_only=True)
        del state["run"]["clip"], state["run"]["data.checksum"]
        torch.save(state, path)
    assert_same(run(tmp_path, resume=True), whole)


def test_state_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A crash in the middle of writing leaves the last state as it was."""
    with pytest.raises(Stop):
        run(tmp_path / "parts", callbacks=stop_after(2))
    before = {path.name for path in (tmp_path / "parts").iterdir()}

    replace = Path.replace

    def crash(self, target):
        if target.suffix == ".pt":
            raise Stop
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(Stop):
            run(tmp_path / "parts", resume=True)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == before
    assert_same(run(tmp_path / "parts", resume=True), run(tmp_path / "whole"))


def test_a_state_that_could_not_be_read_again_is_refused_before_training(tmp_path):
    class Kept(nn.Linear):
        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = state

    x, y = torch.ones(8, 4), torch.arange(8) % 3
    model, calls = Kept(4, 3), []
    for extra, folder in ((object(), None), ({"seen": 3}, tmp_path / "a")):
        model.extra = extra
        fit(model, [(x, y)], epochs=1, folder=folder)
    model.extra = None
    fit(model, [(x, y)], epochs=1, folder=tmp_path / "a", resume=True)
    assert model.extra == {"seen": 3}
    model.extra = np.arange(3)
    with pytest.raises(ValueError, match="`folder` must be left out where the state of model"):
        fit(model, [(x, y)], epochs=1, folder=tmp_path / "b", callbacks=[calls.append])
    assert not calls
    model.extra = 3
    fit(model, [(x, y)], epochs=1, folder=tmp_path / "b")
