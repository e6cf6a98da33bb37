import os
import socket
from contextlib import nullcontext

import pytest
import torch

from landscape import recording, training
from landscape.linalg import hessian, mini_batches, recorded_hessian
from tests.cases import Replayed, Stream

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that a test starts


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def recorded(monkeypatch):
    """A CPU that records and replays as a GPU does; `Replayed` counts."""
    for module in (recorded_hessian, recording, training.recorded):
        monkeypatch.setattr(module, "Recording", Replayed)
        monkeypatch.setattr(module, "trial", lambda work: (work(), True))
    for module in (mini_batches, recording, training.recorded):
        monkeypatch.setattr(module, "side_stream", lambda device, place=0: Stream())
    for module in (hessian, recorded_hessian, recording, training.loop, training.recorded):
        monkeypatch.setattr(module, "apart", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(Replayed, "made", 0)
    return Replayed


@pytest.fixture
def two_threads():
    """PyTorch has two threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def alone():
    """A group of this process alone, for the wrappers of `torch.distributed`."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("PyTorch was built without gloo")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test reaches a network."""
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
