"""Plots: one function a result, `plot.x(result, *, ax=None) -> Axes`, and figures of the paper.

Functions compute, show, save and style nothing. For the look of a paper draw inside
`matplotlib.rc_context(plot.style.rc())`; the figure-level functions do so themselves.
"""

from landscape.plot import interactive, style
from landscape.plot.build_up import build_up
from landscape.plot.corruption import corruption_robustness
from landscape.plot.density import half_density
from landscape.plot.diagram import block_diagram, figure11
from landscape.plot.feature_figures import figure2, figure2a, figure8, figure9, figure10, panels
from landscape.plot.features import (
    cka,
    feature_variance,
    fourier_amplitude,
    fourier_depth,
    lesion_study,
)
from landscape.plot.figures import figure1, figure1a, figure1b, figure1c
from landscape.plot.hessian import hessian_max_spectrum
from landscape.plot.robustness import (
    adversarial_robustness,
    frequency_robustness,
    reliability_diagram,
)
from landscape.plot.scale import shared_limits
from landscape.plot.seeds import run_columns, run_curves, spectra_over_runs
from landscape.plot.spectrum import hessian_spectrum, spectral_density
from landscape.plot.surface import loss_line, loss_surface
from landscape.plot.training_history import training_history
from landscape.plot.trajectory import polar_trajectory, trajectory

__all__ = [
    # results to axes
    "adversarial_robustness",
    "block_diagram",
    "build_up",
    "cka",
    "corruption_robustness",
    "feature_variance",
    "fourier_amplitude",
    "fourier_depth",
    "frequency_robustness",
    "hessian_max_spectrum",
    "hessian_spectrum",
    "lesion_study",
    "loss_line",
    "loss_surface",
    "polar_trajectory",
    "reliability_diagram",
    "spectral_density",
    "training_history",
    "trajectory",
    # several runs: every run a point, their mean with its interval
    "run_columns",
    "run_curves",
    "spectra_over_runs",
    # figures of the paper
    "figure1",
    "figure1a",
    "figure1b",
    "figure1c",
    "figure2",
    "figure2a",
    "figure8",
    "figure9",
    "figure10",
    "figure11",
    "panels",
    # parts
    "half_density",
    "interactive",
    "shared_limits",
    "style",
]
