"""Recorded steps: on a CPU what is done around recordings, in `test_gpu.py` with them."""

import random

import pytest
import torch
from torch import nn

from landscape import training
from landscape.models import create_model
from landscape.restore import same_tensors
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


class Remembering(nn.Module):
    """Replaces a tensor that is no buffer at every call."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(())

    def forward(self, x):
        self.mean = 0.9 * self.mean.to(x) + 0.1 * x.detach().mean()
        return x * (1 + self.mean)


class Averaging(nn.Module):
    """Writes to a tensor that is no buffer; the trial of a recording must not count."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(4, dtype=torch.float64)

    def forward(self, x):
        self.mean = self.mean.to(x.device)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean((0, 2, 3)), alpha=0.1)
        return x * (1 + self.mean[:, None, None])


class LookingUp(nn.Module):
    """Keeps a scale for the size of the batch, and replaces it where another size comes."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(0)

    def forward(self, x):
        if len(self.scale) != len(x):
            self.scale = torch.linspace(1, 2, len(x), dtype=x.dtype, device=x.device)
        return x * self.scale[:, None, None, None]


class Branching(nn.Module):
    """The batch decides, on the device."""

    def forward(self, x):
        return torch.where(x.mean() > 0, x, 2 * x)


PARTS = {
    "nothing": nn.Identity,
    "branching": Branching,
    "drawing": Drawing,
    "counting": Counting,
    "remembering": Remembering,
    "averaging": Averaging,
    "looking up": LookingUp,
}
UNRECORDED = ("drawing", "counting", "remembering")


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
        with same_tensors(self.step.model):  # a recording computes nothing
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


def test_what_a_recording_reads_is_kept(recorded, monkeypatch):
    held = []
    made = training.recorded.Recorded._record

    def record(self, inputs, targets):
        made(self, inputs, targets)
        held.append([*self._held])

    monkeypatch.setattr(training.recorded, "Recording", OnCpu)
    monkeypatch.setattr(training.recorded.Recorded, "_record", record)
    data = load_images("fashion_mnist_mini", size=32, channels=3).subset(232).with_(batch_size=64)
    model = make("looking up", data.device)
    fit(model, data, epochs=1, bfloat16=False, cuda_graphs=True)
    assert len(model[3].scale) == 40  # of the last batch, which is smaller
    (kept,) = held
    assert {64} == {len(t) for t in kept if t.ndim == 1 and len(t) > 4}
    assert any(t is model[1].running_mean for t in kept)


def test_a_graph_that_the_caller_keeps_is_not_recorded_into(recorded, monkeypatch):
    monkeypatch.setattr(training.recorded, "Recording", OnCpu)
    data = load_images("fashion_mnist_mini", size=32, channels=3).subset(192).with_(batch_size=64)
    model = make("nothing", data.device)
    loss = model(next(iter(data))[0].double()).sum()
    fit(model, data, epochs=1, bfloat16=False, cuda_graphs=True)
    assert recorded.made == 0
    del loss
    fit(model, data, epochs=1, bfloat16=False, cuda_graphs=True)
    assert recorded.made == 1


class Rewinding(nn.Module):
    """Sets the random state of a device, as checkpointing does in the backward pass."""

    def forward(self, x):
        torch.cuda.set_rng_state(torch.zeros(16, dtype=torch.uint8))
        return x


def test_steps_that_set_a_random_state_are_not_recorded(recorded, monkeypatch):
    monkeypatch.setattr(training.recorded, "Recording", OnCpu)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    data = load_images("fashion_mnist_mini", size=32, channels=3).subset(192).with_(batch_size=64)
    model = nn.Sequential(Rewinding(), nn.Flatten(), nn.Linear(3072, 10))
    fit(model, data, epochs=1, bfloat16=False, cuda_graphs=True)
    assert recorded.made == 0
