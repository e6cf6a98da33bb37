"""Killed at any point, out of disk space, diverged: what is left, and what is said."""

import errno
import functools
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.runs import assert_same, run, soften


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(number, action, function):
    """Return `function` with `action` in place of its call of that number, counted from 1."""
    calls = 0

    @functools.wraps(function)
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return (action if calls == number else function)(*args, **kwargs)

    return counted


# An epoch has three steps, and writes weights, state and log: each a sync, then a replace. So does
# epoch 0, which has no step.
POINTS = {
    "first step": ("step", 1),
    "fourth epoch": ("step", 11),
    "first weights half written": ("fsync", 1),
    "first state half written": ("fsync", 2),
    "weights written, not in place": ("replace", 10),
    "state written, not in place": ("replace", 11),
    "log written, not in place": ("replace", 12),
    "before the old state is dropped": ("unlink", 10),
    "last state half written": ("fsync", 20),
    "in the callback": ("callback", 6),
}


def run_and_die(folder, where, number):
    """Train, killed at the `number`th call of what `where` says."""
    transform, callbacks = soften, []
    if where == "step":
        transform = on_call(number, kill, soften)
    elif where == "callback":
        callbacks = [on_call(number, kill, lambda model, done: None)]
    else:
        owner = os if where == "fsync" else Path
        setattr(owner, where, on_call(number, kill, getattr(owner, where)))
    run(folder, transform=transform, callbacks=callbacks)


def run_out_of_space(folder):
    """Train; after the second epoch no file may grow beyond 2000 bytes."""

    def limit(model, done):
        if done == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    try:
        run(folder, callbacks=[limit])
    except OSError as error:
        folder.with_suffix(".txt").write_text(str(error))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happened to."""
    return run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def other_process(tmp_path_factory):
    """Where the runs lie that were killed at each point, or ran out of space."""
    folder = tmp_path_factory.mktemp("other")
    # Sums over threads round by their number: the other process has as many as this one.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **threads}
    process = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=environment,
        timeout=120,
        capture_output=True,
        text=True,
    )
    killed = [str(signal.SIGKILL.value)] * len(POINTS)
    assert process.stdout.split() == [*killed, "0"], process.stderr
    return folder


@pytest.mark.parametrize("point", POINTS)
def test_killed_run_resumes_to_the_same_weights(other_process, whole, point):
    assert_same(run(other_process / point, resume=True), whole)
    states = {path.name for path in (other_process / point).iterdir()} - {"log.csv"}
    epochs = {f"epoch-{epoch:05d}.pt" for epoch in range(7)}
    assert states == epochs | {"resume-00005.pt", "resume-00006.pt"}  # nothing half written


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("file", ["weights", "state", "log"])
def test_full_disk_ends_with_what_is_kept_and_what_to_do(whole, tmp_path, monkeypatch, file):
    # The third epoch's: three files before the first epoch, and three an epoch.
    number = 3 + 2 * 3 + ["weights", "state", "log"].index(file) + 1
    kept = 3 if file == "log" else 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", on_call(number, no_space, os.fsync))
        with pytest.raises(OSError, match=f"Epoch 3 .*No space.* after epoch {kept}") as caught:
            run(tmp_path / "parts")
    assert caught.value.errno == errno.ENOSPC
    assert "Make room, then go on with `resume=True`" in str(caught.value)
    assert not list((tmp_path / "parts").glob(".*"))
    assert_same(run(tmp_path / "parts", resume=True), whole)


def test_full_disk_before_any_state_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", on_call(2, no_space, os.fsync))
    with pytest.raises(OSError, match="Epoch 0 .* still holds no state"):
        run(tmp_path)


def test_limit_on_the_size_of_files(other_process, whole):
    """The kernel itself refuses to write on, in the middle of a file."""
    message = (other_process / "limit.txt").read_text()
    assert "Epoch 3 could not be written (File too large)" in message
    assert "holds the state after epoch 2. Go on with `resume=True`" in message
    assert not list((other_process / "limit").glob(".*"))
    assert_same(run(other_process / "limit", resume=True), whole)


def test_what_another_run_is_writing_is_left_to_it(tmp_path):
    part = tmp_path / f".resume-00002.pt.{os.getppid()}.part"
    part.touch()
    run(tmp_path, epochs=3)
    assert part.exists()


def test_nan_keeps_the_last_good_state_to_resume_from(whole, tmp_path):
    poison = on_call(11, lambda x, y, generator: (x * float("nan"), y), soften)
    with pytest.raises(FloatingPointError, match="loss of step 2 in epoch 4 .* end of epoch 3"):
        run(tmp_path / "parts", transform=poison)
    assert_same(run(tmp_path / "parts", resume=True), whole)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    run(folder / "imports", epochs=3)  # what PyTorch imports late, once for all children
    jobs = [functools.partial(run_and_die, folder / name, *at) for name, at in POINTS.items()]
    for job in (*jobs, functools.partial(run_out_of_space, folder / "limit")):
        child = os.fork()
        if child == 0:
            job()
            os._exit(0)
        print(os.waitpid(child, 0)[1], flush=True)
