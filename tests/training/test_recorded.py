"""Recorded steps: on a CPU what is done around recordings, in `test_gpu.py` with them."""

import random
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from landscape.models import create_model
from landscape.restore import same_buffers
from landscape.training import fit, load_images, loop, recipe, recorded


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


class OnCpu:
    """Stands for a recording: writes what the work writes into the same memory again and again."""

    made = 0
    replayed = 0

    def __init__(self, work, stream):
        self.work = work
        type(self).made += 1
        step = work.args[0]
        self.parameters = step.parameters
        with same_buffers(step.model):  # a recording computes nothing
            self.result = self.work()
        self.gradients = [parameter.grad for parameter in self.parameters]

    def replay(self, stream):
        type(self).replayed += 1
        for place, value in zip(self.result, self.work(), strict=True):
            place.copy_(value)
        for place, parameter in zip(self.gradients, self.parameters, strict=True):
            place.copy_(parameter.grad)
            parameter.grad = None


@pytest.mark.parametrize("name", PARTS)
def test_steps_around_recordings_are_the_same_steps(name, monkeypatch):
    class Counted(OnCpu):
        pass

    monkeypatch.setattr(recorded, "Recording", Counted)
    monkeypatch.setattr(recorded, "side_stream", lambda device: "a stream")
    monkeypatch.setattr(recorded, "trial", lambda work: (work(), True))
    monkeypatch.setattr(recorded, "apart", nullcontext)
    monkeypatch.setattr(loop, "apart", nullcontext)
    data = load_images("fashion_mnist_mini", size=32, channels=3, shuffle=True)
    check_steps(name, data)
    made, replayed = (0, 0) if name in UNRECORDED else (2, 4)
    assert (Counted.made, Counted.replayed) == (made, replayed)
