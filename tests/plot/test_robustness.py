import itertools
from dataclasses import replace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from landscape.corruptions.severities import CORRUPTIONS
from landscape.plot import corruption, interactive, robustness, style
from landscape.plot.corruption import corruption_robustness
from landscape.plot.robustness import (
    adversarial_robustness,
    frequency_robustness,
    reliability_diagram,
)
from landscape.probes.adversarial import AdversarialRobustness
from landscape.probes.corruption import CorruptionRobustness
from landscape.probes.evaluate import Evaluation
from landscape.probes.frequency import RobustnessCurve
from landscape.results import Provenance
from tests.plot.page import begins_at_zero, boxes

FREQUENCIES = np.arange(1, 10) / 10


def paired(accuracy, clean):
    """The fields that curves of robustness have in common, errors all different."""
    accuracy = np.asarray(accuracy, dtype=float)
    grow = np.arange(1, len(accuracy) + 1)
    return {
        "accuracy": accuracy,
        "accuracy_stderr": 0.004 * grow,
        "delta_accuracy": accuracy - clean,
        "delta_accuracy_stderr": 0.003 * grow,
        "nll": 3 - accuracy,
        "nll_stderr": 0.02 * grow,
        "delta_nll": clean - accuracy,
        "delta_nll_stderr": 0.01 * grow,
        "clean_accuracy": clean,
        "clean_accuracy_stderr": 0.002,
        "clean_nll": 3 - clean,
        "clean_nll_stderr": 0.015,
        "seed": 0,
        "provenance": Provenance(),
    }


def curve(accuracy=None, clean=0.78, norm=0.1):
    accuracy = clean - 0.15 * np.sin(3 * FREQUENCIES) if accuracy is None else accuracy
    return RobustnessCurve(
        frequencies=FREQUENCIES, width=0.1, norm=norm, clip=False, **paired(accuracy, clean)
    )


def attacked(accuracy=(0.6, 0.4, 0.2, 0.1), clean=0.8, norm="linf", attack="pgd", radii=None):
    return AdversarialRobustness(
        radii=np.array([1, 2, 4, 8]) / 255 if radii is None else np.asarray(radii),
        attack=attack,
        norm=norm,
        steps=10,
        random_start=True,
        restarts=1,
        **paired(accuracy, clean),
    )


def evaluation(count=(0, 10, 40, 50), accuracy=(np.nan, 0.3, 0.5, 0.9), samples=100):
    edges = np.linspace(0, 1, 5)
    middle = (edges[1:] + edges[:-1]) / 2 + 0.01
    return Evaluation(
        num_samples=samples,
        num_classes=10,
        num_nonfinite=0,
        nll=1.0,
        nll_stderr=0.1,
        accuracy=0.7,
        accuracy_stderr=0.05,
        top5=0.9,
        top5_stderr=0.03,
        brier=0.4,
        brier_stderr=0.02,
        ece=0.0873,
        ece_stderr=0.004,
        ece_noise=0.0119,
        bin_edges=edges,
        bin_count=np.array(count),
        bin_confidence=np.where(np.array(count) > 0, middle, np.nan),
        bin_accuracy=np.array(accuracy, dtype=float),
        provenance=Provenance(),
    )


NAMES = ("fog", "gaussian_noise", "jpeg_compression", "defocus_blur", "shot_noise", "vignette")


def table(names=NAMES, severities=(1, 2, 3, 4, 5)):
    error = np.linspace(0.02, 0.98, len(names) * len(severities))
    error = error.reshape(len(names), len(severities))
    return CorruptionRobustness(
        corruptions=tuple(names),
        severities=severities,
        error=error,
        error_stderr=0.01 + 0.02 * error,
        error_increase=error - 0.0832,
        error_increase_stderr=0.02 * error,
        nll=3 * error,
        nll_stderr=0.1 * error,
        nll_increase=3 * error - 0.3,
        nll_increase_stderr=0.1 * error,
        ece=0.1 * error,
        clean_error=0.0832,
        clean_error_stderr=0.002,
        clean_nll=0.3,
        clean_nll_stderr=0.01,
        clean_ece=0.02,
        mean_corruption_error=0.4567,
        mean_corruption_error_stderr=0.0049,
        profile="cifar",
        seed=0,
        relative=None,
        provenance=Provenance(),
    )


def by_gid(ax, gid):
    return [artist for artist in ax.findobj(lambda a: a.get_gid() == gid)]


def notes(ax):
    return [text.get_text() for text in by_gid(ax, "note")]


def bars_of(container):
    """x, lower and upper ends of error bars."""
    (collection,) = container.lines[2]
    segments = [each for each in collection.get_segments() if len(each)]
    return np.array([[each[0, 0], each[0, 1], each[1, 1]] for each in segments]).T


# --- against frequency ---


def test_curves_are_percentage_points_with_two_paired_errors():
    results = {"ResNet": curve(clean=0.81), "ViT": curve(0.7 - 0.1 * FREQUENCIES)}
    ax = frequency_robustness(results)
    for (name, result), drawn in zip(results.items(), ax.containers, strict=True):
        x, y = drawn.lines[0].get_data()
        np.testing.assert_array_equal(x, result.frequencies)
        np.testing.assert_allclose(y, 100 * (result.accuracy - result.clean_accuracy))
        x, low, high = bars_of(drawn)
        np.testing.assert_allclose(x, result.frequencies)
        np.testing.assert_allclose((low + high) / 2, y)
        np.testing.assert_allclose((high - low) / 2, 200 * result.delta_accuracy_stderr)
        assert drawn.lines[0].get_color() == style.family_color(name)
    assert ax.get_xlabel() == "Noise frequency (units of π)"
    assert ax.get_ylabel() == "Δ accuracy (percentage points)"
    labels = ax.get_legend_handles_labels()[1]
    assert labels == ["ResNet: clean 81.0 %", "ViT: clean 78.0 %"]
    assert notes(ax) == ["noise RMS 0.1 of full scale, rings 0.1π wide"]
    assert list(by_gid(ax, "clean")[0].get_ydata()) == [0, 0]


def test_noise_that_differs_is_named_in_the_legend():
    ax = frequency_robustness({"weak": curve(norm=0.05), "strong": curve(norm=0.2)})
    labels = ax.get_legend_handles_labels()[1]
    assert labels[1] == "strong:\nclean 78.0 %, noise RMS 0.2 of full scale, rings 0.1π wide"
    assert notes(ax) == []
    assert frequency_robustness(curve()).get_legend_handles_labels()[1] == ["clean 78.0 %"]


@pytest.mark.parametrize("draw", [frequency_robustness, adversarial_robustness])
def test_values_that_are_not_finite_are_counted_gaps(draw):
    result = curve() if draw is frequency_robustness else attacked()
    result.accuracy[2] = result.delta_accuracy[2] = np.nan
    ax = draw(result, color="#112233")
    (crosses,) = by_gid(ax, "missing")
    x = FREQUENCIES[2] if draw is frequency_robustness else 4
    np.testing.assert_allclose(crosses.get_xdata(), [x])
    assert crosses.get_color() == "#112233"
    size = len(result.accuracy)
    assert notes(ax)[0].startswith(f"×: 1 of {size} not finite\n")
    ax.figure.canvas.draw()


@pytest.mark.parametrize("accuracy", [None, 0.78 + 0.05 * FREQUENCIES, 0 * FREQUENCIES])
def test_legend_of_the_curves_lies_above_them(accuracy):
    with mpl.rc_context(style.rc()):
        figure, ax = plt.subplots(figsize=(style.COLUMN_WIDTH, 2), layout="constrained")
        frequency_robustness({"ResNet": curve(accuracy), "ViT": curve(accuracy)}, ax=ax)
        figure.canvas.draw()
    floor = min(text.get_window_extent().y0 for text in ax.get_legend().get_texts())
    tops = [ax.transData.transform(np.stack(bars_of(c)[[0, 2]], 1))[:, 1] for c in ax.containers]
    assert max(top.max() for top in tops) < floor


def test_legend_of_the_reliability_diagram_lies_above_an_accuracy_of_one():
    results = {"ResNet": evaluation(), "ViT": evaluation(samples=9)}
    with mpl.rc_context(style.rc()):
        figure, ax = plt.subplots(figsize=(style.COLUMN_WIDTH, 2), layout="constrained")
        reliability_diagram(results, ax=ax)
        figure.canvas.draw()
    floor = min(text.get_window_extent().y0 for text in ax.get_legend().get_texts())
    assert ax.transData.transform((0, 1))[1] < floor
    assert ax.get_yticks()[-1] == 1


# --- against attacks ---


def test_attacked_accuracy_starts_at_the_clean_one():
    results = {"ResNet": attacked(), "ViT": attacked((0.7, 0.5, 0.3, 0.2))}
    ax = adversarial_robustness(results)
    for result, drawn in zip(results.values(), ax.containers, strict=True):
        x, y = drawn.lines[0].get_data()
        np.testing.assert_allclose(x, [0, 1, 2, 4, 8])
        np.testing.assert_allclose(y, 100 * np.r_[0.8, result.accuracy])
        _, low, high = bars_of(drawn)
        errors = 200 * np.r_[0.002, result.accuracy_stderr]
        np.testing.assert_allclose((high - low) / 2, errors)
    assert ax.get_xlabel() == "Radius of the L∞ ball (1/255 of full scale)"
    assert ax.get_ylabel() == "Accuracy (%)"
    assert begins_at_zero(ax)
    assert notes(ax) == ["PGD, 10 steps"]
    assert ax.get_legend_handles_labels()[1] == ["ResNet: clean 80.0 %", "ViT: clean 80.0 %"]


def test_a_radius_of_zero_is_not_drawn_twice():
    ax = adversarial_robustness(attacked((0.8, 0.5), radii=(0, 1 / 255), norm="l2"))
    np.testing.assert_allclose(ax.containers[0].lines[0].get_xdata(), [0, 1])
    assert ax.get_xlabel() == "Radius of the L2 ball (1/255 of full scale)"


def test_attacks_that_differ_are_named_and_norms_are_not_mixed():
    ax = adversarial_robustness({"one": attacked(attack="fgsm"), "many": attacked()})
    labels = ax.get_legend_handles_labels()[1]
    assert labels == ["one: clean 80.0 %, FGSM", "many: clean 80.0 %, PGD, 10 steps"]
    for draw in (adversarial_robustness, interactive.adversarial_robustness):
        with pytest.raises(ValueError, match=r"must share one norm, got \['l2', 'linf'\]"):
            draw({"a": attacked(), "b": attacked(norm="l2")})


# --- calibration ---


def test_reliability_is_accuracy_against_confidence_with_gaps_and_shares():
    result = evaluation()
    ax = reliability_diagram(result)
    assert ax.get_xlim() == (-style.EDGE, 1 + style.EDGE)  # marks at the ends are whole
    assert ax.get_ylim()[0] == -style.EDGE
    x, y = ax.containers[0].lines[0].get_data()
    np.testing.assert_array_equal(x, result.bin_confidence)
    np.testing.assert_array_equal(y, result.bin_accuracy)
    (gaps,) = by_gid(ax, "gap")
    drawn = [segment for segment in gaps.get_segments() if len(segment)]
    np.testing.assert_allclose([s[0] for s in drawn], np.stack([x, x], 1)[1:])
    np.testing.assert_allclose([s[1] for s in drawn], np.stack([x, y], 1)[1:])
    (share,) = by_gid(ax, "share")
    values, edges, _ = share.get_data()
    np.testing.assert_allclose(values, [0, 0.1, 0.4, 0.5])
    np.testing.assert_array_equal(edges, result.bin_edges)
    assert ax.get_legend_handles_labels()[1] == ["ECE 8.7 ± 0.4 % (noise 1.2 %)"]
    assert notes(ax) == ["noise: the ECE of a calibrated model, n = 100"]
    assert ax.get_xlabel() == "Confidence (fraction)"
    assert ax.get_ylabel() == "Accuracy, share of samples (fraction)"
    ax.figure.canvas.draw()


def test_bars_of_reliability_are_intervals_of_wilson():
    result = evaluation(count=(2, 8, 40, 50), accuracy=(0.0, 1.0, 0.5, 0.9))
    _, low, high = bars_of(reliability_diagram(result).containers[0])
    for p, n, a, b in zip(result.bin_accuracy, result.bin_count, low, high, strict=True):
        # The ends are the shares q from which p is two standard errors of q away.
        for end in (a, b):
            if 0 < end < 1:
                assert abs(p - end) == pytest.approx(2 * np.sqrt(end * (1 - end) / n), rel=1e-9)
        assert a <= p <= b
        assert b - a > 0.05  # not even a share of 0 or 1 is certain
    assert (low[0], high[1]) == (0, 1)


def test_several_models_have_their_colours_and_counts():
    results = {"ResNet": evaluation(), "ViT": evaluation(samples=200)}
    ax = reliability_diagram(results)
    assert [c.lines[0].get_color() for c in ax.containers] == [
        style.family_color(name) for name in results
    ]
    assert ax.get_legend_handles_labels()[1][1] == "ViT: ECE 8.7 ± 0.4 % (noise 1.2 %), n = 200"
    assert notes(ax) == ["noise: the ECE of a calibrated model"]


# --- corruptions ---


def test_cells_are_percent_in_rows_by_group():
    result = table()
    ax = corruption_robustness(result)
    names = [label.get_text() for label in ax.get_yticklabels()]
    expected = ["gaussian_noise", "shot_noise", "defocus_blur", "fog", "jpeg_compression"]
    expected += ["vignette"]
    assert names == [name.replace("_", " ") for name in expected]
    rows = [result.corruptions.index(name) for name in expected]
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array(), 100 * result.error[rows])
    assert image.get_clim() == (0, 100)
    texts = {text.get_position(): text.get_text() for text in by_gid(ax, "cell")}
    for (row, column), value in np.ndenumerate(result.error[rows]):
        assert texts[column, row] == f"{100 * value:.0f}"
    groups = {text.get_text(): text.get_position()[1] for text in by_gid(ax, "group")}
    assert groups == {"noise": 0.5, "blur": 2, "weather": 3, "digital": 4, "other": 5}
    lines = [line.get_ydata()[0] for line in by_gid(ax, "separator")]
    assert lines == [1.5, 2.5, 3.5, 4.5]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3", "4", "5"]
    assert ax.get_xlabel() == "Severity"
    assert ax.get_title() == "Mean corruption error 45.7 ± 0.5 %, clean 8.3 %"


def test_numbers_stand_out_from_their_cells_and_gaps_stay_gaps():
    result = table()
    result.error[0, 0] = np.nan
    ax = corruption_robustness(result)
    ax.figure.canvas.draw()
    (image,) = ax.images
    assert image.get_array().mask.sum() == 1
    for text in by_gid(ax, "cell"):
        column, row = text.get_position()
        value = image.get_array()[row, column]
        if np.ma.is_masked(value):
            assert (text.get_text(), text.get_color()) == ("–", "k")  # on the white of the axes
            continue
        lightness = np.dot(image.to_rgba(float(value))[:3], (0.299, 0.587, 0.114))
        assert text.get_color() == ("w" if lightness < 0.5 else "k")


def spread(result, *deviations):
    """A result that knows how sure its clean error and means are."""
    return replace(result, error_covariance=np.diag(deviations) ** 2)


def test_several_models_have_points_of_their_means_in_rows_by_group():
    resnet = spread(table(severities=(1, 2, 3)), 0.002, *np.linspace(0.01, 0.06, 6))
    vit = replace(resnet, error=resnet.error[::-1], clean_error=0.1, error_covariance=None)
    ax = corruption_robustness({"ResNet-50": resnet, "ViT-Ti": vit})
    ticks = [label.get_text() for label in ax.get_yticklabels()]
    assert ticks[:3] == ["clean", "gaussian noise", "shot noise"]
    order = [resnet.corruptions.index(name.replace(" ", "_")) for name in ticks[1:]]
    for name, result, drawn in zip(
        ("ResNet-50", "ViT-Ti"), (resnet, vit), ax.containers, strict=True
    ):
        x, y = drawn.lines[0].get_data()
        means = [result.clean_error, *result.error.mean(1)[order]]
        np.testing.assert_allclose(x, 100 * np.array(means))
        np.testing.assert_array_equal(np.round(y), np.arange(7))
        assert drawn.lines[0].get_color() == style.family_color(name)
    assert ax.containers[0].lines[0].get_marker() != ax.containers[1].lines[0].get_marker()
    (bars,) = ax.containers[0].lines[2]
    widths = [np.ptp(segment[:, 0]) for segment in bars.get_segments()]
    expected = np.linspace(0.01, 0.06, 6)[order]
    np.testing.assert_allclose(widths, 400 * np.array([0.002, *expected]))
    low, high = sorted(ax.get_ylim())
    assert ax.yaxis_inverted()
    assert (low, high) == (-0.5, 6.5)
    lines = [line.get_ydata()[0] for line in by_gid(ax, "separator")]
    assert lines == [0.5, 2.5, 3.5, 4.5, 5.5]
    assert ax.get_xlabel() == "Error, mean over severities 1–3 (%)"
    entries = [text.get_text() for text in ax.get_legend().get_texts()]
    assert entries == [f"{name}: mean 45.7 ± 0.5 %" for name in ("ResNet-50", "ViT-Ti")]


@pytest.mark.parametrize(
    ("severities", "label"),
    [((3,), "Error at severity 3 (%)"), ((1, 3, 5), "Error, mean over severities 1, 3, 5 (%)")],
)
def test_the_axis_of_means_says_over_which_severities(severities, label):
    assert corruption_robustness({"ViT": table(severities=severities)}).get_xlabel() == label


@pytest.mark.parametrize(
    "other",
    [table(NAMES[:5]), table(severities=(1, 2)), replace(table(), profile="imagenet")],
    ids=["corruptions", "severities", "profile"],
)
def test_errors_under_other_corruptions_are_not_compared(other, request):
    what = request.node.callspec.id
    with pytest.raises(ValueError, match=f"`result` must share its {what}, got .* of 'b' and"):
        corruption_robustness({"a": table(), "b": other})


def test_all_corruptions_have_their_group():
    everything = [name for names in corruption.GROUPS.values() for name in names]
    assert sorted(everything) == sorted(CORRUPTIONS)
    rows, groups = corruption.grouped_rows(reversed(everything))
    assert list(dict.fromkeys(groups)) == ["noise", "blur", "weather", "digital"]
    assert [everything[::-1][row] for row in rows][:3] == list(corruption.GROUPS["noise"])[::-1]


# --- all of them ---

STATIC = {
    "frequency": (frequency_robustness, {"ResNet-50": curve(), "ViT-Ti": curve()}, 0.7),
    "attack": (adversarial_robustness, {"ResNet-50": attacked(), "ViT-Ti": attacked()}, 0.7),
    "reliability": (
        reliability_diagram,
        {"ResNet-50": evaluation(), "AlterNet-50": evaluation(samples=10_000)},
        0.85,
    ),
    "corruption": (
        corruption_robustness,
        table([n for names in corruption.GROUPS.values() for n in names]),
        1.1,
    ),
    "corruption of several": (
        corruption_robustness,
        {"ResNet-50": table(CORRUPTIONS), "ViT-Ti": table(CORRUPTIONS)},
        1.1,
    ),
}


@pytest.mark.parametrize("case", STATIC)
def test_texts_stay_on_the_page_and_apart_at_column_width(case):
    draw, data, aspect = STATIC[case]
    with mpl.rc_context(style.rc()):
        figure, ax = plt.subplots(
            figsize=(style.COLUMN_WIDTH, aspect * style.COLUMN_WIDTH), layout="constrained"
        )
        assert draw(data, ax=ax) is ax
        FigureCanvasAgg(figure).draw()
        drawn = boxes(figure)
    assert len(drawn) > 10
    for text, box in drawn:
        assert figure.bbox.padded(1).contains(box.x0, box.y0), text
        assert figure.bbox.padded(1).contains(box.x1, box.y1), text
    small = [(text, box.padded(-1)) for text, box in drawn]
    for (first, a), (second, b) in itertools.combinations(small, 2):
        assert not a.overlaps(b), (first, second)


@pytest.mark.parametrize("module", [robustness, interactive], ids=["static", "interactive"])
@pytest.mark.parametrize("cls", [Evaluation, RobustnessCurve, AdversarialRobustness])
def test_every_result_names_its_plot(cls, module):
    assert callable(getattr(module, cls._plot))
    with pytest.raises(ValueError, match="`result` must hold at least one result"):
        getattr(module, cls._plot)({})


# --- interactive ---


def test_interactive_curves_have_the_same_values_and_the_nll():
    results = {"ResNet": curve(clean=0.81), "ViT": curve()}
    figure = interactive.frequency_robustness(results)
    for (name, result), trace in zip(results.items(), figure.data, strict=True):
        np.testing.assert_array_equal(trace.x, result.frequencies)
        np.testing.assert_array_equal(trace.y, 100 * result.delta_accuracy)
        np.testing.assert_array_equal(trace.error_y.array, 200 * result.delta_accuracy_stderr)
        shown = np.array(trace.customdata).T
        np.testing.assert_array_equal(shown[0], 100 * result.delta_accuracy_stderr)
        np.testing.assert_array_equal(shown[1], 100 * result.accuracy)
        np.testing.assert_array_equal(shown[2:], [result.delta_nll, result.delta_nll_stderr])
        assert trace.line.color == style.family_color(name)
    assert figure.data[0].name == "ResNet: clean 81.0 %"
    assert figure.layout.title.text == "noise RMS 0.1 of full scale, rings 0.1π wide"
    assert figure.layout.xaxis.title.text == "Noise frequency (units of π)"


def test_interactive_attacks_have_the_same_values():
    figure = interactive.adversarial_robustness(attacked())
    (trace,) = figure.data
    np.testing.assert_allclose(trace.x, [0, 1, 2, 4, 8])
    np.testing.assert_allclose(trace.y, [80, 60, 40, 20, 10])
    np.testing.assert_allclose(trace.error_y.array, [0.4, 0.8, 1.6, 2.4, 3.2])
    np.testing.assert_allclose(np.array(trace.customdata)[:, 1], np.array([0, 1, 2, 4, 8]) / 255)
    assert figure.layout.title.text == "PGD, 10 steps"
    assert figure.layout.xaxis.title.text == "Radius of the L∞ ball (1/255 of full scale)"


def test_interactive_reliability_shows_bins_and_counts():
    result = evaluation()
    figure = interactive.reliability_diagram({"ViT": result})
    points, columns = figure.data
    np.testing.assert_array_equal(points.x, result.bin_confidence)
    np.testing.assert_array_equal(points.y, result.bin_accuracy)
    low, high = robustness.wilson_interval(result.bin_accuracy, result.bin_count)
    np.testing.assert_allclose(points.error_y.array, high - result.bin_accuracy)
    np.testing.assert_allclose(points.error_y.arrayminus, result.bin_accuracy - low)
    shown = np.array(points.customdata, dtype=float).T
    np.testing.assert_array_equal(shown[:2], [result.bin_edges[:-1], result.bin_edges[1:]])
    np.testing.assert_array_equal(shown[2], result.bin_count)
    np.testing.assert_array_equal(shown[3], result.bin_accuracy - result.bin_confidence)
    np.testing.assert_allclose(columns.y, [0, 0.1, 0.4, 0.5])
    np.testing.assert_allclose(columns.x, [0.125, 0.375, 0.625, 0.875])
    assert points.name == "ViT: ECE 8.7 ± 0.4 % (noise 1.2 %)"


def test_interactive_corruptions_are_side_by_side_on_one_scale():
    result = table()
    figure = interactive.corruption_robustness({"ResNet": result, "ViT": result})
    assert len(figure.data) == 2
    rows, groups = corruption.grouped_rows(result.corruptions)
    for trace in figure.data:
        np.testing.assert_allclose(np.array(trace.z), 100 * result.error[rows])
        shown = np.array(trace.customdata)
        np.testing.assert_allclose(shown[..., 0].astype(float), 100 * result.error_stderr[rows])
        np.testing.assert_allclose(shown[..., 1].astype(float), result.nll[rows])
        np.testing.assert_allclose(shown[..., 2].astype(float), result.nll_stderr[rows])
        assert list(shown[:, 0, 3]) == groups
        assert trace.y[0] == "gaussian noise"
        assert trace.coloraxis == "coloraxis"
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 100)
    titles = [each.text for each in figure.layout.annotations]
    assert titles[1] == "ViT: Mean corruption error 45.7 ± 0.5 %, clean 8.3 %"
    assert figure.layout.yaxis.autorange == "reversed"
    alone = interactive.corruption_robustness(result)
    assert alone.layout.annotations[0].text == "Mean corruption error 45.7 ± 0.5 %, clean 8.3 %"


@pytest.mark.parametrize(
    ("draw", "result"),
    [
        (frequency_robustness, curve()),
        (adversarial_robustness, attacked()),
        (reliability_diagram, evaluation()),
    ],
)
def test_a_legend_of_a_zoo_stands_beside_the_axes(draw, result):
    ax = draw({f"model {i}": result for i in range(20)})
    ax.figure.canvas.draw()
    legend = ax.get_legend().get_window_extent()
    assert ax.bbox.x1 < legend.x0
    assert legend.x1 <= ax.figure.bbox.x1
    few = draw({f"model {i}": result for i in range(4)})
    few.figure.canvas.draw()
    assert few.get_legend().get_window_extent().x1 <= few.bbox.x1
    heights = [np.ptp(each.get_ylim()) for each in (ax, few)]
    assert heights[0] <= heights[1]  # no room is left for what stands elsewhere


@pytest.mark.parametrize("count", [2, 4, 6])
@pytest.mark.parametrize(
    ("draw", "make"),
    [
        (frequency_robustness, lambda i: curve(norm=0.1 * (i + 1))),
        (frequency_robustness, lambda i: curve()),
        (adversarial_robustness, lambda i: attacked()),
        (reliability_diagram, lambda i: evaluation(samples=100 + i)),
    ],
    ids=["frequency of many noises", "frequency", "attack", "reliability"],
)
def test_legends_of_long_names_stay_on_the_page_and_off_the_curves(draw, make, count):
    names = [f"vit_base_patch16_clip_224.openai_ft_in12k_{i}" for i in range(count)]
    ax = draw({name: make(i) for i, name in enumerate(names)})
    ax.figure.canvas.draw()
    legend = ax.get_legend().get_window_extent()
    inside = ax.bbox.overlaps(legend)
    assert inside or count > 2
    assert not inside or count < 6
    room = ax.bbox if inside else ax.figure.bbox
    assert room.x0 <= legend.x0 < legend.x1 <= room.x1
    assert room.y0 <= legend.y0 < legend.y1 <= room.y1
    assert ax.bbox.width > 0.4 * ax.figure.bbox.width
    if inside and draw is not adversarial_robustness:  # has no room of its own
        tops = [
            ax.transData.transform(np.nan_to_num(c.lines[0].get_xydata())) for c in ax.containers
        ]
        assert max(top[:, 1].max() for top in tops) < legend.y0
    shown = "".join(text.get_text() for text in ax.get_legend().get_texts()).replace("\n", "")
    assert all(name in shown for name in names)


def test_long_names_of_interactive_figures_are_in_one_line():
    name = "vit_base_patch16_clip_224.openai_ft_in12k_in1k"
    figure = interactive.reliability_diagram({name: evaluation()})
    assert figure.data[0].name == f"{name}: ECE 8.7 ± 0.4 % (noise 1.2 %)"
