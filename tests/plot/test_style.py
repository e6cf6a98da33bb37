import itertools

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from landscape.plot import style, texts
from landscape.plot.interactive.look import plotly_line


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("ResNet-50", "resnet20"),
        ("ViT", "vit_tiny_patch16_224"),
        ("ViT-Ti", "DeiT-S"),
        ("AlterNet-50", "alter_resnet_50"),
        ("Swin-T", "swin_tiny"),
        ("PiT", "pit_ti"),
    ],
)
def test_a_family_has_one_colour_however_it_is_spelled(name, same):
    assert style.family_color(name) == style.family_color(same) is not None


def test_families_differ_and_alternet_is_no_resnet():
    families = ["ResNet", "ViT", "AlterNet", "Swin", "PiT"]
    assert len({style.family_color(name) for name in families}) == len(families)


def test_colour_does_not_depend_on_what_else_is_drawn():
    alone = style.line_styles(["ViT"])["ViT"]["color"]
    assert style.line_styles(["MLP", "ResNet", "Swin", "ViT"])["ViT"]["color"] == alone


def test_members_of_a_family_differ_by_line_and_unknown_names_by_colour():
    styles = style.line_styles(["ResNet-18", "ResNet-50", "MLP", "GRU", "Mamba", "ResNet-18"])
    assert len(styles) == 5
    looks = {(each["color"], each["linestyle"]) for each in styles.values()}
    assert len(looks) == 5
    assert styles["ResNet-18"]["color"] == styles["ResNet-50"]["color"]
    known = {style.family_color(name) for name in ("ResNet", "ViT", "AlterNet", "Swin", "PiT")}
    assert not known & {styles[name]["color"] for name in ("MLP", "GRU", "Mamba")}


def test_a_whole_zoo_is_told_apart():
    names = [f"{family}-{i}" for family in ("ResNet", "ViT") for i in range(8)]
    names += [f"model {i}" for i in range(24)]
    styles = style.line_styles(names)
    assert len({tuple(look.items()) for look in styles.values()}) == len(names)
    dashes = {tuple(plotly_line(look).items()) for look in styles.values()}
    assert len(dashes) == len(names)


# Machado, Oliveira & Fernandes (2009), severity 1, on linear RGB; every row sums to 1.
BLINDNESS = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def to_lab(color, blindness):
    """CIE L*a*b* (D65) of a colour as it is seen."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (np.array(BLINDNESS[blindness]) @ linear).clip(0, 1)
    srgb = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    f = np.cbrt(np.array(srgb) @ seen / (0.9505, 1.0, 1.089))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("blindness", list(BLINDNESS))
def test_families_are_told_apart_under_colour_blindness(blindness):
    families = ["ResNet", "ViT", "AlterNet", "Swin", "PiT"]
    seen = [to_lab(style.family_color(name), blindness) for name in families]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 12  # a difference of 2.3 is just noticeable


@pytest.mark.parametrize("blindness", list(BLINDNESS))
def test_kinds_are_told_apart_from_each_other_and_from_families(blindness):
    names = ["ResNet", "ViT", "AlterNet", "Swin", "PiT", "MLP", "GRU", "Mamba"]
    families = [to_lab(look["color"], blindness) for look in style.line_styles(names).values()]
    kinds = [to_lab(color, blindness) for color in style.KIND_COLORS.values()]
    pairs = [*itertools.combinations(kinds, 2), *itertools.product(kinds, families)]
    assert min(np.linalg.norm(a - b) for a, b in pairs) > 12


@pytest.mark.parametrize("blindness", list(BLINDNESS))
def test_pale_areas_of_kinds_are_told_apart(blindness):
    pale = [np.array(to_rgb(color)) for color in style.KIND_COLORS.values()]
    seen = [to_lab(1 - style.KIND_ALPHA * (1 - rgb), blindness) for rgb in pale]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 5


def test_settings_hold_inside_the_context_only():
    before = mpl.rcParams["font.family"]
    with mpl.rc_context(style.rc()):
        assert mpl.rcParams["font.family"] == ["STIXGeneral"]
        assert mpl.rcParams["pdf.fonttype"] == 42
    assert mpl.rcParams["font.family"] == before


def test_no_text_of_a_paper_figure_is_below_six_points():
    keys = ("font.size", "axes.labelsize", "axes.titlesize", "xtick.labelsize", "legend.fontsize")
    assert min(style.rc()[key] for key in keys) >= 6
    assert style.NOTE_SIZE >= 6


def test_entries_of_a_legend_are_lines_that_keep_every_letter():
    name = "a" * 45
    few = {"ViT": "one", "": "t" * 20, name: "NEP 1\nAPE 2", "ViT-Ti": "word " * 11 + "word"}
    entries = texts.wrapped_entries(few)
    assert entries["ViT"] == "ViT: one"
    assert entries[""] == "t" * 20
    assert entries[name] == f"{'a' * 30}\n{'a' * 15}: NEP 1\nAPE 2"
    assert entries["ViT-Ti"] == "ViT-Ti:\n" + "word " * 11 + "word"
    many = texts.wrapped_entries({**few, " ": "a fifth entry"})
    assert max(len(line) for entry in many.values() for line in entry.split("\n")) <= 40


def test_long_names_keep_their_ends_and_stay_told_apart():
    name = "a" * 50 + "b" * 50
    assert texts.shortened("ViT", 3) == "ViT"
    assert texts.shortened(name, 10) == "aaaaa…bbbb"
    twins = {"a" * 30 + str(i) + "b" * 30: "text" for i in range(3)}
    short = texts.short_names(twins, 20)
    assert len(set(short.values())) == 3
    assert max(map(len, short.values())) <= 20
    assert len(set(texts.wrapped_entries({**twins, "c": "text", "d": "text"}).values())) == 5
    entry = texts.wrapped_entries({name: "text"})[name]
    assert entry.startswith("a" * 30 + "\n")
    assert entry.endswith("b" * 29 + ": text")
