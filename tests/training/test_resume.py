"""An interrupted and resumed run equals the uninterrupted one bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape.training import DeviceImages, fit

EPOCHS = 6


class Stop(Exception):
    """Stands for whatever ends a process."""


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 3)
        )


def make_data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (20, 2, 6, 6), generator=generator, dtype=torch.uint8)

    def noise(x, y, generator):
        return x // 2 + torch.randint(9, x.shape, generator=generator, dtype=torch.uint8), y

    return DeviceImages(
        images,
        torch.arange(20) % 3,
        mean=(0.5, 0.5),
        std=(0.3, 0.3),
        batch_size=8,
        shuffle=True,
        augment=noise,
    )


def soften(x, y, generator):
    share = torch.rand((), generator=generator)
    return x + 0.1 * torch.randn(x.shape, generator=generator), share * F.one_hot(y, 3) + (
        1 - share
    ) / 3


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01), None


def multi_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)


def plateau(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)


def run(folder, *, make=adam, resume=False, transform=soften, callback=None, epochs=EPOCHS):
    model = make_model()
    optimizer, schedule = make(model)
    result = fit(
        model,
        make_data(),
        epochs=epochs,
        optimizer=optimizer,
        schedule=schedule,
        transform=transform,
        validation=make_data(),
        folder=folder,
        checkpoints=("init", 3, "last"),
        trajectory=True,
        resume=resume,
        callback=callback,
    )
    return model, optimizer, result


def stop_after(epoch):
    def callback(history):
        if len(history.epoch) == epoch:
            raise Stop

    return callback


def flat(value):
    if isinstance(value, dict):
        return [leaf for key in value for leaf in flat(value[key])]
    if isinstance(value, list):
        return [leaf for item in value for leaf in flat(item)]
    return [value]


def assert_same(one, other):
    """Compare weights, buffers, optimizer state and history, to the last bit."""
    for this, that in zip(one[:2], other[:2], strict=True):
        for a, b in zip(flat(this.state_dict()), flat(that.state_dict()), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    for column in ("epoch", "learning_rate", "train_loss", "train_accuracy", "validation_loss"):
        assert np.array_equal(getattr(one[2], column), getattr(other[2], column))
    for a, b in zip(one[2].trajectory, other[2].trajectory, strict=True):
        states = torch.load(a, weights_only=True), torch.load(b, weights_only=True)
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("make", [adam, multi_step, plateau])
@pytest.mark.parametrize("after", [1, 4])
def test_stopped_between_epochs(tmp_path, make, after):
    whole = run(tmp_path / "whole", make=make)
    with pytest.raises(Stop):
        run(tmp_path / "parts", make=make, callback=stop_after(after))
    torch.manual_seed(123)
    assert_same(run(tmp_path / "parts", make=make, resume=True), whole)


@pytest.mark.parametrize("after", [1, 7, 17], ids=["first epoch", "middle", "last step"])
def test_stopped_within_an_epoch(tmp_path, after):
    calls = []

    def stop_there(x, y, generator):
        calls.append(0)
        if len(calls) > after:
            raise Stop
        return soften(x, y, generator)

    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "parts", transform=stop_there)
    assert_same(run(tmp_path / "parts", resume=True), whole)


def test_stopped_several_times(tmp_path):
    whole = run(tmp_path / "whole")
    for after in (1, 2, 5):
        with pytest.raises(Stop):
            run(tmp_path / "parts", resume=after > 1, callback=stop_after(after))
    assert_same(run(tmp_path / "parts", resume=True), whole)
    lines = (tmp_path / "parts" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", *(f"{e}.0" for e in range(1, 7))]


def test_killed_process(tmp_path):
    """A real SIGKILL, sent by the process to itself within the fourth epoch."""
    # Sums over threads round by their number: the killed run has as many as this process.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **threads}
    process = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "parts")], env=environment, timeout=60
    )
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "parts" / "resume-00003.pt").exists()
    assert_same(run(tmp_path / "parts", resume=True), run(tmp_path / "whole"))


@pytest.mark.parametrize("damage", ["truncated", "emptied", "changed"])
def test_damaged_latest_state_is_refused_and_the_one_before_is_used(tmp_path, damage):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "parts", callback=stop_after(4))
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
        run(tmp_path, callback=stop_after(2))
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

    def refuse(x, y, generator):
        raise AssertionError("trained again")

    assert_same(run(tmp_path, resume=True, transform=refuse), whole)
    assert (tmp_path / "log.csv").read_bytes() == log


def test_resume_where_nothing_is_starts_afresh(tmp_path):
    assert_same(run(tmp_path / "new", resume=True), run(tmp_path / "whole"))


def test_other_run_in_the_folder_is_refused(tmp_path):
    run(tmp_path, epochs=3)
    with pytest.raises(ValueError, match="`folder` must hold no run yet, .* pass `resume=True`"):
        run(tmp_path, epochs=3)
    with pytest.raises(ValueError, match="there `epochs` is 3 and here 6; choose another folder"):
        run(tmp_path, resume=True)
    with pytest.raises(ValueError, match="there `optimizer` is 'AdamW' and here 'SGD'"):
        run(tmp_path, resume=True, epochs=3, make=multi_step)


def test_state_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A crash in the middle of writing leaves the last state as it was."""
    with pytest.raises(Stop):
        run(tmp_path / "parts", callback=stop_after(2))
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


if __name__ == "__main__":
    steps = 0

    def kill_in_fourth_epoch(x, y, generator):
        """Let eleven steps of three an epoch pass."""
        global steps
        steps += 1
        if steps == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return soften(x, y, generator)

    run(Path(sys.argv[1]), transform=kill_in_fourth_epoch)
