"""The training core on a CUDA device: same draws as on the CPU, no state left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape.models import create_model
from landscape.recording import Recording, unsynchronised
from landscape.training import RandAugment, fit, load_images, loop, recipe
from landscape.training.ensemble import fit_ensemble
from tests.training.test_recorded import PARTS, UNRECORDED, check_steps, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def data():
    data = load_images("fashion_mnist_mini", size=32, channels=3, batch_size=64, shuffle=True)
    return data.subset(256)


def test_batches_and_augmentation_equal_those_of_the_cpu(data):
    data = data.with_(augment=RandAugment())
    for (x, y), (x_gpu, y_gpu) in zip(data.batches(3), data.to("cuda").batches(3), strict=True):
        assert x_gpu.is_cuda
        assert torch.equal(y, y_gpu.cpu())
        # one grey level at most, and rarely: rounding differs between devices
        difference = (x - x_gpu.cpu()).abs()
        assert difference.max() < 1.01 / 255 / min(data.std)
        assert (difference > 1e-4).double().mean() < 0.01


def test_recipe_draws_the_same_mixture_on_both_devices(data):
    transform = recipe(data.mean, data.std, data.num_classes, erasing=0.25)
    for (x, y), (x_gpu, y_gpu) in zip(data, data.to("cuda"), strict=True):
        _, target = transform(x, y, torch.Generator().manual_seed(0))
        _, on_gpu = transform(x_gpu, y_gpu, torch.Generator().manual_seed(0))
        torch.testing.assert_close(target, on_gpu.cpu())


def test_fit_in_bfloat16_learns_and_leaves_the_random_states_alone(data):
    data = data.to("cuda")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(7200, 10)
        ).cuda()
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    result = fit(model, data, epochs=8, optimizer=optimizer)
    assert result.train_loss[-1] < result.train_loss[0]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["resnet20", "vit_nano"])
def test_ensemble_equals_separate_trainings(data, name):
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return [create_model(name).double().cuda() for _ in range(2)]

    models, alone = make(), make()
    data = data.to("cuda")
    assert fit_ensemble(models, data, epochs=2).method == "vmap"
    for k in range(2):
        fit(alone[k], data, epochs=2, seed=k, bfloat16=False, channels_last=False)
        for a, b in zip(models[k].parameters(), alone[k].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet20", "vit_nano", "waiting", *PARTS])
def test_recorded_steps_are_the_same_steps(data, name, monkeypatch):
    replays = []
    replay = Recording.replay
    monkeypatch.setattr(Recording, "replay", lambda *args: replays.append(args) or replay(*args))
    check_steps(name, data.to("cuda"))
    assert len(replays) == (0 if name in ("waiting", *UNRECORDED) else 4)


def test_a_recording_goes_on_after_a_batch_of_another_size(data):
    x, y = next(iter(data))
    batches = [(x[:n].double(), y[:n]) for n in (8, 8, 8, 4, 8)]
    states = []
    for cuda_graphs in (False, True):
        model = make("looking up", torch.device("cuda"))
        fit(model, batches, epochs=1, bfloat16=False, channels_last=False, cuda_graphs=cuda_graphs)
        states.append([*model.parameters()])
    torch.testing.assert_close(*states, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_an_epoch_never_waits_for_the_device(data, cuda_graphs):
    model = create_model("vit_nano", drop_path=0.3).cuda().train()
    data = data.to("cuda")
    transform = recipe(data.mean, data.std, data.num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = loop.Step(model, optimizer, F.cross_entropy, transform, 5.0, True, cuda_graphs)
    with unsynchronised():
        for epoch in range(3):
            batches = data.batches(epoch)
            means = loop.train_epoch(step, batches, torch.Generator(), lambda index: None)
    assert means.num_batches == 4
