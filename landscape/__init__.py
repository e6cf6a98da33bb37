"""Probes of loss landscapes and feature maps for any PyTorch vision model."""

from importlib import import_module
from typing import Any

from landscape.blocks import Block, Blocks
from landscape.linalg.eigen import top_eigenpairs
from landscape.linalg.eigenpairs import Eigenpairs
from landscape.linalg.hessian import HessianOperator
from landscape.linalg.operators import MatrixOperator, SymmetricOperator
from landscape.linalg.output_curvature import (
    EmpiricalFisherOperator,
    FisherOperator,
    GaussNewtonOperator,
)
from landscape.linalg.quadrature import SpectralDensity
from landscape.linalg.trace import TraceEstimate
from landscape.objective import Objective
from landscape.probes.adversarial import AdversarialRobustness, adversarial_robustness
from landscape.probes.architecture import Architecture, architecture
from landscape.probes.cka import CKA, cka
from landscape.probes.corruption import (
    CorruptionRobustness,
    RelativeCorruptionError,
    corruption_robustness,
)
from landscape.probes.directions import Directions, random_directions
from landscape.probes.evaluate import Evaluation, evaluate
from landscape.probes.feature_maps import BlockTable
from landscape.probes.fourier import FourierAmplitude, fourier_amplitude
from landscape.probes.frequency import RobustnessCurve, frequency_robustness
from landscape.probes.hessian import (
    HessianSpectrum,
    hessian_density,
    hessian_spectrum,
    hessian_trace,
)
from landscape.probes.hessian_max import HessianMaxSpectrum, hessian_max_spectrum
from landscape.probes.lesion import LesionStudy, lesion_study
from landscape.probes.planes import between, eigen_directions, pca_directions
from landscape.probes.published_corruptions import (
    PublishedCorruptions,
    load_published_corruptions,
)
from landscape.probes.published_surface import load_published_surface
from landscape.probes.surface import LossLine, LossSurface, loss_line, loss_surface
from landscape.probes.trajectory import (
    PolarTrajectory,
    Trajectory,
    polar_trajectory,
    project_trajectory,
)
from landscape.probes.variance import FeatureVariance, feature_variance
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
    # surfaces and trajectories
    "between",
    "eigen_directions",
    "load_published_surface",
    "loss_line",
    "loss_surface",
    "pca_directions",
    "polar_trajectory",
    "project_trajectory",
    "random_directions",
    # representations
    "Block",
    "Blocks",
    "architecture",
    "cka",
    "feature_variance",
    "fourier_amplitude",
    "lesion_study",
    # robustness
    "adversarial_robustness",
    "corruption_robustness",
    "evaluate",
    "frequency_robustness",
    "load_published_corruptions",
    # results
    "AdversarialRobustness",
    "Architecture",
    "BlockTable",
    "CKA",
    "CorruptionRobustness",
    "Directions",
    "Eigenpairs",
    "Evaluation",
    "FeatureVariance",
    "FourierAmplitude",
    "HessianMaxSpectrum",
    "HessianSpectrum",
    "LesionStudy",
    "LossLine",
    "LossSurface",
    "PolarTrajectory",
    "Provenance",
    "PublishedCorruptions",
    "RelativeCorruptionError",
    "Result",
    "RobustnessCurve",
    "SpectralDensity",
    "TraceEstimate",
    "Trajectory",
]


def __getattr__(name: str) -> Any:
    """Import `landscape.models`, `.plot` or `.training` on first use; probes need none of them."""
    if name in ("models", "plot", "training"):
        return import_module(f"landscape.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
