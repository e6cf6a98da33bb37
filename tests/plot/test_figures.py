import ast
import itertools
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.contour import QuadContourSet
from matplotlib.text import Text

import landscape.plot as plot
from tests.plot.cases import max_spectrum, polar, random_spectrum, surface
from tests.plot.page import boxes

EPOCHS = ("warm-up", "epoch 10", "epoch 20", "epoch 30")


def surfaces(count=2):
    names = ("ResNet", "ViT", "AlterNet")[:count]
    return {name: surface(surface().nll * 3**i) for i, name in enumerate(names)}


def spectra(epochs=EPOCHS, scale=1.0):
    return {
        "ResNet": {
            e: random_spectrum(i, negative=0, scale=60 - 10 * i) for i, e in enumerate(epochs)
        },
        "ViT": {
            e: random_spectrum(9 + i, scale=(60 - 10 * i) * scale) for i, e in enumerate(epochs)
        },
    }


def texts_of(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_figure1a_has_a_common_scale_for_each_quantity(count):
    results = surfaces(count)
    figure = plot.figure1a(results)
    low, high = plot.shared_limits(results.values())
    deep = [ax for ax in figure.axes if ax.name == "3d"]
    assert len(deep) == count
    assert len({ax.get_zlim() for ax in deep}) == 1
    ends = {"loss": (low, high)} | {
        q: plot.shared_limits(results.values(), q) for q in ("nll", "l2")
    }
    contours = [a for ax in figure.axes for a in ax.collections if isinstance(a, QuadContourSet)]
    filled = [each for each in contours if each.filled]
    assert len(filled) == 3 * count
    for i, quantity in enumerate(ends):
        for each in filled[i * count : (i + 1) * count]:
            assert (each.norm.vmin, each.norm.vmax) == pytest.approx(ends[quantity])


def test_figure1a_names_models_and_quantities_with_units():
    figure = plot.figure1a(surfaces())
    texts = texts_of(figure)
    assert texts.count("ResNet") == 1 + 3
    assert texts.count("ViT") == 1 + 3
    for label in ("Loss: NLL + L2 (nats", "NLL (nats", "L2 term (nats"):
        assert any(text.startswith(label) for text in texts)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_long_names_of_figure1a_stand_apart_on_the_page(count):
    names = [f"vit_base_patch16_clip_224.openai_ft_in12k_in1k, {i} epochs" for i in range(count)]
    figure = plot.figure1a({name: surface() for name in names})
    drawn = [(text, box) for text, box in boxes(figure) if text.startswith("vi")]
    assert len(drawn) == 4 * count
    assert len({text for text, _ in drawn}) == 2 * count
    for text, box in drawn:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
    for (first, a), (second, b) in itertools.combinations(drawn, 2):
        assert not a.overlaps(b), (first, second)


@pytest.mark.parametrize(("factor", "label"), [(1.5, "Loss (nats)"), (9, "Loss (nats, log scale)")])
def test_heights_of_figure1a_say_that_they_are_logarithmic(factor, label):
    results = {"ResNet": surface(), "ViT": surface(surface().nll * factor)}
    deep = [ax for ax in plot.figure1a(results).axes if ax.name == "3d"]
    assert {ax.get_zlabel() for ax in deep} == {label}


def test_figure1a_counts_missing_points_once_a_surface():
    results = surfaces()
    results["ResNet"] = surface(missing=[(6, 4), (0, 0)])
    texts = texts_of(plot.figure1a(results))
    assert [text for text in texts if "finite" in text] == ["×: 2 of 35 not finite"]


def test_figure1b_draws_every_path_in_the_colour_of_its_family():
    figure = plot.figure1b({"ResNet": polar(), "ViT": polar((1, 0.7, 0.3, 0))})
    (ax,) = figure.axes
    colors = {line.get_label(): line.get_color() for line in ax.lines}
    assert colors["ResNet"] == plot.style.family_color("ResNet")
    assert colors["ViT"] == plot.style.family_color("ViT")
    assert figure.get_figwidth() == plot.style.COLUMN_WIDTH


@pytest.mark.parametrize("epochs", [EPOCHS, ("epoch 1",)], ids=len)
def test_figure1c_has_a_row_an_epoch_and_a_scale_a_half(epochs):
    results = spectra(epochs)
    figure = plot.figure1c(results)
    axes = np.array(figure.axes).reshape(len(epochs), 2)
    assert [ax.get_ylabel() for ax in axes[:, 0]] == list(epochs)
    everything = [each for by_epoch in results.values() for each in by_epoch.values()]
    values = np.concatenate([each.eigenvalues.ravel() for each in everything])
    for column, ends in ((0, (values.min(), 0)), (1, (0, values.max()))):
        (limits,) = {ax.get_xlim() for ax in axes[:, column]}
        assert limits[0] <= ends[0] <= ends[1] <= limits[1]
        assert 0 in limits
    for row, epoch in enumerate(epochs):
        labels = axes[row, 0].get_legend_handles_labels()[1]
        assert labels[0] == "ResNet: NEP 0.00 [0.00, 0.10], n = 0"
        n = int((results["ViT"][epoch].eigenvalues < 0).sum())
        assert labels[1].endswith(f"n = {n}")


@pytest.mark.parametrize("scale", [1, 100])
def test_legends_of_figure1c_lie_above_the_densities(scale):
    figure = plot.figure1c(spectra(scale=scale))
    FigureCanvasAgg(figure).draw()
    for ax in figure.axes:
        texts = ax.get_legend().get_texts()
        floor = min(text.get_window_extent().y0 for text in texts)
        curves = [line for line in ax.lines if line.get_gid() == "density"]
        tops = [ax.transData.transform(line.get_xydata())[:, 1] for line in curves]
        assert max(top.max() for top in tops if top.size) < floor


@pytest.mark.parametrize("name", ["ResNet", "ResNet of a well known library, pretrained on images"])
def test_legends_of_the_panels_of_figure1_stay_inside_of_them(name):
    by_model = spectra(scale=7e3)
    results = {name: by_model["ResNet"], "ViT": by_model["ViT"]}
    figure = plot.figure1(surfaces(), {"ViT": polar()}, results)
    panels = [
        ax for ax in figure.findobj(Axes) if any(each.get_gid() == "rug" for each in ax.lines)
    ]
    assert len(panels) == 2 * len(EPOCHS)
    for ax in panels:
        legend = ax.get_legend().get_window_extent()
        assert ax.bbox.x0 <= legend.x0
        assert legend.x1 <= ax.bbox.x1


@pytest.mark.parametrize(("scale", "axis"), [(1, "linear"), (100, "symlog")])
def test_figure1c_is_logarithmic_where_a_spectrum_would_be_a_needle(scale, axis):
    figure = plot.figure1c(spectra(EPOCHS[:2], scale))
    assert {ax.get_xscale() for ax in figure.axes} == {axis}
    note = [text for text in texts_of(figure) if text.startswith("Density of")]
    assert ("log" in note[0]) == (axis == "symlog")
    assert "Silverman" in note[0]


def test_figure1c_leaves_out_an_epoch_that_one_model_lacks():
    results = spectra(EPOCHS[:2])
    del results["ResNet"]["warm-up"]
    figure = plot.figure1c(results)
    labels = [ax.get_legend_handles_labels()[1] for ax in figure.axes[::2]]
    by_row = {ax.get_ylabel(): names for ax, names in zip(figure.axes[::2], labels, strict=True)}
    assert [name.split(":")[0] for name in by_row["warm-up"]] == ["ViT"]
    assert [name.split(":")[0] for name in by_row["epoch 10"]] == ["ResNet", "ViT"]


def test_figure1_composes_the_panels_at_text_width(tmp_path):
    trajectories = {"ResNet": polar(), "ViT": polar((1, 0.7, 0.3, 0))}
    figure = plot.figure1(surfaces(), trajectories, spectra())
    assert figure.get_figwidth() == plot.style.TEXT_WIDTH
    assert {"a", "b", "c"} <= set(texts_of(figure))
    for name in ("fig1.png", "fig1.pdf"):
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.parametrize("angle", [1.2, 2.2], ids=["quarter disc", "half disc"])
def test_texts_of_figure1_stay_on_the_page_and_apart(angle):
    trajectories = {"ResNet": polar(), "ViT": polar(angle=(0, 0.6, angle, np.nan))}
    results = surfaces()
    results["ResNet"] = surface(missing=[(6, 4), (0, 0)])
    figure = plot.figure1(results, trajectories, spectra())
    drawn = boxes(figure)
    assert len(drawn) > 80
    for text, box in drawn:
        assert figure.bbox.padded(1).contains(box.x0, box.y0), text
        assert figure.bbox.padded(1).contains(box.x1, box.y1), text
    small = [(text, box.padded(-1)) for text, box in drawn]  # boxes are looser than ink
    for (first, a), (second, b) in itertools.combinations(small, 2):
        assert not a.overlaps(b), (first, second)


@pytest.mark.parametrize("draw", [plot.figure1a, plot.figure1b, plot.figure1c])
def test_empty_mappings_are_refused(draw):
    with pytest.raises(ValueError, match="`results` must hold at least one result"):
        draw({})


def test_no_figure_stays_open_and_text_is_in_the_style():
    figure = plot.figure1c({"ViT": {"epoch 1": max_spectrum(np.linspace(-1, 5, 20)[:, None])}})
    assert plt.get_fignums() == []
    families = {tuple(text.get_fontfamily()) for text in figure.findobj(Text)}
    assert families == {("STIXGeneral",)}


def test_plot_modules_import_neither_torch_nor_plotly_at_their_top():
    for path in Path(plot.__file__).parent.glob("*.py"):
        top = [
            n
            for n in ast.parse(path.read_text()).body
            if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        names = {getattr(n, "module", None) or n.names[0].name for n in top}
        assert not {name.split(".")[0] for name in names} & {"torch", "plotly", "torchvision"}, path


def test_importing_landscape_loads_no_plotting_and_plot_loads_no_plotly():
    code = (
        "import sys, landscape; a = {'matplotlib', 'plotly'} & set(sys.modules);"
        "import landscape.plot; b = {'plotly'} & set(sys.modules); assert not a | b, (a, b)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
