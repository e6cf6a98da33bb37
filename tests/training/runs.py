"""Short training runs that may be stopped, for the tests of resuming and of faults."""

import numpy as np
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


def run(folder, *, make=adam, resume=False, transform=soften, callbacks=(), epochs=EPOCHS):
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
        callbacks=callbacks,
    )
    return model, optimizer, result


def stop_after(epoch):
    def callback(model, done):
        if done == epoch:
            raise Stop

    return [callback]


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
