"""Several models on the same axes: one call a model, or one call with a mapping."""

from functools import partial

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from landscape import plot
from tests.plot.cases import (
    density,
    full_spectrum,
    line,
    polar,
    random_spectrum,
    trajectory,
)
from tests.plot.feature_cases import fourier, variance, vit
from tests.plot.test_robustness import attacked, curve, evaluation

CASES = {
    "loss_line": (plot.loss_line, [line([3 + k, 1 + k, 2 + k]) for k in range(4)]),
    "feature_variance": (plot.feature_variance, [variance(vit(3), 1 + 0.1 * k) for k in range(4)]),
    "fourier_depth": (plot.fourier_depth, [fourier(vit(3 + k)) for k in range(4)]),
    "trajectory": (plot.trajectory, [trajectory([(1, k), (0, 0)]) for k in range(4)]),
    "polar_trajectory": (
        plot.polar_trajectory,
        [polar(angle=(0, 0.1 * k, 0.2 * k, np.nan)) for k in range(4)],
    ),
    "run_curves": (
        lambda values, **keywords: plot.run_curves([0, 1], values, **keywords),
        [np.array([[k, k + 1.0], [k, k + 2.0]]) for k in range(4)],
    ),
}
MAPPED = [name for name in CASES if name != "run_curves"]
FAMILIES = ("ViT", "ResNet", "Swin")


SAID = {  # results whose entries in the legend say more than the name
    "hessian_max_spectrum": (
        plot.hessian_max_spectrum,
        [random_spectrum(k, scale=10.0**k) for k in range(3)],
        "n = 150\nNEP",
    ),
    "hessian_max_spectrum log": (
        partial(plot.hessian_max_spectrum, log=True),
        [random_spectrum(k, scale=0.01**k) for k in range(3)],
        "n = 150\nNEP",
    ),
    "frequency_robustness": (
        plot.frequency_robustness,
        [curve(0.7 - 0.2 * k * np.arange(9) / 9) for k in range(3)],
        "clean 78.0 %",
    ),
    "adversarial_robustness": (
        plot.adversarial_robustness,
        [attacked(radii=np.arange(1, 5) * 2**k / 255, clean=0.3 + 0.2 * k) for k in range(3)],
        "clean",
    ),
    "reliability_diagram": (plot.reliability_diagram, [evaluation() for _ in range(3)], "ECE"),
}


@pytest.mark.parametrize("name", SAID)
def test_calls_with_a_label_draw_what_one_with_a_mapping_does(name):
    draw, results, said = SAID[name]
    labels = ("ViT-S", "ResNet-50", "other")
    one = draw(dict(zip(labels, results, strict=True)))
    ax = None
    for result, label in zip(results, labels, strict=True):
        ax = draw(result, ax=ax, label=label)
    assert looks(ax) == looks(one)
    entries = ax.get_legend_handles_labels()[1]
    assert entries == one.get_legend_handles_labels()[1]
    for entry, label in zip(entries, labels, strict=True):
        assert entry.startswith(f"{label}: {said}")
        assert looks(ax)[entry][0] == plot.style.family_color(label) or label == "other"
    np.testing.assert_allclose([ax.get_xlim(), ax.get_ylim()], [one.get_xlim(), one.get_ylim()])
    assert plot.texts.notes_of(ax) == plot.texts.notes_of(one)
    with pytest.raises(ValueError, match="`label` must be None where results come with"):
        draw({"a": results[0]}, label="x")


def test_notes_of_models_drawn_one_after_the_other_stand_one_above_the_other():
    ax = plot.frequency_robustness(curve(norm=0.1), label="ViT")
    plot.frequency_robustness(curve(norm=0.2), label="ResNet", ax=ax)
    plot.frequency_robustness(curve(norm=0.1), label="Swin", ax=ax)
    first, second = plot.texts.notes_of(ax)
    assert first.startswith("noise RMS 0.1")
    assert second.startswith("ResNet: noise RMS 0.2")
    results = {"ViT": line([3, np.inf, 1]), "ResNet": line([3, np.nan, np.inf])}
    ax = plot.loss_line(results)
    expected = ["ViT, ×: 1 of 3 not finite", "ResNet, ×: 2 of 3 not finite"]
    assert plot.texts.notes_of(ax) == expected
    (note,) = [text for text in ax.texts if text.get_gid() == "note"]
    assert note.get_text() == "\n".join(expected)


SPECTRA = {
    "spectral_density": (plot.spectral_density, [density(dim=50 + k) for k in range(3)]),
    "hessian_spectrum": (plot.hessian_spectrum, [full_spectrum() for _ in range(3)]),
    "hessian_spectrum edges alone": (
        plot.hessian_spectrum,
        [full_spectrum(with_density=False) for _ in range(3)],
    ),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_spectra_of_several_models_are_told_apart_and_lie_on_one_scale(name):
    draw, results = SPECTRA[name]
    labels = ("ResNet-50", "ViT-S", "other")
    ax = draw(dict(zip(labels, results, strict=True)))
    one_by_one = None
    for result, label in zip(results, labels, strict=True):
        one_by_one = draw(result, ax=one_by_one, label=label)
    assert ax.get_ylim() == one_by_one.get_ylim()
    for each in (ax, one_by_one):
        found = {text.split(":")[0]: color for text, (color, _) in looks(each).items()}
        colors = [plot.style.family_color(label) or "#333333" for label in labels]
        assert found == dict(zip(labels, colors, strict=True))
        shown = [text.get_text() for text in each.get_legend().get_texts()]
        assert [text.split(":")[0] for text in shown[:3]] == list(labels)
        assert len(set(shown)) == len(shown)
    if "alone" not in name:
        heights = np.concatenate([path.vertices for c in ax.collections for path in c.get_paths()])
        assert ax.get_ylim()[1] > heights[:, 1].max()
    with pytest.raises(ValueError, match="`label` must be None where results come with"):
        draw({"a": results[0]}, label="x")


def test_edges_of_several_spectra_have_rows_and_colours_of_their_own():
    ax = plot.hessian_spectrum({"ResNet": full_spectrum(), "ViT": full_spectrum()})
    rows = {}
    for bars in ax.containers:
        rows.setdefault(bars.lines[0].get_color(), set()).update(bars.lines[0].get_ydata())
    assert set(rows) == {plot.style.family_color(name) for name in ("ResNet", "ViT")}
    heights = [height for row in rows.values() for height in row]
    assert len(heights) == len(set(heights)) == 2


def looks(ax):
    """Colour and dashes of every curve in a legend, by label."""
    found = {}
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
        handle = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
        if hasattr(handle, "get_linestyle") and handle.get_linestyle() in ("-", "--", ":", "-."):
            dashes = tuple(map(str, handle._unscaled_dash_pattern))
            found[label] = (handle.get_color(), dashes)
    return found


def in_turn(name, labels):
    draw, results = CASES[name]
    ax = None
    for result, label in zip(results, labels, strict=False):
        ax = draw(result, ax=ax, label=label)
    return ax


@pytest.mark.parametrize(
    "labels",
    [("a", "b", "c"), ("ViT-Ti", "ViT-S", "ViT-B"), ("a", "ResNet", "b", "resnet50")],
    ids=["unknown", "family", "mixed"],
)
@pytest.mark.parametrize("name", CASES)
def test_models_drawn_one_after_the_other_are_told_apart(name, labels):
    drawn = looks(in_turn(name, labels))
    assert [label for label in drawn if label in labels] == list(labels)
    assert len({drawn[label] for label in labels}) == len(labels)
    for label in labels:
        assert drawn[label][0] == (plot.style.family_color(label) or drawn[label][0])
    known = {plot.style.family_color(family) for family in FAMILIES}
    assert not known & {drawn[label][0] for label in labels if len(label) == 1}


def test_marks_and_shades_of_a_legend_take_no_colour_of_a_model():
    alone = plot.style.line_styles(["a", "b", "c"])
    for name in ("fourier_depth", "polar_trajectory"):
        drawn = looks(in_turn(name, alone))
        assert [drawn[label][0] for label in alone] == [look["color"] for look in alone.values()]


@pytest.mark.parametrize("name", MAPPED)
def test_labelled_curves_have_a_legend(name):
    ax = in_turn(name, ("a", "b"))
    assert {"a", "b"} <= {text.get_text() for text in ax.get_legend().get_texts()}


def test_a_line_without_a_label_has_no_legend():
    assert plot.loss_line(line([3, 2, 1])).get_legend() is None
    assert plot.trajectory(trajectory([(1, 2), (0, 0)])).get_legend() is None


@pytest.mark.parametrize("name", MAPPED)
def test_a_mapping_draws_what_one_call_a_model_does(name):
    draw, results = CASES[name]
    labels = ("a", "ViT", "b")
    one = draw(dict(zip(labels, results, strict=False)), alpha=0.5)
    several = in_turn(name, labels)
    assert looks(one) == looks(several)
    for drawn, expected in zip(one.lines, several.lines, strict=True):
        np.testing.assert_array_equal(drawn.get_xydata(), expected.get_xydata())
    assert [curve.get_alpha() for curve in one.lines if curve.get_alpha()] != []
    assert draw(dict(zip(labels, results, strict=False)), ax=one) is one


@pytest.mark.parametrize("name", MAPPED)
def test_an_empty_mapping_and_one_with_a_label_are_refused(name):
    draw, results = CASES[name]
    with pytest.raises(ValueError, match="`result` must hold at least one result"):
        draw({})
    with pytest.raises(ValueError, match="`label` must be None where results come with .*'x'"):
        draw({"a": results[0]}, label="x")


def test_the_scale_of_a_mapping_is_that_which_was_asked_for():
    results = dict(enumerate_labels(CASES["feature_variance"][1]))
    assert plot.feature_variance(results, log=True).get_yscale() == "log"
    lines = dict(enumerate_labels(CASES["loss_line"][1]))
    ax = plot.loss_line(lines, quantity="l2", log=True)
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "L2 term (nats)"


def enumerate_labels(results):
    return [(f"model {i}", result) for i, result in enumerate(results)]


@pytest.mark.parametrize("name", [*MAPPED, *SPECTRA])
def test_a_legend_of_many_models_covers_nothing_in_a_column(name):
    draw, results = {**CASES, **SPECTRA}[name]
    polar_axes = {"projection": "polar"} if "polar" in name else None
    with mpl.rc_context(plot.style.rc()):
        figure, ax = plt.subplots(figsize=(3.25, 2.4), layout="constrained", subplot_kw=polar_axes)
        draw({f"model {i}": results[i % len(results)] for i in range(12)}, ax=ax)
        figure.canvas.draw()
    legend = ax.get_legend().get_window_extent()
    assert not ax.bbox.overlaps(legend)
    assert figure.bbox.contains(legend.x0, legend.y0)
    assert figure.bbox.contains(legend.x1, legend.y1)
    assert ax.bbox.height * ax.bbox.width > 0.09 * figure.bbox.height * figure.bbox.width


@pytest.mark.parametrize("name", ["hessian_max_spectrum", "polar_trajectory", "spectral_density"])
@pytest.mark.parametrize("count", [12, 30])
def test_a_legend_of_a_zoo_stays_on_the_page_and_counts_what_it_leaves_out(name, count):
    draw, results = {**CASES, **SPECTRA, **SAID}[name][:2]
    names = [f"vit_tiny_patch16_224.augreg_in21k_ft_in1k_{i:02d}" for i in range(count)]
    ax = draw({each: results[i % len(results)] for i, each in enumerate(names)})
    ax.figure.canvas.draw()  # a layout that collapses warns
    legend = ax.get_legend()
    box = legend.get_window_extent()
    assert ax.figure.bbox.padded(1).contains(box.x0, box.y0)
    assert ax.figure.bbox.padded(1).contains(box.x1, box.y1)
    entries = [text.get_text() for text in legend.get_texts()]
    shown = sum("augreg" in entry for entry in entries)
    assert shown == count or entries[-1] == f"… and {count - shown} more"
    rugs = [line for line in ax.lines if line.get_gid() == "rug"]
    assert max([line.get_ydata().max(initial=0) for line in rugs], default=0) < 1
