"""Searches that multiply by differences of gradients, against those by accurate products alone."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import landscape
from landscape import HessianOperator, Objective, top_eigenpairs
from landscape.linalg.differences import GradientDifferences
from landscape.linalg.search import REFINEMENTS

WIDTH = 520


class Mlp(nn.Module):
    """A model of so many parameters that its vectors are long, over tokens."""

    def __init__(self, activation):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, WIDTH) for n in (12, WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.activation = activation

    def forward(self, x):
        for layer in self.layers:
            x = self.activation(layer(x))
        return self.head(self.norm(x).mean(1))


def kinked(x):
    """A leaky ReLU whose name does not say so."""
    return torch.where(x > 0, x, 0.1 * x)


def problem(activation=F.gelu, sizes=(24, 8), dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mlp(activation)
        x, y = torch.randn(sum(sizes), 1280 // sizes[0], 12), torch.arange(sum(sizes)) % 3
    x += y[:, None, None] * torch.linspace(-0.5, 0.5, 12)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    model, x = model.to(dtype), x.to(dtype)
    return model, list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.fixture
def accurate(monkeypatch):
    """Run a function with accurate products alone."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(HessianOperator, "differences", lambda self, certify: None)
            return function()

    return run


@pytest.fixture
def counted(monkeypatch):
    """Count products by differences of gradients."""
    products = []
    matvec = GradientDifferences.matvec

    def counting(self, v):
        products.append(1)
        return matvec(self, v)

    monkeypatch.setattr(GradientDifferences, "matvec", counting)
    return products


def true_residuals(model, data, objective, found):
    """Return ‖H x − λ x‖ in float64."""
    exact = HessianOperator(model.double(), [(x.double(), y) for x, y in data], objective)
    rows = torch.from_numpy(found.vectors).double()
    rest = exact.matmat(rows.T).T - torch.from_numpy(found.values)[:, None] * rows
    return rest.norm(dim=1).numpy()


@pytest.mark.parametrize("activation", [F.gelu, F.relu])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_products_are_about_those_of_the_hessian(decay, activation, generator):
    model, data = problem(activation)
    operator = HessianOperator(model, data, Objective(weight_decay=decay))
    products = operator.differences()
    top = top_eigenpairs(operator, 2, vectors=True)
    random = torch.randn(operator.dim, generator=generator)
    for v in (random / random.norm(), *torch.from_numpy(top.vectors)):
        error = products.matvec(v) - operator.matvec(v)
        assert error.norm() < 3e-3 * abs(top.values[0])


@pytest.mark.parametrize(("which", "activation"), [("LM", F.gelu), ("LA", F.gelu), ("LM", F.relu)])
def test_pairs_are_those_of_accurate_products(which, activation, accurate, counted):
    model, data = problem(activation)
    objective = Objective(weight_decay=1e-2)
    operator = HessianOperator(model, data, objective)
    found = top_eigenpairs(operator, 3, which, vectors=True)
    assert len(counted) >= found.num_matvecs - 3 - 3
    assert operator.num_matvecs == found.num_matvecs - len(counted)
    alone = accurate(lambda: top_eigenpairs(operator, 3, which, tol=1e-5))
    np.testing.assert_allclose(found.values, alone.values, rtol=1e-3)
    assert (abs(found.values - alone.values) <= found.errors + 1e-5 * alone.values[0]).all()
    assert found.converged.all()
    assert found.miss <= 0.01
    true = true_residuals(model, data, objective, found)
    np.testing.assert_allclose(found.residuals, true, rtol=1e-2, atol=1e-5 * alone.values[0])


@pytest.mark.parametrize("activation", [F.gelu, F.relu])
def test_mini_batches_are_those_of_accurate_products(activation, accurate, counted):
    model, data = problem(activation, sizes=(12, 12, 12))
    found = landscape.hessian_max_spectrum(model, data, k=3)
    assert found.num_hvps - len(counted) < 3 * (3 + 3)
    alone = accurate(lambda: landscape.hessian_max_spectrum(model, data, k=3, tol=1e-5))
    np.testing.assert_allclose(found.eigenvalues, alone.eigenvalues, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"activation": nn.ReLU6()}, {}),
        ({"dtype": torch.float64}, {}),
        ({}, {"tol": 1e-4}),
        ({}, {"which": "SA"}),
    ],
    ids=["relu6", "float64", "tol", "smallest"],
)
def test_what_wants_accurate_products_has_them_alone(settings, arguments, counted):
    model, data = problem(**settings, sizes=(16,))
    top_eigenpairs(HessianOperator(model, data), 1, **arguments)
    assert not counted


@pytest.mark.parametrize(("memory", "certify"), [(0, True), ("auto", False)])
def test_held_kinks_want_kept_graphs_and_a_long_search(memory, certify, counted):
    model, data = problem(F.relu, sizes=(16, 16))
    operator = HessianOperator(model, data, memory=memory)
    assert operator.kinks == "held"
    top_eigenpairs(operator, 1, certify=certify)
    landscape.hessian_max_spectrum(model, data, k=1, memory=memory, certify=certify)
    assert not counted


def test_kinks_are_noticed_by_their_products(accurate, counted):
    model, data = problem(kinked)
    operator = HessianOperator(model, data)
    assert operator.kinks == "none"
    found = top_eigenpairs(operator, 3)
    assert 0 < len(counted) < 8
    alone = accurate(lambda: top_eigenpairs(operator, 3))
    np.testing.assert_allclose(found.values, alone.values, rtol=1e-3)
    assert abs(found.num_matvecs - len(counted) - alone.num_matvecs) < 4


@pytest.mark.parametrize(("noise", "goes_on"), [(0.002, False), (0.3, True)])
def test_pairs_that_a_check_finds_wanting_are_refined_or_sought_anew(
    noise, goes_on, monkeypatch, accurate, counted, generator
):
    model, data = problem()
    operator = HessianOperator(model, data)
    alone = accurate(lambda: top_eigenpairs(operator, 3, tol=1e-5))
    matvec = GradientDifferences.matvec

    def noisy(self, v):
        off = torch.randn(len(v), generator=generator)
        return matvec(self, v).add_(off / off.norm(), alpha=noise * alone.values[0])

    monkeypatch.setattr(GradientDifferences, "matvec", noisy)
    before = operator.num_matvecs
    found = top_eigenpairs(operator, 3)
    assert operator.num_matvecs - before > 3
    assert (operator.num_matvecs - before > 3 * (1 + REFINEMENTS)) is goes_on
    assert found.converged.all()
    assert found.num_matvecs == len(counted) + operator.num_matvecs - before
    np.testing.assert_allclose(found.values, alone.values, rtol=1e-3)


def test_products_are_never_more_than_asked_for(counted):
    model, data = problem(sizes=(16,))
    operator = HessianOperator(model, data)
    for max_iter in (3, 8, 10, 13):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # some have not converged
            found = top_eigenpairs(operator, 3, max_iter=max_iter, tol=5e-4)
        assert found.num_matvecs <= max_iter
    assert counted
