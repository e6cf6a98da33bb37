"""The drawing of a build-up: what was kept, what was refused, and their errors."""

import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from landscape.plot import interactive, style
from landscape.plot.build_up import build_up
from landscape.results import Provenance
from landscape.training import BuildUp
from tests.plot.page import boxes

MSAS = [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 1, 1), (0, 0, 2, 1), (0, 1, 1, 1)]
KEPT = [True, True, False, True, False, False]


def table(criterion="accuracy", kept=KEPT):
    steps = len(kept)
    return BuildUp(
        depths=(3, 4, 6, 4),
        stage=np.array([-1, 3, 3, 2, 2, 1])[:steps],
        position=np.array([-1, 3, 1, 5, 3, 3])[:steps],
        msas=np.array(MSAS)[:steps],
        num_parameters=np.full(steps, 1000),
        accuracy=np.array([0.7, 0.74, 0.72, 0.75, 0.73, 0.71])[:steps],
        accuracy_stderr=np.array([0.01, 0.02, 0.03, 0.01, 0.02, 0.03])[:steps],
        nll=np.array([1.2, 1.1, 1.3, 1.0, 1.15, 1.25])[:steps],
        nll_stderr=np.array([0.1, 0.2, 0.3, 0.1, 0.2, 0.3])[:steps],
        kept=np.array(kept),
        seconds=np.ones(steps),
        criterion=criterion,
        provenance=Provenance(),
    )


@pytest.mark.parametrize("criterion", ["accuracy", "nll"])
def test_kept_steps_are_joined_and_refused_ones_are_open_with_two_standard_errors(criterion):
    result = table(criterion)
    value, error = (
        (100 * result.accuracy, 100 * result.accuracy_stderr)
        if criterion == "accuracy"
        else (result.nll, result.nll_stderr)
    )
    ax = build_up(result)
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"kept", "refused"}
    np.testing.assert_array_equal(lines["kept"].get_xdata(), [0, 1, 3])
    np.testing.assert_array_equal(lines["kept"].get_ydata(), value[[0, 1, 3]])
    assert lines["kept"].get_color() == style.family_color("AlterNet")
    np.testing.assert_array_equal(lines["refused"].get_xdata(), [2, 4, 5])
    np.testing.assert_array_equal(lines["refused"].get_ydata(), value[[2, 4, 5]])
    assert lines["refused"].get_linestyle() == "None"
    assert to_hex(lines["refused"].get_markerfacecolor()) == "#ffffff"
    ways = [line for line in ax.lines if line.get_gid() == "way"]
    assert [tuple(way.get_xdata()) for way in ways] == [(1, 2), (3, 4), (3, 5)]
    assert [tuple(way.get_ydata()) for way in ways] == [
        tuple(value[[1, 2]]), tuple(value[[3, 4]]), tuple(value[[3, 5]])
    ]  # fmt: skip
    segments = np.concatenate([np.array(c.get_segments()) for c in ax.collections])
    order = np.argsort(segments[:, 0, 0])
    np.testing.assert_array_equal(segments[order, 0, 0], range(6))
    np.testing.assert_allclose(segments[order, 1, 1] - segments[order, 0, 1], 4 * error)
    expected = {"accuracy": "Validation accuracy (%)", "nll": "Validation NLL (nats)"}
    assert ax.get_ylabel() == expected[criterion]


def test_ticks_say_the_msas_of_each_stage_the_last_on_top():
    ax = build_up(table())
    labels = [text.get_text() for text in ax.get_xticklabels()]
    assert labels[0] == "0\n0\n0\n0"
    assert labels[3] == "1\n1\n0\n0"
    assert ax.get_xlabel() == "MSAs per stage, the last stage on top"
    assert ax.get_xlim() == (-0.5, 5.5)


def test_without_a_refused_step_none_is_in_the_legend():
    ax = build_up(table(kept=[True, True]))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["kept"]
    figure, ax = plt.subplots()
    assert build_up(table(kept=[True]), ax=ax, color="k") is ax
    assert ax.lines[0].get_color() == "k"


def test_at_the_width_of_a_column_nothing_overlaps():
    with mpl.rc_context(style.rc()):
        figure, ax = plt.subplots(figsize=(style.COLUMN_WIDTH, 2), layout="constrained")
        build_up(table(), ax=ax)
        for (a, one), (b, other) in itertools.combinations(boxes(figure), 2):
            assert not one.overlaps(other), (a, b)
        legend = ax.get_legend().get_window_extent()
        for bars in ax.collections:
            for low, high in bars.get_segments():
                assert not legend.contains(*ax.transData.transform(high)), low


@pytest.mark.parametrize("criterion", ["accuracy", "nll"])
def test_the_interactive_table_tells_the_msas_of_each_network(criterion):
    result = table(criterion)
    value = 100 * result.accuracy if criterion == "accuracy" else result.nll
    error = 200 * result.accuracy_stderr if criterion == "accuracy" else 2 * result.nll_stderr
    kept, refused = interactive.build_up(result).data
    for trace, chosen in ((kept, result.kept), (refused, ~result.kept)):
        np.testing.assert_array_equal(trace.x, np.flatnonzero(chosen))
        np.testing.assert_allclose(trace.y, value[chosen])
        np.testing.assert_allclose(trace.error_y.array, error[chosen])
    assert refused.customdata[0] == "0, 0, 0, 2"
    assert kept.line.color == style.family_color("alternet")
