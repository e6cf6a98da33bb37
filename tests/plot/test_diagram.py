"""A diagram of blocks: every box where it belongs, its text inside it, at the width of a column."""

import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgba
from matplotlib.patches import Rectangle

from landscape.plot import style
from landscape.plot.diagram import block_diagram, figure11, output_text
from landscape.plot.style import KIND_COLORS
from landscape.probes.architecture import Architecture
from landscape.results import Provenance
from tests.plot.feature_cases import fields, resnet, vit
from tests.plot.page import boxes


def table(blocks, names=None):
    """Blocks with maps that halve, and channels that double, from stage to stage."""
    known = fields(blocks)
    stage = known["stage"]
    is_head = np.array([kind == "head" for kind in known["kinds"]])
    side = np.where(is_head, 0, 56 // 2**stage)
    return Architecture(
        **known | ({} if names is None else {"names": tuple(names)}),
        channels=np.where(is_head, 1000, 96 * 2**stage),
        grid=np.stack([side, side], axis=1),
        provenance=Provenance(),
    )


def swin():
    """The blocks of a Swin: attention and MLP in turn, subsampling between the stages."""
    kinds, stage, names = ["stem"], [0], ["stem"]
    for i, depth in enumerate((2, 2, 6, 2)):
        if i:
            kinds, stage = [*kinds, "pool"], [*stage, i]
            names.append(f"layers.{i}.downsample.reduction")
        for j in range(depth):
            kinds, stage = [*kinds, "msa", "mlp"], [*stage, i, i]
            names += [f"layers.{i}.blocks.{j}.attn", f"layers.{i}.blocks.{j}.mlp"]
    return table((kinds, np.array(stage), True), [*names, "head"])


TABLES = {
    "resnet": lambda: table(resnet(head=True)),
    "vit": lambda: table(vit(head=True)),
    "swin": swin,
    "deep": lambda: table(resnet((3, 8, 36, 3), head=True)),  # ResNet-152
    "deepest": lambda: table(vit(30, head=True)),
}


def block_boxes(ax, result):
    """The box of each block, in order."""
    by_name = {p.get_gid(): p for p in ax.patches if p.get_gid() != "stage"}
    assert len(by_name) == len(result.names) == sum(p.get_gid() != "stage" for p in ax.patches)
    return [by_name[name] for name in result.names]


def texts(ax, gid):
    return [text for text in ax.texts if text.get_gid() == gid]


@pytest.mark.parametrize(
    ("name", "columns"), [("resnet", 1), ("swin", 1), ("vit", 2), ("swin", 2), ("deep", 3)]
)
def test_boxes_follow_each_other_down_the_columns_with_a_gap_between_stages(name, columns):
    result = TABLES[name]()
    ax = block_diagram(result, columns=columns)
    drawn = block_boxes(ax, result)
    place = [(int(box.get_x()), round(box.get_y(), 6)) for box in drawn]
    assert place == sorted(place)  # column by column, from the top down: the axis is inverted
    assert ax.get_ylim()[0] > ax.get_ylim()[1] == 0
    assert {column for column, _ in place} == set(range(columns))
    group = [-1 if k == "head" else s for k, s in zip(result.kinds, result.stage, strict=True)]
    for i, ((a, top), (b, lower)) in enumerate(itertools.pairwise(place)):
        if a == b:
            assert lower - top == pytest.approx(1 if group[i] == group[i + 1] else 1.4)
    each = [sum(column == c for column, _ in place) for c in range(columns)]
    assert max(each) - min(each) < columns


@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_colours_are_those_of_the_kinds_in_the_other_drawings(name):
    result = TABLES[name]()
    ax = block_diagram(result)
    for kind, box in zip(result.kinds, block_boxes(ax, result), strict=True):
        expected = KIND_COLORS.get(kind, KIND_COLORS["other"])
        assert to_hex(box.get_edgecolor()).upper() == expected
        assert box.get_facecolor() == to_rgba(expected, 0.3)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    shown = {"conv": "Conv", "msa": "MSA", "mlp": "MLP", "pool": "subsampling", "stem": "other"}
    assert labels == [label for kind, label in shown.items() if kind in result.kinds]
    assert block_diagram(result, legend=False).get_legend() is None


def test_boxes_say_name_and_output_with_an_arrow_where_the_map_shrinks():
    result = swin()
    ax = block_diagram(result)
    assert [text.get_text() for text in texts(ax, "name")] == list(result.names)
    outputs = [text.get_text() for text in texts(ax, "output")]
    assert outputs[0] == outputs[1] == "96 × 56 × 56"
    assert outputs[5] == "↓ 192 × 28 × 28"
    assert outputs[-1] == "1000"
    assert sum("↓" in text for text in outputs) == 3
    assert outputs == [output_text(result, i) for i in range(len(result.names))]


@pytest.mark.parametrize("columns", [1, 2])
def test_stages_are_numbered_beside_their_blocks_and_the_head_belongs_to_none(columns):
    result = table(resnet((1, 4, 6, 2), head=True))
    ax = block_diagram(result, columns=columns)
    strips = [p for p in ax.patches if p.get_gid() == "stage"]
    labels = [text.get_text() for text in texts(ax, "stage")]
    if columns == 1:
        assert labels == ["1", "Stage 2", "Stage 3", "4"]
    else:  # eight blocks on the left: stage 3 goes on at the top of the right column
        assert labels == ["1", "Stage 2", "3", "Stage 3", "4"]
        assert [int(strip.get_x()) for strip in strips] == [0, 0, 0, 1, 1]
    drawn = block_boxes(ax, result)
    for i, box in enumerate(drawn):
        beside = [
            s for s in strips
            if int(s.get_x()) == int(box.get_x())
            and s.get_y() <= box.get_y() + 1e-9
            and box.get_y() + box.get_height() <= s.get_y() + s.get_height() + 1e-9
        ]  # fmt: skip
        assert len(beside) == (result.kinds[i] != "head")


@pytest.mark.parametrize("name", TABLES)
def test_at_the_width_of_a_column_texts_stay_in_their_boxes_and_off_each_other(name):
    result = TABLES[name]()
    with mpl.rc_context(style.rc()):
        ax = block_diagram(result)
        figure = ax.figure
        assert figure.get_figwidth() == style.COLUMN_WIDTH
        assert figure.get_figheight() < 6
        drawn = boxes(figure)
        frame = figure.bbox.padded(0.5)
        for (a, one), (b, other) in itertools.combinations(drawn, 2):
            assert not one.padded(-0.5).overlaps(other.padded(-0.5)), (a, b)
        for text, box in drawn:
            assert frame.containsx(box.x0), text
            assert frame.containsx(box.x1), text
            assert frame.containsy(box.y0), text
            assert frame.containsy(box.y1), text
        for i, patch in enumerate(block_boxes(ax, result)):
            inside = patch.get_window_extent()
            for gid in ("name", "output"):
                extent = texts(ax, gid)[i].get_window_extent()
                assert inside.x0 <= extent.x0 < extent.x1 <= inside.x1, result.names[i]
                assert inside.y0 - 2 <= extent.y0 < extent.y1 <= inside.y1 + 2, result.names[i]
        sizes = {text.get_size() for text in ax.texts}
        assert sizes == {style.NOTE_SIZE}


def test_axes_that_are_given_get_as_many_columns_as_their_height_asks_for():
    result = TABLES["deep"]()
    for height, expected in ((9, 1), (4, 2), (2, 4)):
        figure = plt.figure(figsize=(8, height))
        ax = figure.add_axes((0, 0, 1, 1))
        assert block_diagram(result, ax=ax) is ax
        assert ax.get_xlim() == (0, expected)


def test_a_name_too_long_loses_its_start():
    names = ["x", "a.very.long.name.of.a.module.that.no.column.of.a.page.can.hold.at.this.size"]
    result = table((["stem", "conv"], np.zeros(2, dtype=int), False), names)
    ax = block_diagram(result, columns=2)
    first, second = (text.get_text() for text in texts(ax, "name"))
    assert first == "x"
    assert second.startswith("…")
    assert names[1].endswith(second[1:])
    assert 5 < len(second) < 40


def test_columns_below_one_are_refused():
    with pytest.raises(ValueError, match="`columns` must be at least 1, got 0"):
        block_diagram(swin(), columns=0)


def test_arguments_of_a_box_are_passed_on():
    ax = block_diagram(swin(), facecolor="w", legend=False)
    drawn = [p for p in ax.patches if isinstance(p, Rectangle) and p.get_gid() != "stage"]
    assert {to_hex(box.get_facecolor()) for box in drawn} == {"#ffffff"}


def test_figure_11_puts_models_side_by_side_on_one_scale():
    results = {"ResNet-50": TABLES["resnet"](), "ViT-Ti": TABLES["vit"](), "Swin-T": swin()}
    figure = figure11(results)
    assert figure.get_figwidth() == style.TEXT_WIDTH
    assert [ax.get_title() for ax in figure.axes] == list(results)
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["Conv", "MSA", "MLP", "subsampling", "other"]
    with mpl.rc_context(style.rc()):
        drawn = boxes(figure)
        for (a, one), (b, other) in itertools.combinations(drawn, 2):
            assert not one.padded(-0.5).overlaps(other.padded(-0.5)), (a, b)
        assert all(figure.bbox.padded(0.5).containsy(box.y1) for _, box in drawn)
    with pytest.raises(ValueError, match="`results` must hold at least one"):
        figure11({})
