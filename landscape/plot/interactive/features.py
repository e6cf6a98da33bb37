"""What blocks do to a signal, as plotly figures whose points tell the names of the blocks.

A panel per model, on one scale; plotly is imported when called.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import to_hex

from landscape.plot import features, style
from landscape.plot.interactive.look import LOOK, named_line, plotly_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from landscape.probes.cka import CKA
    from landscape.probes.feature_maps import BlockTable
    from landscape.probes.fourier import FourierAmplitude
    from landscape.probes.lesion import LesionStudy
    from landscape.probes.variance import FeatureVariance

_AMPLITUDE = "Δ log amplitude"
_BLOCK = "%{customdata[0]} (%{customdata[1]})"


def fourier_amplitude(result: "FourierAmplitude | Mapping[str, FourierAmplitude]") -> "Figure":
    """Draw a curve for each block; hovering shows block, frequency, value and standard error.

    Args:
        result: One result, or several by label.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `result` is empty.
    """
    from plotly import graph_objects as go

    by_label = style.named(result, "FourierAmplitude")
    values = [np.concatenate(each.delta_log_amplitude) for each in by_label.values()]
    figure = _panels(by_label, [{"not finite": ~np.isfinite(each)} for each in values])
    colors = features.depth_map()
    for column, one in enumerate(by_label.values(), start=1):
        for i, name in enumerate(one.names):
            curve, color = one.delta_log_amplitude[i], to_hex(colors(float(one.depth[i])))
            data = [[name, one.kinds[i], error] for error in one.stderr[i]]
            trace = go.Scatter(
                x=one.frequency[i],
                y=curve,
                customdata=data,
                mode="lines+markers",
                line={"color": color},
                marker={"size": 4},
                name=name,
                showlegend=False,
                hovertemplate=f"{_BLOCK}<br>%{{x:.3g}} π: %{{y:.3f}} ± %{{customdata[2]:.2g}}"
                "<extra></extra>",
            )
            figure.add_trace(trace, row=1, col=column)
        figure.update_xaxes(title_text=features.frequency_label(one), col=column)
    figure.update_xaxes(
        tickvals=[0, 0.25, 0.5, 0.75, 1],
        ticktext=["0", "π/4", "π/2", "3π/4", "π"],
    )
    figure.update_yaxes(title_text=_AMPLITUDE, col=1)
    scale = [[at, to_hex(colors(at))] for at in np.linspace(0, 1, 11).tolist()]
    bar = {"colorscale": scale, "cmin": 0, "cmax": 1, "color": [0], "showscale": True}
    bar["colorbar"] = {"title": {"text": features.DEPTH_LABEL}}
    scatter = {"mode": "markers", "marker": bar, "showlegend": False, "hoverinfo": "skip"}
    figure.add_trace(go.Scatter(x=[None], y=[None], **scatter), row=1, col=1)  # for its bar alone
    return figure


def fourier_depth(result: "FourierAmplitude | Mapping[str, FourierAmplitude]") -> "Figure":
    """Draw the amplitude at the highest frequency against depth; hovering shows the block.

    Args:
        result: One result, or several by label.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `result` is empty.
    """
    by_label = style.named(result, "FourierAmplitude")
    values = {name: (each.highest, each.highest_stderr) for name, each in by_label.items()}
    missing = [features.missing_amplitudes(each) for each in by_label.values()]
    figure = _against_depth(by_label, values, missing)
    label = features.highest_label(by_label.values())
    figure.update_yaxes(title_text=plotly_text(label), col=1)
    return figure


def feature_variance(
    result: "FeatureVariance | Mapping[str, FeatureVariance]", *, log: bool = False
) -> "Figure":
    """Draw the variance of the feature maps against depth; hovering shows the block.

    Args:
        result: One result, or several by label.
        log: Logarithmic variance.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `result` is empty.
    """
    by_label = style.named(result, "FeatureVariance")
    values = {name: (each.variance, each.stderr) for name, each in by_label.items()}
    missing = [features.missing_variances(each, log=log) for each in by_label.values()]
    figure = _against_depth(by_label, values, missing)
    figure.update_yaxes(type="log" if log else "linear", rangemode="normal" if log else "tozero")
    figure.update_yaxes(title_text=features.VARIANCE_LABEL, col=1)
    return figure


def cka(result: "CKA | Mapping[str, CKA]") -> "Figure":
    """Draw the similarity of all pairs of blocks; hovering shows both blocks and the error.

    Args:
        result: One result, or several by label.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `result` is empty.
    """
    from plotly import graph_objects as go

    by_label = style.named(result, "CKA")
    figure = _panels(by_label, [{}] * len(by_label), shared=False)
    for column, one in enumerate(by_label.values(), start=1):
        rows, columns = one.blocks_a.names, one.blocks_b.names
        pairs = [
            [[a, b, one.stderr[i, j]] for j, b in enumerate(columns)] for i, a in enumerate(rows)
        ]
        trace = go.Heatmap(
            x=np.arange(1, len(columns) + 1),
            y=np.arange(1, len(rows) + 1),
            z=np.where(np.isfinite(one.values), one.values, np.nan),
            customdata=pairs,
            coloraxis="coloraxis",
            hovertemplate="%{customdata[0]}<br>%{customdata[1]}<br>"
            "CKA = %{z:.3f} ± %{customdata[2]:.2g}<extra></extra>",
        )
        figure.add_trace(trace, row=1, col=column)
        edge: dict[str, Any] = {"line": {"color": "white", "width": 1}, "row": 1, "col": column}
        for at in features.stage_edges(one.blocks_a.stage):
            figure.add_hline(y=float(at) + 0.5, **edge)
        for at in features.stage_edges(one.blocks_b.stage):
            figure.add_vline(x=float(at) + 0.5, **edge)
    figure.update_xaxes(constrain="domain")
    for i, one in enumerate(by_label.values()):
        down, across = (label.replace("\n", " ") for label in features.block_labels(one))
        figure.update_xaxes(title_text=across, col=i + 1)
        if i == 0 or down != "Block":
            figure.update_yaxes(title_text=down, col=i + 1)
        number = "" if i == 0 else str(i + 1)
        figure.update_layout({f"yaxis{number}": {"scaleanchor": f"x{number}"}})
    scale = style.SEQUENTIAL.capitalize()
    bar = {"colorscale": scale, "cmin": 0, "cmax": 1, "colorbar": {"title": {"text": "CKA"}}}
    figure.update_layout(coloraxis=bar)
    return figure


def lesion_study(result: "LesionStudy | Mapping[str, LesionStudy]") -> "Figure":
    """Draw the accuracy that each removed unit costs; hovering shows the unit and the rise in NLL.

    Args:
        result: One result, or several by label.

    Returns:
        The plotly figure.

    Raises:
        TypeError: If a result is of another kind.
        ValueError: If `result` is empty.
    """
    from plotly import graph_objects as go

    by_label = style.named(result, "LesionStudy")
    missing = [{"not finite": ~np.isfinite(each.delta_accuracy)} for each in by_label.values()]
    figure = _panels(by_label, missing)
    shown: set[str] = set()
    for column, one in enumerate(by_label.values(), start=1):
        kinds = features.colored_kinds(one.kinds)
        for kind in dict.fromkeys(kinds.tolist()):
            chosen = np.flatnonzero(kinds == kind)
            error = 200 * one.delta_accuracy_stderr[chosen]
            trace = go.Bar(
                x=chosen + 1,
                y=-100 * one.delta_accuracy[chosen],
                error_y={"array": error, "thickness": 1},
                customdata=[[one.names[i], one.parts[i], one.delta_nll[i]] for i in chosen],
                marker={"color": style.KIND_COLORS[kind]},
                name=style.KIND_NAMES[kind],
                legendgroup=kind,
                showlegend=kind not in shown,
                hovertemplate="%{customdata[0]}, %{customdata[1]}<br>accuracy loss %{y:.2f} points"
                "<br>Δ NLL = %{customdata[2]:.3f} nats<extra></extra>",
            )
            figure.add_trace(trace, row=1, col=column)
            shown.add(kind)
        for at in features.stage_edges(one.stage):
            line = {"color": "gray", "width": 1, "dash": "dot"}
            figure.add_vline(x=float(at) + 0.5, line=line, row=1, col=column)
    figure.update_xaxes(title_text=features.UNIT_LABEL)
    figure.update_yaxes(title_text=features.LOSS_LABEL, col=1)
    return figure


def _panels(
    by_label: Mapping[str, Any], missing: Sequence[features.Missing], *, shared: bool = True
) -> "Figure":
    """Return a panel a model, with a count of its values that cannot be drawn in its title."""
    from plotly.subplots import make_subplots

    titles = []
    for name, each in zip(by_label, missing, strict=True):
        counts = [f"{w.sum()} of {w.size} {why}" for why, w in each.items() if w.any()]
        titles.append(name + (f" ({', '.join(counts)})" if counts else ""))
    figure = make_subplots(1, len(by_label), subplot_titles=titles, shared_yaxes=shared)
    figure.update_layout(**LOOK)
    return figure


def _against_depth(
    by_label: "Mapping[str, BlockTable]",
    values: Mapping[str, tuple[np.ndarray, np.ndarray]],
    missing: Sequence[features.Missing],
) -> "Figure":
    """Draw (values, standard errors) of each model against depth, over its shaded steps."""
    from plotly import graph_objects as go

    figure = _panels(by_label, missing)
    styles = style.line_styles(by_label)
    for column, (name, table) in enumerate(by_label.items(), start=1):
        mean, stderr = values[name]
        trace = go.Scatter(
            x=table.depth,
            y=mean,
            error_y={"array": 2 * stderr, "thickness": 1},
            customdata=list(zip(table.names, table.kinds, stderr, strict=True)),
            **named_line(name, styles[name]),
            showlegend=False,
            hovertemplate=f"{_BLOCK}<br>%{{y:.4g}} ± %{{customdata[2]:.2g}}<extra></extra>",
        )
        figure.add_trace(trace, row=1, col=column)
        for what, start, stop in features.shaded_steps(table):
            shade: dict[str, Any] = {"fillcolor": features.SHADES[what], "line_width": 0}
            shade |= {"opacity": style.KIND_ALPHA, "layer": "below", "row": 1, "col": column}
            figure.add_vrect(start, stop, **shade)
    figure.update_xaxes(title_text=features.DEPTH_LABEL, range=[-0.02, 1.02])
    return figure
