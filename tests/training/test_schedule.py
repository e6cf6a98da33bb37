"""Warm-up and cosine against closed forms and PyTorch; the paper's AdamW."""

import math

import pytest
import torch
from torch import nn

from landscape.training import WarmupCosine, adamw


def test_factor_at_known_positions():
    schedule = WarmupCosine(epochs=25, warmup_epochs=5)
    expected = {0: 0, 2.5: 0.5, 5: 1, 10: (1 + math.sqrt(0.5)) / 2, 15: 0.5, 25: 0}
    for position, factor in expected.items():
        assert schedule(position) == pytest.approx(factor, abs=1e-15)


def test_per_epoch_equals_pytorchs_cosine_after_the_warmup():
    schedule = WarmupCosine(epochs=17, warmup_epochs=5, per_epoch=True)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    for epoch in range(12):
        for share in (0, 0.3, 0.99):
            assert schedule(5 + epoch + share) == pytest.approx(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()
    assert schedule(2.25) == 0.45  # the warm-up moves at every step all the same


def test_no_warmup_starts_at_one():
    assert WarmupCosine(epochs=3, warmup_epochs=0)(0.0) == 1.0


@pytest.mark.parametrize(
    ("epochs", "warmup", "match"),
    [
        (5, 5, "`epochs` must be at least 6, got 5"),
        (5, -1, "`warmup_epochs` must be at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused(epochs, warmup, match):
    with pytest.raises(ValueError, match=match):
        WarmupCosine(epochs, warmup)


@pytest.mark.parametrize("decay_1d", [True, False])
def test_adamw_trains_all_and_decays_what_it_says(decay_1d):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.scale = nn.Parameter(torch.ones(()))
    nn.init.ones_(model[0].bias)
    model[1].requires_grad_(False)
    optimizer = adamw(model, lr=0.1, weight_decay=0.5, decay_1d=decay_1d)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert set(held) == {parameter for parameter in model.parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {"0.weight", "0.bias", "scale"} if decay_1d else {"0.weight"}
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in decayed else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lr": -1}, "`lr` must be at least 0, got -1"),
        ({"lr": "x"}, "`lr` must be a number, got 'x'"),
        ({"weight_decay": -1}, "`weight_decay` must be at least 0, got -1"),
    ],
)
def test_adamw_refuses_rates_by_their_names(arguments, match):
    with pytest.raises(ValueError, match=match):
        adamw(nn.Linear(2, 2), **arguments)


def test_defaults_are_the_papers():
    assert WarmupCosine(305).warmup_epochs == 5
    defaults = adamw(nn.Linear(2, 2)).defaults
    assert (defaults["lr"], defaults["weight_decay"]) == (1.25e-4, 0.05)
