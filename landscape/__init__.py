"""Probes of loss landscapes and feature maps for any PyTorch vision model."""

from landscape.linalg.eigen import Eigenpairs, top_eigenpairs
from landscape.linalg.hessian import (
    EmpiricalFisherOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
)
from landscape.linalg.operators import MatrixOperator, SymmetricOperator
from landscape.linalg.quadrature import SpectralDensity
from landscape.linalg.trace import TraceEstimate
from landscape.objective import Objective
from landscape.probes.hessian import (
    HessianMaxSpectrum,
    HessianSpectrum,
    hessian_density,
    hessian_max_spectrum,
    hessian_spectrum,
    hessian_trace,
)
from landscape.results import Provenance, Result

__all__ = [
    # what is probed
    "Objective",
    # operators and algorithms on them
    "EmpiricalFisherOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "MatrixOperator",
    "SymmetricOperator",
    "top_eigenpairs",
    # curvature
    "hessian_density",
    "hessian_max_spectrum",
    "hessian_spectrum",
    "hessian_trace",
    # results
    "Eigenpairs",
    "HessianMaxSpectrum",
    "HessianSpectrum",
    "Provenance",
    "Result",
    "SpectralDensity",
    "TraceEstimate",
]
