"""Lines, projected trajectories, spectra and tables of a build-up as plotly figures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import to_hex, to_rgb

from landscape._checks import check_choice
from landscape.plot import style
from landscape.plot.build_up import SCORE_LABELS
from landscape.plot.interactive.look import LOOK, named_line, plotly_line, plotly_text
from landscape.plot.scale import LABELS, Quantity, finite_values
from landscape.plot.spectrum import LABEL, density_band
from landscape.plot.surface import X_LABEL, Y_LABEL
from landscape.plot.training_history import COLUMNS, PALE, Column, curves, height_label

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from landscape.linalg.quadrature import SpectralDensity
    from landscape.probes.hessian import HessianSpectrum
    from landscape.probes.surface import LossLine
    from landscape.probes.trajectory import Trajectory
    from landscape.training import FitResult
    from landscape.training.build_up_table import BuildUp


def loss_line(
    result: "LossLine | Mapping[str, LossLine]", *, quantity: Quantity = "loss", log: bool = False
) -> "Figure":
    """Draw a quantity along one direction, with a band of two standard errors each side.

    Hovering shows the coordinate and the value. Points that are not finite break the line.

    Args:
        result: One line, or several by label.
        quantity: What to draw.
        log: Logarithmic height.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `quantity` was not evaluated, `log` meets values that are not positive, or
            `result` is empty.
    """
    from plotly import graph_objects as go

    named = style.named(result, "LossLine")
    styles = style.line_styles(named)
    figure = go.Figure(layout=LOOK)
    for name, one in named.items():
        values = finite_values(one, quantity, log=log).filled(np.nan)
        if quantity in {"loss", "nll"}:
            error = 2 * np.where(np.isfinite(one.nll_stderr), one.nll_stderr, 0.0)
            low = values - error
            if log and np.isfinite(values).any():  # a logarithmic axis has no place for less
                low = np.maximum(low, np.nanmin(values) / 10)
            _add_band(figure, one.x, low, values + error, styles[name], name)
        figure.add_trace(
            go.Scatter(
                x=one.x,
                y=values,
                marker={"size": 4},
                **named_line(name, styles[name]),
                hovertemplate=f"a = %{{x:.3g}}<br>{quantity} = %{{y:.4g}}",
            )
        )
    figure.update_xaxes(title_text=plotly_text(X_LABEL))
    figure.update_yaxes(title_text=LABELS[quantity], type="log" if log else "linear")
    return figure


def training_history(
    result: "FitResult | Mapping[str, FitResult]",
    *,
    quantity: Column = "loss",
    log: bool = False,
) -> "Figure":
    """Draw loss or accuracy after every epoch of training runs; training is pale.

    Args:
        result: The history of one run, or of several by label.
        quantity: `"loss"` or `"accuracy"`.
        log: Logarithmic height.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `quantity` is unknown, or `result` is empty.
    """
    from plotly import graph_objects as go

    check_choice("quantity", quantity, COLUMNS)
    named = style.named(result, "FitResult")
    styles = style.line_styles(named)
    figure = go.Figure(layout=LOOK)
    for name, one in named.items():
        training, validation = curves(one, quantity)
        parts = [("training", training)] + (
            [] if validation is None else [("validation", validation)]
        )
        for part, values in parts:
            figure.add_trace(
                go.Scatter(
                    x=one.epoch,
                    y=values,
                    marker={"size": 4},
                    opacity=PALE if len(parts) > 1 and part == "training" else 1.0,
                    **named_line(f"{name}, {part}" if name else part, styles[name]),
                    hovertemplate=f"epoch %{{x:d}}<br>{quantity} = %{{y:.4g}}",
                )
            )
    figure.update_xaxes(title_text="epoch")
    label = height_label(next(iter(named.values())), quantity)
    figure.update_yaxes(title_text=label, type="log" if log else "linear")
    return figure


def trajectory(result: "Trajectory | Mapping[str, Trajectory]") -> "Figure":
    """Draw trajectories projected on two directions; hovering shows the step.

    Args:
        result: One trajectory, coordinates `(t, 2)`, or several by label.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If one is not projected on exactly two directions, or `result` is empty.
    """
    from plotly import graph_objects as go

    named = style.named(result, "Trajectory")
    styles = style.line_styles(named)
    figure = go.Figure(layout=LOOK)
    for name, one in named.items():
        coordinates = np.asarray(one.coordinates)
        if coordinates.ndim != 2 or coordinates.shape[1] != 2:
            raise ValueError(
                f"`result` must have coordinates of shape (t, 2), got {coordinates.shape}; "
                "project on two directions."
            )
        ends = ["star", *["circle"] * (len(coordinates) - 2), "square"][-len(coordinates) :]
        figure.add_trace(
            go.Scatter(
                x=coordinates[:, 0],
                y=coordinates[:, 1],
                customdata=one.steps,
                marker={"symbol": ends, "size": 8},
                **named_line(name, styles[name]),
                hovertemplate="step %{customdata}<br>a = %{x:.3g}<br>b = %{y:.3g}",
            )
        )
    figure.update_xaxes(title_text=plotly_text(X_LABEL))
    figure.update_yaxes(title_text=plotly_text(Y_LABEL))
    return figure


def spectral_density(result: "SpectralDensity | Mapping[str, SpectralDensity]") -> "Figure":
    """Draw eigen-densities on a logarithmic scale, with bands of two standard errors each side.

    Args:
        result: One density, or several by label.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `result` is empty.
    """
    named = style.named(result, "SpectralDensity")
    return _densities(named, style.line_styles(named))


def _densities(named: dict[str, Any], styles: Mapping[str, dict[str, Any]]) -> "Figure":
    from plotly import graph_objects as go

    figure = go.Figure(layout=LOOK)
    lowest, highest = np.inf, 0.0
    for name, result in named.items():
        floor, low, high = density_band(result)
        lowest, highest = min(lowest, floor), max(highest, float(high.max()))
        _add_band(figure, result.grid, low, high, styles[name], name)
        figure.add_trace(
            go.Scatter(
                x=result.grid,
                y=result.values,
                name=f"{name}, σ = {result.sigma:.3g}".removeprefix(", "),
                legendgroup=name,
                mode="lines",
                line=plotly_line(styles[name]),
                hovertemplate="λ = %{x:.4g}<br>density %{y:.3g}",
            )
        )
    figure.update_xaxes(title_text=plotly_text(LABEL))
    span = np.log10([lowest, 3 * max(highest, lowest)]).tolist()
    figure.update_yaxes(title_text="Density (1/nats)", type="log", range=span)
    return figure


def hessian_spectrum(result: "HessianSpectrum | Mapping[str, HessianSpectrum]") -> "Figure":
    """Draw eigen-densities with the eigenvalues at their edges; hovering shows each and its error.

    Triangles up are the largest eigenvalues, triangles down the smallest; hollow where one has not
    converged.

    Args:
        result: One spectrum, or several by label; without a density the edges are drawn alone.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `result` is empty.
    """
    from plotly import graph_objects as go

    named = style.named(result, "HessianSpectrum")
    styles = style.line_styles(named)
    densities = {n: r.density for n, r in named.items() if r.density is not None}
    figure = _densities(densities, styles) if densities else go.Figure(layout=LOOK)
    span = figure.layout.yaxis.range
    for row, (name, one) in enumerate(named.items()):
        height = 0.05 * (row + 1)
        if span is not None:
            height = 10 ** (span[0] + height * (span[1] - span[0]))
        for pairs, side, symbol in (
            (one.largest, "largest", "triangle-up"),
            (one.smallest, "smallest", "triangle-down"),
        ):
            hollow = ["" if converged else "-open" for converged in pairs.converged]
            figure.add_trace(
                go.Scatter(
                    x=pairs.values,
                    y=np.full(len(pairs.values), height),
                    error_x={"array": pairs.residuals, "thickness": 1},
                    customdata=np.stack([pairs.residuals, pairs.errors], axis=-1),
                    name=f"{name}, {side}".removeprefix(", "),
                    legendgroup=name,
                    mode="markers",
                    marker={
                        "symbol": [symbol + each for each in hollow],
                        "color": styles[name]["color"],
                        "size": 9,
                    },
                    hovertemplate="λ = %{x:.6g} ± %{customdata[1]:.1g}"
                    "<br>residual %{customdata[0]:.1g}",
                )
            )
        trace = f"trace {one.trace:.4g} ± {one.trace_stderr:.2g}"
        if name:
            group = {"legendgrouptitle": {"text": f"{name}: {trace}"}}
            figure.update_traces(group, selector={"legendgroup": name})
        else:
            figure.update_layout(title=trace)
    figure.update_xaxes(title_text=plotly_text(LABEL))
    if span is None:
        figure.update_yaxes(visible=False, range=[0, 1])
    return figure


def build_up(result: "BuildUp") -> "Figure":
    """Draw the validation score of every network that was tried; hovering shows its MSAs.

    Args:
        result: The table.

    Returns:
        The plotly figure; bars are two standard errors each side.

    Raises:
        TypeError: If `result` is no `BuildUp`.
    """
    from plotly import graph_objects as go

    style.check_result(result, "BuildUp")
    accuracy = result.criterion == "accuracy"
    value = 100 * result.accuracy if accuracy else result.nll
    error = 200 * result.accuracy_stderr if accuracy else 2 * result.nll_stderr
    steps = np.arange(len(value))
    figure = go.Figure(layout=LOOK)
    for chosen, name, mode, color, symbol in (
        (result.kept, "kept", "lines+markers", style.family_color("alternet"), "circle"),
        (~result.kept, "refused", "markers", to_hex(style.MUTED), "circle-open"),
    ):
        figure.add_trace(
            go.Scatter(
                x=steps[chosen],
                y=value[chosen],
                error_y={"array": error[chosen]},
                customdata=[", ".join(map(str, row)) for row in result.msas[chosen].tolist()],
                name=name,
                mode=mode,
                marker={"symbol": symbol, "size": 8},
                line={"color": color},
                hovertemplate="MSAs per stage: %{customdata}<br>%{y:.4g}",
            )
        )
    figure.update_xaxes(title_text="Network")
    figure.update_yaxes(title_text=SCORE_LABELS[result.criterion])
    return figure


def _add_band(
    figure: "Figure",
    x: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    line: dict[str, Any],
    name: str,
) -> None:
    """Shade what lies between two curves, in pieces where these are finite."""
    from plotly import graph_objects as go

    red, green, blue = (round(255 * part) for part in to_rgb(line["color"]))
    finite = np.isfinite(low) & np.isfinite(high)
    starts = np.flatnonzero(finite & ~np.append(False, finite[:-1]))
    stops = np.flatnonzero(finite & ~np.append(finite[1:], False)) + 1
    for start, stop in zip(starts, stops, strict=True):
        piece = slice(start, stop)
        figure.add_trace(
            go.Scatter(
                x=np.concatenate([x[piece], x[piece][::-1]]),
                y=np.concatenate([high[piece], low[piece][::-1]]),
                fill="toself",
                fillcolor=f"rgba({red}, {green}, {blue}, 0.2)",
                line={"width": 0},
                mode="lines",
                legendgroup=name,
                showlegend=False,
                hoverinfo="skip",
            )
        )
