"""Both engines and dense autograd on one objective: soft targets, weight decay, uneven batches."""

import contextlib
import copy
import gc
import itertools
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pyhessian import hessian as PyHessian
from scipy.integrate import trapezoid
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import landscape
from landscape import HessianOperator, Objective
from landscape.probes import pyhessian_engine

pytestmark = pytest.mark.pyhessian

WEIGHT_DECAY = 0.05
OBJECTIVE = Objective(weight_decay=WEIGHT_DECAY)
# PyHessian stops on the change of a value, so its pairs rarely meet `tol` as residuals do.
unconverged = pytest.mark.filterwarnings("ignore:.*PyHessian stops on the change:UserWarning")


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1))


class AttentionNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 6), nn.LayerNorm(6)
        self.qkv, self.head = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x):  # every row of the image is a token
        x = self.embed(x.squeeze(1))
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


class WithUnused(ConvNet):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(5))


def make(cls, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = cls()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2.0)  # away from the flat start
            for name, buffer in model.named_buffers():
                if "running" in name:
                    buffer.add_(0.3 * torch.rand_like(buffer))
    return model.to(dtype)


def batches(sizes=(9, 5, 2), dtype=torch.float64):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(sum(sizes), 1, 8, 8, generator=g).to(dtype)
    y = (2 * torch.randn(sum(sizes), 3, generator=g)).softmax(-1).to(dtype)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def dense(model, data, weight_decay=WEIGHT_DECAY, prefix=""):
    """The Hessian of -mean Σ y log p + (λ/2)‖θ‖², in float64, row by row."""
    model = copy.deepcopy(model).double().eval()
    x = torch.cat([x for x, _ in data]).double()
    y = torch.cat([y for _, y in data]).double()
    chosen = {n: p.detach() for n, p in model.named_parameters() if n.startswith(prefix)}
    shapes = [p.shape for p in chosen.values()]

    def loss(theta):
        parts = theta.split([s.numel() for s in shapes])
        values = {n: t.view(s) for n, t, s in zip(chosen, parts, shapes, strict=True)}
        logp = functional_call(model, values, (x,)).log_softmax(-1)
        return -(y * logp).sum(-1).mean() + 0.5 * weight_decay * theta.square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(
            loss, torch.cat([p.flatten() for p in chosen.values()])
        )


def by_magnitude(spectrum):
    values = np.concatenate([spectrum.largest.values, spectrum.smallest.values])
    return values[np.argsort(-np.abs(values))]


CASES = [(ConvNet, torch.float64), (AttentionNet, torch.float32)]


@pytest.fixture(params=CASES, ids=["conv64", "attention32"], scope="module")
def case(request):
    cls, dtype = request.param
    model = make(cls, dtype)
    data = batches(dtype=dtype)
    return model, data, dense(model, data)


@unconverged
@pytest.mark.parametrize("merged", [False, True], ids=["uneven", "one batch"])
def test_eigenvalues_of_both_engines_are_those_of_dense_autograd(case, merged):
    model, data, matrix = case
    if merged:
        data = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    exact = torch.linalg.eigvalsh(matrix).numpy()
    exact = exact[np.argsort(-np.abs(exact))][:3]
    settings = {"objective": OBJECTIVE, "k": 3, "density": False, "vectors": True}
    ours = landscape.hessian_spectrum(model, data, tol=1e-5, **settings)
    theirs = landscape.hessian_spectrum(
        model, data, engine="pyhessian", tol=1e-6, max_iter=500, **settings
    )
    np.testing.assert_allclose(by_magnitude(ours)[:3], exact, rtol=1e-5)
    np.testing.assert_allclose(by_magnitude(theirs), exact, rtol=2e-4)
    assert theirs.provenance.settings["engine"] == "pyhessian"
    assert ours.provenance.settings["engine"] == "native"
    # The residuals are those of the vectors that come with them.
    for pairs in (theirs.largest, theirs.smallest):
        v = torch.from_numpy(pairs.vectors).double()
        rest = v @ matrix - torch.from_numpy(pairs.values)[:, None] * v
        np.testing.assert_allclose(pairs.residuals, rest.norm(dim=1), rtol=0.05, atol=1e-6)
        assert (pairs.residuals > 0).all()


@unconverged
def test_trace_and_density_agree_with_dense_autograd(case):
    model, data, matrix = case
    dim = len(matrix)
    exact = torch.linalg.eigvalsh(matrix).numpy()
    result = landscape.hessian_spectrum(
        model, data, objective=OBJECTIVE, k=1, num_probes=4, max_iter=40, engine="pyhessian"
    )
    assert result.trace_stderr > 0
    assert abs(result.trace - exact.sum()) < 4 * result.trace_stderr
    density = result.density
    assert density.nodes.shape == density.weights.shape == (4, 40)
    np.testing.assert_allclose(density.weights.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(density.nodes.max(1), exact.max(), rtol=1e-3)
    np.testing.assert_allclose(density.nodes.min(1), exact.min(), rtol=1e-3)
    ours = landscape.hessian_density(model, data, objective=OBJECTIVE, num_steps=40, num_probes=4)
    for power in (1, 2):
        truth = (exact**power).sum() / dim
        for measure in (density, ours):
            moment, stderr = measure.moment(power)
            assert 0 < stderr < np.abs(exact**power).mean()
            assert abs(moment - truth) < 4 * stderr
    assert trapezoid(density.values, density.grid) == pytest.approx(1, abs=1e-6)


@unconverged
def test_every_mini_batch_has_its_own_hessian(case):
    model, data, _ = case
    result = landscape.hessian_max_spectrum(
        model, data, objective=OBJECTIVE, k=2, tol=1e-6, max_iter=500, engine="pyhessian"
    )
    for row, residuals, batch in zip(result.eigenvalues, result.residuals, data, strict=True):
        exact = torch.linalg.eigvalsh(dense(model, [batch])).numpy()
        exact = exact[np.argsort(-np.abs(exact))][:2]
        np.testing.assert_allclose(row, exact, rtol=1e-3)
        assert (residuals < 0.1 * np.abs(exact)).all()
    assert result.provenance.settings["engine"] == "pyhessian"


@unconverged
@pytest.mark.parametrize("sizes", [(16,), (9, 7)], ids=str)
def test_subset_of_parameters(sizes):
    model, data = make(ConvNet), batches(sizes)
    exact = torch.linalg.eigvalsh(dense(model, data, prefix="head")).numpy()[::-1]
    result = landscape.hessian_spectrum(
        model,
        data,
        objective=Objective(weight_decay=WEIGHT_DECAY, parameters="head*"),
        k=2,
        density=False,
        tol=1e-7,
        engine="pyhessian",
    )
    assert result.dim == model.head.weight.numel() + model.head.bias.numel()
    np.testing.assert_allclose(result.largest.values, exact[:2], rtol=1e-4)
    assert result.smallest.values.shape == (0,)  # softmax regression is convex


@unconverged
@pytest.mark.parametrize("sizes", [(16,), (9, 7)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_parameter_that_the_loss_ignores_is_a_zero_row(sizes, weight_decay):
    model, data = make(WithUnused), batches(sizes)
    exact = torch.linalg.eigvalsh(dense(model, data, weight_decay)).numpy()
    result = landscape.hessian_spectrum(
        model,
        data,
        objective=Objective(weight_decay=weight_decay),
        k=1,
        density=False,
        vectors=True,
        tol=1e-7,
        engine="pyhessian",
    )
    assert result.largest.values[0] == pytest.approx(exact[-1], rel=1e-4)
    first = next(i for i, (n, _) in enumerate(model.named_parameters()) if n == "unused")
    start = sum(p.numel() for _, p in itertools.islice(model.named_parameters(), first))
    assert np.abs(result.largest.vectors[0, start : start + 5]).max() < 1e-6


@pytest.mark.parametrize("sizes", [(16,), (9, 7)], ids=str)
def test_converged_means_that_the_value_is_right(sizes):
    model, data = make(ConvNet), batches(sizes)
    exact = torch.linalg.eigvalsh(dense(model, data)).numpy()
    operator = HessianOperator(model, data, OBJECTIVE)
    flags = []
    for seed in range(4):
        pairs = pyhessian_engine.top_eigenpairs(
            operator, 5, tol=1e-3, max_iter=100, generator=torch.Generator().manual_seed(seed)
        )
        distance = np.abs(pairs.values[:, None] - exact[None, :]).min(1)
        assert (distance <= pairs.residuals * (1 + 1e-9)).all()
        assert (distance[pairs.converged] <= 1e-3 * np.abs(pairs.values[pairs.converged])).all()
        assert (np.diff(np.abs(pairs.values)) <= 0).all()
        flags.append(pairs.converged)
    assert np.any(flags)
    assert not np.all(flags)


def test_value_between_two_close_eigenvalues_is_not_called_converged():
    # Mean squared error of a linear model: H = (2/n) XᵀX, planted.
    eigenvalues = torch.tensor([10.0, 9.99, 1.0, 0.5, 0.1], dtype=torch.float64)
    x = torch.diag((eigenvalues * 5 / 2).sqrt())
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    operator = HessianOperator(model, [(x, x.sum(1, keepdim=True))], Objective(loss=F.mse_loss))
    distances = []
    for seed in range(8):  # power iteration stops half way between the two
        pairs = pyhessian_engine.top_eigenpairs(
            operator, 1, tol=1e-4, max_iter=50, generator=torch.Generator().manual_seed(seed)
        )
        distance = np.abs(pairs.values[0] - eigenvalues.numpy()).min()
        assert distance <= pairs.errors[0] * (1 + 1e-6)
        assert pairs.converged[0] == (pairs.errors[0] <= 1e-4 * pairs.values[0])
        distances.append(distance)
    assert max(distances) > 2e-3


def test_unconverged_pairs_are_flagged_with_one_warning():
    with pytest.warns(
        UserWarning, match="of 3 eigenpairs have not converged .* PyHessian stops on the change"
    ) as caught:
        result = landscape.hessian_spectrum(
            make(ConvNet),
            batches(),
            k=3,
            max_iter=2,
            density=False,
            engine="pyhessian",
        )
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not np.concatenate([result.largest.converged, result.smallest.converged]).all()


@unconverged
@pytest.mark.parametrize("sizes", [(16,), (9, 7)], ids=str)
def test_products_are_counted(sizes):
    products = []
    module = sys.modules["pyhessian.hessian"]
    one, several = module.hessian_vector_product, PyHessian.dataloader_hv_product

    def count_one(*args):
        products.append("one")
        return one(*args)

    def count_several(*args):
        products.append("several")
        return several(*args)

    with (
        patch.object(module, "hessian_vector_product", count_one),
        patch.object(PyHessian, "dataloader_hv_product", count_several),
    ):
        result = landscape.hessian_spectrum(
            make(ConvNet), batches(sizes), k=2, max_iter=20, engine="pyhessian"
        )
    assert result.num_hvps == len(products)
    assert result.largest.num_matvecs < result.num_hvps - 20  # the density took 20


def run_small(model, data, seed=0):
    return landscape.hessian_spectrum(
        model,
        data,
        objective=OBJECTIVE,
        k=2,
        max_iter=10,
        engine="pyhessian",
        generator=torch.Generator().manual_seed(seed),
    )


@unconverged
@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("sizes", [(16,), (9, 7)], ids=str)
def test_model_and_global_random_state_are_left_as_found(sizes, interrupted):
    model, data = make(ConvNet), batches(sizes)
    model.train()
    model.norm.eval()
    model.conv.bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0) if p.requires_grad else None
    model.head.register_forward_hook(lambda *_: None)
    state = copy.deepcopy(model.state_dict())
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    modes = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    if interrupted:
        with (
            patch.object(PyHessian, "trace", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            run_small(model, data)
    else:
        run_small(model, data)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == identities
    assert [m.training for m in model.modules()] == modes
    assert len(model.head._forward_hooks) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    for p in model.parameters():
        assert (p.grad is None) == (not p.requires_grad)
        if p.grad is not None:
            assert p.grad.grad_fn is None
            assert (p.grad == 3).all()


@unconverged
def test_same_seed_same_result_whatever_the_global_random_state():
    model, data = make(ConvNet), batches()
    with torch.random.fork_rng():
        first = run_small(model, data)
        torch.manual_seed(99)
        again, other = run_small(model, data), run_small(model, data, seed=1)
    assert (by_magnitude(first) == by_magnitude(again)).all()
    assert (first.density.nodes == again.density.nodes).all()
    assert (by_magnitude(first) != by_magnitude(other)).any()


@unconverged
@pytest.mark.parametrize("sizes", [(16,), (9, 7)], ids=str)
@pytest.mark.parametrize(
    "interruption",
    [
        contextlib.nullcontext(),
        patch.object(PyHessian, "eigenvalues", side_effect=KeyboardInterrupt),
    ],
    ids=["finished", "interrupted"],
)
def test_no_gradient_with_its_graph_stays_alive(sizes, interruption):
    operator = HessianOperator(make(ConvNet), batches(sizes), OBJECTIVE)

    def run():
        generator = torch.Generator().manual_seed(0)
        with contextlib.suppress(KeyboardInterrupt):
            pyhessian_engine.top_eigenpairs(operator, 1, tol=1e-3, max_iter=5, generator=generator)

    def graphs():
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return sum(t.grad_fn is not None for t in tensors)

    run()
    gc.collect()
    before = graphs()
    gc.disable()  # what only the collector could free would be seen
    try:
        with interruption:
            run()
        after = graphs()
    finally:
        gc.enable()
    assert after == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "`k` must be at least 1, got 0"),
        ({"tol": 0.0}, "`tol` must be positive and finite, got 0.0"),
        ({"max_iter": 0}, "`max_iter` must be at least 1, got 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("probe", [landscape.hessian_spectrum, landscape.hessian_max_spectrum])
def test_bad_arguments_are_refused_before_pyhessian_runs(probe, arguments, message):
    with (
        patch.object(PyHessian, "eigenvalues", side_effect=AssertionError("it ran")),
        pytest.raises(ValueError, match=message),
    ):
        probe(make(ConvNet), batches(), engine="pyhessian", **arguments)


def test_more_eigenvalues_than_parameters_and_unknown_devices_are_refused():
    operator = HessianOperator(make(ConvNet), batches(), OBJECTIVE)
    settings = {"tol": 1e-3, "max_iter": 5, "generator": torch.Generator()}
    with pytest.raises(ValueError, match=f"`k` must be at most the dimension {operator.dim}"):
        pyhessian_engine.top_eigenpairs(operator, operator.dim + 1, **settings)
    operator.device = torch.device("mps")
    with pytest.raises(ValueError, match="CPU or a CUDA device"):
        pyhessian_engine.top_eigenpairs(operator, 1, **settings)


@unconverged
def test_trace_of_one_sample_has_no_standard_error():
    result = landscape.hessian_spectrum(
        make(ConvNet), batches(), k=1, max_iter=1, density=False, engine="pyhessian"
    )
    assert np.isfinite(result.trace)
    assert np.isnan(result.trace_stderr)
