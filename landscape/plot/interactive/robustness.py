"""Robustness and calibration as plotly figures; plotly is imported when called."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from landscape.plot import style
from landscape.plot.corruption import corruption_title, grouped_rows, row_names
from landscape.plot.interactive.look import LOOK, named_line
from landscape.plot.robustness import (
    CONFIDENCE_LABEL,
    DELTA_LABEL,
    FREQUENCY_LABEL,
    RADIUS_LABELS,
    RELIABILITY_LABEL,
    attack_of,
    attacked_accuracy,
    clean_entry,
    common_norm,
    ece_entry,
    legend_entries,
    noise_of,
    sample_size,
    wilson_interval,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from landscape.probes.adversarial import AdversarialRobustness
    from landscape.probes.corruption import CorruptionRobustness
    from landscape.probes.evaluate import Evaluation
    from landscape.probes.frequency import RobustnessCurve


def frequency_robustness(
    result: "RobustnessCurve | Mapping[str, RobustnessCurve]",
) -> "Figure":
    """Draw the change of accuracy under noise by its frequency; hovering shows NLL, too.

    Bars are two paired standard errors each side.

    Args:
        result: One curve, or several by label.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `result` is empty.
    """
    from plotly import graph_objects as go

    by_label = style.named(result, "RobustnessCurve")
    common, labels = legend_entries(by_label, clean_entry, noise_of)
    figure = go.Figure()
    for name, one in by_label.items():
        hover = "frequency %{x:.3g}π<br>Δ accuracy %{y:.2f} ± %{customdata[0]:.2f} points"
        hover += "<br>accuracy %{customdata[1]:.2f} %<br>Δ NLL %{customdata[2]:.4g}"
        hover += " ± %{customdata[3]:.2g} nats"
        columns = [100 * one.delta_accuracy_stderr, 100 * one.accuracy]
        columns += [one.delta_nll, one.delta_nll_stderr]
        curve = go.Scatter(
            x=one.frequencies,
            y=100 * one.delta_accuracy,
            error_y={"array": 200 * one.delta_accuracy_stderr},
            customdata=np.stack(columns, axis=-1),
            hovertemplate=hover,
            **named_line(labels[name], style.line_styles(by_label)[name]),
        )
        figure.add_trace(curve)
    figure.update_layout(**LOOK, title=common, xaxis_title=FREQUENCY_LABEL)
    figure.update_layout(yaxis_title=DELTA_LABEL)
    return figure


def adversarial_robustness(
    result: "AdversarialRobustness | Mapping[str, AdversarialRobustness]",
) -> "Figure":
    """Draw accuracy under attack by the radius, from the clean accuracy at 0.

    Bars are two standard errors each side.

    Args:
        result: One result, or several of one norm by label.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `result` is empty, or mixes norms.
    """
    from plotly import graph_objects as go

    by_label = style.named(result, "AdversarialRobustness")
    norm = common_norm(by_label)
    common, labels = legend_entries(by_label, clean_entry, attack_of)
    figure = go.Figure()
    for name, one in by_label.items():
        radii, accuracy, error = attacked_accuracy(one)
        hover = "radius %{x:.3g}/255 = %{customdata[1]:.4g}"
        hover += "<br>accuracy %{y:.2f} ± %{customdata[0]:.2f} %"
        curve = go.Scatter(
            x=255 * radii,
            y=100 * accuracy,
            error_y={"array": 200 * error},
            customdata=np.stack([100 * error, radii], axis=-1),
            hovertemplate=hover,
            **named_line(labels[name], style.line_styles(by_label)[name]),
        )
        figure.add_trace(curve)
    figure.update_layout(**LOOK, title=common, xaxis_title=RADIUS_LABELS[norm])
    figure.update_layout(yaxis_title="Accuracy (%)", yaxis_rangemode="tozero")
    return figure


def reliability_diagram(result: "Evaluation | Mapping[str, Evaluation]") -> "Figure":
    """Draw accuracy against confidence; hovering shows the edges and the count of a bin.

    Bars are Wilson's intervals of two standard errors; the columns are the share of samples in
    each bin of the confidence.

    Args:
        result: One evaluation, or several by label.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `result` is empty.
    """
    from plotly import graph_objects as go

    by_label = style.named(result, "Evaluation")
    common, labels = legend_entries(by_label, ece_entry, sample_size)
    figure = go.Figure()
    diagonal = {"color": "#737373", "dash": "dash", "width": 1}
    figure.add_shape(type="line", x0=0, y0=0, x1=1, y1=1, line=diagonal)
    for name, one in by_label.items():
        look = style.line_styles(by_label)[name]
        low, high = wilson_interval(one.bin_accuracy, one.bin_count)
        bars = {"array": high - one.bin_accuracy, "arrayminus": one.bin_accuracy - low}
        hover = "confidence %{x:.3f}, in (%{customdata[0]:.3f}, %{customdata[1]:.3f}]"
        hover += "<br>accuracy %{y:.3f}<br>gap %{customdata[3]:.3f}<br>%{customdata[2]} samples"
        points = go.Scatter(
            x=one.bin_confidence,
            y=one.bin_accuracy,
            error_y={"symmetric": False, **bars},
            customdata=_bins(one),
            hovertemplate=hover,
            **named_line(labels[name], look),
        )
        columns = go.Bar(
            x=(one.bin_edges[1:] + one.bin_edges[:-1]) / 2,
            y=one.bin_count / max(one.num_samples, 1),
            width=np.diff(one.bin_edges),
            marker={"color": look["color"], "opacity": 0.2, "line": {"width": 0}},
            name=labels[name],
            legendgroup=labels[name],
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_traces([points, columns])
    title = "noise: the ECE of a calibrated model" + (f", {common}" if common else "")
    figure.update_layout(**LOOK, title=title, barmode="overlay")
    figure.update_xaxes(title_text=CONFIDENCE_LABEL, range=[0, 1])
    figure.update_yaxes(title_text=RELIABILITY_LABEL, range=[0, 1.03])
    return figure


def corruption_robustness(
    result: "CorruptionRobustness | Mapping[str, CorruptionRobustness]",
) -> "Figure":
    """Draw tables of the error under corruptions side by side; hovering shows errors and NLL.

    Args:
        result: One table, or several by label.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `result` is empty.
    """
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    by_label = style.named(result, "CorruptionRobustness")
    titles = [
        f"{name}: {corruption_title(one)}" if name else corruption_title(one)
        for name, one in by_label.items()
    ]
    figure = make_subplots(1, len(by_label), subplot_titles=titles)
    for column, one in enumerate(by_label.values(), start=1):
        rows, groups = grouped_rows(one.corruptions)
        values = 100 * np.asarray(one.error)[rows]
        hover = "%{y} (%{customdata[3]}), severity %{x}"
        hover += "<br>error %{z:.2f} ± %{customdata[0]:.2f} %"
        hover += "<br>NLL %{customdata[1]:.4g} ± %{customdata[2]:.2g} nats<extra></extra>"
        table = go.Heatmap(
            x=[str(each) for each in one.severities],
            y=row_names(one, rows),
            z=values,
            customdata=_cells(one, rows, groups),
            coloraxis="coloraxis",
            texttemplate="%{z:.0f}",
            hovertemplate=hover,
        )
        figure.add_trace(table, row=1, col=column)
    figure.update_xaxes(title_text="Severity", type="category")
    figure.update_yaxes(autorange="reversed")
    bar = {"cmin": 0, "cmax": 100, "colorscale": style.SEQUENTIAL.capitalize()}
    figure.update_layout(**LOOK, coloraxis={**bar, "colorbar": {"title": {"text": "Error (%)"}}})
    return figure


def _bins(result: "Evaluation") -> NDArray[np.float64]:
    gap = result.bin_accuracy - result.bin_confidence
    columns = [result.bin_edges[:-1], result.bin_edges[1:], result.bin_count, gap]
    return np.stack(columns, axis=-1)


def _cells(
    result: "CorruptionRobustness", rows: list[int], groups: list[str]
) -> NDArray[np.object_]:
    cells = np.empty((len(rows), len(result.severities), 4), dtype=object)
    columns = (100 * result.error_stderr, result.nll, result.nll_stderr)
    for index, values in enumerate(columns):
        cells[..., index] = np.asarray(values)[rows]
    cells[..., 3] = np.array(groups, dtype=object)[:, None]
    return cells
