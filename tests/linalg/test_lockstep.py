import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import landscape
from landscape import HessianOperator, Objective
from landscape.linalg import lockstep
from landscape.linalg.lockstep import StackedHessian
from landscape.models import create_model
from tests.cases import assert_untouched, make_batches, make_model, snapshot

OBJECTIVE = Objective(weight_decay=0.05)


def frozen_batches(model, batches, objective=OBJECTIVE):
    frozen = objective.freeze(model, batches, check_mean=False)
    return frozen, list(frozen.batches)


@pytest.mark.parametrize("name", ["conv", "tied", "attention"])
def test_stacked_products_are_those_of_each_mini_batch(name, generator):
    model, batches = make_model(name), make_batches((4, 4, 4))
    frozen, prepared = frozen_batches(model, batches)
    before = snapshot(model)
    hessian = StackedHessian(frozen, prepared, measure=True)
    vectors = torch.randn(3, frozen.space.dim, generator=generator, dtype=torch.float64)
    found = hessian.product(vectors)
    for v, product, loss, batch in zip(vectors, found, hessian.losses, batches, strict=True):
        alone = HessianOperator(model, [batch], OBJECTIVE)
        torch.testing.assert_close(product, alone.matvec(v))
        logits = model.eval()(batch[0])
        torch.testing.assert_close(loss, F.cross_entropy(logits, batch[1]))
        model.train()
    assert hessian.num_bytes > 0
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["resnet20", "vit_nano"])
def test_stacked_products_of_our_models(name, generator):
    model = create_model(name, num_classes=3, in_channels=1).double()
    x = torch.randn(6, 1, 32, 32, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 2, 1])
    frozen, prepared = frozen_batches(model, [(x[:3], y[:3]), (x[3:], y[3:])])
    vectors = torch.randn(2, frozen.space.dim, generator=generator, dtype=torch.float64)
    found = StackedHessian(frozen, prepared).product(vectors)
    for v, product, batch in zip(vectors, found, prepared, strict=True):
        alone = HessianOperator.of(frozen.of_batch(batch))
        torch.testing.assert_close(product, alone.matvec(v))


@pytest.mark.parametrize("name", ["conv", "attention"])
def test_lock_step_finds_what_one_after_the_other_does(name):
    """Seven mini-batches, in groups of 3, 3 and 1 of two shapes."""
    model, batches = make_model(name), make_batches((4, 4, 4, 4, 3, 3, 4))
    alone = landscape.hessian_max_spectrum(model, batches, objective=OBJECTIVE, group=1)
    before = snapshot(model)
    together = landscape.hessian_max_spectrum(model, batches, objective=OBJECTIVE, group=3)
    assert_untouched(model, before)
    np.testing.assert_allclose(together.eigenvalues, alone.eigenvalues, rtol=1e-3)
    assert together.converged.all()
    assert (together.residuals <= 0.1 * np.abs(together.eigenvalues)).all()
    assert together.provenance.settings["group"] == 3
    assert together.provenance.settings["kept_batches"] == 7
    assert alone.provenance.settings["group"] == 1
    assert abs(together.num_hvps - alone.num_hvps) < 0.3 * alone.num_hvps
    # On a CPU one after the other is the default.
    assert landscape.hessian_max_spectrum(model, batches).provenance.settings["group"] == 1


def test_those_that_have_converged_drop_out(monkeypatch):
    """Mini-batches of equal images have a Hessian of low rank, and are done early."""
    model = make_model("attention")
    x, y = make_batches((12,))[0]
    hard, easy = (x[:4], y[:4]), (torch.zeros_like(x[:4]), y[:4] * 0)
    rows = []

    class Counted(StackedHessian):
        def product(self, vectors):
            rows.append(len(vectors))
            return super().product(vectors)

    monkeypatch.setattr(lockstep, "StackedHessian", Counted)
    result = landscape.hessian_max_spectrum(model, [hard, easy, easy, easy], group=4)
    assert rows[1] == 4  # after the trial of two
    assert rows[-1] == 1
    assert sum(rows[1:]) < 4 * len(rows[1:])
    assert result.num_hvps <= sum(rows[1:])
    alone = landscape.hessian_max_spectrum(model, [hard])
    np.testing.assert_allclose(result.eigenvalues[0], alone.eigenvalues[0], rtol=1e-3)


def test_a_warm_start_serves_the_whole_group():
    model, batches = make_model("conv"), make_batches((6, 6))
    kwargs = {"k": 2, "objective": OBJECTIVE}
    cold = landscape.hessian_max_spectrum(model, [batches[0]] * 3, group=3, **kwargs)
    found = landscape.top_eigenpairs(
        HessianOperator(model, batches[:1], OBJECTIVE), 2, vectors=True
    )
    warm = landscape.hessian_max_spectrum(model, [batches[0]] * 3, group=3, start=found, **kwargs)
    np.testing.assert_allclose(warm.eigenvalues, cold.eigenvalues, rtol=1e-3)
    assert warm.num_hvps < cold.num_hvps
    # The second group starts from what the first one found.
    twice = landscape.hessian_max_spectrum(model, [batches[0]] * 6, group=3, **kwargs)
    assert twice.num_hvps < 2 * cold.num_hvps


def test_a_group_that_does_not_fit_is_halved(monkeypatch):
    model, batches = make_model("conv"), make_batches((4,) * 6)
    expected = landscape.hessian_max_spectrum(model, batches).eigenvalues
    sizes = []

    class Small(StackedHessian):
        def product(self, vectors):
            sizes.append(len(vectors))
            if len(vectors) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().product(vectors)

    monkeypatch.setattr(lockstep, "StackedHessian", Small)
    result = landscape.hessian_max_spectrum(model, batches, group=6)
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-3)
    assert result.provenance.settings["group"] == 2
    assert [size for size in sizes if size > 2] == [6, 3]


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x if x.sum() > 0 else 2 * x)


class Leaky(nn.Module):
    """Runs under vmap, and is wrong: the mean over the batch is one over a single sample there."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.head(x.flatten(1)) * (
            2.0 if torch._C._functorch.maybe_get_level(x) > 0 else 1.0
        )


def test_models_that_cannot_be_stacked_are_solved_one_by_one():
    batches = make_batches((4, 4))
    for model in (Branching().double(), Leaky().double()):
        frozen, _ = frozen_batches(model, batches)
        assert lockstep._stacked_bytes(frozen, list(frozen.batches)) is None
        with pytest.raises(ValueError, match="`group` must be 1 for a model that vmap cannot run"):
            landscape.hessian_max_spectrum(model, batches, group=2)
    with pytest.raises(ValueError, match="`group` must be at least 1, got 0"):
        landscape.hessian_max_spectrum(model, batches, group=0)
    with pytest.raises(ValueError, match="`group` needs engine='native', got 'pyhessian'"):
        landscape.hessian_max_spectrum(model, batches, group=2, engine="pyhessian")


def test_lock_step_in_half_precision():
    model, batches = make_model("conv", torch.bfloat16), make_batches((4, 4))
    alone, together = (
        landscape.hessian_max_spectrum(model, batches, k=1, group=group) for group in (1, 2)
    )
    np.testing.assert_allclose(together.eigenvalues, alone.eigenvalues, rtol=0.02)


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, pixel_values, labels=None):
        logits = self.head(pixel_values.flatten(1)).tanh()
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"logits": logits, "loss": loss}


@pytest.mark.parametrize("loss", [None, F.cross_entropy])
def test_mapping_batches_and_the_loss_of_a_model(loss):
    model = Keyed().double()
    batches = [{"pixel_values": x, "labels": y} for x, y in make_batches((4, 4, 4))]
    objective = Objective(loss=loss)
    results = [
        landscape.hessian_max_spectrum(model, batches, objective=objective, k=3, group=group)
        for group in (1, 3)
    ]
    np.testing.assert_allclose(results[1].eigenvalues, results[0].eigenvalues, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["resnet20", "vit_nano"])
def test_lock_step_on_a_gpu(name):
    model = create_model(name, num_classes=10).cuda()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 3, 32, 32, generator=generator).cuda()
    y = torch.randint(10, (96,), generator=generator).cuda()
    batches = list(zip(x.split(16), y.split(16), strict=True))
    together = landscape.hessian_max_spectrum(model, batches)
    assert together.provenance.settings["group"] > 1
    alone = landscape.hessian_max_spectrum(model, batches, group=1)
    np.testing.assert_allclose(together.eigenvalues, alone.eigenvalues, rtol=5e-3)
