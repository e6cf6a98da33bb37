"""The same results as plotly figures, to turn, zoom and read off; plotly is imported when called.

Write one with `figure.write_html(path, include_plotlyjs="cdn")`.
"""

from landscape.plot.interactive.curves import (
    build_up,
    hessian_spectrum,
    loss_line,
    spectral_density,
    training_history,
    trajectory,
)
from landscape.plot.interactive.features import (
    cka,
    feature_variance,
    fourier_amplitude,
    fourier_depth,
    lesion_study,
)
from landscape.plot.interactive.loss import hessian_max_spectrum, loss_surface, polar_trajectory
from landscape.plot.interactive.robustness import (
    adversarial_robustness,
    corruption_robustness,
    frequency_robustness,
    reliability_diagram,
)

__all__ = [
    # training, surfaces, trajectories, spectra
    "build_up",
    "hessian_max_spectrum",
    "hessian_spectrum",
    "loss_line",
    "loss_surface",
    "polar_trajectory",
    "spectral_density",
    "training_history",
    "trajectory",
    # representations
    "cka",
    "feature_variance",
    "fourier_amplitude",
    "fourier_depth",
    "lesion_study",
    # robustness
    "adversarial_robustness",
    "corruption_robustness",
    "frequency_robustness",
    "reliability_diagram",
]
