"""What all plots of a result have in common: the axes that they make, and what they refuse."""

import inspect
import itertools
from dataclasses import replace

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pytest

from landscape import plot
from landscape.plot import corruption
from tests.plot.cases import (
    density,
    full_spectrum,
    history,
    line,
    polar,
    random_spectrum,
    surface,
    trajectory,
)
from tests.plot.feature_cases import fourier, lesions, resnet, similarity, variance, vit
from tests.plot.page import boxes
from tests.plot.test_build_up import table as build_up
from tests.plot.test_robustness import attacked, curve, evaluation
from tests.plot.test_robustness import table as corruptions

EVERY_CORRUPTION = [name for names in corruption.GROUPS.values() for name in names]
DRAWN = {
    "adversarial_robustness": lambda: plot.adversarial_robustness(attacked()),
    "build_up": lambda: plot.build_up(build_up()),
    "cka": lambda: plot.cka(similarity(vit())),
    "corruption_robustness": lambda: plot.corruption_robustness(corruptions(EVERY_CORRUPTION)),
    "feature_variance": lambda: plot.feature_variance(variance(vit()), label="ViT"),
    "feature_variance log": lambda: plot.feature_variance(variance(vit(2), 1.2), log=True),
    "fourier_amplitude": lambda: plot.fourier_amplitude(fourier(vit())),
    "fourier_depth": lambda: plot.fourier_depth(fourier(resnet()), label="ResNet"),
    "frequency_robustness": lambda: plot.frequency_robustness(curve()),
    "hessian_max_spectrum": lambda: plot.hessian_max_spectrum(random_spectrum()),
    "hessian_spectrum": lambda: plot.hessian_spectrum(full_spectrum()),
    "lesion_study": lambda: plot.lesion_study(lesions(vit(), skipped="ab")),
    "loss_line": lambda: plot.loss_line(line([3, np.inf, 1, 2, 4]), label="ViT"),
    "loss_line log": lambda: plot.loss_line(line([0.3, 0.2, 0.1, 0.3], 0.02), log=True),
    "loss_surface": lambda: plot.loss_surface(surface()),
    "loss_surface contour": lambda: plot.loss_surface(surface(), kind="contour"),
    "polar_trajectory": lambda: plot.polar_trajectory(polar(), label="ViT"),
    "polar_trajectory wide": lambda: plot.polar_trajectory(polar(angle=(0, 1, 2.6, np.nan))),
    "reliability_diagram": lambda: plot.reliability_diagram(evaluation()),
    "run_columns": lambda: plot.run_columns({"ResNet": [1e-3, 2e-3], "ViT": [3e-3, 4e-3]}),
    "run_curves": lambda: plot.run_curves([1, 2], np.array([[1e5, 2e5]] * 2), label="ViT"),
    "spectral_density": lambda: plot.spectral_density(density()),
    "training_history": lambda: plot.training_history(history(), label="ViT"),
    "training_history log": lambda: plot.training_history({"a": history(), "b": history(2)}, log=1),
    "trajectory": lambda: plot.trajectory(trajectory([(1, 2), (0, 0)]), label="ViT"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_no_text_leaves_the_page(name):
    with mpl.rc_context(mpl.rcParamsDefault):
        figure = DRAWN[name]().figure
        drawn = boxes(figure)
    assert len(drawn) > 3
    for text, box in drawn:
        assert figure.bbox.padded(1).contains(box.x0, box.y0), text
        assert figure.bbox.padded(1).contains(box.x1, box.y1), text


@pytest.mark.parametrize(
    ("draw", "result"),
    [
        (plot.loss_line, line([3, 1, 2])),
        (plot.reliability_diagram, evaluation()),
        (plot.spectral_density, density()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_labels_may_be_numbers_such_as_widths(draw, result):
    entries = [draw({key(8): result, key(16): result}).get_legend() for key in (int, str)]
    numbers, texts = ([text.get_text() for text in legend.get_texts()] for legend in entries)
    assert numbers == texts


def test_titles_of_panels_may_be_numbers():
    figure = plot.panels({8: surface(), 0.5: density()})
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["8", "0.5"]


def test_titles_and_notes_of_different_results_side_by_side_stay_apart():
    results = {
        "Corruptions": corruptions(EVERY_CORRUPTION),
        "Calibration": evaluation(),
        "Lesions": lesions(vit(), skipped="ab"),
    }
    figure = plot.panels(results)
    assert [ax.get_title(loc="left") for ax in figure.axes] == list(results)
    notes = [t.get_text() for ax in figure.axes for t in ax.texts if t.get_gid() == "note"]
    assert [" ".join(note.split()) for note in notes] == [
        "Mean corruption error 45.7 ± 0.5 %, clean 8.3 %",
        "noise: the ECE of a calibrated model, n = 100",
        "2 not removable",
    ]
    drawn = boxes(figure)
    for (first, a), (second, b) in itertools.combinations(drawn, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), (first, second)
    for text, box in drawn:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1, text


@pytest.mark.parametrize(("count", "rows"), [(3, [3]), (4, [2, 2]), (5, [3, 2]), (7, [3, 3, 1])])
def test_many_results_side_by_side_stand_in_rows_of_three(count, rows):
    results = [fourier(vit()), evaluation(), lesions(vit()), random_spectrum(), line([3, 1, 2])]
    figure = plot.panels({str(i): results[i % 5] for i in range(count)})
    drawn = boxes(figure)
    for text, box in drawn:
        assert figure.bbox.padded(1).contains(box.x0, box.y0), text
        assert figure.bbox.padded(1).contains(box.x1, box.y1), text
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    tops = [round(ax.bbox.y1 / figure.dpi / 2) for ax in panels]
    assert [tops.count(top) for top in sorted(set(tops), reverse=True)] == rows
    assert min(ax.bbox.width for ax in panels) > 0.8 * figure.dpi
    assert min(ax.bbox.height for ax in panels) > 0.8 * figure.dpi


@pytest.mark.parametrize("kinds", ["s", "p", "w", "sl", "spw", "slpw"])
def test_surfaces_and_paths_stand_side_by_side_with_flat_drawings(kinds):
    known = {
        "s": ("loss_surface", surface(), "3d"),
        "l": ("loss_line", line([3, 1, 2]), "rectilinear"),
        "p": ("polar_trajectory", polar(), "polar"),
        "w": ("polar_trajectory", polar(angle=(0, 1, 2.6, np.nan)), "polar"),
    }
    figure = plot.panels({known[kind][0] + kind: known[kind][1] for kind in kinds})
    assert [ax.name for ax in figure.axes] == [known[kind][2] for kind in kinds]
    drawn = boxes(figure)
    for text, box in drawn:
        assert figure.bbox.padded(1).contains(box.x0, box.y0), text
        assert figure.bbox.padded(1).contains(box.x1, box.y1), text
    assert any("nats" in text for text, _ in drawn) == any(kind in "sl" for kind in kinds)


@pytest.mark.parametrize("heights", [(12.0, 17.0), (2.3041, 2.3043), (2.3041e7, 2.3043e7)], ids=str)
@pytest.mark.parametrize("size", [(3.25, 2.4), (6.4, 4.8)], ids=str)
def test_labels_of_a_surface_stay_on_the_page_and_off_its_ticks(size, heights):
    nll = np.linspace(*heights, 35).reshape(7, 5)
    with mpl.rc_context({**plot.style.rc(), "figure.figsize": size}):
        ax = plot.loss_surface(surface(nll), quantity="nll")
        drawn = boxes(ax.figure)
    assert ax.zaxis.get_offset_text().get_text() == ""
    for text, box in drawn:
        assert ax.figure.bbox.padded(1).contains(box.x0, box.y0), text
        assert ax.figure.bbox.padded(1).contains(box.x1, box.y1), text
    (label,) = [box for text, box in drawn if text == "NLL (nats)"]
    ticks = [box for text, box in drawn if text[0].isdigit() and float(text) > 2]
    assert len(ticks) >= 3
    assert not any(label.overlaps(tick) for tick in ticks)


ALONE = {
    "adversarial_robustness": lambda ax: plot.adversarial_robustness(attacked(), ax=ax),
    "feature_variance": lambda ax: plot.feature_variance(variance(vit()), ax=ax),
    "fourier_depth": lambda ax: plot.fourier_depth(fourier(vit()), ax=ax),
    "frequency_robustness": lambda ax: plot.frequency_robustness(curve(), ax=ax),
    "hessian_max_spectrum": lambda ax: plot.hessian_max_spectrum(random_spectrum(), ax=ax),
    "loss_line": lambda ax: plot.loss_line(line([3, 1, 2]), ax=ax),
    "reliability_diagram": lambda ax: plot.reliability_diagram(evaluation(), ax=ax),
    "spectral_density": lambda ax: plot.spectral_density(density(), ax=ax),
    "training_history": lambda ax: plot.training_history(history(), ax=ax),
    "trajectory": lambda ax: plot.trajectory(trajectory([(1, 2), (0, 0)]), ax=ax),
}


@pytest.mark.parametrize("name", ALONE)
def test_results_without_a_name_take_the_colours_of_the_style(name):
    cycle = ["#aa0001", "#00aa01"]
    with mpl.rc_context({"axes.prop_cycle": mpl.cycler(color=cycle)}):
        ax = plot.style.fresh_axes()
        for _ in range(2):
            ALONE[name](ax)
    colors = [each.get_color() for each in ax.lines if each.get_color() in cycle]
    assert list(dict.fromkeys(colors)) == cycle


def test_dark_styles_hide_no_line_no_mark_and_no_text():
    with mpl.style.context("dark_background"):
        several = plot.loss_line({"a": line([3, 1, 2]), "b": line([2, 1, 3])})
        ends = plot.polar_trajectory(polar())
        bars = plot.lesion_study(lesions(vit()))
        gaps = plot.corruption_robustness(replace(corruptions(), error=np.full((6, 5), np.nan)))
    assert {text.get_color() for text in gaps.texts if text.get_text() == "–"} == {"w"}
    assert min(mpl.colors.to_rgb(several.lines[0].get_color())) > 0.8
    assert several.get_legend().get_frame().get_facecolor()[:3] == (0, 0, 0)
    marks = [each for each in ends.lines if each.get_gid() in {"w_init", "w_opt"}]
    assert {mpl.colors.to_hex(mark.get_color()) for mark in marks} == {"#ffffff"}
    assert mpl.colors.to_hex(bars.collections[0].get_color()[0]) == "#ffffff"


LONG = [
    f"vit_base_patch16_clip_224.openai_ft_in12k_in1k, {i} epochs of mixup and cutmix on every image"
    for i in range(6)
]
TOLD_APART = {
    "figure2": lambda: plot.figure2({"ViT": fourier(vit(4))}, {name: curve() for name in LONG}),
    "figure2 of four": lambda: plot.figure2(
        {name: fourier(vit(4)) for name in LONG[:4]}, {name: curve() for name in LONG[:4]}
    ),
    "figure9": lambda: plot.figure9({name: variance(vit(4)) for name in LONG[:3]}),
    "loss_line": lambda: plot.loss_line({name: line([3, 2, 1]) for name in LONG}).figure,
    "run_columns": lambda: plot.run_columns({LONG[0]: [1.0], "b": [2.0, 3.0]}).figure,
    "run_columns of six": lambda: plot.run_columns({name: [1.0, 2.0] for name in LONG}).figure,
    "spectra_over_runs": lambda: plot.spectra_over_runs(
        {name: [random_spectrum(), random_spectrum(1)] for name in LONG[:3]}
    ),
}


@pytest.mark.parametrize("name", TOLD_APART)
def test_long_names_stay_on_the_page_and_leave_room_for_what_is_drawn(name):
    figure = TOLD_APART[name]()
    drawn = boxes(figure)
    for text, box in drawn:
        assert figure.bbox.padded(1).contains(box.x0, box.y0), text
        assert figure.bbox.padded(1).contains(box.x1, box.y1), text
    axes = [ax for ax in figure.axes if ax.lines]
    assert min(ax.bbox.height for ax in axes) > 0.7 * figure.dpi
    if "columns" not in name and "runs" not in name:  # boxes of what stands aslant overlap
        for (first, a), (second, b) in itertools.combinations(drawn, 2):
            assert not a.padded(-1).overlaps(b.padded(-1)), (first, second)
    for ax in axes:
        texts = ax.get_legend().get_texts() if ax.get_legend() else ax.get_xticklabels()
        entries = [text.get_text() for text in texts]
        assert len(set(entries)) == len(entries)


def unknown(result, *names):
    return replace(result, **{name: np.nan * getattr(result, name) for name in names})


NOT_FINITE = {
    "feature_variance": (unknown(variance(vit(2)), "variance", "stderr"), {"log": True}),
    "feature_variance of zeros": (
        replace(variance(vit(2)), variance=np.zeros(5), stderr=np.zeros(5)),
        {"log": True},
    ),
    "hessian_max_spectrum": (unknown(random_spectrum(), "eigenvalues"), {"log": True}),
    "hessian_spectrum": (
        replace(full_spectrum(), density=unknown(density(), "values", "values_stderr")),
        {},
    ),
    "loss_line": (unknown(line([3, 1, 2]), "nll", "loss"), {"log": True}),
    "spectral_density": (unknown(density(), "values", "values_stderr"), {}),
}


@pytest.mark.parametrize("module", [plot, plot.interactive], ids=["matplotlib", "plotly"])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_a_logarithmic_plot_of_nothing_to_draw_is_blank(name, module):
    result, look = NOT_FINITE[name]
    figure = getattr(module, name.split()[0])(result, **look)
    if module is plot:
        figure.figure.canvas.draw()


SEVERAL = {
    "adversarial_robustness": "AdversarialRobustness",
    "corruption_robustness": "CorruptionRobustness",
    "frequency_robustness": "RobustnessCurve",
    "hessian_max_spectrum": "HessianMaxSpectrum",
    "reliability_diagram": "Evaluation",
}
ONE = {
    "block_diagram": "Architecture",
    "build_up": "BuildUp",
    "cka": "CKA",
    "feature_variance": "FeatureVariance",
    "fourier_amplitude": "FourierAmplitude",
    "fourier_depth": "FourierAmplitude",
    "hessian_spectrum": "HessianSpectrum",
    "lesion_study": "LesionStudy",
    "loss_line": "LossLine",
    "loss_surface": "LossSurface",
    "polar_trajectory": "PolarTrajectory",
    "spectral_density": "SpectralDensity",
    "trajectory": "Trajectory",
}


@pytest.mark.parametrize("name", [*ONE, *SEVERAL])
def test_other_results_are_refused_by_the_name_of_what_is_drawn(name):
    kind = ONE.get(name) or SEVERAL[name]
    several = ".* mapping" if name in SEVERAL else ""
    other = surface() if name == "build_up" else build_up()
    for wrong in (other, [other], None):
        found = type(wrong).__name__
        with pytest.raises(TypeError, match=f"`result` must be a `{kind}`{several}.*, got {found}"):
            getattr(plot, name)(wrong)
    with pytest.raises(TypeError, match=f"must be a `{kind}`"):
        getattr(plot, name)({"a": other})


@pytest.mark.parametrize("name", plot.interactive.__all__)
def test_interactive_drawings_refuse_other_results_too(name):
    other = surface() if name == "build_up" else build_up()
    for wrong in (other, None):
        with pytest.raises(TypeError, match=f"`result` must be a .*, got {type(wrong).__name__}"):
            getattr(plot.interactive, name)(wrong)


def test_every_drawing_of_a_result_calls_it_so():
    drawings = [getattr(plot, name) for name in [*ONE, *SEVERAL]]
    drawings += [getattr(plot.interactive, name) for name in plot.interactive.__all__]
    firsts = {draw: next(iter(inspect.signature(draw).parameters)) for draw in drawings}
    assert set(firsts.values()) == {"result"}, firsts
