import dataclasses
import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from landscape.plot import feature_figures, features, interactive, style, texts
from tests.plot.feature_cases import fourier, lesions, resnet, similarity, variance, vit
from tests.plot.page import begins_at_zero, boxes
from tests.plot.test_robustness import curve

SIDES = [32, *[32] * 3, *[16] * 4, *[8] * 6, *[4] * 3]


def fouriers():
    return {"ResNet-50": fourier(resnet(), SIDES), "ViT-Ti": fourier(vit())}


def variances(growth=1.0):
    return {"ResNet-50": variance(resnet(), growth), "ViT-Ti": variance(vit())}


def ckas():
    return {"ResNet-50": similarity(resnet(head=True)), "ViT-Ti": similarity(vit(head=True))}


def studies():
    return {"ResNet-50": lesions(resnet(), skipped="abc"), "ViT-Ti": lesions(vit())}


def spans(ax):
    """Ends of the shaded steps by colour."""
    found = {}
    for patch in ax.patches:
        if isinstance(patch, Rectangle) and patch.get_height() == 1:
            ends = (patch.get_x(), patch.get_x() + patch.get_width())
            found.setdefault(to_hex(patch.get_facecolor()), []).append(ends)
    return found


def test_every_block_has_its_curve_its_band_and_the_colour_of_its_depth():
    result = fourier(resnet(), SIDES)
    ax = features.fourier_amplitude(result)
    colors = features.depth_map()
    assert len(ax.lines) == len(ax.collections) == 17
    for i, (line, band) in enumerate(zip(ax.lines, ax.collections, strict=True)):
        np.testing.assert_array_equal(line.get_xdata(), result.frequency[i])
        np.testing.assert_array_equal(line.get_ydata(), result.delta_log_amplitude[i])
        assert line.get_color() == colors(float(result.depth[i]))
        lowest = band.get_paths()[0].vertices[:, 1].min()
        expected = (result.delta_log_amplitude[i] - 2 * result.stderr[i]).min()
        assert lowest == pytest.approx(expected)
    bar = ax.figure.axes[1]
    assert bar.get_ylabel() == "Relative depth"
    assert bar.get_ylim() == (0, 1)


def test_colours_of_depth_get_lighter_and_stay_visible_on_white():
    luminance = features.depth_map()(np.linspace(0, 1, 50))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).all()
    assert luminance[-1] < 0.8


def test_frequencies_are_labelled_in_units_of_pi():
    ax = features.fourier_amplitude(fourier(vit()), colorbar=False)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", r"$\pi/2$", r"$\pi$"]
    assert ax.get_xticks().tolist() == [0, 0.5, 1]
    assert ax.get_xlim() == (0, 1)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Frequency", r"$\Delta$ log amplitude")
    assert len(ax.figure.axes) == 1
    radial = features.fourier_amplitude(fourier(vit(), radial=True))
    assert radial.get_xlabel() == "Radial frequency"


def test_a_map_of_one_column_has_no_curve():
    result = fourier(resnet((1, 1)), [4, 2, 1])
    assert len(features.fourier_amplitude(result).lines) == 2
    line = features.fourier_depth(result).lines[0]
    np.testing.assert_array_equal(line.get_ydata(), result.highest)
    assert np.isnan(result.highest).tolist() == [False, False, True]


@pytest.mark.parametrize("draw", [features.fourier_depth, features.feature_variance])
def test_values_stand_over_the_steps_of_attention_and_subsampling(draw):
    make = fourier if draw is features.fourier_depth else variance
    for blocks, name in ((vit(3), "ViT-Ti"), (resnet((2, 1, 2)), "ResNet-50")):
        result = make(blocks)
        expected = getattr(result, "highest", None)
        if expected is None:
            expected, stderr = result.variance, result.stderr
        else:
            stderr = result.highest_stderr
        ax = draw(result, label=name)
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), result.depth)
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), expected)
        assert ax.lines[0].get_color() == style.family_color(name)
        bars = np.array([each for each in ax.collections[0].get_segments()])
        np.testing.assert_allclose(bars[:, 1, 1] - bars[:, 0, 1], 4 * stderr)
        depth = result.depth
        msa, pool = (style.KIND_COLORS[kind].lower() for kind in ("msa", "pool"))
        steps = {msa: [i for i, kind in enumerate(result.kinds) if kind == "msa"]}
        steps[pool] = np.flatnonzero(result.subsamples).tolist()
        for color, at in steps.items():
            ends = [(depth[i - 1], depth[i]) for i in at]
            np.testing.assert_allclose(spans(ax).get(color, []), ends)
        word = "MSA" if name == "ViT-Ti" else "subsampling"
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert sorted(labels) == sorted([name, word])


@pytest.mark.parametrize("draw", [features.fourier_depth, features.feature_variance])
def test_blocks_of_several_models_are_marked_on_their_curves_and_not_shaded(draw):
    make = fourier if draw is features.fourier_depth else variance
    results = {"ViT-Ti": make(vit(3)), "ResNet-50": make(resnet((2, 1, 2)))}
    ax = draw(results)
    assert not spans(ax)
    marks = {
        line.get_gid(): (line.get_markeredgecolor(), line.get_xdata())
        for line in ax.lines
        if line.get_gid() and line.get_visible()
    }
    kinds = {"MSA": ("ViT-Ti", [1, 3, 5]), "subsampling": ("ResNet-50", [3, 4])}
    assert set(marks) == set(kinds)
    for what, (name, blocks) in kinds.items():
        assert marks[what][0] == style.family_color(name)
        np.testing.assert_array_equal(marks[what][1], results[name].depth[blocks])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(labels) == sorted([*results, *kinds])


def test_variance_starts_at_zero_or_is_logarithmic():
    linear = features.feature_variance(variance(vit()))
    assert begins_at_zero(linear)
    assert features.feature_variance(variance(vit()), log=True).get_yscale() == "log"
    assert linear.get_xlabel() == "Relative depth"


def test_two_variances_on_the_same_axes_both_fit():
    ax = features.feature_variance(variance(vit()), label="ViT-Ti")
    features.feature_variance(variance(resnet()), ax=ax, label="ResNet-50")
    assert begins_at_zero(ax)
    assert ax.get_ylim()[1] > variance(resnet()).variance.max() > variance(vit()).variance.max()


def without(result, name, *blocks, value=np.nan):
    values = getattr(result, name)
    if isinstance(values, tuple):
        values = tuple(value * v if i in blocks else v for i, v in enumerate(values))
    else:
        values = np.where(np.isin(np.arange(len(values)), blocks), value, values)
    return dataclasses.replace(result, **{name: values})


MISSING = {  # result, keywords, where crosses are, note
    "fourier_amplitude": (
        without(fourier(vit(1), [8, 8, 8]), "delta_log_amplitude", 1), {},
        np.arange(5) / 4, "5 of 15 not finite",
    ),
    "fourier_depth": (
        without(fourier(vit(1), [8, 8, 1]), "delta_log_amplitude", 1), {},
        [0.5], "1 of 3 not finite",
    ),
    "feature_variance": (
        without(variance(vit(1)), "variance", 0, 2, value=np.inf), {},
        [0, 1], "2 of 3 not finite",
    ),
    "feature_variance log": (
        without(variance(vit(1)), "variance", 1, value=0), {"log": True},
        [0.5], "1 of 3 not positive",
    ),
    "lesion_study": (
        without(lesions(vit(1)), "delta_accuracy", 1), {},
        [2], "1 of 2 not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_values_that_cannot_be_drawn_are_marked_and_counted(name):
    result, look, crosses, note = MISSING[name]
    ax = getattr(features, name.split()[0])(result, **look)
    (drawn,) = [line for line in ax.lines if line.get_gid() == "missing"]
    np.testing.assert_array_equal(drawn.get_xdata(), crosses)
    assert drawn.get_marker() == "x"
    assert texts.notes_of(ax) == [f"×: {note}"]
    figure = getattr(interactive, name.split()[0])({"ViT": result}, **look)
    assert [each.text for each in figure.layout.annotations] == [f"ViT ({note})"]


def test_only_values_at_pi_are_said_to_be():
    even, odd = fourier(vit(1)), fourier(vit(1), [16, 8, 7])
    label = "$\\Delta$ log amplitude\nat the highest frequency"
    assert features.fourier_depth(even).get_ylabel() == r"$\Delta$ log amplitude at $\pi$"
    for results in ({"a": even, "b": odd}, {"a": odd, "b": even}):
        assert features.fourier_depth(results).get_ylabel() == label
        assert feature_figures.figure8(results).axes[0].get_ylabel() == label
        title = interactive.fourier_depth(results).layout.yaxis.title.text
        assert title == "Δ log amplitude<br>at the highest frequency"
    assert interactive.fourier_depth(even).layout.yaxis.title.text == "Δ log amplitude at π"


def test_blocks_of_two_networks_are_told_apart():
    alone, two = similarity(vit(2)), similarity(vit(2), resnet((2, 3)))
    ax = features.cka(alone)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Block", "Block")
    ax = features.cka(two)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Block of model_b", "Block of model_a")
    of = dataclasses.replace(alone.provenance, model="ViT", settings={"model_b": "DeiT"})
    ax = features.cka(dataclasses.replace(alone, provenance=of))
    assert ax.get_xlabel() == "Block of model_b\n(DeiT)"
    assert ax.get_ylabel() == "Block of model_a\n(ViT)"
    layout = interactive.cka({"a": alone, "b": two}).layout
    assert (layout.xaxis.title.text, layout.yaxis.title.text) == ("Block", "Block")
    labels = layout.xaxis2.title.text, layout.yaxis2.title.text
    assert labels == ("Block of model_b", "Block of model_a")


def test_matrix_is_the_result_with_the_first_block_at_the_bottom_and_lines_between_stages():
    result = similarity(resnet((2, 3, 1), head=True), vit(2))
    result.values[0, 1] = np.nan
    ax = features.cka(result)
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array().filled(np.nan), result.values)
    assert image.origin == "lower"
    assert image.get_extent() == [0.5, 5.5, 0.5, 8.5]
    assert image.get_clim() == (0, 1)
    across = [line.get_ydata()[0] for line in ax.lines if line.get_gid() == "stage"]
    assert across == [3.5, 6.5]  # the ViT has one stage, the head that of the last block
    assert ax.figure.axes[1].get_ylabel() == "CKA"
    assert len(features.cka(result, colorbar=False).figure.axes) == 1


@pytest.mark.parametrize(("stages", "square"), [((2, 2, 2), True), ((9, 9, 9), False)], ids=str)
def test_a_deep_network_beside_a_shallow_one_is_no_sliver(stages, square):
    ax = features.cka(similarity(resnet(stages), vit(2)))
    assert (ax.get_aspect() == 1) is square
    ax.figure.canvas.draw()
    assert ax.bbox.width > 0.3 * ax.bbox.height


def test_bars_are_accuracy_losses_in_points_by_kind_in_network_order():
    kinds = ("conv", "msa", "conv", "stem", "mlp", "conv")
    result = lesions(resnet((2, 3, 1)), ("x", "y"), kinds)
    ax = features.lesion_study(result)
    bars = {
        round(bar.get_x() + bar.get_width() / 2): bar
        for container in ax.containers
        if hasattr(container, "patches")
        for bar in container.patches
    }
    for i, kind in enumerate(kinds):
        assert bars[i + 1].get_height() == pytest.approx(-100 * result.delta_accuracy[i])
        color = style.KIND_COLORS["other" if kind == "stem" else kind]
        assert to_hex(bars[i + 1].get_facecolor()) == color.lower()
    segments = [s for c in ax.collections for s in c.get_segments()]
    np.testing.assert_allclose([s[1, 1] - s[0, 1] for s in segments], 400 * 0.004)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["Conv", "MSA", "other", "MLP"]
    stages = [line.get_xdata()[0] for line in ax.lines if line.get_gid() == "stage"]
    assert stages == [2.5, 5.5]
    notes = [text.get_text() for text in ax.texts if text.get_gid() == "note"]
    assert notes == ["2 not removable"]
    assert not features.lesion_study(lesions(vit())).texts


def test_given_axes_are_used_and_no_figure_is_opened():
    axes = mpl.figure.Figure().subplots(1, 5)
    drawn = [
        features.fourier_amplitude(fourier(vit()), ax=axes[0]),
        features.fourier_depth(fourier(vit()), ax=axes[1]),
        features.feature_variance(variance(vit()), ax=axes[2]),
        features.cka(similarity(vit()), ax=axes[3]),
        features.lesion_study(lesions(vit()), ax=axes[4]),
    ]
    assert drawn == list(axes)
    assert plt.get_fignums() == []


def test_results_name_the_function_that_draws_them():
    for result in (fourier(vit()), variance(vit()), similarity(vit()), lesions(vit())):
        assert callable(getattr(features, result._plot))


@pytest.mark.parametrize("models", [1, 2])
def test_figures_have_a_panel_a_model_on_one_scale(models):
    some = dict(itertools.islice(fouriers().items(), models))
    for figure in (feature_figures.figure2a(some), feature_figures.figure8(some)):
        panels = figure.axes[:models]
        assert [ax.get_title() for ax in panels] == list(some)
        assert len({ax.get_ylim() for ax in panels}) == 1
        assert [bool(ax.get_ylabel()) for ax in panels] == [True, False][:models]
        ticks = [ax.yaxis.get_tick_params()["labelleft"] for ax in panels]
        assert ticks == [True, False][:models]
        for ax, result in zip(panels, some.values(), strict=True):
            values = np.concatenate([*result.delta_log_amplitude])
            lowest = result.highest.min() if ax.get_ylabel().endswith(r"$\pi$") else values.min()
            assert ax.get_ylim()[0] < lowest
        assert figure.get_figwidth() == (style.COLUMN_WIDTH, style.TEXT_WIDTH)[models - 1]
    assert len(feature_figures.figure2a(some).axes) == models + 1  # one colour bar


@pytest.mark.parametrize(("growth", "scale"), [(1.0, "linear"), (1.5, "log")])
def test_figure9_is_logarithmic_where_one_network_would_hide_another(growth, scale):
    results = variances(growth)
    figure = feature_figures.figure9(results)
    assert {ax.get_yscale() for ax in figure.axes} == {scale}
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    for which in ("major", "minor"):  # the scale stands at the first panel alone
        ticks = [ax.yaxis.get_tick_params(which)["labelleft"] for ax in figure.axes]
        assert ticks == [True, *[False] * (len(results) - 1)]
    low, high = figure.axes[0].get_ylim()
    for result in results.values():
        assert low < result.variance.min() < result.variance.max() < high


def test_long_titles_take_several_lines():
    name = "timm/vit_base_patch16_clip_224.openai_ft_in12k_in1k"
    first, *others = fouriers().values()
    figure = feature_figures.figure2a({name: first, "short": others[0], "third": others[0]})
    figure.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in figure.axes[:3]]
    assert "".join(figure.axes[0].get_title().split("\n")) == name
    assert boxes[0].x1 < boxes[1].x0 < boxes[1].x1 < boxes[2].x0


def test_figure10_has_matrices_over_bars_with_one_scale_each():
    figure = feature_figures.figure10(ckas(), studies())
    top, bottom = figure.axes[:2], figure.axes[2:4]
    assert [ax.get_title() for ax in top] == ["ResNet-50", "ViT-Ti"]
    assert {ax.images[0].get_clim() for ax in top} == {(0, 1)}
    assert len({ax.get_ylim() for ax in bottom}) == 1
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["Conv", "MSA", "MLP"]
    assert all(ax.get_legend() is None for ax in bottom)
    only = feature_figures.figure10({"ViT-Ti": ckas()["ViT-Ti"]}, {"ResNet-50": lesions(resnet())})
    assert [ax.axison for ax in only.axes[:4]] == [True, False, False, True]
    for figure, panels in (
        (feature_figures.figure10(ckas(), {}), 3),
        (feature_figures.figure10({}, studies()), 2),
    ):
        assert len(figure.axes) == panels
        assert [ax.get_title() for ax in figure.axes[:2]] == ["ResNet-50", "ViT-Ti"]


def test_colour_bar_says_that_there_are_similarities_below_zero():
    results = ckas()
    extents = []
    for lowest in (0.0, -0.01):
        results["ViT-Ti"].values[0, 5] = lowest
        bar = feature_figures.figure10(results, {}).axes[2]
        extents.append(bar._colorbar.extend)
    assert extents == ["neither", "min"]


FIGURES = {
    "2a": lambda: feature_figures.figure2a(fouriers()),
    "8": lambda: feature_figures.figure8(fouriers()),
    "9": lambda: feature_figures.figure9(variances()),
    "9 log": lambda: feature_figures.figure9(variances(1.5)),
    "10": lambda: feature_figures.figure10(ckas(), studies()),
}


@pytest.mark.parametrize("name", FIGURES)
def test_texts_stay_on_the_page_and_apart_in_the_style(name):
    figure = FIGURES[name]()
    assert figure.get_figwidth() == style.TEXT_WIDTH
    drawn = boxes(figure)
    assert len(drawn) > 10
    for text, box in drawn:
        assert figure.bbox.padded(1).contains(box.x0, box.y0), text
        assert figure.bbox.padded(1).contains(box.x1, box.y1), text
    small = [(text, box.padded(-1)) for text, box in drawn]  # boxes are looser than ink
    for (first, a), (second, b) in itertools.combinations(small, 2):
        assert not a.overlaps(b), (first, second)
    assert {tuple(text.get_fontfamily()) for text in figure.findobj(Text)} == {("STIXGeneral",)}
    assert plt.get_fignums() == []


@pytest.mark.parametrize(("panels", "models"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (2, 5)])
def test_figure2_is_readable_with_one_to_five_models(panels, models):
    names = ["ResNet-50", "ViT-Ti", "Swin-T", "ConvNeXt-T", "AlterNet-50"]
    amplitudes = {name: fourier(vit(4)) for name in names[:panels]}
    falling = [0.7 - 0.05 * i * np.arange(1, 10) / 10 for i in range(models)]
    curves = {name: curve(values) for name, values in zip(names, falling, strict=False)}
    figure = feature_figures.figure2(amplitudes, curves)
    drawn = boxes(figure)  # a layout that does not fit warns
    for text, box in drawn:
        assert figure.bbox.padded(1).contains(box.x0, box.y0), text
        assert figure.bbox.padded(1).contains(box.x1, box.y1), text
    small = [(text, box.padded(-1)) for text, box in drawn]
    for (first, a), (second, b) in itertools.combinations(small, 2):
        assert not a.overlaps(b), (first, second)
    letters = [text for text in figure.findobj(Text) if text.get_text() in {"a", "b", "(a)"}]
    assert [(text.get_text(), text.get_weight()) for text in letters] == [
        ("a", "bold"),
        ("b", "bold"),
    ]
    shown, ax = figure.axes[:panels], figure.axes[-1]
    assert [panel.get_title() for panel in shown] == names[:panels]
    assert all(panel.bbox.width > 0.1 * figure.bbox.width for panel in shown)
    assert ax.get_ylabel() == "Δ accuracy (percentage points)"
    assert ax.bbox.width > (0.25 if models < 3 else 0.6) * figure.bbox.width
    legend = ax.get_legend().get_window_extent()
    tops = [ax.transData.transform(c.lines[0].get_xydata())[:, 1].max() for c in ax.containers]
    assert legend.y0 > max(tops)


@pytest.mark.parametrize(
    "draw",
    [
        feature_figures.figure2a,
        feature_figures.figure8,
        feature_figures.figure9,
        lambda results: feature_figures.figure10(results, results),
        interactive.fourier_amplitude,
        interactive.fourier_depth,
        interactive.feature_variance,
        interactive.cka,
        interactive.lesion_study,
    ],
)
def test_empty_mappings_are_refused(draw):
    with pytest.raises(ValueError, match="`results?` must hold at least one result"):
        draw({})


def test_hovering_over_a_curve_names_block_frequency_and_error():
    results = fouriers()
    figure = interactive.fourier_amplitude(results)
    traces = iter(figure.data)
    for column, result in enumerate(results.values()):
        for i, name in enumerate(result.names):
            trace = next(traces)
            np.testing.assert_array_equal(trace.x, result.frequency[i])
            np.testing.assert_array_equal(trace.y, result.delta_log_amplitude[i])
            assert trace.xaxis == ("x" if column == 0 else "x2")
            assert [row[0] for row in trace.customdata] == [name] * len(trace.x)
            np.testing.assert_array_equal([row[2] for row in trace.customdata], result.stderr[i])
            assert trace.line.color == to_hex(features.depth_map()(float(result.depth[i])))
    assert next(traces).marker.colorbar.title.text == "Relative depth"
    assert [note.text for note in figure.layout.annotations] == ["ResNet-50", "ViT-Ti"]
    assert figure.layout.yaxis2.matches == "y"
    assert figure.layout.xaxis2.title.text == "Frequency"
    radial = interactive.fourier_amplitude(fourier(vit(), radial=True))
    assert radial.layout.xaxis.title.text == "Radial frequency"


@pytest.mark.parametrize("draw", [interactive.fourier_depth, interactive.feature_variance])
def test_hovering_over_depth_names_the_block(draw):
    results = fouriers() if draw is interactive.fourier_depth else variances()
    figure = draw(results)
    for trace, (name, result) in zip(figure.data, results.items(), strict=True):
        np.testing.assert_array_equal(trace.x, result.depth)
        values = result.highest if draw is interactive.fourier_depth else result.variance
        np.testing.assert_array_equal(trace.y, values)
        assert tuple(row[0] for row in trace.customdata) == result.names
        assert trace.line.color == style.family_color(name)
    shades = [shape.fillcolor for shape in figure.layout.shapes]
    counts = [shades.count(style.KIND_COLORS[kind]) for kind in ("pool", "msa")]
    assert counts == [3, 12]


def test_logarithmic_variance():
    assert interactive.feature_variance(variance(vit()), log=True).layout.yaxis.type == "log"
    assert interactive.feature_variance(variance(vit())).layout.yaxis.rangemode == "tozero"


def test_hovering_over_a_pair_names_both_blocks():
    result = similarity(resnet((2, 3, 1), head=True), vit(2))
    result.values[0, 1] = np.nan
    figure = interactive.cka({"ResNet": result})
    (trace,) = figure.data
    np.testing.assert_array_equal(np.array(trace.z), result.values)
    pair = trace.customdata[2][1]
    assert tuple(pair[:2]) == (result.blocks_a.names[2], result.blocks_b.names[1])
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    assert [shape.y0 for shape in figure.layout.shapes] == [3.5, 6.5]


def test_hovering_over_a_bar_names_the_unit():
    results = studies()
    figure = interactive.lesion_study(results)
    found = {}
    for trace in figure.data:
        for x, y, row in zip(trace.x, trace.y, trace.customdata, strict=True):
            found[trace.xaxis, x] = (*row[:2], y)
    for axis, result in zip(("x", "x2"), results.values(), strict=True):
        for i, name in enumerate(result.names):
            assert found[axis, i + 1] == (
                name,
                result.parts[i],
                pytest.approx(-100 * result.delta_accuracy[i]),
            )
    assert [trace.name for trace in figure.data if trace.showlegend] == ["Conv", "MSA", "MLP"]


def test_pages_are_small(tmp_path):
    path = tmp_path / "fig2a.html"
    interactive.fourier_amplitude(fouriers()).write_html(path, include_plotlyjs="cdn")
    assert path.stat().st_size < 100_000


def test_saved_results_draw_the_same(tmp_path):
    result = similarity(resnet())
    again = type(result).load(result.save(tmp_path / "cka"))
    np.testing.assert_array_equal(
        features.cka(again).images[0].get_array(), features.cka(result).images[0].get_array()
    )
    assert dataclasses.asdict(again.blocks_a)["names"] == result.blocks_a.names


def test_figure10_has_a_letter_for_each_part_that_the_claims_name():
    both = feature_figures.figure10({"ViT": similarity(vit())}, {"ViT": lesions(vit())})
    assert [t.get_text() for ax in both.axes for t in ax.texts if t.get_text()] == ["a", "b"]
    alone = feature_figures.figure10({}, {"ViT": lesions(vit())})
    assert not [t for ax in alone.axes for t in ax.texts]


@pytest.mark.parametrize("count", [4, 5, 7, 9])
def test_titles_of_many_panels_stay_apart(count):
    names = [f"vit_tiny_patch16_224.augreg_in21k_ft_in1k_{i}" for i in range(count)]
    figure = feature_figures.figure10(
        {name: similarity(vit()) for name in names}, {name: lesions(vit()) for name in names}
    )
    titles = [ax.title for ax in figure.axes if ax.get_title()]
    assert len({title.get_text() for title in titles}) == count
    drawn = [(title.get_text(), title.get_window_extent()) for title in titles]
    for (_, one), (_, other) in itertools.combinations(drawn, 2):
        assert not one.overlaps(other)
    assert len(figure.axes) == 2 * count + 1
