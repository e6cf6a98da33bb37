import dataclasses
import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.integrate import trapezoid
from torch import nn

import landscape
from landscape import Objective
from landscape.intervals import mean_interval
from landscape.linalg.krylov import RitzPairs
from landscape.models import create_model
from landscape.probes.hessian import _density
from landscape.training import load_images
from tests import oracles
from tests.cases import assert_untouched, make_batches, make_model, snapshot

OBJECTIVE = Objective(weight_decay=0.05)


def jitter(x, y, generator):
    return x + torch.randn(x.shape, generator=generator, dtype=x.dtype), y


def eigenvalues(model, batches, **kwargs):
    return torch.linalg.eigvalsh(oracles.dense(model, batches, **kwargs)).numpy()


@pytest.mark.parametrize("name", ["conv", "tied", "attention"])
def test_spectrum_equals_dense_autograd(name):
    model, batches = make_model(name), make_batches((7, 3))
    expected = eigenvalues(model, batches, weight_decay=0.05)
    spectrum = landscape.hessian_spectrum(model, batches, objective=OBJECTIVE)
    np.testing.assert_allclose(spectrum.largest.values, expected[::-1][:5], rtol=1e-3)
    np.testing.assert_allclose(spectrum.smallest.values, expected[:5], rtol=1e-3, atol=1e-12)
    for pairs in (spectrum.largest, spectrum.smallest):
        distance = np.abs(expected[None] - pairs.values[:, None]).min(1)
        assert (distance <= pairs.residuals + 1e-10).all()
    assert spectrum.num_hvps <= spectrum.dim == len(expected)
    assert trapezoid(spectrum.density.values, spectrum.density.grid) == pytest.approx(1, abs=1e-6)
    assert abs(spectrum.trace - expected.sum()) <= 3 * spectrum.trace_stderr + 1e-9
    second, stderr = spectrum.density.moment(2)
    assert abs(second - (expected**2).mean()) <= 3 * stderr + 1e-9
    assert spectrum.provenance.objective == "loss=cross_entropy, weight_decay=0.05"


def test_trace_and_frobenius_norm_lie_within_their_standard_errors():
    model, batches = make_model("attention"), make_batches((12,))
    matrix = oracles.dense(model, batches)
    scores = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        # Few products, so that the density is an estimate and not the whole spectrum.
        density = landscape.hessian_density(
            model, batches, num_steps=8, sigma=1.0, num_probes=2, generator=generator
        )
        for power in (1, 2):
            exact = (torch.linalg.eigvalsh(matrix) ** power).mean().item()
            mean, stderr = density.moment(power)
            scores.append((mean - exact) / stderr)
    assert abs(np.mean(scores)) < 0.5
    assert (np.abs(scores) < 2).mean() > 0.9


def test_an_early_stop_gives_an_honest_estimate():
    model, batches = make_model("conv"), make_batches((12,))
    expected = eigenvalues(model, batches)
    scores = []
    for seed in range(30):
        spectrum = landscape.hessian_spectrum(
            model, batches, k=2, tol=1e-2, density=False, max_basis=20,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        assert spectrum.density is None
        np.testing.assert_allclose(spectrum.largest.values, expected[::-1][:2], rtol=1e-2)
        scores.append((spectrum.trace - expected.sum()) / (spectrum.trace_stderr + 1e-12))
    assert (np.abs(scores) < 2.5).mean() > 0.85


def test_density_and_trace_tell_where_they_came_from(tmp_path):
    model, batches = make_model("conv"), make_batches((7, 5))
    generator = torch.Generator().manual_seed(3)
    density = landscape.hessian_density(
        model, batches, objective=OBJECTIVE, num_steps=6, num_probes=2, generator=generator
    )
    trace = landscape.hessian_trace(model, batches, objective=OBJECTIVE, num_matvecs=9)
    for result, seed, products in ((density, 3, 12), (trace, 0, 9)):
        known = result.provenance
        assert (known.num_hvps, known.seed, known.num_samples) == (products, seed, 12)
        assert known.objective == "loss=cross_entropy, weight_decay=0.05"
        loaded = type(result).load(result.save(tmp_path / "result"))
        assert loaded.provenance == known
    assert density.provenance.settings["num_probes"] == 2


def test_trace_by_hutch_plus_plus():
    model, batches = make_model("attention"), make_batches((7, 3))
    exact = eigenvalues(model, batches).sum()
    estimate = landscape.hessian_trace(model, batches, num_matvecs=60)
    assert estimate.num_matvecs == 60
    assert 0 < estimate.stderr < 0.2 * abs(exact)
    assert abs(estimate.value - exact) < 3 * estimate.stderr


@pytest.mark.parametrize("name", ["conv", "attention"])
def test_max_spectrum_misses_no_eigenvalue_of_any_mini_batch(name):
    model, batches = make_model(name), make_batches((4, 4, 4, 3))
    result = landscape.hessian_max_spectrum(model, batches, objective=OBJECTIVE)
    assert result.eigenvalues.shape == (4, 5)
    for row, batch in zip(result.eigenvalues, batches, strict=True):
        exact = eigenvalues(model, [batch], weight_decay=0.05)
        exact = exact[np.argsort(-np.abs(exact))][:5]
        np.testing.assert_allclose(row, exact, rtol=1e-3)
    assert result.converged.all()
    values = result.eigenvalues
    assert result.nep == (values < 0).mean() > 0
    assert result.ape == pytest.approx(values[values > 0].mean())
    for value, (low, high) in (
        (result.nep, result.nep_interval),
        (result.ape, result.ape_interval),
    ):
        assert low <= value <= high
        assert low < high


def test_intervals_over_few_mini_batches_are_wider_than_percentiles(generator):
    """Of a normal mean, half the width is t · s / √n with s over n − 1."""
    for count in (8, 200):
        sharpness = torch.randn(count, generator=generator).double() + 20
        data = [(s.sqrt().view(1, 1), torch.zeros(1, 1).double()) for s in sharpness]
        objective = Objective(loss=lambda out, y: 0.5 * (out - y).square().mean())
        result = landscape.hessian_max_spectrum(Scale(), data, objective=objective, k=1)
        expected = mean_interval(sharpness)
        assert result.ape == pytest.approx(expected[0], rel=1e-9)
        half = (result.ape_interval[1] - result.ape_interval[0]) / 2
        assert half == pytest.approx((expected[2] - expected[1]) / 2, rel=0.15)
    alone = landscape.hessian_max_spectrum(Scale(), data[:1], objective=objective, k=1)
    assert np.isnan([*alone.nep_interval, *alone.ape_interval]).all()


@pytest.mark.parametrize("count", [4, 5])
def test_few_mini_batches_have_the_quantile_of_student(count):
    """A normal mean: t of n − 1 degrees, over √n, where a resample has s over n."""
    from landscape.probes.hessian_max import _bootstrap

    values = np.linspace(1, 2, count)
    generator = torch.Generator().manual_seed(0)
    _, (low, high) = _bootstrap(values[:, None], 100_000, generator)
    quantile = stats.t.ppf(0.975, count - 1) * np.sqrt(count / (count - 1))
    draws = np.random.RandomState(0).randint(count, size=(100_000, count))
    tail = 100 * stats.norm.cdf(-quantile)
    expected = np.percentile(values[draws].mean(1), [tail, 100 - tail])
    np.testing.assert_allclose([low, high], expected, rtol=0.01)


def test_each_mini_batch_has_a_start_of_its_own_and_the_certificate_asked_for():
    model, (batch,) = make_model("conv"), make_batches((6,))
    few = {"k": 1, "max_iter": 3, "certify": False}
    with pytest.warns(UserWarning, match="have not converged"):
        first, second = landscape.hessian_max_spectrum(
            model, [batch] * 2, group=2, **few
        ).eigenvalues
    assert first != second
    loose, usual, strict = (
        landscape.hessian_max_spectrum(model, [batch] * 2, k=2, certify=certify)
        for certify in (False, True, 1e-6)
    )
    assert (loose.miss == 1).all()
    assert (usual.miss < 0.1).all()
    assert (strict.miss <= usual.miss).all()
    assert loose.num_hvps < usual.num_hvps <= strict.num_hvps
    assert usual.provenance.num_hvps == usual.num_hvps / 2


def test_accurate_products_after_a_rough_search_have_accurate_errors():
    model, batches = make_model("conv", torch.float32), make_batches((8, 8), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = landscape.hessian_max_spectrum(model, batches, k=2, precision="bf16")
    assert found.errors.min() < 1e-4


def test_the_trace_is_that_of_before_the_first_restart():
    model, batches = make_model("conv"), make_batches((12,))
    found = landscape.hessian_spectrum(model, batches, k=2, tol=1e-8, max_basis=16, certify=False)
    exact = eigenvalues(model, batches).sum()
    assert abs(found.trace - exact) < 3 * found.trace_stderr
    assert found.trace_stderr < 2 * exact


def test_mini_batches_that_do_not_count_are_told():
    model, batches = make_model("conv"), make_batches((4, 4, 4))
    batches[1] = batches[1][0], torch.full_like(batches[1][1], -100)
    with pytest.warns(UserWarning, match="1 mini-batches without a sample or label that counts"):
        result = landscape.hessian_max_spectrum(model, batches, k=1)
    assert len(result.eigenvalues) == 2


def test_max_spectrum_at_a_zero_head_has_multiple_eigenvalues():
    """At equal logits the head's Hessian is (I/K − 11ᵀ/K²) ⊗ XXᵀ: K − 1 = 2 of each."""
    model, batches = make_model("conv"), make_batches((5,))
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    exact = eigenvalues(model, batches, names=["5.weight", "5.bias"])
    exact = exact[np.argsort(-np.abs(exact))][:4]
    assert exact[0] == pytest.approx(exact[1], rel=1e-9)
    head = Objective(parameters="5.*")
    result = landscape.hessian_max_spectrum(model, batches, objective=head, k=4)
    np.testing.assert_allclose(result.eigenvalues[0], exact, rtol=1e-3)


def test_bootstrap_interval_covers(generator):
    """The interval of the mean over mini-batches covers the truth about as often as it says."""
    from landscape.probes.hessian_max import _bootstrap

    covered = []
    for _ in range(100):
        rows = torch.rand(30, 1, generator=generator, dtype=torch.float64).numpy()
        _, (low, high) = _bootstrap(rows, 300, generator)
        covered.append(low <= 0.5 <= high)
    assert 0.85 <= np.mean(covered) <= 1.0


@pytest.mark.parametrize("probe", ["spectrum", "density", "trace"])
def test_results_do_not_depend_on_batching_or_on_the_global_random_state(probe):
    function = getattr(landscape, f"hessian_{probe}")
    model = make_model("attention")

    def numbers(sizes):
        result = function(model, make_batches(sizes), objective=OBJECTIVE)
        if probe == "spectrum":
            return np.concatenate([result.largest.values, result.smallest.values, [result.trace]])
        return np.array([result.value if probe == "trace" else result.trace])

    first = numbers((12,))
    torch.rand(5)
    np.testing.assert_array_equal(first, numbers((12,)))
    for sizes in ((8, 4), (5, 4, 3), (1,) * 12):
        np.testing.assert_allclose(numbers(sizes), first, rtol=1e-6)


def test_a_random_transform_is_frozen_and_follows_the_seed():
    model, batches = make_model("conv"), make_batches((6, 6))

    def top(seed):
        objective = Objective(transform=jitter, seed=seed)
        return landscape.hessian_max_spectrum(model, batches, objective=objective).eigenvalues

    first = top(0)
    np.testing.assert_array_equal(first, top(0))
    assert np.abs(first - top(1)).max() > 1e-3 * np.abs(first).max()
    # Each mini-batch alone sees the batch that the whole pass sees.
    frozen = Objective(transform=jitter).freeze(model, batches)
    drawn = [(b.inputs, b.targets) for b in frozen.batches]
    np.testing.assert_allclose(landscape.hessian_max_spectrum(model, drawn).eigenvalues, first)


def test_a_warm_start_saves_products_and_finds_the_same():
    model, batches = make_model("conv"), make_batches((7, 3))
    kwargs = {"objective": OBJECTIVE, "k": 2, "density": False, "vectors": True}
    before = landscape.hessian_spectrum(model, batches, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-4 * torch.ones_like(p))
    cold = landscape.hessian_spectrum(model, batches, **kwargs)
    starts = {
        "result": before,
        "array": np.concatenate([before.largest.vectors, before.smallest.vectors]),
        "tensor": torch.from_numpy(
            np.concatenate([before.largest.vectors, before.smallest.vectors])
        ),
    }
    warm = {
        n: landscape.hessian_spectrum(model, batches, start=s, **kwargs) for n, s in starts.items()
    }
    exact = eigenvalues(model, batches, weight_decay=0.05)
    for result in warm.values():
        assert result.num_hvps < cold.num_hvps
        np.testing.assert_allclose(result.largest.values, exact[::-1][:2], rtol=1e-3)
        np.testing.assert_allclose(result.smallest.values, exact[:2], rtol=1e-3)
        np.testing.assert_array_equal(result.largest.values, warm["array"].largest.values)
        assert abs(result.trace - exact.sum()) <= 3 * result.trace_stderr
        assert result.provenance.settings["warm"]
        assert not cold.provenance.settings["warm"]
    bare = landscape.hessian_spectrum(model, batches, start=before, certify=False, **kwargs)
    assert np.isnan(bare.trace)
    assert bare.num_hvps < warm["result"].num_hvps
    first = landscape.hessian_max_spectrum(model, batches[:1], k=2)
    again = landscape.hessian_max_spectrum(model, batches[:1], k=2, start=before.largest)
    np.testing.assert_allclose(again.eigenvalues, first.eigenvalues, rtol=1e-3)
    for probe in (landscape.hessian_spectrum, landscape.hessian_max_spectrum):
        with pytest.raises(ValueError, match="`start` needs engine='native'"):
            probe(model, batches, start=before, engine="pyhessian")
    # A mini-batch starts from what the one before gave.
    once, twice = (
        landscape.hessian_max_spectrum(model, batches[:1] * n, k=2, certify=False) for n in (1, 2)
    )
    assert once.num_hvps < twice.num_hvps < 2 * once.num_hvps
    np.testing.assert_allclose(twice.eigenvalues, first.eigenvalues.repeat(2, 0), rtol=1e-3)
    with pytest.raises(ValueError, match="`start` needs `density=False`"):
        landscape.hessian_spectrum(model, batches, start=before)
    with pytest.raises(ValueError, match="compute it with `vectors=True`"):
        landscape.hessian_max_spectrum(
            model, batches, start=dataclasses.replace(before.largest, vectors=None)
        )
    with pytest.raises(ValueError, match=r"`start` must have shape \(\d+,\) or \(m, \d+\), got"):
        landscape.hessian_max_spectrum(model, batches, start=torch.ones(3, 2))


@pytest.mark.parametrize(("memory", "kept"), [("auto", 2), (0, 0)])
def test_the_result_tells_how_many_graphs_were_kept(memory, kept):
    model, batches = make_model("attention"), make_batches((7, 3))
    for probe in (landscape.hessian_spectrum, landscape.hessian_max_spectrum):
        settings = probe(model, batches, k=2, memory=memory).provenance.settings
        assert (settings["kept_batches"], settings["num_batches"]) == (kept, 2)


@pytest.fixture
def trained():
    """A small ResNet after some steps: its eigenvalues stand apart as those of trained nets do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model("resnet20", depths=(1, 1, 1), width=4, num_classes=3, in_channels=1)
    images = load_images("fashion_mnist_mini", batch_size=32)
    kept = [(x[y < 3], y[y < 3]) for x, y in itertools.islice(images, 12)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for x, y in kept * 3:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, [(x[:6], y[:6]) for x, y in kept[:4]]


def test_reduced_precision_is_measured_and_reported(trained):
    """bfloat16 products err by percents, the values found with them by far less, and it says so."""
    model, batches = trained
    frozen = Objective().freeze(model, batches)
    rough = landscape.HessianOperator.of(frozen, precision="bf16")
    exact = landscape.HessianOperator.of(frozen)
    v = torch.randn(exact.dim, generator=torch.Generator().manual_seed(0))
    error = (rough.matvec(v) - exact.matvec(v)).norm() / exact.matvec(v).norm()
    assert 1e-3 < error < 0.2
    full = landscape.hessian_spectrum(model, batches, k=2, tol=1e-4)
    with pytest.warns(UserWarning, match='take `precision="full"`'):
        found = landscape.hessian_spectrum(
            model, batches, k=2, tol=1e-3, precision="bf16", vectors=True
        )
    assert found.provenance.settings["precision"] == "bf16"
    for pairs, known in ((found.largest, full.largest), (found.smallest, full.smallest)):
        np.testing.assert_allclose(pairs.values[0], known.values[0], rtol=0.1)
        assert (np.abs(pairs.values - known.values) <= pairs.residuals).all()
        # The residuals are those of the vectors under products in full precision.
        for value, y, residual in zip(pairs.values, pairs.vectors, pairs.residuals, strict=True):
            y = torch.from_numpy(y)
            true = (exact.matvec(y) - float(value) * y).norm()
            assert residual == pytest.approx(true.item(), rel=0.01)
    assert found.asymmetry > 10 * full.asymmetry


def test_reduced_precision_mini_batch_by_mini_batch(trained):
    model, batches = trained
    full = landscape.hessian_max_spectrum(model, batches, k=1)
    for group in (1, 2):
        with pytest.warns(UserWarning, match='take `precision="full"`'):
            found = landscape.hessian_max_spectrum(
                model, batches, k=1, tol=1e-5, precision="bf16", group=group
            )
        np.testing.assert_allclose(found.eigenvalues, full.eigenvalues, rtol=0.1)
        assert (np.abs(found.eigenvalues - full.eigenvalues) <= found.residuals).all()
        assert found.provenance.settings["precision"] == "bf16"


def test_products_that_round_nothing_are_checked_to_be_the_same(trained, monkeypatch):
    """The way of reduced precision with accurate products, one after the other and side by side."""
    model, batches = trained
    for module in ("linalg.hessian", "probes.hessian_max"):
        monkeypatch.setattr(f"landscape.{module}.check_precision", lambda *_: None)
    spectrum = {}
    for precision in ("full", "tf32"):  # which a CPU does not have
        spectrum[precision] = landscape.hessian_spectrum(model, batches, k=2, precision=precision)
        for group in (1, 3):
            found = landscape.hessian_max_spectrum(
                model, batches, k=2, precision=precision, group=group
            )
            assert found.converged.all()
            key = precision, group
            spectrum[key] = found
            np.testing.assert_allclose(
                found.eigenvalues, spectrum["full", 1].eigenvalues, rtol=1e-3
            )
    more = spectrum["tf32"].num_hvps - spectrum["full"].num_hvps
    assert more == 4  # one a pair
    for name in ("largest", "smallest"):
        a, b = (getattr(spectrum[p], name) for p in ("full", "tf32"))
        np.testing.assert_allclose(a.values, b.values, rtol=1e-3)
        np.testing.assert_allclose(a.residuals, b.residuals, rtol=0.05, atol=1e-4)
    assert (spectrum["tf32", 3].residuals < 1.1 * spectrum["full", 3].residuals + 1e-3).all()


def test_the_rounding_of_a_gpu_is_chosen_and_put_back(trained):
    model, batches = trained
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    seen = []

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            seen.append(tuple(backend.fp32_precision for backend in backends))
            return self.model(x)

    before = [backend.fp32_precision for backend in backends]
    frozen = Objective().freeze(Looking(), batches)
    operator = landscape.HessianOperator.of(frozen)
    assert seen[-1] == ("ieee", "ieee")
    operator.matvec(torch.ones(operator.dim))
    assert [backend.fp32_precision for backend in backends] == before
    with pytest.raises(ValueError, match="'tf32' needs a CUDA device"):
        landscape.hessian_spectrum(model, batches, precision="tf32")
    with pytest.raises(ValueError, match="must be 'full' for a model in torch.float64"):
        landscape.hessian_max_spectrum(make_model("conv"), make_batches((4,)), precision="bf16")
    with pytest.raises(ValueError, match="`precision` must be one of 'full', 'tf32', 'bf16'"):
        landscape.hessian_spectrum(model, batches, precision="half")
    with pytest.raises(ValueError, match="needs engine='native'"):
        landscape.hessian_spectrum(model, batches, precision="bf16", engine="pyhessian")


def test_model_is_untouched_even_by_an_interrupt():
    model, batches = make_model("conv"), make_batches((7, 3))
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = snapshot(model)
    landscape.hessian_spectrum(model, batches)
    landscape.hessian_max_spectrum(model, batches)
    landscape.hessian_density(model, batches)
    landscape.hessian_trace(model, batches)
    assert_untouched(model, before)
    calls = []

    def interrupted(outputs, targets):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.raises(KeyboardInterrupt):
        landscape.hessian_max_spectrum(model, batches, objective=Objective(loss=interrupted))
    assert_untouched(model, before)


def test_device_and_precision_follow_the_model():
    model = make_model("attention", torch.float32)
    single = landscape.hessian_spectrum(model, make_batches((7, 3)), vectors=True)
    double = landscape.hessian_spectrum(make_model("attention"), make_batches((7, 3)))
    assert single.provenance.dtype == "float32"
    assert single.largest.vectors.dtype == np.float32
    np.testing.assert_allclose(single.largest.values, double.largest.values, rtol=1e-3)


def test_scale_of_the_loss_is_the_scale_of_the_spectrum():
    model, batches = make_model("attention"), make_batches((7, 3))

    def tiny(outputs, targets):
        return 1e-7 * nn.functional.cross_entropy(outputs, targets)

    base = landscape.hessian_spectrum(model, batches)
    small = landscape.hessian_spectrum(model, batches, objective=Objective(loss=tiny))
    np.testing.assert_allclose(small.largest.values, 1e-7 * base.largest.values, rtol=1e-3)
    np.testing.assert_allclose(small.smallest.values, 1e-7 * base.smallest.values, rtol=1e-3)


def test_save_load_round_trip(tmp_path):
    model, batches = make_model("attention"), make_batches((7, 3))
    for result in (
        landscape.hessian_spectrum(model, batches, vectors=True),
        landscape.hessian_max_spectrum(model, batches),
    ):
        loaded = type(result).load(result.save(tmp_path / "result"))
        for field in dataclasses.fields(result):
            value, again = getattr(result, field.name), getattr(loaded, field.name)
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(value, again)
        assert loaded.provenance == result.provenance
        with pytest.raises(dataclasses.FrozenInstanceError):
            loaded.num_hvps = 0


def test_a_bar_is_shown_on_request_only(capsys):
    model, batches = make_model("attention"), make_batches((7, 3))
    landscape.hessian_spectrum(model, batches)
    landscape.hessian_max_spectrum(model, batches)
    assert capsys.readouterr() == ("", "")
    landscape.hessian_spectrum(model, batches, progress=True)
    assert "Hessian spectrum" in capsys.readouterr().err
    landscape.hessian_max_spectrum(model, batches, progress=True)
    assert "Hessian max spectrum" in capsys.readouterr().err
    landscape.hessian_density(model, batches, num_steps=7, num_probes=2, progress=True)
    assert "Hessian density" in capsys.readouterr().err
    landscape.hessian_trace(model, batches, num_matvecs=12, progress=True)
    assert "Hessian trace" in capsys.readouterr().err


@pytest.mark.parametrize("probe", [landscape.hessian_spectrum, landscape.hessian_max_spectrum])
def test_bad_input_is_refused_before_work(probe):
    model, batches = make_model("conv"), make_batches((7, 3))
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        probe(model, batches, k=0)
    with pytest.raises(ValueError, match="`engine` must be one of 'native', 'pyhessian'"):
        probe(model, batches, engine="jax")
    with pytest.raises(TypeError, match="re-iterable"):
        probe(model, iter(batches))
    with pytest.raises(ValueError, match="at least one sample"):
        probe(model, [])
    with pytest.raises(ValueError, match="finite loss"):
        probe(model, [batches[0], (batches[1][0] * float("inf"), batches[1][1])])
    with pytest.raises(ValueError, match="labels in 0 … 2"):
        probe(model, [(x, y + 1) for x, y in batches])
    with pytest.raises(ValueError, match="requires_grad"):
        probe(make_model("conv").requires_grad_(False), batches)
    with pytest.raises(ValueError, match="`max_iter` must be at least"):
        probe(model, batches, max_iter=0)
    with pytest.warns(UserWarning, match="raise `max_iter`"):
        probe(model, batches, max_iter=11)


class NeverCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        raise AssertionError("work has begun")


class NeverRead:
    def __iter__(self):
        raise AssertionError("work has begun")


@pytest.mark.parametrize(
    ("probe", "arguments", "match"),
    [
        ("hessian_spectrum", {"tol": 0}, "`tol` must be positive and finite, got 0"),
        ("hessian_spectrum", {"tol": np.inf}, "`tol` must be positive and finite, got inf"),
        ("hessian_spectrum", {"tol": None}, "`tol` must be positive and finite, got None"),
        ("hessian_spectrum", {"tol": "x"}, "`tol` must be positive and finite, got 'x'"),
        ("hessian_spectrum", {"tol": torch.ones(2)}, "`tol` must be positive and finite"),
        ("hessian_spectrum", {"certify": 1.5}, "`certify` must be a bool or a probability"),
        ("hessian_spectrum", {"certify": None}, "`certify` must be a bool or .*, got None"),
        ("hessian_spectrum", {"precision": "fp16"}, "`precision` must be one of 'full'"),
        ("hessian_spectrum", {"engine": np.ones(2)}, "`engine` must be one of 'native'"),
        ("hessian_spectrum", {"k": True}, "`k` must be a whole number, got True"),
        ("hessian_spectrum", {"max_iter": -1}, "`max_iter` must be at least 1, got -1"),
        ("hessian_spectrum", {"max_basis": "x"}, "`max_basis` must be a whole number, got 'x'"),
        ("hessian_spectrum", {"basis_dtype": "x"}, "`basis_dtype` must be one of None"),
        ("hessian_spectrum", {"basis_device": "gpu"}, "`basis_device` must be a device .* 'gpu'"),
        ("hessian_spectrum", {"memory": -1}, "`memory` must be at least 0, got -1"),
        ("hessian_spectrum", {"memory": np.inf}, "`memory` must be finite, got inf"),
        ("hessian_spectrum", {"memory": "all"}, "`memory` must be 'auto', bytes or a fraction"),
        ("hessian_spectrum", {"num_probes": 0}, "`num_probes` must be at least 1"),
        (
            "hessian_spectrum",
            {"engine": "pyhessian", "max_basis": 9},
            "`max_basis` needs engine='native', got 'pyhessian'",
        ),
        ("hessian_max_spectrum", {"tol": -1}, "`tol` must be positive and finite, got -1"),
        ("hessian_max_spectrum", {"precision": "fp16"}, "`precision` must be one of 'full'"),
        ("hessian_max_spectrum", {"memory": -1}, "`memory` must be at least 0, got -1"),
        ("hessian_max_spectrum", {"num_bootstrap": True}, "`num_bootstrap` must be a whole number"),
        ("hessian_max_spectrum", {"certify": 2.0}, "`certify` must be a bool or a probability"),
        ("hessian_max_spectrum", {"num_bootstrap": 0}, "`num_bootstrap` must be at least 1"),
        ("hessian_max_spectrum", {"max_iter": 4}, "`max_iter` must be at least 5"),
        ("hessian_density", {"num_steps": 1}, "`num_steps` must be at least 2"),
        ("hessian_density", {"sigma": -1}, "`sigma` must be positive and finite, got -1"),
        ("hessian_density", {"sigma": np.inf}, "`sigma` must be positive and finite, got inf"),
        ("hessian_trace", {"num_matvecs": 5}, "`num_matvecs` must be at least 6"),
    ],
)
def test_arguments_are_checked_before_the_model_is_called(probe, arguments, match):
    with pytest.raises(ValueError, match=match):
        getattr(landscape, probe)(NeverCalled(), NeverRead(), **arguments)


@pytest.mark.parametrize("probe", [landscape.hessian_spectrum, landscape.hessian_max_spectrum])
def test_what_is_no_start_is_refused(probe):
    arguments = {"density": False} if probe is landscape.hessian_spectrum else {}
    with pytest.raises(TypeError, match="`start` must be vectors, .* or None, got int"):
        probe(NeverCalled(), NeverRead(), start=3, **arguments)


def test_many_probes_have_their_products_each():
    model, batches = make_model("conv"), make_batches((7, 3))
    result = landscape.hessian_spectrum(model, batches, k=1, num_probes=3, certify=False)
    assert result.num_hvps >= min(3 * 40, result.dim)
    with pytest.warns(UserWarning, match="raise `max_iter`"):
        few = landscape.hessian_spectrum(model, batches, num_probes=3, max_iter=30)
    assert few.num_hvps == 30


def test_more_probes_may_have_more_products():
    x = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    model, batches = nn.Linear(9, 30).double(), [(x, torch.arange(40) % 30)]
    result = landscape.hessian_spectrum(model, batches, k=1, num_probes=6, certify=False)
    assert result.dim == 300
    assert result.num_hvps >= 6 * 40  # above the 200 of a few probes


def test_probes_that_fill_the_whole_space_find_all_there_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Tanh())
    model = model.append(nn.Linear(2, 3)).double()
    batches = make_batches((12,))
    result = landscape.hessian_spectrum(model, batches, k=2, num_probes=8)
    assert result.num_hvps == result.dim == 43
    values = torch.linalg.eigvalsh(oracles.dense(model, batches))
    np.testing.assert_allclose(result.largest.values, values[[-1, -2]], rtol=1e-9)


def test_every_probe_is_in_the_density():
    model, batches = make_model("conv"), make_batches((6,))
    few = {"k": 1, "max_iter": 30, "tol": 1e-12, "certify": False}
    with pytest.warns(UserWarning, match="have not converged"):
        density = landscape.hessian_spectrum(model, batches, num_probes=3, **few).density
    assert len(density.nodes) == 3


def test_a_probe_within_the_exact_part_leaves_nothing_exact():
    ritz = RitzPairs(np.array([-1.0, 0.0, 0.5, 4.0]), np.zeros(4), np.eye(4))
    other = [0.2, 0.3, 0.3, 0.2]
    within = _density(ritz, np.array([[0.5, 0, 0, 0.5], other]), 50, 1)
    assert within.outliers.size == 0
    assert np.isfinite(within.values).all()
    beyond = _density(ritz, np.array([[0.3, 0.2, 0.1, 0.4], other]), 50, 1)
    np.testing.assert_array_equal(beyond.outliers, [-1, 4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_have_eigenvectors_in_float32(dtype):
    model, batches = make_model("conv", dtype), make_batches((4, 4))
    found = landscape.hessian_spectrum(model, batches, k=1, tol=0.1, vectors=True)
    assert found.largest.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.largest.vectors), 1, rtol=1e-5)
    operator = landscape.HessianOperator(model, batches)
    v = np.ones(operator.dim, dtype=np.float32)
    np.testing.assert_array_equal(operator.to_scipy() @ v, (operator @ torch.ones(len(v))).float())


class Quadratic(nn.Module):
    """Outputs θᵀAθ/2, whose Hessian is A."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix
        self.theta = nn.Parameter(torch.zeros(len(matrix), dtype=matrix.dtype))

    def forward(self, x):
        return x + self.theta @ self.matrix @ self.theta / 2


def test_a_multiple_eigenvalue_at_an_edge_does_not_weigh_as_one():
    """Of the last at each edge no copies are looked for, so it is not known to be simple."""
    spectrum = np.repeat([1.0, 2.0, 3.0], [30, 15, 15])
    model, data = Quadratic(oracles.planted(spectrum).matrix), [(torch.zeros(2, 1).double(),) * 2]
    objective = Objective(loss=lambda out, y: out.mean())
    for seed in range(10):
        found = landscape.hessian_spectrum(
            model, data, objective=objective, k=1, generator=torch.Generator().manual_seed(seed)
        )
        assert found.largest.values[0] == pytest.approx(3)
        assert abs(found.trace - spectrum.sum()) < 4 * found.trace_stderr


class Scale(nn.Module):
    """One parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x):
        return self.scale * x


def test_mini_batches_with_as_many_negative_eigenvalues_each_tell_little_of_others(generator):
    """One or two of five are negative: where all mini-batches have one, an interval of length 0."""
    from landscape.probes.hessian_max import _bootstrap

    covered = []
    for _ in range(200):
        values = torch.ones(10, 5, dtype=torch.float64)
        values[:, 3] = -1
        values[:, 4] = torch.where(torch.rand(10, generator=generator) < 0.1, -1.0, 1.0)
        (low, high), _ = _bootstrap(values.numpy(), 200, generator)
        covered.append(low <= 0.22 <= high)
    assert np.mean(covered) > 0.9
    (low, high), _ = _bootstrap(values[:, :4].numpy(), 200, generator)
    exact = stats.binomtest(10, 40).proportion_ci(0.95, "exact")
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=0.03)


def test_mini_batches_of_a_single_parameter_without_a_positive_eigenvalue():
    """L = −mean (θ x)²: the Hessian of each mini-batch is −2 mean x², its only eigenvalue."""
    x = torch.arange(1.0, 21).double().view(5, 4, 1)
    data = [(batch, torch.zeros(4, 1).double()) for batch in x]
    objective = Objective(loss=lambda out, y: -(out - y).square().mean())
    result = landscape.hessian_max_spectrum(Scale(), data, objective=objective, k=1)
    np.testing.assert_allclose(result.eigenvalues[:, 0], -2 * x.square().mean((1, 2)), rtol=1e-12)
    assert result.nep == 1
    assert result.nep_interval == pytest.approx((0.025 ** (1 / 5), 1))  # five values
    assert np.isnan([result.ape, *result.ape_interval]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_zero_eigenvalues_has_no_sign(dtype, generator):
    """Two samples of a logistic regression: a convex loss, and a Hessian of rank two."""
    model = nn.Linear(10, 2, dtype=dtype)
    x, y = torch.randn(40, 10, generator=generator, dtype=dtype), torch.arange(40) % 2
    batches = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 40, 2)]
    found = landscape.hessian_max_spectrum(model, batches)
    assert (np.abs(found.eigenvalues[:, 2:]) < 1e-5).all()
    assert found.nep == 0
    unseen = found.nep_interval[1]
    assert found.nep_interval[0] == 0
    values = 100 * (1.9842 / 2.0930) ** 2  # of 20 mini-batches; quantiles of t for 99 and 19
    assert (1 - unseen) ** values == pytest.approx(0.025, rel=1e-3)  # so many would show it
    assert (np.sign(found.signed_eigenvalues) == [1, 1, 0, 0, 0]).all()
    top = found.eigenvalues[:, :2]
    assert found.ape == pytest.approx(top.mean(), rel=1e-6)
    assert found.ape_interval[0] < found.ape < found.ape_interval[1]


def test_sparse_tensors_in_a_model_are_no_obstacle(generator):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("edges", torch.eye(6).to_sparse())
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(torch.sparse.mm(self.edges, self.a(x).tanh()).tanh())

    model, x = Graph(), torch.randn(6, 4, generator=generator)
    data = [(x, torch.arange(6) % 3)]
    plain = nn.Sequential(model.a, nn.Tanh(), nn.Tanh(), model.b)
    ours, expected = landscape.HessianOperator(model, data), landscape.HessianOperator(plain, data)
    v = torch.randn(ours.dim, generator=generator)
    torch.testing.assert_close(ours @ v, expected @ v)


def test_numbers_may_be_tensors(tmp_path):
    model, batches = make_model("attention"), make_batches((7, 3))
    k, tol = torch.tensor(2), torch.tensor(1e-3)
    found = landscape.hessian_spectrum(model, batches, k=k, tol=tol)
    plain = landscape.hessian_spectrum(model, batches, k=2, tol=float(tol))
    np.testing.assert_array_equal(found.largest.values, plain.largest.values)
    assert found.trace == plain.trace
    found.save(tmp_path / "spectrum.npz")
    per_batch = landscape.hessian_max_spectrum(model, batches, k=k, tol=tol)
    assert per_batch.eigenvalues.shape == (2, 2)
