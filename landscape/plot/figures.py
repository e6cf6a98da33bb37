"""Figures of several axes in the style of a paper: Figure 1 of Park & Kim (2022) and its panels.

Every function returns a `matplotlib.figure.Figure` that no global state knows of: save it with
`figure.savefig(path)`; there is nothing to close.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from landscape.plot import style, texts
from landscape.plot.hessian import (
    MAX_LABEL,
    Half,
    density_text,
    hessian_max_spectrum,
    limit_eigenvalues,
    spread_far,
    trim_spectrum,
)
from landscape.plot.scale import (
    LABELS,
    Quantity,
    color_bar,
    log_label,
    make_norm,
    shared_limits,
)
from landscape.plot.surface import loss_surface
from landscape.plot.trajectory import polar_trajectory

if TYPE_CHECKING:
    from landscape.probes.hessian_max import HessianMaxSpectrum
    from landscape.probes.surface import LossSurface
    from landscape.probes.trajectory import PolarTrajectory

    Surfaces = Mapping[str, LossSurface]
    Trajectories = Mapping[str, PolarTrajectory]
    Spectra = Mapping[str, Mapping[str, HessianMaxSpectrum]]

HALVES: tuple[Half, ...] = ("negative", "positive")
_TERMS: tuple[Quantity, ...] = ("loss", "nll", "l2")


def figure1a(results: "Surfaces") -> Figure:
    """Draw loss surfaces side by side: in 3D, and as contours with NLL and L2 apart.

    Each quantity has one scale for all models, so heights and colours compare.

    Args:
        results: Surface of each model.

    Returns:
        The figure, 5.5 in wide.

    Raises:
        ValueError: If `results` is empty.
    """
    with style.paper_figure(results, style.TEXT_WIDTH, 3.5) as figure:
        _draw_surfaces(figure, results)
    return figure


def figure1b(results: "Trajectories") -> Figure:
    """Draw the polar trajectories of several models in one sector.

    Args:
        results: Trajectory of each model.

    Returns:
        The figure, 3.25 in wide.

    Raises:
        ValueError: If `results` is empty.
    """
    with style.paper_figure(results, style.COLUMN_WIDTH, 2.4) as figure:
        _draw_trajectories(figure, results)
    return figure


def figure1c(results: "Spectra") -> Figure:
    """Draw Hessian max eigenvalue spectra: a row per epoch, the halves apart, models overlaid.

    Each half has one scale of eigenvalues for all epochs, logarithmic in both where one spectrum
    spreads far. Densities fill the height of their panel; their areas are the NEP and its
    complement (`half_density`).

    Args:
        results: For each model its spectrum at each epoch, in the order to draw them.

    Returns:
        The figure, 5.5 in wide.

    Raises:
        ValueError: If `results` is empty.
    """
    height = 0.7 + 0.75 * len(_epochs(results))
    with style.paper_figure(results, style.TEXT_WIDTH, height) as figure:
        _draw_spectra(figure, results)
    return figure


def figure1(surfaces: "Surfaces", trajectories: "Trajectories", spectra: "Spectra") -> Figure:
    """Draw Figure 1: (a) loss surfaces, (b) polar trajectories, (c) Hessian max spectra.

    Args:
        surfaces: Surface of each model.
        trajectories: Trajectory of each model.
        spectra: For each model its spectrum at each epoch, in the order to draw them.

    Returns:
        The figure, 5.5 in wide.

    Raises:
        ValueError: If one of them is empty.
    """
    with style.paper_figure(surfaces, style.TEXT_WIDTH, 6.4) as figure:
        rows: Any = figure.subfigures(2, 1, height_ratios=(3.5, 2.9))
        top, (left, right) = rows[0], rows[1].subfigures(1, 2, width_ratios=(1.85, 3.65))
        _draw_surfaces(top, surfaces)
        _draw_trajectories(left, trajectories)
        _draw_spectra(right, spectra)
        for panel, letter in ((top, "a"), (left, "b"), (right, "c")):
            style.letter_panel(panel, letter)
    return figure


def _draw_surfaces(figure: Figure | SubFigure, results: "Surfaces") -> None:
    count = len(results)
    scale = _shared_scale(results, "loss")
    for column, (name, result) in enumerate(results.items()):
        place = (column / count, 0.44, 0.96 / count, 0.5)
        ax: Any = figure.add_axes(place, projection="3d")
        loss_surface(result, ax=ax, **scale)
        _trim_surface3d(ax, zoom=min(1.08, 2.4 / count), log=scale["log"])
        title = texts.wrapped_title(name, count, 9)
        figure.text((column + 0.5) / count, 0.99, title, ha="center", va="top", size=9)
    for block, quantity in enumerate(_TERMS):
        _draw_contours(figure, results, quantity, block)


def _draw_contours(
    figure: Figure | SubFigure, results: "Surfaces", quantity: Quantity, block: int
) -> None:
    """Draw one quantity of every model as contours over a common colour bar."""
    count, gap = len(results), 0.012
    left, right = 0.075 + 0.315 * block, 0.075 + 0.315 * block + 0.285
    width = (right - left - gap * (count - 1)) / count
    scale = _shared_scale(results, quantity)
    short = texts.short_names(results, texts.room_for(width * style.TEXT_WIDTH, 7))
    for column, (name, result) in enumerate(results.items()):
        ax = figure.add_axes((left + column * (width + gap), 0.2, width, 0.21))
        loss_surface(result, ax=ax, kind="contour", quantity=quantity, colorbar=False, **scale)
        ax.set_title(short[name], size=7, pad=2)
        ax.set_xlabel("$a$", labelpad=0)
        ax.set_ylabel("" if block or column else "$b$", labelpad=0)
        ax.tick_params(labelleft=not (block or column))
        ax.set_aspect("equal")
        for axis in (ax.xaxis, ax.yaxis):  # ticks as there is room for their labels
            axis.set_major_locator(MaxNLocator(4 if count < 3 else 2, prune="both"))
        for note in ax.findobj(lambda artist: artist.get_gid() == "note"):
            note.remove()  # the 3D panel says what the crosses are
    bar = figure.add_axes((left, 0.105, right - left, 0.02))
    norm = make_norm(scale["vmin"], scale["vmax"], log=scale["log"])
    color_bar(figure, norm, LABELS[quantity], cax=bar, orientation="horizontal")


def _shared_scale(results: "Surfaces", quantity: Quantity) -> dict[str, Any]:
    low, high = shared_limits(results.values(), quantity)
    log = isinstance(make_norm(low, high), LogNorm)
    return {"vmin": low, "vmax": high, "log": log}


def _trim_surface3d(ax: Any, zoom: float, *, log: bool) -> None:
    """Move labels and ticks of 3D axes close to the box, for a panel of a few inches."""
    ax.view_init(elev=22, azim=-60)
    ax.set_box_aspect((1, 1, 0.7), zoom=zoom)
    loss = "Loss (nats)"  # in full at its colour bar
    ax.set(xlabel="$a$", ylabel="$b$", zlabel=log_label(loss) if log else loss)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_tick_params(pad=-3)
        axis.labelpad = -9
        axis.set_pane_color((1, 1, 1, 0))
    ax.xaxis.set_major_locator(MaxNLocator(4, prune="both"))
    ax.yaxis.set_major_locator(MaxNLocator(4, prune="both"))
    ax.zaxis.labelpad = -6
    ax.zaxis.label.set_size(7)


def _draw_trajectories(figure: Figure | SubFigure, results: "Trajectories") -> None:
    ax: Any = figure.add_axes((0.1, 0.2, 0.8, 0.7), projection="polar")
    for name, result in results.items():
        polar_trajectory(result, ax=ax, label=name)
    if ax.get_thetamax() > 90:  # a half disc has labels on both sides
        ax.set_position((0.17, 0.2, 0.66, 0.7))
    ax.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 5, 10]))


def _draw_spectra(figure: Figure | SubFigure, results: "Spectra") -> None:
    epochs = _epochs(results)
    everything = [spectrum for spectra in results.values() for spectrum in spectra.values()]
    log = spread_far(everything)
    inch = figure.dpi / figure.bbox.height
    place = {"left": 0.055, "right": 0.99, "top": 1 - 0.1 * inch, "bottom": 0.55 * inch}
    grid = figure.add_gridspec(len(epochs), 2, wspace=0.06, hspace=0.12, **place)
    axes = np.array(grid.subplots(sharex="col"), dtype=object).reshape(len(epochs), 2)
    for row, epoch in enumerate(epochs):
        named = {name: spectra[epoch] for name, spectra in results.items() if epoch in spectra}
        for ax, half in zip(axes[row], HALVES, strict=True):
            hessian_max_spectrum(named, ax=ax, half=half, log=log)
            trim_spectrum(ax, half)
        axes[row, 0].set_ylabel(epoch)
    for ax, half in zip(axes[0], HALVES, strict=True):  # the columns share their axis
        limit_eigenvalues(ax, everything, half, log=log)
    label: dict[str, Any] = {"x": 0.525, "ha": "center", "va": "bottom"}
    figure.text(y=0.2 * inch, s=MAX_LABEL, **label)
    note = f"{density_text(log)}: Gaussian kernels, Silverman's bandwidth. "
    note += "n: eigenvalues. [ ]: 95 % interval"
    figure.text(y=0.06 * inch, s=note, size=style.NOTE_SIZE, color=style.MUTED, **label)


def _epochs(results: "Spectra") -> list[str]:
    return list(dict.fromkeys(epoch for spectra in results.values() for epoch in spectra))
