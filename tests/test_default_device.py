"""Results do not depend on where tensors are made by default (`torch.set_default_device`)."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import landscape
from landscape import Objective
from landscape.models import create_model
from landscape.training import fit, fit_ensemble, load_images, recipe
from tests.cases import make_batches, make_model


def images():
    """Pixels in 0 … 1 and labels, in batches of two sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(11, 3, 32, 32, generator=generator)
    y = torch.randint(3, (11,), generator=generator)
    return [(x[:6], y[:6]), (x[6:], y[6:])]


def vit():
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "dim": 12, "depth": 1, "heads": 1, "num_classes": 3}
    return create_model("vit_nano", **sizes).eval()


def states(model):
    """Three checkpoints on the way to the model."""
    state = model.state_dict()
    moved = {name: tensor.is_floating_point() for name, tensor in state.items()}
    return [
        {n: t + step * t.cos() ** (step + 1) if moved[n] else t for n, t in state.items()}
        for step in (2, 1, 0)
    ]


def jitter(x, y, generator):
    return x + 0.1 * torch.randn(x.shape, generator=generator, device="cpu", dtype=x.dtype), y


def surface(model, data, **arguments):
    return landscape.loss_surface(model, data, points=3, metrics=("accuracy", "ece"), **arguments)


CURVATURE = {
    "hessian_spectrum": lambda m, d: landscape.hessian_spectrum(m, d, k=2, vectors=True),
    "hessian_spectrum reduced": lambda m, d: landscape.hessian_spectrum(
        m, d, k=1, basis_dtype=torch.float32, num_probes=2, tol=1e-2
    ),
    "hessian_spectrum warm": lambda m, d: landscape.hessian_spectrum(
        m, d, k=1, density=False, start=np.ones(landscape.HessianOperator(m, d).dim)
    ),
    "hessian_spectrum pyhessian": lambda m, d: landscape.hessian_spectrum(
        m, d, k=1, engine="pyhessian", tol=1e-2
    ),
    "hessian_max_spectrum": lambda m, d: landscape.hessian_max_spectrum(m, d, k=2),
    "hessian_max_spectrum group": lambda m, d: landscape.hessian_max_spectrum(m, d, k=1, group=2),
    "hessian_density": lambda m, d: landscape.hessian_density(m, d, num_steps=5),
    "hessian_trace": lambda m, d: landscape.hessian_trace(m, d, num_matvecs=12),
    "to_scipy": lambda m, d: landscape.HessianOperator(m, d).to_scipy() @ np.ones(83),
    "gauss-newton": lambda m, d: landscape.top_eigenpairs(landscape.GaussNewtonOperator(m, d), 1),
    "fisher": lambda m, d: landscape.top_eigenpairs(landscape.FisherOperator(m, d), 1),
    "empirical fisher": lambda m, d: landscape.top_eigenpairs(
        landscape.EmpiricalFisherOperator(m, d), 1
    ),
    "transform": lambda m, d: landscape.hessian_trace(
        m, d, objective=Objective(transform=jitter, weight_decay=0.1), num_matvecs=12
    ),
    "weights": lambda m, d: landscape.hessian_trace(
        m,
        d,
        objective=Objective(nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3], device="cpu").double())),
        num_matvecs=12,
    ),
}
LANDSCAPES = {
    "random_directions": lambda m, d: landscape.random_directions(m),
    "pca_directions": lambda m, d: landscape.pca_directions(states(m)),
    "between": lambda m, d: landscape.between(m, states(m)[0]),
    "eigen_directions": lambda m, d: landscape.eigen_directions(
        landscape.hessian_spectrum(m, d, k=2, vectors=True), m
    ),
    "loss_surface": surface,
    "loss_surface norms": lambda m, d: surface(
        m, d, l2="norms", objective=Objective(weight_decay=0.1)
    ),
    "loss_line adaptive": lambda m, d: landscape.loss_line(m, d, points=9, tol=0.1),
    "loss_line recalibrated": lambda m, d: landscape.loss_line(
        m, d, points=3, batch_norm="recalibrate", metrics="loss"
    ),
    "polar_trajectory": lambda m, d: landscape.polar_trajectory(states(m)),
    "project_trajectory": lambda m, d: landscape.project_trajectory(
        states(m), landscape.pca_directions(states(m))
    ),
}
FEATURES = {
    "architecture": lambda m, d: landscape.architecture(m),
    "feature_variance": lambda m, d: landscape.feature_variance(m, d),
    "fourier_amplitude": lambda m, d: landscape.fourier_amplitude(m, d),
    "fourier_amplitude radial": lambda m, d: landscape.fourier_amplitude(
        m, d, radial=True, window="hann"
    ),
    "cka": lambda m, d: landscape.cka(m, d),
    "cka of two": lambda m, d: landscape.cka(m, d, copy.deepcopy(m)),
    "lesion_study": lambda m, d: landscape.lesion_study(m, d),
    "lesion_study head": lambda m, d: landscape.lesion_study(m, d, units="head"),
    "evaluate": lambda m, d: landscape.evaluate(m, d),
    "frequency_robustness": lambda m, d: landscape.frequency_robustness(m, d, clip=True),
    "adversarial_robustness": lambda m, d: landscape.adversarial_robustness(
        m, d, radii=(0.01,), steps=2, restarts=2, mean=0.0, std=(1.0, 1.0, 1.0)
    ),
    "adversarial_robustness l2": lambda m, d: landscape.adversarial_robustness(
        m, d, radii=(0.1,), steps=2, norm="l2"
    ),
    "corruption_robustness": lambda m, d: landscape.corruption_robustness(m, d, severities=(1, 5)),
    "corruption_robustness cifar": lambda m, d: landscape.corruption_robustness(
        m, d, severities=(3,), profile="cifar"
    ),
}


def assert_same(one, other):
    """Equal, but for what a provenance says of time."""
    if dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            if field.name != "provenance":
                assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        np.testing.assert_array_equal(one, other)


def check(probe, model, data):
    with torch.device("meta"):  # first: what is made once and kept is made here
        found = probe(model, data)
    assert_same(found, probe(model, data))


@pytest.mark.parametrize("probe", CURVATURE)
def test_curvature_is_taken_where_the_model_is(probe):
    model = make_model("attention")
    nn.init.zeros_(model.head.bias)  # zeros are woken up by noise
    check(CURVATURE[probe], model, make_batches((7, 3)))


@pytest.mark.parametrize("probe", LANDSCAPES)
def test_landscapes_are_drawn_where_the_model_is(probe):
    check(LANDSCAPES[probe], make_model("conv"), make_batches((7, 3)))


@pytest.mark.parametrize("probe", FEATURES)
def test_features_and_robustness_are_measured_where_the_model_is(probe):
    check(FEATURES[probe], vit(), images())


def trained(method):
    data = load_images("fashion_mnist_mini", split="test", batch_size=16).subset(32)
    transform = recipe(data.mean, data.std, data.num_classes, erasing=0.25)
    arguments = {"epochs": 1, "transform": transform, "validation": data}
    with torch.device("cpu"):
        models = [create_model("resnet20", width=4, in_channels=1) for _ in range(2)]
        for seed, model in enumerate(models):
            torch.manual_seed(seed)
            for p in model.parameters():
                nn.init.normal_(p, std=0.1)
    if method is None:
        fit(models[0], data, **arguments)
    else:
        fit_ensemble(models, data, method=method, **arguments)
    return tuple(landscape.evaluate(model, data) for model in models)


@pytest.mark.parametrize("method", [None, "loop", "vmap"])
def test_training_takes_place_where_the_model_is(method):
    with torch.device("meta"):
        found = trained(method)
    assert_same(found, trained(method))
