"""Which eigenvalues enter a density exactly, and which are left to the random probe."""

import numpy as np
import pytest
import torch
from torch import nn

from landscape import Objective, hessian_spectrum

BULK = np.linspace(-0.5, 0.5, 200)


def spectrum_of(eigenvalues, **kwargs):
    """Spectrum of Σ y (xᵀθ)² / 2N, whose Hessian Σ y x xᵀ / N has these eigenvalues."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    x = torch.diag((len(values) * values.abs()).sqrt())
    objective = Objective(loss=lambda outputs, y: (y * outputs.square()).mean() / 2)
    model = nn.Linear(len(values), 1, bias=False, dtype=torch.float64)
    return hessian_spectrum(model, [(x, values.sign()[:, None])], objective=objective, **kwargs)


@pytest.mark.parametrize(("second", "simple"), [(9.9, False), (9.0, True)])
def test_edge_values_within_two_percent_of_another_are_sampled(second, simple):
    spectrum = spectrum_of(np.r_[-3, -2, -1.5, BULK, 1.5, second, 10], k=3)
    assert spectrum.largest.residuals.max() < 1e-6  # both are known, however near
    exact = [-3, -2, second, 10] if simple else [-3, -2]
    np.testing.assert_allclose(spectrum.density.outliers, exact, atol=1e-9)
    assert (spectrum.density.nodes.max() > 5) is not simple
    assert spectrum.density.moment(0)[0] == pytest.approx(1, abs=1e-12)
    assert abs(spectrum.trace - 5 - second) <= 3 * spectrum.trace_stderr


def test_a_probe_that_lies_in_the_exact_part_is_sampled_all_the_same():
    """One start vector sees an eigenvalue once, however often it occurs."""
    spectrum = spectrum_of(np.r_[np.ones(49), 5], k=1, max_iter=2)  # no product for a certificate
    assert len(spectrum.density.outliers) == 0
    np.testing.assert_allclose(spectrum.density.nodes, [[1, 5]], rtol=1e-9)
    assert spectrum.density.moment(0)[0] == pytest.approx(1, abs=1e-12)
    assert abs(spectrum.trace - 54) <= 3 * spectrum.trace_stderr


@pytest.mark.parametrize("certify", [True, False])
def test_an_edge_value_that_may_be_multiple_is_sampled(certify):
    """Without a certificate nothing is known of its copies, and of those of the last never."""
    spectrum = spectrum_of(np.r_[-3, -2, BULK, 9, 10], k=2, certify=certify)
    assert spectrum.largest.residuals.max() < 1e-6
    np.testing.assert_allclose(spectrum.density.outliers, [-3, 10] if certify else [], atol=1e-9)


def test_without_products_for_a_certificate_no_edge_value_is_taken_for_simple():
    values = np.r_[-3, -2, BULK, 9, 10]
    spent = spectrum_of(values, k=2, certify=False).num_hvps
    short = spectrum_of(values, k=2, max_iter=spent)
    assert short.largest.converged.all()
    assert short.largest.miss == 1
    assert short.density.outliers.size == 0
