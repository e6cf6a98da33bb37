"""The emulated device itself: faults that are planted are noticed, and what is right is not.

In a process of its own, as it replaces a part of PyTorch.
"""

import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
RACE = r"race: aten\.{} {} on another stream \(tests/test_emulated_cuda.py:\d+ .*without waiting"


def on_a_stream_of_its_own(work, wait=True):
    stream, outside = torch.cuda.Stream(), torch.cuda.current_stream()
    if wait:
        stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        result = work()
    return result, stream


def captured(work):
    graph, result = torch.cuda.CUDAGraph(), None

    def capture():
        graph.capture_begin()
        try:
            return work()
        finally:
            graph.capture_end()

    result, stream = on_a_stream_of_its_own(capture)
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


def reads_too_early():
    x = torch.ones(3, device="cuda")
    on_a_stream_of_its_own(lambda: x * 2, wait=False)


def overwrites_too_early():
    x = torch.ones(3, device="cuda")
    torch.cuda.synchronize()
    on_a_stream_of_its_own(lambda: x * 2)
    x.zero_()


def replays_too_early():
    x = torch.ones(3, device="cuda")
    graph, _ = captured(lambda: x * 2)
    x.fill_(2)
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.replay()


def waits_in_a_recording():
    x = torch.ones(3, device="cuda")
    captured(lambda: x * x.sum().item())


def counts_in_a_recording():
    x = torch.ones(3, device="cuda")
    captured(lambda: x[x > 0])


def seeds_in_a_recording():
    captured(lambda: torch.cuda.manual_seed(0))


def works_on_what_was_freed():
    tensors = [torch.ones(3, device="cuda")]
    graph, _ = captured(lambda: tensors[0] * 2)
    tensors[0] = torch.zeros(3, device="cuda")
    graph.replay()


def mixes_devices():
    torch.ones(3, device="cuda") + torch.ones(3)


def mixes_devices_in_a_backward_pass():
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return gradient @ torch.ones(3, 3)

    x = torch.ones(3, device="cuda", requires_grad=True)
    Backward.apply(x).sum().backward()


def draws_from_the_other_device():
    torch.rand(3, device="cuda", generator=torch.Generator())


FAULTS = {
    reads_too_early: RACE.format("mul.Tensor", "reads what aten.ones.default writes"),
    overwrites_too_early: RACE.format("zero_.default", "overwrites what aten.mul.Tensor reads"),
    replays_too_early: RACE.format("mul.Tensor", "reads what aten.fill_.Scalar writes"),
    waits_in_a_recording: "while a graph is recorded, aten._local_scalar_dense.default waits",
    counts_in_a_recording: "while a graph is recorded, aten.index.Tensor waits",
    seeds_in_a_recording: "while a graph is recorded, the random state .* is set",
    works_on_what_was_freed: r"a replay of aten.mul.Tensor, recorded at .* memory that was freed",
    mixes_devices: r"mixed devices: aten.add.Tensor .* of the CPU, shape \(3,\)",
    mixes_devices_in_a_backward_pass: "mixed devices: aten.m",
    draws_from_the_other_device: "mixed devices: aten.rand.generator gets a generator",
}


def waits_for_streams():
    x = torch.ones(3, device="cuda")
    y, stream = on_a_stream_of_its_own(lambda: x * 2)
    torch.cuda.current_stream().wait_stream(stream)
    x.zero_()
    assert y.tolist() == [2, 2, 2]
    on_a_stream_of_its_own(lambda: y.add_(1), wait=False)  # the host has seen it
    torch.cuda.synchronize()
    assert y.cpu().tolist() == [3, 3, 3]


def replays_on_the_same_memory():
    x, calls = torch.ones(3, device="cuda"), torch.zeros((), device="cuda")
    graph, y = captured(lambda: (calls.add_(1), x.view(3, 1).expand(3, 2) * 2)[1])
    assert calls.item() == 0  # a capture computes nothing
    assert y.isnan().all()
    for value in (3.0, 4.0):
        x.fill_(value)
        graph.replay()
        assert (y == 2 * value).all()
    assert calls.item() == 2


def trains():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten(), torch.nn.Dropout()
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(4, 1, 5, 5).cuda()
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert all(p.is_cuda and p.grad.is_cuda for p in model.parameters())


def draws_from_streams_of_their_own():
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    torch.rand(3, device="cuda")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert not torch.equal(torch.cuda.get_rng_state(), states[1])
    graph, drawn = captured(lambda: torch.rand(3, device="cuda"))
    torch.cuda.set_rng_state(states[1])
    graph.replay()
    torch.cuda.set_rng_state(states[1])
    assert torch.equal(drawn, torch.rand(3, device="cuda"))
    for device in ("cpu", "cuda"):
        generator = torch.Generator(device).manual_seed(1)
        assert torch.rand(3, device=device, generator=generator).device.type == device


def makes_tensors_beside_others():
    x = torch.ones(3, device="cuda")
    made = [x.new_zeros(3), torch.zeros_like(x), x.new_tensor([1.0]), torch.as_tensor(x)]
    made += [x.double(), deepcopy(x), x.view(3, 1).expand(3, 2).clone()]
    assert all(t.is_cuda for t in made)
    made = [torch.zeros(3), torch.zeros_like(x, device="cpu"), x.cpu(), torch.tensor([1.0])]
    assert not any(t.is_cuda for t in made)
    before = torch.cuda.memory_allocated()
    kept = torch.zeros(1000, device="cuda")
    assert torch.cuda.memory_allocated() == before + 4000
    del kept
    assert torch.cuda.memory_allocated() == before


RIGHT = [
    waits_for_streams,
    replays_on_the_same_memory,
    trains,
    draws_from_streams_of_their_own,
    makes_tensors_beside_others,
]


def problems_of(work, taken):
    """What is seen while some work runs; an error is among it where it was no problem."""
    try:
        work()
    except Exception as error:
        return taken() or [repr(error)]
    return taken()


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def seen():
    done = python("-m", "tests.test_emulated_cuda")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if isinstance(found, str):
        pytest.skip(f"this PyTorch lacks what is needed: {found}")
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda work: work.__name__)
def test_a_fault_is_noticed_with_its_line(fault, seen):
    (problem,) = seen[fault.__name__]
    assert re.search(FAULTS[fault], problem)
    assert re.search(r"at tests/test_emulated_cuda.py:\d+", problem)


@pytest.mark.parametrize("work", RIGHT, ids=lambda work: work.__name__)
def test_what_is_right_is_not_reported(work, seen):
    assert seen[work.__name__] == []


TESTS = """
import torch

def test_right():
    assert torch.ones(3, device="cuda").sum().item() == 3

def test_race():
    x = torch.ones(3, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        x + 1

def test_unknown():
    torch.cuda.max_memory_allocated()

def test_large():
    torch.ones(1 << 30, device="cuda")
"""


def test_tests_with_faults_fail_and_those_for_real_devices_are_skipped(seen, tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    done = python("-m", "pytest", "-p", "tests.emulated_cuda", "-rs", str(tmp_path))
    assert "1 failed, 1 passed, 2 skipped" in done.stdout
    assert "race: aten.add.Tensor reads what aten.ones.default writes" in done.stdout
    assert "`torch.cuda.max_memory_allocated` is not emulated" in done.stdout
    assert "a tensor of 4096 MiB is work for a real GPU" in done.stdout


def main():
    """Print what is seen of each, or what this PyTorch lacks."""
    try:
        from tests.emulated_cuda.interface import install
        from tests.emulated_cuda.problems import taken

        install()
    except (AttributeError, ImportError) as error:
        return str(error)
    return {work.__name__: problems_of(work, taken) for work in (*FAULTS, *RIGHT)}


if __name__ == "__main__":
    print(json.dumps(main()))
