from functools import partial
from math import erf, sqrt

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from landscape import MatrixOperator, SymmetricOperator, top_eigenpairs
from landscape.linalg import gram_schmidt
from landscape.linalg.certificate import chances
from landscape.linalg.eigenpairs import error_estimates
from landscape.linalg.krylov import KrylovSpace, RitzPairs
from landscape.linalg.quadrature import density_of
from landscape.linalg.search import EigenSearch, multiply
from landscape.linalg.trace import hutch_plus_plus
from landscape.recording import unsynchronised
from tests.oracles import planted

BULK = (0.1 * np.random.RandomState(0).randn(290)).tolist()
SPECTRA = {
    "simple": [10, 8, 6, -5, 4, 3],
    "triple": [10, 10, 10, -5, 4, 3],
    "plus and minus": [10, -10, 8, -8, 3, 2],
    "nine copies": [5] * 9 + [4, 3],
    "close": [10, 9.99, 9.98, 9.97, 5, 4],
    "negative": [-10, -9, -9, -8, -1, -1, 0.5],
}


def wanted(values, k, which):
    values = np.asarray(values, dtype=float)
    order = {"LM": -np.abs(values), "LA": -values, "SA": values}[which]
    return values[np.argsort(order, kind="stable")][:k]


def residuals(operator, pairs):
    vectors = torch.from_numpy(pairs.vectors).double()
    products = vectors @ operator.matrix.double()
    return (products - torch.from_numpy(pairs.values)[:, None] * vectors).norm(dim=1).numpy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("name", SPECTRA)
def test_planted_spectrum_is_found_with_its_multiplicity(name, which, dtype):
    spectrum = SPECTRA[name] + BULK
    operator = planted(spectrum, dtype=dtype)
    pairs = top_eigenpairs(operator, 5, which, vectors=True)
    expected = wanted(spectrum, 5, which)
    assert pairs.converged.all()
    # ± pairs of one magnitude have no order of their own
    key = np.abs if which == "LM" else lambda v: v
    np.testing.assert_allclose(key(pairs.values), key(expected), rtol=1e-3)
    # Residuals are those of the vectors, up to the precision of the products ...
    true = residuals(operator, pairs)
    np.testing.assert_allclose(pairs.residuals, true, rtol=1e-2, atol=2e-5)
    # ... and an eigenvalue lies within each.
    distance = np.abs(np.array(spectrum)[None] - pairs.values[:, None]).min(1)
    assert (distance <= true + 1e-5).all()
    gram = pairs.vectors @ pairs.vectors.T
    np.testing.assert_allclose(gram, np.eye(5), atol=1e-5)


def test_without_certificate_one_krylov_space_sees_one_copy():
    operator = planted(SPECTRA["triple"] + BULK)
    one = top_eigenpairs(operator, 4, "LM", certify=False)
    np.testing.assert_allclose(one.values, [10, -5, 4, 3], rtol=1e-3)
    assert one.num_matvecs < top_eigenpairs(operator, 4, "LM").num_matvecs


def test_chances_of_a_miss_in_closed_form():
    """At a mark where a copy is looked for one start vector counts, at others all of them."""
    m, n = (4.0e4, 9.0e4), 1000
    matrices = np.stack([np.diag(m), np.diag(m)])
    one, two = (erf(sqrt(n / 2 / each)) for each in m)
    np.testing.assert_allclose(chances(matrices, 1, n, own=False), [two, one * two], rtol=1e-12)
    half = erf(sqrt(n / m[0]))  # the first start vector has half the variance
    np.testing.assert_allclose(chances(matrices, 1, n, own=True), [two, half * two], rtol=1e-12)
    assert matrices[0, 0, 0] == m[0]
    scaled = np.diag([1e80, m[1]])[None]  # what is beyond doubt may have been scaled alone
    doubt = erf(sqrt(n / 2e80))
    np.testing.assert_allclose(chances(scaled, 0, n, own=False), [doubt], rtol=1e-12)


MISSED = {
    "a copy of the first": ([10.0, 10.0, 8.0, 6.0, 4.0], 3),
    "a copy of the second": ([10.0, 6.0, 6.0, 3.0, 1.5], 3),
    "a neighbour of the last": ([10.0, 6.0, 5.8, 3.0, 1.5], 2),
    "its mirror image": ([10.0, 6.0, -5.8, 3.0, 1.5], 2),
}


@pytest.mark.parametrize("name", MISSED)
def test_a_miss_is_at_most_as_likely_as_stated(name):
    """What has the worst chance to be seen is missed in at most the stated share of runs."""
    spectrum, k = MISSED[name]
    operator = planted(spectrum + BULK)
    expected = wanted(spectrum, k, "LM")
    bounds, missed, products = [], [], []
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        pairs = top_eigenpairs(operator, k, certify=0.4, generator=generator)
        bounds.append(pairs.miss)
        missed.append(np.abs(pairs.values - expected).max() > 0.1)
        products.append(pairs.num_matvecs)
    assert np.mean(missed) <= 0.4
    if name == "a neighbour of the last":  # not for want of looking: here the bound is sharp
        assert np.mean(missed) > 0.05
    assert np.max(bounds) == 0.4
    sure = top_eigenpairs(operator, k, certify=1e-6)
    usual = top_eigenpairs(operator, k)
    np.testing.assert_allclose(sure.values, expected, rtol=1e-3)
    assert sure.miss == 1e-6
    assert usual.miss == 0.01
    assert np.median(products) < usual.num_matvecs < sure.num_matvecs
    assert top_eigenpairs(operator, k, certify=False).miss == 1.0


@pytest.mark.parametrize(("which", "mirrored"), [("LM", True), ("LA", False)])
def test_the_mirror_image_is_watched_where_magnitude_counts(which, mirrored):
    operator = planted([10.0, 8.0] + BULK)
    search = EigenSearch(
        operator, {"top": (2, which)}, tol=1e-3, max_iter=100, max_basis=None,
        generator=torch.Generator(),
    )  # fmt: skip
    search.run(operator.matvec, starts=1, certify=True)
    assert bool((search.space.marks < -7).any()) is mirrored


@pytest.mark.parametrize("warm", [False, True])
def test_a_lone_eigenvalue_that_is_found_at_once_is_certified_as_others_are(warm):
    operator = planted([10.0, 7.5, 4.0, 3.0, 1.5] + BULK)
    start = torch.linalg.eigh(operator.matrix).eigenvectors[:, -1] if warm else None
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        pairs = top_eigenpairs(operator, 1, "LA", start=start, generator=generator)
        assert pairs.miss == 0.01
        assert pairs.values[0] == pytest.approx(10, rel=1e-3)


def test_a_start_of_ones_own_is_certified_too():
    """It holds the first and the third eigenvector, and nothing of the second."""
    operator = planted([10.0, 6.0, 5.8, 3.0, 1.5] + BULK)
    vectors = torch.linalg.eigh(operator.matrix).eigenvectors
    start = vectors[:, -1] + vectors[:, -3]
    missed = []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        pairs = top_eigenpairs(operator, 2, certify=0.3, start=start, generator=generator)
        missed.append(abs(pairs.values[1] - 6) > 0.1)
    assert 0 < np.mean(missed) <= 0.3
    for seed in range(5):  # however long it is
        spent = {_products(operator, scale * start, seed) for scale in (1.0, 1e4)}
        assert len(spent) == 1
    sure = top_eigenpairs(operator, 2, start=start)
    np.testing.assert_allclose(sure.values, [10, 6], rtol=1e-3)


@pytest.mark.parametrize("max_basis", [8, 12, 40])
def test_thick_restart_finds_the_same_in_bounded_memory(max_basis):
    for name in ("simple", "triple", "close"):
        operator = planted(SPECTRA[name] + BULK)
        pairs = top_eigenpairs(operator, 5, "LM", max_basis=max_basis, tol=1e-6, vectors=True)
        np.testing.assert_allclose(pairs.values, wanted(SPECTRA[name], 5, "LM"), rtol=1e-5)
        np.testing.assert_allclose(pairs.residuals, residuals(operator, pairs), atol=1e-9)


def test_precision_and_place_of_the_basis_are_a_choice(monkeypatch):
    operator = planted(SPECTRA["simple"] + BULK)
    exact = wanted(SPECTRA["simple"], 5, "LM")
    errors = {}
    for dtype in (torch.float32, torch.float64):
        pairs = top_eigenpairs(operator, 5, tol=1e-9, basis_dtype=dtype, basis_device="cpu")
        errors[dtype] = np.abs(pairs.values / exact - 1).max()
    assert errors[torch.float64] < 1e-9 < errors[torch.float32] < 1e-5
    with pytest.raises(ValueError, match="`basis_dtype` must be one of"):
        top_eigenpairs(operator, 5, basis_dtype=torch.float16)
    # What does not fit in float64 is kept in float32, and restarted where that does not either.
    for vectors, capacity in ((16, 24), (1, 20)):
        monkeypatch.setattr("landscape.linalg.search.BASIS_BYTES", 8 * operator.dim * vectors)
        search = EigenSearch(
            operator, {"top": (5, "LM")}, tol=1e-3, max_iter=90, max_basis=None,
            generator=torch.Generator(),
        )  # fmt: skip
        assert (search.space.capacity, search.space._basis.dtype) == (capacity, torch.float32)
    np.testing.assert_allclose(top_eigenpairs(operator, 5).values, exact, rtol=1e-3)


@pytest.mark.parametrize("second_pass", [False, True])
def test_long_vectors_are_made_orthogonal_in_parts(monkeypatch, second_pass):
    monkeypatch.setattr(gram_schmidt, "CHUNK", 100)  # 296 entries: two parts and a rest
    if second_pass:
        monkeypatch.setattr(gram_schmidt, "_ORTHOGONAL_SINGLE", 0.0)
    operator = planted(SPECTRA["triple"] + BULK, dtype=torch.float32)
    exact = top_eigenpairs(operator, 5, basis_dtype=torch.float64)
    pairs = top_eigenpairs(operator, 5, basis_dtype=torch.float32, vectors=True)
    np.testing.assert_allclose(pairs.values, exact.values, rtol=1e-5)
    assert (pairs.errors > 1e-9 * abs(pairs.values)).all()  # as the rounding of products is
    rounding = 1e-5 * abs(exact.values).max()  # of products with vectors so far from orthogonal
    true = residuals(operator, pairs)
    np.testing.assert_allclose(pairs.residuals, true, rtol=1e-2, atol=rounding)
    np.testing.assert_allclose(pairs.vectors @ pairs.vectors.T, np.eye(5), atol=1e-5)
    # Such vectors are kept in float32 where that does not show.
    for tol, given, expected in (
        (1e-3, operator, torch.float32), (1e-4, operator, torch.float32),
        (1e-5, operator, torch.float64),
        (1e-3, planted(SPECTRA["triple"] + BULK), torch.float64),
    ):  # fmt: skip
        search = EigenSearch(
            given, {"top": (5, "LM")}, tol=tol, max_iter=90, max_basis=None,
            generator=torch.Generator(),
        )  # fmt: skip
        assert search.space._basis.dtype == expected
    # All but 1e-4 of a vector is cancelled: a single pass would leave 1e-3 of the rest.
    rows = torch.linalg.qr(torch.randn(296, 7, generator=torch.Generator().manual_seed(0)))[0].T
    rows = rows.contiguous()
    w = rows.sum(0) + 1e-4 * torch.linspace(-1, 1, 296)
    rest, components = gram_schmidt.orthogonalise(w, rows)
    torch.testing.assert_close(components, rows.double() @ w.double(), rtol=1e-6, atol=1e-6)
    assert (rows @ rest).norm() < 1e-5 * rest.norm()


def test_sums_over_long_vectors_keep_their_digits():
    v = torch.rand(20_000_000)
    expected = v.double().norm()  # v.norm() is off by 8e-4 (PyTorch 2.14)
    assert float(gram_schmidt.length(v) / expected) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scale", [2.0**-23, 2.0**23])  # no other rounding: as many products
def test_no_absolute_epsilon(scale):
    spectrum = np.array(SPECTRA["triple"] + BULK)
    base = top_eigenpairs(planted(spectrum), 5)
    pairs = top_eigenpairs(planted(scale * spectrum), 5)
    np.testing.assert_allclose(pairs.values, scale * base.values, rtol=1e-6)
    assert pairs.num_matvecs == base.num_matvecs


@pytest.mark.parametrize(
    ("spectrum", "k"),
    [([0.0] * 30, 3), ([2.0] * 30, 3), ([3.0, 1.0, 2.0], 3), ([7.0], 1), ([5, 5, 0, 0, 0, 0], 4)],
    ids=["zero", "identity", "complete", "scalar", "low rank"],
)
def test_degenerate_operators(spectrum, k):
    pairs = top_eigenpairs(planted(spectrum), k)
    np.testing.assert_allclose(pairs.values, wanted(spectrum, k, "LM"), atol=1e-12)
    assert pairs.converged.all()
    assert pairs.num_matvecs <= len(spectrum)


def test_unconverged_pairs_are_flagged_with_honest_residuals():
    operator = planted(np.linspace(-1, 1, 300))
    with pytest.warns(UserWarning, match="have not converged to 0.001 in 12 products"):
        pairs = top_eigenpairs(operator, 5, max_iter=12, vectors=True)
    assert not pairs.converged.all()
    np.testing.assert_allclose(pairs.residuals, residuals(operator, pairs), rtol=1e-6)


def test_reproducible_and_the_global_random_state_unread():
    operator = planted(SPECTRA["simple"] + BULK)
    first = top_eigenpairs(operator, 5)
    state = torch.get_rng_state()
    torch.rand(3)
    again = top_eigenpairs(operator, 5)
    other = top_eigenpairs(operator, 5, generator=torch.Generator().manual_seed(7))
    np.testing.assert_array_equal(first.values, again.values)
    assert (first.values != other.values).any()
    np.testing.assert_allclose(first.values, other.values, rtol=1e-3)
    torch.set_rng_state(state)
    top_eigenpairs(operator, 5)
    assert torch.equal(state, torch.get_rng_state())


def test_progress_is_shown_and_a_start_may_be_an_array(capsys):
    operator = MatrixOperator(torch.diag(torch.arange(1.0, 31.0, dtype=torch.float64)))
    start = np.ones(30)
    found = top_eigenpairs(operator, 2, start=start, progress=True)
    np.testing.assert_allclose(found.values, [30, 29], rtol=1e-3)
    assert "Eigenpairs" in capsys.readouterr().err
    same = top_eigenpairs(operator, 2, start=torch.from_numpy(start))
    np.testing.assert_array_equal(same.values, found.values)


def test_a_start_vector_may_be_given():
    operator = planted(SPECTRA["simple"] + BULK)
    vectors = top_eigenpairs(operator, 1, vectors=True, tol=1e-8).vectors
    pairs = top_eigenpairs(operator, 1, start=torch.from_numpy(vectors[0]), certify=False)
    assert pairs.num_matvecs == 1
    np.testing.assert_allclose(pairs.values, [10])


@pytest.mark.parametrize(
    ("which", "values", "hidden"),
    [("LM", [-26.0, 27.3, 60.0], 0), ("LA", [-9.0, 25.0, 27.3, 60.0], 1), ("SA", [-6, -5, 3.0], 1)],
)
def test_a_pair_that_could_still_displace_a_wanted_one_holds_the_stop(which, values, hidden):
    """−26 ± 2.7 may become −27.6, and then belongs to the two of largest magnitude."""
    values = np.array(values, dtype=float)
    k = {"LM": 2, "LA": 2, "SA": 1}[which]
    search = EigenSearch(
        planted(BULK), {"top": (k, which)}, tol=1e-3, max_iter=50, max_basis=None,
        generator=torch.Generator(),
    )  # fmt: skip
    for residual, done in ((1.0, False), (0.1, True)):
        residuals = np.full(len(values), 1e-9)
        # −26 is 53 from its neighbour, so its error estimate is 12² / 53; elsewhere it is r.
        residuals[hidden] = (12.0 if which == "LM" else 3.0) * residual
        search._ritz = RitzPairs(values, residuals, np.eye(len(values)))
        assert search._all_within(1e-3) is done


def test_a_gap_ends_where_the_residual_of_a_neighbour_begins():
    """Of r and r² / gap the smaller; gaps are 1 − 0.2, 1.2 − 0.5 (not 1 − 0.1) and 1.2 − 0.2."""
    values, r = np.array([0, 1, 2.2]), np.array([0.1, 0.2, 0.5])
    found = error_estimates(RitzPairs(values, r, np.eye(3)))
    np.testing.assert_allclose(found, r**2 / [0.8, 0.7, 1.0])
    found = error_estimates(RitzPairs(values[:2], r[:2], np.eye(2)))
    np.testing.assert_allclose(found, r[:2] ** 2 / [0.8, 0.9])
    found = error_estimates(RitzPairs(values / 10, r, np.eye(3)))  # within a residual there is none
    np.testing.assert_allclose(found, r)


class Faulty(SymmetricOperator):
    def __init__(self, value):
        super().__init__(20, torch.float64, torch.device("cpu"))
        self.value = value

    def _matmat(self, vectors):
        return vectors * self.value


SHIFTED = {
    "evenly": np.linspace(1, 3, 300),
    "tight": np.linspace(0.9, 1.1, 300),
    "semi-definite": np.random.RandomState(1).gamma(0.5, 1.0, 300),
    "negative": np.linspace(-3, -1, 300),
}


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("name", SHIFTED)
def test_a_spectrum_that_is_not_centred_on_zero_keeps_its_basis_orthogonal(name, which):
    operator = planted(SHIFTED[name])
    space = KrylovSpace(operator, 120)
    space.start(torch.randn(300, generator=torch.Generator().manual_seed(0)).double())
    while not space.full:
        space.take(operator.matvec(space.next(0)))
    gram = space._basis @ space._basis.T
    torch.testing.assert_close(gram, torch.eye(120).double(), rtol=0, atol=1e-12)
    pairs = top_eigenpairs(operator, 3, which, tol=1e-6)
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.values, wanted(SHIFTED[name], 3, which), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("which", "k"), [("SA", 3), ("LA", 5)])
def test_zeros_of_a_low_rank_operator_converge_to_the_rounding_of_products(which, k):
    pairs = top_eigenpairs(planted([3.0, 2.0, 2.0, 1.0] + [0.0] * 296), k, which)
    expected = {"SA": [0.0] * 3, "LA": [3.0, 2.0, 2.0, 1.0, 0.0]}[which]
    np.testing.assert_allclose(pairs.values, expected, atol=1e-12)
    assert pairs.converged.all()
    assert pairs.num_matvecs < 30


def test_an_operator_that_is_not_symmetric_does_not_converge():
    class Skew(SymmetricOperator):
        def _matmat(self, vectors):
            return matrix @ vectors

    matrix = planted([21.0, -20.0, *BULK]).matrix
    noise = torch.randn(292, 292, generator=torch.Generator().manual_seed(0)).double()
    matrix = matrix + 0.05 * (noise - noise.T)
    with pytest.warns(UserWarning, match="have not converged .* not those of a symmetric matrix"):
        pairs = top_eigenpairs(Skew(292, torch.float64, torch.device("cpu")), 2, max_iter=60)
    assert (pairs.errors > 1e-3 * np.abs(pairs.values)).all()


def test_nothing_is_missing_where_every_chain_has_ended():
    for spectrum, k in (([1.0] * 50, 3), ([0.0] * 30, 2), ([5, 4, 3, 2, 1] + [0] * 95, 5)):
        pairs = top_eigenpairs(planted(spectrum), k)
        np.testing.assert_allclose(pairs.values, sorted(spectrum)[::-1][:k], atol=1e-12)
        assert pairs.miss <= 0.01


class Diagonal(SymmetricOperator):
    def __init__(self, values, broken=None):
        super().__init__(len(values), values.dtype, values.device)
        self.values, self.broken = values, broken

    def _matmat(self, vectors):
        product = self.values[:, None] * vectors
        if self.num_matvecs == self.broken:
            product[3] = float("nan")
        return product


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e18, 1e20])
@pytest.mark.parametrize("dim", [203, 300_000])
def test_a_basis_in_single_precision_neither_under_nor_overflows(dim, scale):
    values = torch.linspace(0, 1, dim)
    values[:3] = torch.tensor([5.0, 4.0, 3.0])
    pairs = top_eigenpairs(Diagonal(values * scale), 3, basis_dtype=torch.float32)
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.values / scale, [5, 4, 3], rtol=1e-3)


def test_accurate_products_give_accurate_values_of_long_vectors(generator):
    """A sum over a million products in float32 loses three digits on a CPU."""
    values = torch.linspace(-0.1, 0.1, 1_000_000)
    values[::200_000] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    operator = Diagonal(values)
    limits = {"tol": 1e-5, "max_iter": 60, "max_basis": None, "basis_dtype": torch.float32}
    search = EigenSearch(operator, {"top": (3, "LM")}, generator=generator, rough=True, **limits)
    search.run(operator.matvec, starts=1, certify=False)
    for _ in multiply(search.check(), operator.matvec):
        pass
    found = search.pairs("top")
    np.testing.assert_allclose(found.values, [5, 4, 3], rtol=1e-5)
    assert found.converged.all()


def test_a_rough_search_of_few_dimensions_needs_products_for_its_check(generator):
    operator, wanted = planted([float(i) for i in range(10)]), {"a": (5, "LA"), "b": (5, "SA")}
    limits = {"tol": 1e-3, "max_basis": None, "generator": generator, "rough": True}
    with pytest.raises(ValueError, match="`max_iter` must be at least 20, got 19"):
        EigenSearch(operator, wanted, max_iter=19, **limits)
    search = EigenSearch(operator, wanted, max_iter=20, **limits)
    search.run(operator.matvec, starts=1, certify=True)
    for _ in multiply(search.check(), operator.matvec):
        pass
    np.testing.assert_allclose(search.pairs("a").values, [9, 8, 7, 6, 5], rtol=1e-9)


@pytest.mark.parametrize("step", [1, 2, 5, 10])
def test_a_product_that_is_not_finite_is_refused_at_any_step(step):
    with pytest.raises(ValueError, match="finite products, got NaN or infinity\\.$"):
        top_eigenpairs(Diagonal(torch.linspace(-1, 1, 203).double(), broken=step), 3)


def test_an_overflow_of_float16_is_named(generator):
    operator = Diagonal(torch.full((20,), torch.inf, dtype=torch.float16))
    density = partial(density_of, generator=generator)
    for solve in (top_eigenpairs, density, partial(hutch_plus_plus, generator=generator)):
        with pytest.raises(ValueError, match=r"float16 overflows .* convert the model with `mod"):
            solve(operator)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"operator": None}, TypeError, "`operator` must have `dim`, .* got NoneType; wr"),
        ({"operator": torch.eye(3)}, TypeError, r"got Tensor; .* `MatrixOperator\(matrix\)`"),
        ({"tol": float("inf")}, ValueError, "`tol` must be positive and finite, got inf"),
        ({"tol": "x"}, ValueError, "`tol` must be positive and finite, got 'x'"),
        ({"certify": None}, ValueError, "`certify` must be a bool or a probability .* got None"),
        ({"k": True}, ValueError, "`k` must be a whole number, got True"),
        ({"k": None}, ValueError, "`k` must be a whole number, got None"),
        ({"max_basis": "x"}, ValueError, "`max_basis` must be a whole number, got 'x'"),
        ({"basis_device": "gpu"}, ValueError, "`basis_device` must be a device .* got 'gpu'"),
        ({"start": 3}, TypeError, "`start` must be vectors in a tensor or an array, got int"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        top_eigenpairs(**{"operator": planted([1.0, 2.0, 3.0]), "k": 1} | arguments)


def test_bad_input_is_refused():
    operator = planted([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        top_eigenpairs(operator, 0)
    with pytest.raises(ValueError, match="`k` must be at most the dimension 3, got 4; lower `k`"):
        top_eigenpairs(operator, 4)
    with pytest.raises(ValueError, match="`which` must be one of 'LM', 'LA', 'SA', got 'BE'"):
        top_eigenpairs(operator, 1, "BE")
    with pytest.raises(ValueError, match="`tol` must be positive"):
        top_eigenpairs(operator, 1, tol=0.0)
    with pytest.raises(ValueError, match=r"`certify` must be a bool or a probability"):
        top_eigenpairs(operator, 1, certify=1.0)
    with pytest.raises(ValueError, match="`max_basis` must be at least 7"):
        top_eigenpairs(planted(BULK), 5, max_basis=6)
    with pytest.raises(ValueError, match="finite products"):
        top_eigenpairs(Faulty(float("nan")), 1)
    with pytest.raises(TypeError, match="`matrix` must be a tensor, got ndarray"):
        MatrixOperator(np.eye(3))
    with pytest.raises(ValueError, match="square"):
        MatrixOperator(torch.ones(2, 3))
    with pytest.raises(ValueError, match="symmetric"):
        MatrixOperator(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    for entry in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`matrix` must be finite"):
            MatrixOperator(torch.tensor([[1.0, entry], [entry, 4.0]]))
    with pytest.raises(TypeError, match=r"torch\.Generator"):
        top_eigenpairs(operator, 1, generator=3)
    v = torch.tensor([1.0, -2.0, 0.5])
    for start in (torch.zeros(3), torch.stack([v, -v])):
        with pytest.raises(ValueError, match="`start` must not be zero"):
            top_eigenpairs(operator, 1, start=start)
    for entry in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`start` must be finite"):
            top_eigenpairs(operator, 1, start=torch.tensor([1.0, entry, 1.0]))


def step(space, operator, chain):
    space.take(operator.matvec(space.next(chain)))


@pytest.mark.parametrize("reads", [1, 4])
def test_the_defining_relation_of_the_krylov_space(reads, generator):
    """A V = V T + R Eᵀ through interleaved chains, late starts and a restart."""
    operator = planted(SPECTRA["plus and minus"] + BULK)
    space = KrylovSpace(operator, 30, reads=reads)
    starts = torch.randn(3, operator.dim, generator=generator, dtype=torch.float64)

    def check():
        space.read()
        m = space.size
        basis = space._basis[:m]
        residue = torch.stack(space._frontier).T @ torch.from_numpy(space._coupling[:m].T)
        expected = basis.T @ torch.from_numpy(space._projection[:m, :m]) + residue
        torch.testing.assert_close(operator.matrix @ basis.T, expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(basis @ basis.T, torch.eye(m).double(), rtol=0, atol=1e-12)

    first = space.start(starts[0])
    second = space.start(starts[1])
    for _ in range(5):
        step(space, operator, first)
        step(space, operator, second)
    check()
    space.stop(first)
    third = space.start(starts[2])
    for _ in range(4):
        step(space, operator, third)
    check()
    weights = space.start_weights(space.ritz(), 3)
    np.testing.assert_allclose(weights.sum(1), 1)
    # Each start vector lies in the space: its quadrature has the exact mean vᵀAv.
    for v, w in zip(starts, weights, strict=True):
        v = v / v.norm()
        assert w @ space.ritz().values == pytest.approx((v @ operator.matrix @ v).item())
    space.compress(space.ritz(), np.array([0, 1, 2, 11, 12, 13]))
    check()
    for _ in range(6):
        step(space, operator, second)
    check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_that_is_not_read_never_waits_for_a_gpu():
    operator = MatrixOperator(torch.diag(torch.linspace(-1, 2, 30)).double().cuda())
    space = KrylovSpace(operator, 20, reads=10)
    chain = space.start(torch.ones(30).double().cuda())
    with unsynchronised():
        for _ in range(9):
            space.take(operator.matvec(space.next(chain)))
    assert space.behind


@pytest.mark.parametrize("case", ["low rank", "two eigenvectors"])
def test_a_chain_that_ends_unread_is_cut_back(case, generator):
    """Its later steps were for nothing, and what they took of the other chain is given back."""
    if case == "low rank":  # two vectors and what A, of rank 2, makes of them span 4
        operator, expected = planted([3.0, -1.0] + [0.0] * 40), 4
        starts = torch.randn(2, operator.dim, generator=generator, dtype=torch.float64)
    else:  # the second chain sees two eigenvectors, of which the first has nothing
        operator, expected = planted([-30.0, 30.0, *np.linspace(0.5, 1, 50)]), 3
        vectors = torch.linalg.eigh(operator.matrix).eigenvectors
        starts = torch.stack([vectors[:, 1:-1].sum(1), vectors[:, 0] + vectors[:, -1]])
    space = KrylovSpace(operator, 30, reads=20)
    first = space.start(starts[0])
    step(space, operator, first)
    space.read()
    space.stop(first)
    second = space.start(starts[1])
    for _ in range(8):
        step(space, operator, second)
    assert space.behind
    space.read()
    assert space.alive == []
    assert space.size == expected
    basis, frontier = space._basis[: space.size], torch.stack(space._frontier)
    torch.testing.assert_close(basis @ basis.T, torch.eye(expected).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        basis @ frontier.T, torch.zeros(expected, 2).double(), rtol=0, atol=1e-12
    )
    products = basis.T @ torch.from_numpy(space._projection[:expected, :expected])
    products += frontier.T @ torch.from_numpy(space._coupling[:expected].T)
    torch.testing.assert_close(operator.matrix @ basis.T, products, rtol=0, atol=1e-12)


class Waits(TorchDispatchMode):
    """Counts the numbers that the host reads off a tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_between_two_reads(generator):
    operator = planted(SPECTRA["simple"] + BULK)
    space = KrylovSpace(operator, 60, reads=50)
    for _ in range(2):
        chain = space.start(torch.randn(operator.dim, generator=generator, dtype=torch.float64))
        with Waits() as waits:
            for _ in range(12):
                step(space, operator, chain)
        assert waits.count == 0
        assert space.behind
        space.stop(chain)
    with Waits() as waits:
        values = space.ritz().values
    assert waits.count == 0  # one transfer of all coefficients, none by none
    np.testing.assert_allclose(values[-4:], [4, 6, 8, 10], rtol=1e-3)


@pytest.mark.parametrize("name", SPECTRA)
def test_rare_reads_find_the_same(name):
    operator = planted(SPECTRA[name] + BULK)
    found, products = [], []
    for reads in (1, 3):
        search = EigenSearch(
            operator, {"top": (4, "LA")}, tol=1e-3, max_iter=200, max_basis=20,
            generator=torch.Generator().manual_seed(0), reads=reads,
        )  # fmt: skip
        search.run(operator.matvec, starts=1, certify=True)
        found.append(search.pairs("top"))
        products.append(search.num_matvecs)
    assert all(pairs.converged.all() for pairs in found)
    np.testing.assert_allclose(found[1].values, found[0].values, rtol=1e-3)
    np.testing.assert_allclose(found[1].residuals, found[0].residuals, atol=0.5)
    assert products[0] - 3 <= products[1] <= products[0] + 12


def test_the_asymmetry_is_the_largest_of_all_products(generator):
    matrix = planted([10, 8, 6, -5, 4, 3] + BULK).matrix
    skew = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
    space = KrylovSpace(planted([10, 8, 6, -5, 4, 3] + BULK), 20)
    chain = space.start(torch.ones(len(matrix), dtype=torch.float64))
    seen = []
    for number in range(8):
        v = space.next(chain)
        space.take((matrix + (0.01 if number < 3 else 0) * (skew - skew.T)) @ v)
        space.read()
        seen.append(space.asymmetry)
    assert seen == sorted(seen)
    assert seen[-1] == max(seen) > 1e-3


def test_visibility_is_the_part_of_an_eigenvector_in_the_space(generator):
    """For an eigenvector x: gᵀ M g = |Qᵀx|², with g its products with the start vectors."""
    operator = planted([10, 8, 6, -5, 4, 3] + BULK)
    values, vectors = torch.linalg.eigh(operator.matrix)
    starts = torch.randn(3, operator.dim, generator=generator, dtype=torch.float64)
    starts /= starts.norm(dim=1, keepdim=True)
    space = KrylovSpace(operator, 60, reads=2)
    marks = values[[-1, -3, 0, 100]].numpy()
    for number, start in enumerate(starts):
        chain = space.start(start)
        if number == 1:
            space.watch(marks)  # what came before is followed too, and what comes after
        for _ in range(3):
            step(space, operator, chain)
        space.stop(chain)
    matrices = space.visibility()
    assert matrices.shape == (4, 3, 3)
    held = torch.linalg.qr(torch.cat([space._basis[: space.size], *_rows(space)]).T).Q
    for matrix, index in zip(matrices, [-1, -3, 0, 100], strict=True):
        x = vectors[:, index]
        g = (starts @ x).numpy()
        seen = (held.T @ x).square().sum().item()
        assert 0 < seen < 1
        assert g @ matrix @ g == pytest.approx(seen, rel=1e-6)
    # A restart keeps a part of the space, and forgets what it has to do with earlier starts.
    space.compress(space.ritz(), np.array([0, 1, 4, 5, 8]))
    less = space.visibility()
    assert (np.linalg.eigvalsh(matrices - less) > -1e-9 * matrices.max()).all()
    held = torch.linalg.qr(torch.cat([space._basis[: space.size], *_rows(space)]).T).Q
    for matrix, index in zip(less, [-1, -3, 0, 100], strict=True):
        x = vectors[:, index]
        g = (starts @ x).numpy()
        assert g @ matrix @ g == pytest.approx((held.T @ x).square().sum().item(), rel=1e-6)
    chain = space.start(torch.ones(operator.dim, dtype=torch.float64))
    space.watch(marks)
    assert space.visibility().shape == (4, 1, 1)


def _products(operator, start, seed):
    generator = torch.Generator().manual_seed(seed)
    return top_eigenpairs(operator, 2, start=start, generator=generator).num_matvecs


def _rows(space):
    return [frontier[None] for frontier in space._frontier if frontier.any()]


def test_what_is_seen_beyond_doubt_stays_so_over_many_products():
    operator = planted(BULK)
    space = KrylovSpace(operator, 90)
    space.start(torch.ones(operator.dim, dtype=torch.float64))
    space.watch(np.array([2.0, 500.0]))
    seen = []
    for _ in range(80):
        space.take(operator.matvec(space.next(0)))
        seen.append(chances(space.visibility(), 0, operator.dim, own=False))
    for later, earlier in zip(seen[20:], seen[15:], strict=False):
        assert (later < 1e-9).all()
        assert (later <= np.maximum(earlier, 1e-30)).all()


def test_an_eigenvalue_far_above_a_small_bulk_is_watched_without_overflow():
    """μ over the width of the bulk, 1e4 here, comes into M at the power of each product."""
    operator = planted([50] + [-1e-3 * i / 300 for i in range(300)])
    search = EigenSearch(
        operator, {"largest": (1, "LA"), "smallest": (1, "SA")}, tol=1e-4, max_iter=500,
        max_basis=None, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    search.run(operator.matvec, starts=1, certify=True, min_iter=150)
    found = [search.pairs(name) for name in ("largest", "smallest")]
    np.testing.assert_allclose([pairs.values[0] for pairs in found], [50, -299e-5 / 3], rtol=1e-3)
    assert all(pairs.converged.all() for pairs in found)
    assert search.miss == pytest.approx(0.01)
    assert np.isfinite(search.space.visibility()).all()
