"""Every probe on a CUDA device: what the CPU gives, and nothing of the user's is changed."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import nn

import landscape
from landscape import Objective, Result
from landscape.models import create_model
from tests.cases import MODELS, assert_untouched, make_batches, make_model, snapshot
from tests.corruptions.cases import pictures

DEVICE = "cuda"
SIZES = (7, 5)
OBJECTIVE = Objective(weight_decay=0.05)
NETWORKS = {"resnet20": {"width": 4}, "vit_nano": {"dim": 24, "depth": 2}}
ROUNDING = ((torch.backends.cuda.matmul, "tf32"), (torch.backends.cudnn.conv, "ieee"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # PyTorch's own, of a thread's first matrix product.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]


@pytest.fixture(autouse=True)
def _rounding_of_the_user():
    """The opposite of PyTorch's own for matrix products and convolutions, which every probe keeps.

    Products of the Hessian in float32 must not be rounded by it.
    """
    before = [backend.fp32_precision for backend, _ in ROUNDING]
    for backend, precision in ROUNDING:
        backend.fp32_precision = precision
    yield
    kept = [backend.fp32_precision for backend, _ in ROUNDING]
    for (backend, _), precision in zip(ROUNDING, before, strict=True):
        backend.fp32_precision = precision
    assert kept == [precision for _, precision in ROUNDING]


def build(name, device="cpu", dtype=torch.float64):
    """A model half in training, with statistics and gradients of its own."""
    if name in MODELS:
        model = make_model(name, dtype)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create_model(name, num_classes=3, **NETWORKS[name]).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.5)
    model = model.to(device).train()
    next(model.children()).eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def batches(name, device="cpu", dtype=torch.float64):
    """Batches for a model; images are whole bytes, in pixel units."""
    data = make_batches(SIZES)
    if name in NETWORKS:
        y = torch.cat([labels for _, labels in data])
        data = zip((pictures(len(y)) / 255.0).split(SIZES), y.split(SIZES), strict=True)
    return [(x.to(device, dtype), y.to(device)) for x, y in data]


def draws(name):
    """Two directions, the same for every device."""
    return landscape.random_directions(build(name), num=2)


def trail(model):
    """Four checkpoints on the device of a model, the last one the model itself."""
    generator = torch.Generator().manual_seed(3)
    states = []
    for step in (3.0, 2.0, 1.0, 0.0):
        state = {n: t.clone() for n, t in model.state_dict().items()}
        for n, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            state[n] += step * noise.to(p)
        states.append(state)
    return states


def assert_alike(found, expected, rtol=1e-6, atol=1e-9):
    """Two results are equal up to rounding, field by field but for where they came from."""
    if isinstance(expected, Result):
        assert type(found) is type(expected)
        for field in dataclasses.fields(expected):
            if field.name != "provenance":
                pair = getattr(found, field.name), getattr(expected, field.name)
                assert_alike(*pair, rtol=rtol, atol=atol)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_alike(found[key], expected[key], rtol=rtol, atol=atol)
    elif isinstance(expected, tuple):
        for pair in zip(found, expected, strict=True):
            assert_alike(*pair, rtol=rtol, atol=atol)
    elif isinstance(expected, float | np.ndarray):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)
    else:
        assert found == expected


def assert_estimates_agree(found, expected):
    """Two traces are equal within their errors."""
    traces, errors = [], []
    for result in (found, expected):
        of_trace = isinstance(result, landscape.TraceEstimate)
        traces.append(result.value if of_trace else result.trace)
        errors.append(result.stderr if of_trace else result.trace_stderr)
    assert abs(traces[0] - traces[1]) <= 4 * np.hypot(*errors)


def top(operator):
    """A probe: the top eigenpairs of an operator of this class."""

    def probe(model, data):
        return landscape.top_eigenpairs(operator(model, data, OBJECTIVE), k=2, tol=1e-6)

    return probe


CURVATURE = {
    "hessian_spectrum": lambda m, d: landscape.hessian_spectrum(
        m, d, objective=OBJECTIVE, k=3, tol=1e-6
    ),
    "hessian_spectrum, basis on the host": lambda m, d: landscape.hessian_spectrum(
        m, d, k=3, tol=1e-6, basis_device="cpu"
    ),
    "hessian_spectrum, from vectors": lambda m, d: landscape.hessian_spectrum(
        m, d, k=3, tol=1e-6, density=False, start=np.ones(sum(p.numel() for p in m.parameters()))
    ),
    "hessian_spectrum, no graph kept": lambda m, d: landscape.hessian_spectrum(
        m, d, k=3, tol=1e-6, memory=0
    ),
    "hessian_max_spectrum": lambda m, d: landscape.hessian_max_spectrum(
        m, d, objective=OBJECTIVE, k=3, tol=1e-6
    ),
    "hessian_max_spectrum, in step": lambda m, d: landscape.hessian_max_spectrum(
        m, [(x[:5], y[:5]) for x, y in d], k=3, tol=1e-6, group=2
    ),
    "top_eigenpairs, Hessian": top(landscape.HessianOperator),
    "top_eigenpairs, Gauss-Newton": top(landscape.GaussNewtonOperator),
    "top_eigenpairs, Fisher": top(landscape.FisherOperator),
    "top_eigenpairs, empirical Fisher": top(landscape.EmpiricalFisherOperator),
}
"""Eigenvalues, which do not depend on the start vector."""

SURFACES = {
    "loss_surface": lambda m, d, v: landscape.loss_surface(
        m, d, directions=v, points=(5, 4), objective=OBJECTIVE, metrics=("accuracy", "ece")
    ),
    "loss_surface, tol": lambda m, d, v: landscape.loss_surface(
        m, d, directions=v, span=0.1, points=9, tol=0.1, metrics="loss"
    ),
    "loss_line, norms": lambda m, d, v: landscape.loss_line(
        m, d, directions=v.select(1), points=7, objective=OBJECTIVE, l2="norms"
    ),
    "loss_line, recalibrate": lambda m, d, v: landscape.loss_line(
        m, d, directions=v.select(0), points=5, batch_norm="recalibrate"
    ),
    "loss_line, default direction": lambda m, d, v: landscape.loss_line(m, d, points=3),
}

FORWARD = {
    "evaluate": landscape.evaluate,
    "architecture": lambda m, d: landscape.architecture(m),
    "architecture, example": lambda m, d: landscape.architecture(m, example=d[0][0]),
    "cka": landscape.cka,
    "feature_variance": landscape.feature_variance,
    "fourier_amplitude": landscape.fourier_amplitude,
    "fourier_amplitude, radial": lambda m, d: landscape.fourier_amplitude(
        m, d, window="hann", radial=True
    ),
    "lesion_study": landscape.lesion_study,
    "adversarial_robustness, FGSM": lambda m, d: landscape.adversarial_robustness(
        m, d, attack="fgsm", radii=(0.01, 0.1)
    ),
    "adversarial_robustness, PGD": lambda m, d: landscape.adversarial_robustness(
        m, d, norm="l2", radii=(0.5,), steps=3, restarts=2
    ),
    "frequency_robustness": lambda m, d: landscape.frequency_robustness(
        m, d, frequencies=(0.1, 0.5, 0.9), clip=True
    ),
    "hessian_density": lambda m, d: landscape.hessian_density(m, d, num_steps=6, num_probes=2),
    "hessian_trace": lambda m, d: landscape.hessian_trace(m, d, num_matvecs=6),
}
"""What draws from a generator draws on its device, the CPU: the same numbers everywhere."""


@functools.cache
def on_the_cpu(table, probe, name):
    return run(table, probe, name, build(name), batches(name))


def run(table, probe, name, model, data):
    if table == "surfaces":
        return SURFACES[probe](model, data, draws(name))
    return {"curvature": CURVATURE, "forward": FORWARD}[table][probe](model, data)


def on_the_gpu(table, probe, name, where, tmp_path):
    """The result of a probe on the GPU, after a check of what it leaves behind."""
    model, data = build(name, DEVICE), batches(name, where)
    before, states = snapshot(model), torch.cuda.get_rng_state_all()
    result = run(table, probe, name, model, data)
    assert_untouched(model, before)
    assert all(map(torch.equal, torch.cuda.get_rng_state_all(), states))
    assert {p.device.type for p in model.parameters()} == {DEVICE}
    provenance = getattr(result, "provenance", None)
    assert provenance is None or provenance.device.startswith(DEVICE)
    assert_alike(Result.load(result.save(tmp_path / "result")), result, rtol=0, atol=0)
    return result


@pytest.mark.parametrize("where", ["cpu", DEVICE])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("probe", CURVATURE)
def test_spectra(probe, name, where, tmp_path):
    found = on_the_gpu("curvature", probe, name, where, tmp_path)
    expected = on_the_cpu("curvature", probe, name)
    if isinstance(found, landscape.HessianSpectrum):
        for edge in ("largest", "smallest"):
            pairs, known = getattr(found, edge), getattr(expected, edge)
            assert pairs.converged.all()
            np.testing.assert_allclose(pairs.values, known.values, rtol=1e-5, atol=1e-9)
        if found.density is not None:
            assert_estimates_agree(found, expected)
    else:
        field = "values" if isinstance(found, landscape.Eigenpairs) else "eigenvalues"
        assert found.converged.all()
        values, known = getattr(found, field), getattr(expected, field)
        np.testing.assert_allclose(values, known, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("where", ["cpu", DEVICE])
@pytest.mark.parametrize("name", ["conv", "attention", *NETWORKS])
@pytest.mark.parametrize("probe", SURFACES)
def test_surfaces(probe, name, where, tmp_path):
    found = on_the_gpu("surfaces", probe, name, where, tmp_path)
    assert_alike(found, on_the_cpu("surfaces", probe, name))


@pytest.mark.parametrize("where", ["cpu", DEVICE])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("probe", FORWARD)
def test_forward_passes_and_equal_draws(probe, name, where, tmp_path):
    found = on_the_gpu("forward", probe, name, where, tmp_path)
    expected = on_the_cpu("forward", probe, name)
    if isinstance(found, landscape.SpectralDensity | landscape.TraceEstimate):
        assert_estimates_agree(found, expected)  # vectors drawn on another device are others
    else:
        assert_alike(found, expected)


@pytest.mark.parametrize("profile", ["imagenet", "cifar"])
def test_corruptions(profile, tmp_path):
    """Their images differ by a grey level here and there."""
    results = []
    for device in ("cpu", DEVICE):
        model, data = build("resnet20", device), batches("resnet20", device)
        before = snapshot(model)
        result = landscape.corruption_robustness(model, data, severities=(3,), profile=profile)
        assert_untouched(model, before)
        results.append(result)
    assert_alike(Result.load(result.save(tmp_path / "result")), result, rtol=0, atol=0)
    found, expected = results[1], results[0]
    assert found.clean_nll == pytest.approx(expected.clean_nll, rel=1e-6)
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-3)
    np.testing.assert_allclose(found.error, expected.error, atol=1.01 / sum(SIZES))


@pytest.mark.parametrize(
    "operator",
    [
        landscape.HessianOperator,
        landscape.GaussNewtonOperator,
        landscape.FisherOperator,
        landscape.EmpiricalFisherOperator,
    ],
)
@pytest.mark.parametrize("name", [*MODELS, *NETWORKS])
def test_products(name, operator):
    here = operator(build(name), batches(name), OBJECTIVE)
    there = operator(build(name, DEVICE), batches(name), OBJECTIVE)
    v = torch.randn(here.dim, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = there @ v.to(DEVICE)
    assert product.device.type == DEVICE
    torch.testing.assert_close(product.cpu(), here @ v, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close((there @ v[:, 0]).cpu(), here @ v[:, 0], rtol=1e-8, atol=1e-10)
    flat = v[:, 0].numpy()
    np.testing.assert_allclose(
        there.to_scipy() @ flat, (here @ v[:, 0]).numpy(), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("name", ["conv", "resnet20"])
def test_directions_and_trajectories(name, tmp_path):
    def measure(device):
        model, data = build(name, device), batches(name)
        before, states = snapshot(model), trail(model)
        spectrum = landscape.hessian_spectrum(
            model, data, k=2, tol=1e-8, density=False, certify=False, vectors=True
        )
        components = landscape.pca_directions(states, model=model)
        results = {
            "random": landscape.random_directions(model),
            "between": landscape.between(model, states[0], states[1]),
            "pca": components,
            "polar": landscape.polar_trajectory(states, model=model),
            "projected": landscape.project_trajectory(states, components, origin=model),
            "mixed": landscape.project_trajectory(states, components, origin=build(name)),
        }
        for result in results.values():
            assert_alike(Result.load(result.save(tmp_path / "result")), result, rtol=0, atol=0)
        eigen = landscape.eigen_directions(spectrum, model)
        assert_untouched(model, before)
        return results, landscape.loss_line(model, data, directions=eigen.select(0), points=3)

    (found, line), (expected, known) = measure(DEVICE), measure("cpu")
    assert_alike(found, expected, atol=1e-7)  # the last checkpoint is the model: a distance of 0
    # An eigenvector has no sign.
    nll = line.nll if abs(line.nll - known.nll).max() < 1e-5 else line.nll[::-1]
    np.testing.assert_allclose(nll, known.nll, rtol=1e-5)


@pytest.mark.parametrize("other", ["cpu", DEVICE])
def test_two_networks_on_devices_of_their_own(other):
    data = batches("resnet20")
    expected = landscape.cka(build("resnet20"), data, build("vit_nano"))
    found = landscape.cka(build("resnet20", DEVICE), data, build("vit_nano", other))
    assert_alike(found, expected)


@pytest.mark.parametrize("name", ["conv", "attention"])
@pytest.mark.parametrize(
    ("precision", "tol"),
    [("full", 1e-3), ("tf32", 0.02), ("bf16", 0.3)],
    ids=["full", "tf32", "bf16"],
)
def test_reduced_precision_says_how_far_off_it_is(name, precision, tol):
    exact = landscape.hessian_spectrum(build(name), batches(name), k=1, tol=1e-6)
    model, data = build(name, DEVICE, torch.float32), batches(name)
    before = snapshot(model)
    found = landscape.hessian_spectrum(model, data, k=1, tol=tol, precision=precision)
    for pairs, known in ((found.largest, exact.largest), (found.smallest, exact.smallest)):
        assert pairs.converged.all()
        assert (
            abs(pairs.values - known.values) <= pairs.residuals + 1e-4 * abs(known.values)
        ).all()
    for group in (1, 2):
        found = landscape.hessian_max_spectrum(
            model, data, k=1, tol=tol, precision=precision, group=group
        )
        known = landscape.hessian_max_spectrum(build(name), batches(name), k=3, tol=1e-6)
        assert found.converged.all()
        error = abs(found.eigenvalues - known.eigenvalues).min(1)  # of a rough search any may be
        assert (error <= found.residuals[:, 0] + 1e-4 * abs(known.eigenvalues[:, 0])).all()
    assert_untouched(model, before)


def test_a_generator_may_be_on_the_device():
    model, data = build("conv", DEVICE), batches("conv")
    expected = landscape.hessian_spectrum(build("conv"), data, k=2, tol=1e-6)
    for _ in range(2):
        generator = torch.Generator(DEVICE).manual_seed(1)
        found = landscape.hessian_spectrum(model, data, k=2, tol=1e-6, generator=generator)
        np.testing.assert_allclose(found.largest.values, expected.largest.values, rtol=1e-5)
        generator = torch.Generator(DEVICE).manual_seed(1)
        line = landscape.loss_line(model, data, points=3, generator=generator)
        assert np.isfinite(line.loss).all()


@pytest.mark.parametrize("loss", [nn.functional.cross_entropy, None], ids=["ours", "its own"])
def test_a_graph_of_samples_is_not_cut(loss):
    class Graph(nn.Module):
        """An edge that points nowhere would end the process's use of the device."""

        def __init__(self):
            super().__init__()
            self.head, self.broken = nn.Linear(4, 3), 0

        def forward(self, x, edges, labels=None):
            self.broken += int(edges.max()) >= len(x)
            edges = edges.clamp_max(len(x) - 1)
            logits = self.head(x.index_add(0, edges[1], x[edges[0]]))
            if loss is not None:
                return logits
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    draw = torch.Generator().manual_seed(0)
    x, edges = torch.randn(40, 4, generator=draw), torch.randint(40, (2, 90), generator=draw)
    batch = {"x": x, "edges": edges, "labels": torch.randint(3, (40,), generator=draw)}
    model = Graph().to(DEVICE)
    spectrum = landscape.hessian_spectrum(model, [batch], objective=Objective(loss=loss), k=2)
    assert np.isfinite(spectrum.largest.values).all()
    assert model.broken == 0
