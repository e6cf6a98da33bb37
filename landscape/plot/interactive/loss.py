"""Surfaces, trajectories and Hessian spectra as plotly figures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.colors import LogNorm

from landscape.plot import style
from landscape.plot.density import half_density
from landscape.plot.hessian import MAX_LABEL, number
from landscape.plot.interactive.look import LOOK, named_line, plotly_line, plotly_text
from landscape.plot.scale import (
    LABELS,
    Quantity,
    finite_values,
    make_norm,
    nice_ticks,
    norm_ends,
    shared_limits,
    tick_texts,
)
from landscape.plot.surface import X_LABEL, Y_LABEL
from landscape.plot.trajectory import known_angles

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from landscape.probes.hessian_max import HessianMaxSpectrum
    from landscape.probes.surface import LossSurface
    from landscape.probes.trajectory import PolarTrajectory


def loss_surface(
    result: "LossSurface | Mapping[str, LossSurface]",
    *,
    quantities: tuple[Quantity, ...] = ("loss", "nll", "l2"),
) -> "Figure":
    """Draw surfaces side by side in 3D with one scale of height and colour.

    A quantity whose largest value is over ten times its smallest has a logarithmic scale.
    Buttons switch between quantities; hovering shows the coordinates and the value. Points that
    are not finite are holes, counted in the titles.

    Args:
        result: One surface, or several by label.
        quantities: What the buttons offer; the first is shown at the start.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If a quantity was not evaluated, or `result` or `quantities` is empty.
    """
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    named = style.named(result, "LossSurface")
    if not quantities:
        raise ValueError("`quantities` must name at least one quantity, got none.")
    titles = [_title(name, one, quantities) for name, one in named.items()]
    scenes = [[{"type": "surface"}] * len(named)]
    figure = make_subplots(1, len(named), specs=scenes, subplot_titles=titles)
    for quantity in quantities:
        norm = make_norm(*shared_limits(named.values(), quantity))
        for column, one in enumerate(named.values(), start=1):
            heights = finite_values(one, quantity).filled(np.nan).T  # plotly's rows are y
            hover = f"a = %{{x:.3g}}<br>b = %{{y:.3g}}<br>{quantity} = %{{z:.4g}}<extra></extra>"
            surface = go.Surface(
                x=one.x,
                y=one.y,
                z=heights,
                surfacecolor=np.log10(heights) if isinstance(norm, LogNorm) else heights,
                coloraxis="coloraxis",
                hovertemplate=hover,
                visible=quantity == quantities[0],
            )
            figure.add_trace(surface, row=1, col=column)
    buttons = [_button(quantity, quantities, named) for quantity in quantities]
    figure.update_layout(
        **LOOK,
        **buttons[0]["args"][1],
        coloraxis_colorscale=style.SEQUENTIAL.capitalize(),
        updatemenus=[{"type": "buttons", "direction": "right", "x": 0, "y": 0, "buttons": buttons}],
    )
    x, y = plotly_text(X_LABEL), plotly_text(Y_LABEL)
    figure.update_scenes(xaxis_title=x, yaxis_title=y, aspectmode="cube")
    return figure


def polar_trajectory(result: "PolarTrajectory | Mapping[str, PolarTrajectory]") -> "Figure":
    """Draw polar trajectories; hovering shows step, radius and angle.

    Args:
        result: One trajectory, or several by label.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `result` is empty.
    """
    from plotly import graph_objects as go

    named = style.named(result, "PolarTrajectory")
    styles = style.line_styles(named)
    figure = go.Figure()
    for name, one in named.items():
        figure.add_trace(
            go.Scatterpolar(
                r=one.radius,
                theta=np.degrees(known_angles(one)),
                customdata=one.steps,
                **named_line(name, styles[name]),
                hovertemplate="step %{customdata}<br>r = %{r:.3g}<br>θ = %{theta:.3g}°",
            )
        )
    widest = max(float(np.nanmax(known_angles(one), initial=0.0)) for one in named.values())
    sector = [0, 180 if widest > np.pi / 2 else 90]
    figure.update_layout(**LOOK, polar={"sector": sector, "radialaxis_title": "‖Δw_t‖ / ‖Δw_0‖"})
    return figure


def hessian_max_spectrum(
    result: "HessianMaxSpectrum | Mapping[str, HessianMaxSpectrum]", *, log: bool = False
) -> "Figure":
    """Draw Hessian max eigenvalue spectra, the halves apart; hovering shows each eigenvalue.

    Args:
        result: One spectrum, or several by label.
        log: Densities of log10|λ| on logarithmic axes; the negative half is then drawn over |λ|.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `result` is empty.
    """
    from plotly.subplots import make_subplots

    named = style.named(result, "HessianMaxSpectrum")
    styles = style.line_styles(named)
    figure = make_subplots(1, 2, subplot_titles=["negative half", "positive half"])
    signs: tuple[tuple[int, Literal[-1, 1]], ...] = ((1, -1), (2, 1))
    for row, (name, one) in enumerate(named.items()):
        for column, sign in signs:
            traces = _half_traces(name, one, sign, log, row, plotly_line(styles[name]))
            for trace in traces:
                figure.add_trace(trace, row=1, col=column)
    label = plotly_text(MAX_LABEL)
    figure.update_xaxes(title_text=label, type="log" if log else "linear")
    if log:
        figure.update_xaxes(title_text=label.replace("λ", "−λ"), autorange="reversed", col=1)
    figure.update_yaxes(title_text="Density per decade" if log else "Density (1/nats)", col=1)
    figure.update_layout(**LOOK)
    return figure


def _half_traces(
    name: str,
    result: "HessianMaxSpectrum",
    sign: Literal[-1, 1],
    log: bool,
    row: int,
    line: dict[str, str],
) -> list[Any]:
    from plotly import graph_objects as go

    grid, density, _ = half_density(result, sign, log=log)
    eigenvalues = np.asarray(result.signed_eigenvalues)
    batch, index = np.nonzero(np.isfinite(eigenvalues) & (np.sign(eigenvalues) == sign))
    values, residuals = eigenvalues[batch, index], np.asarray(result.residuals)[batch, index]
    flip = sign if log else 1
    said = f"NEP {number(result.nep)}" if sign < 0 else f"APE {number(result.ape)}"
    curve = go.Scatter(
        x=flip * grid,
        y=density,
        name=f"{name} ({said})" if name else said,
        line=line,
        fill="tozeroy",
        legendgroup=name,
        hoverinfo="skip",
    )
    rug = go.Scatter(
        x=flip * values,
        y=np.full(values.shape, -0.02 * (row + 1) * np.max(density, initial=1e-3)),
        customdata=np.stack([values, batch, index + 1, residuals], axis=-1),
        mode="markers",
        marker={"symbol": "line-ns-open", "color": line["color"], "size": 8},
        name=name,
        legendgroup=name,
        showlegend=False,
        hovertemplate="λ = %{customdata[0]:.4g} ± %{customdata[3]:.1g}"
        "<br>mini-batch %{customdata[1]}, number %{customdata[2]}",
    )
    return [curve, rug]


def _button(
    quantity: Quantity, quantities: tuple[Quantity, ...], named: "Mapping[str, LossSurface]"
) -> dict[str, Any]:
    """Return the button that shows `quantity` on its common scale."""
    norm = make_norm(*shared_limits(named.values(), quantity))
    log, ticks = isinstance(norm, LogNorm), nice_ticks(norm)
    low, high = np.log10(norm_ends(norm)) if log else norm_ends(norm)
    layout: dict[str, Any] = {
        "coloraxis.cmin": low,
        "coloraxis.cmax": high,
        "coloraxis.colorbar.title.text": LABELS[quantity],
        "coloraxis.colorbar.tickvals": np.log10(ticks) if log else ticks,
        "coloraxis.colorbar.ticktext": tick_texts(ticks, "10<sup>{}</sup>"),
    }
    for column in range(1, len(named) + 1):
        scene = "scene" if column == 1 else f"scene{column}"
        layout[f"{scene}.zaxis.type"] = "log" if log else "linear"
        layout[f"{scene}.zaxis.range"] = [low, high]  # plotly wants log10 of them for "log"
        layout[f"{scene}.zaxis.title.text"] = LABELS[quantity]
    shown = [each == quantity for each in quantities for _ in named]
    return {"label": quantity, "method": "update", "args": [{"visible": shown}, layout]}


def _title(name: str, result: "LossSurface", quantities: tuple[Quantity, ...]) -> str:
    missing = max(int(finite_values(result, each).mask.sum()) for each in quantities)
    return name + (f" ({missing} of {result.loss.size} points not finite)" if missing else "")
