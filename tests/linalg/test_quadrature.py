import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import trapezoid

from landscape.linalg.quadrature import density_of, lanczos_quadrature, spectral_density
from landscape.linalg.trace import hutch_plus_plus
from tests.oracles import planted

SPECTRUM = np.concatenate([[20.0, 9.0, -4.0], 0.3 * np.random.RandomState(0).randn(397)])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def unit(dim, seed=0):
    v = torch.randn(dim, generator=seeded(seed), dtype=torch.float64)
    return v / v.norm()


def test_quadrature_is_exact_for_polynomials():
    operator, v = planted(SPECTRUM), unit(400)
    nodes, weights = lanczos_quadrature(operator, v, 6)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    power = v
    for degree in range(1, 12):  # up to 2 · 6 − 1
        power = operator.matrix @ power
        assert weights @ nodes**degree == pytest.approx((v @ power).item(), rel=1e-9)


def test_a_bounded_basis_keeps_the_measure():
    operator, v = planted(SPECTRUM), unit(400)
    full = lanczos_quadrature(operator, v, 60)
    windowed = lanczos_quadrature(operator, v, 60, basis_bytes=5 * 8 * 400)
    for degree in (1, 2, 3, 4):
        assert windowed[1] @ windowed[0] ** degree == pytest.approx(
            full[1] @ full[0] ** degree, rel=1e-6
        )
    # Ghost copies of the largest eigenvalue share its mass.
    near = np.abs(windowed[0] - 20) < 1e-3
    assert windowed[1][near].sum() == pytest.approx(full[1][-1], rel=1e-4)


@pytest.mark.parametrize("num_probes", [1, 3])
def test_density_integrates_to_one(num_probes):
    density = density_of(planted(SPECTRUM), num_probes=num_probes, generator=seeded(0))
    assert density.nodes.shape[0] == num_probes
    assert trapezoid(density.values, density.grid) == pytest.approx(1, abs=1e-9)
    mean = trapezoid(density.values * density.grid, density.grid)
    assert mean == pytest.approx(density.moment(1)[0], abs=1e-9)
    narrow = density_of(planted(SPECTRUM), sigma=1e-3, num_steps=20, generator=seeded(0))
    assert trapezoid(narrow.values, narrow.grid) == pytest.approx(1, abs=1e-6)


def test_progress_tells_of_every_product():
    ticks = []
    density_of(
        planted(SPECTRUM), num_steps=7, num_probes=3, generator=seeded(0),
        tick=lambda: ticks.append(1),
    )  # fmt: skip
    assert len(ticks) == 7 * 3


def test_standard_errors_are_calibrated():
    """Over 150 seeds the errors of both moments, in their standard errors, have unit spread."""
    matrix = planted(SPECTRUM)
    scores = []
    for seed in range(150):
        rules = [lanczos_quadrature(matrix, unit(400, 2 * seed + i), 12) for i in range(2)]
        nodes, weights = (np.stack(parts) for parts in zip(*rules, strict=True))
        density = spectral_density(nodes, weights, 400, sigma=10.0, points=16)
        moments = [density.moment(power) for power in (1, 2)]
        exact = [(SPECTRUM**power).mean() for power in (1, 2)]
        scores.append([(m - e) / stderr for (m, stderr), e in zip(moments, exact, strict=True)])
    scores = np.array(scores)
    assert (np.abs(scores.mean(0)) < 0.25).all()
    assert (scores.std(0) > 0.4).all()
    assert (scores.std(0) < 1.3).all()
    assert ((np.abs(scores) < 2).mean(0) > 0.9).all()


def test_known_outliers_take_their_variance_with_them():
    matrix, n = planted(SPECTRUM), len(SPECTRUM)
    plain, exact = [], []
    for seed in range(100):
        nodes, weights = lanczos_quadrature(matrix, unit(n, seed), 14)
        known = np.array([np.abs(nodes - value).argmin() for value in SPECTRUM[:3]])
        rest = np.delete(np.arange(len(nodes)), known)
        plain.append(spectral_density(nodes[None], weights[None], n, points=16, sigma=1.0))
        exact.append(
            spectral_density(
                nodes[None, rest],
                weights[None, rest],
                n,
                outliers=nodes[known],
                points=16,
                sigma=1.0,
            )  # fmt: skip
        )
    spread = {k: np.std([d.trace for d in v]) for k, v in (("plain", plain), ("exact", exact))}
    assert spread["exact"] < 0.4 * spread["plain"]
    scores = np.array([(d.trace - SPECTRUM.sum()) / d.trace_stderr for d in exact])
    assert abs(scores.mean()) < 0.35
    assert 0.7 < scores.std() < 1.3


def test_the_variance_of_the_few_that_are_not_known():
    """Of ten eigenvalues eight are known; the rest are 0 and 1: 2 σ² c² / (c + 2), c = 2."""
    density = spectral_density(
        np.array([[0.0, 1.0]]), np.array([[0.5, 0.5]]), 10, outliers=np.zeros(8), sigma=1.0
    )
    assert density.trace_stderr == pytest.approx(np.sqrt(0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_nodes_stay_within_a_spectrum_that_is_not_centred_on_zero(dtype):
    spectrum = 0.1 + np.random.RandomState(2).gamma(0.5, 1.0, 400)
    density = density_of(planted(spectrum, dtype=dtype), generator=seeded(0))
    slack = 1e-6 * spectrum.max()
    assert density.nodes.min() >= spectrum.min() - slack
    assert density.nodes.max() <= spectrum.max() + slack
    assert abs(density.trace - spectrum.sum()) < 4 * density.trace_stderr
    spread = np.sqrt(2 * 400 * spectrum.var())  # of tr(A) by one probe on the sphere, about
    assert density.trace_stderr == pytest.approx(spread, rel=0.3)


def test_an_underflow_far_from_all_nodes_is_no_error():
    nodes, weights = np.array([[0.0, 1.0]]), np.ones((1, 2)) / 2
    with np.errstate(all="raise"):
        assert spectral_density(nodes, weights, 2, sigma=0.01).values[0] > 0


@pytest.mark.parametrize("num_probes", [1, 3])
def test_degenerate_spectra_have_a_density(num_probes):
    for spectrum in (np.zeros(50), np.full(50, 3.0), np.full(50, -0.1)):
        density = density_of(planted(spectrum), num_probes=num_probes, generator=seeded(0))
        assert density.trace == pytest.approx(spectrum.sum(), abs=1e-9)
        assert trapezoid(density.values, density.grid) == pytest.approx(1, abs=1e-9)


def test_hutch_plus_plus_is_calibrated_and_exact_on_low_rank():
    matrix = planted(SPECTRUM)
    scores = []
    for seed in range(100):
        estimate = hutch_plus_plus(matrix, num_matvecs=30, generator=seeded(seed))
        assert estimate.num_matvecs == 30
        scores.append((estimate.value - SPECTRUM.sum()) / estimate.stderr)
    assert abs(np.mean(scores)) < 0.35
    assert 0.7 < np.std(scores) < 1.5
    low_rank = np.concatenate([[9.0, -5.0, 2.0], np.zeros(200)])
    estimate = hutch_plus_plus(planted(low_rank), num_matvecs=24, generator=seeded(0))
    assert estimate.value == pytest.approx(6.0, abs=1e-9)
    whole = hutch_plus_plus(planted(SPECTRUM[:7]), num_matvecs=60, generator=seeded(0))
    assert whole.value == pytest.approx(SPECTRUM[:7].sum(), abs=1e-9)
    assert whole.stderr == 0
    assert whole.num_matvecs == 14


def test_hutch_plus_plus_has_the_standard_error_of_its_samples():
    estimate = hutch_plus_plus(planted(SPECTRUM), num_matvecs=9, generator=seeded(0))
    assert len(estimate.samples) == 3
    assert estimate.value == pytest.approx(estimate.captured + estimate.samples.mean())
    assert estimate.stderr == pytest.approx(stats.sem(estimate.samples))


def test_bad_input_is_refused():
    operator = planted(SPECTRUM)
    with pytest.raises(ValueError, match="`num_steps` must be at least 2"):
        density_of(operator, num_steps=1, generator=seeded(0))
    with pytest.raises(ValueError, match="`sigma` must be positive"):
        density_of(operator, sigma=-1.0, generator=seeded(0))
    with pytest.raises(ValueError, match="`num_matvecs` must be at least 6"):
        hutch_plus_plus(operator, num_matvecs=5, generator=seeded(0))
