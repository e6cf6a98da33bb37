"""Plots: one function a result, `plot.x(result, *, ax=None) -> Axes`, and the paper's Figure 1.

Functions compute, show, save and style nothing. For the look of a paper draw inside
`matplotlib.rc_context(plot.style.rc())`; the figure-level functions do so themselves.
"""

from landscape.plot import interactive, style
from landscape.plot.density import half_density
from landscape.plot.figures import figure1, figure1a, figure1b, figure1c
from landscape.plot.hessian import (
    hessian_max_spectrum,
    hessian_spectrum,
    spectral_density,
)
from landscape.plot.scale import shared_limits
from landscape.plot.surface import loss_line, loss_surface
from landscape.plot.trajectory import polar_trajectory, trajectory

__all__ = [
    # results to axes
    "hessian_max_spectrum",
    "hessian_spectrum",
    "loss_line",
    "loss_surface",
    "polar_trajectory",
    "spectral_density",
    "trajectory",
    # figures of the paper
    "figure1",
    "figure1a",
    "figure1b",
    "figure1c",
    # parts
    "half_density",
    "interactive",
    "shared_limits",
    "style",
]
