"""Recorded steps: on a CPU what is done around recordings, in `test_gpu.py` with them."""

import random

import pytest
import torch
from torch import nn

from landscape import training
from landscape.models import create_model
from landscape.restore import same_buffers
from landscape.training import fit, load_images, recipe
from tests.cases import Replayed


class Waiting(nn.Module):
    def forward(self, x):
        return x * float(x.abs().max() > 0)


class Drawing(nn.Module):
    def forward(self, x):
        return x * (1 + random.random())


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.ones(()))

    def forward(self, x):
        self.count = self.count + 1
        return x / self.count.to(x.dtype)


class Branching(nn.Module):
    """The batch decides, on the device."""

    def forward(self, x):
        return torch.where(x.mean() > 0, x, 2 * x)


PARTS = {
    "nothing": nn.Identity,
    "branching": Branching,
    "drawing": Drawing,
    "counting": Counting,
}
UNRECORDED = ("drawing", "counting")


def make(name, device):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name in ("resnet20", "vit_nano"):
            return create_model(name, drop_path=0.3).double().to(device)
        part = Waiting() if name == "waiting" else PARTS[name]()
        convs = nn.Conv2d(3, 4, 5, stride=2), nn.BatchNorm2d(4), nn.ReLU(), part
        # Dropout draws on the model's device: on a CPU it could not be recorded.
        dropout = nn.Identity() if device.type == "cpu" else nn.Dropout(0.5)
        rest = dropout, nn.Flatten(), nn.Linear(784, 10)
        return nn.Sequential(*convs, *rest).double().to(device)


def check_steps(name, data):
    """Train as recorded and as not, with a last batch that is smaller; compare all weights."""
    data = data.subset(232).with_(batch_size=64)
    models = [make(name, data.device), make(name, data.device)]
    for model, cuda_graphs in zip(models, (False, True), strict=True):
        fit(
            model,
            data,
            epochs=2,
            transform=recipe(data.mean, data.std, data.num_classes),
            validation=data,
            bfloat16=False,
            channels_last=False,
            cuda_graphs=cuda_graphs,
        )
        assert all(parameter.grad is None for parameter in model.parameters())
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


class OnCpu(Replayed):
    """Leaves what a step returns, and its gradients, in the same memory at every replay."""

    replayed = 0

    def __init__(self, work, stream):
        self.step = work.args[0]
        with same_buffers(self.step.model):  # a recording computes nothing
            super().__init__(work, stream)
        self.gradients = [parameter.grad for parameter in self.step.parameters]

    def replay(self, stream):
        OnCpu.replayed += 1
        for place, value in zip(self.result, self.work(), strict=True):
            place.copy_(value)
        for place, parameter in zip(self.gradients, self.step.parameters, strict=True):
            place.copy_(parameter.grad)
            parameter.grad = None


@pytest.mark.parametrize("name", PARTS)
def test_steps_around_recordings_are_the_same_steps(name, recorded, monkeypatch):
    monkeypatch.setattr(training.recorded, "Recording", OnCpu)
    monkeypatch.setattr(OnCpu, "replayed", 0)
    data = load_images("fashion_mnist_mini", size=32, channels=3, shuffle=True)
    check_steps(name, data)
    made, replayed = (0, 0) if name in UNRECORDED else (2, 4)
    assert (recorded.made, OnCpu.replayed) == (made, replayed)
