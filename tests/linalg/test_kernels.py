"""The kernels of a GPU against float64: on a GPU, and in Triton's interpreter without one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from landscape.linalg import gpu
from tests.linalg.kernels import CASES, errors

KERNELS = {
    "attention.bend",
    "attention.centre",
    "convolution.convolve",
    "convolution.of_weight",
    "matmul.multiply",
    "pointwise.bend",
    "pointwise.norm_curvature",
}


@pytest.fixture(scope="module")
def interpreted():
    if find_spec("triton") is None:
        pytest.skip("needs Triton, which comes with PyTorch for GPUs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.linalg.kernels"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if "only 0-dimensional arrays" in done.stderr:
        pytest.skip("this Triton (3.6 does) fails to interpret loops with NumPy 2.4")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels(name, interpreted):
    ours, plain = interpreted["errors"][name]
    assert ours < max(2 * plain, 1e-6)


def test_every_kernel_is_interpreted(interpreted):
    assert set(interpreted["calls"]) == KERNELS


def test_what_cannot_be_compiled_is_gone_without(monkeypatch):
    broken = SimpleNamespace(bend=lambda *tensors: 1 / 0)
    monkeypatch.setitem(sys.modules, "landscape.linalg.gpu.pointwise", broken)
    monkeypatch.setattr(gpu, "pointwise", broken, raising=False)
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: [None] * 4)
    with pytest.warns(UserWarning, match="Triton fails: ZeroDivisionError"):
        assert not gpu._runs_kernels.__wrapped__(torch.device("cuda", 0))
    broken.bend = lambda *tensors: None
    assert gpu._runs_kernels.__wrapped__(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not gpu._runs_kernels.__wrapped__(torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_kernels(name):
    if not gpu.has_kernels(torch.zeros(1, device="cuda")):
        pytest.skip("needs Triton and an NVIDIA GPU since 2020")
    ours, plain = errors(name, "cuda")
    assert ours < max(2 * plain, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_kernels_for_float32():
    x = torch.zeros(1, device="cuda")
    assert gpu.has_kernels(x) == (torch.cuda.get_device_capability() >= (8, 0))
    assert not gpu.has_kernels(x.double())
    assert not gpu.has_kernels(x.cpu())
