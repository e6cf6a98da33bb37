import os
from pathlib import Path

import numpy as np
import pytest

from landscape import LossSurface, load_published_surface
from landscape.probes.published_surface import COLUMNS

ROOT = Path(__file__).parents[2]
FILES = {
    "ViT-Ti": "cifar100_vit_ti_losslandscape.csv",
    "ResNet-50": "cifar100_resnet_dnn_50_losslandscape.csv",
}
# Centre: NLL, accuracy, ECE, sum of norms; NLL + 0.05 Σ‖p‖ at radius 0, 0.1, 0.3, 1.0 (mean of the
# four points on the axes); points that are not finite.
FACTS = {
    "ViT-Ti": ((2.4896, 0.6583, 0.1634, 769.50), (40.96, 41.28, 43.05, 53.37), 0),
    "ResNet-50": ((2.1941, 0.7238, 0.1540, 1534.20), (78.90, 79.23, 82.07, 99.07), 31),
}


def reference(name):
    folder = os.environ.get("LANDSCAPE_REFERENCE")
    folder = Path(folder) if folder else ROOT.parent / "shared" / "reference"
    if not (folder / FILES[name]).is_file():
        pytest.skip(f"no {FILES[name]} in {folder}; set LANDSCAPE_REFERENCE to its folder")
    return folder / FILES[name]


def write(path, points, order, end="\r\n"):
    """Write a file in the published format: entry c of the row of (x, y) is 100 c + x + 10 y."""
    rows = []
    for index in order:
        x, y = points[index]
        values = [100 * c + x + 10 * y for c in range(len(COLUMNS))]
        values[0], values[1] = x, y
        rows.append(values)
    for row in rows:
        if (row[0], row[1]) == points[0]:
            row[4] = float("inf")
        if (row[0], row[1]) == points[-1]:
            row[4] = float("nan")
    path.write_text(end.join(",".join(map(repr, row)) for row in rows) + end, newline="")
    return path


X, Y = (-0.5, 0.0, 0.1 + 0.2), (0.0, 0.25)
POINTS = [(x, y) for x in X for y in Y]


@pytest.mark.parametrize(
    "order",
    [range(6), (0, 2, 4, 1, 3, 5), (5, 3, 1, 4, 2, 0), (2, 5, 0, 3, 1, 4)],
    ids=["y fastest", "x fastest", "backwards", "shuffled"],
)
def test_axes_are_found_whatever_the_order_of_the_rows(tmp_path, order):
    surface = load_published_surface(write(tmp_path / "a.csv", POINTS, order), 0.5)
    np.testing.assert_allclose(surface.x, X)
    np.testing.assert_allclose(surface.y, Y)
    expected = np.add.outer(np.array(X), 10 * np.array(Y))
    np.testing.assert_allclose(surface.l2, 0.5 * (300 + expected))
    np.testing.assert_allclose(surface.accuracy, 700 + expected)
    np.testing.assert_allclose(surface.ece, 1700 + expected)
    finite = np.isfinite(surface.nll)
    np.testing.assert_allclose(surface.nll[finite], (400 + expected)[finite])
    np.testing.assert_array_equal(surface.loss, surface.nll + surface.l2)
    assert surface.nll[0, 0] == np.inf
    assert np.isnan(surface.nll[2, 1])
    assert surface.num_nonfinite == 2
    assert finite.sum() == 4


def test_coordinates_that_differ_by_rounding_are_one(tmp_path):
    points = [(0.0, 0.0), (0.1 + 0.2, 0.0), (0.0, 0.7), (0.3, 0.1 * 7)]
    assert len({x for x, _ in points}) == 3
    surface = load_published_surface(write(tmp_path / "a.csv", points, range(4)))
    np.testing.assert_allclose(surface.x, [0, 0.3])
    np.testing.assert_allclose(surface.y, [0, 0.7])


def test_a_mark_of_the_byte_order_is_no_coordinate(tmp_path):
    path = write(tmp_path / "a.csv", POINTS, range(6))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    np.testing.assert_allclose(load_published_surface(path).x, X)


def test_surface_is_saved_and_loaded(tmp_path):
    surface = load_published_surface(write(tmp_path / "a.csv", POINTS, range(6), end="\n"))
    loaded = LossSurface.load(surface.save(tmp_path / "a.npz"))
    np.testing.assert_array_equal(loaded.loss, surface.loss)
    assert loaded.provenance.settings == {"file": "a.csv", "l2": "norms", "weight_decay": 0.05}
    assert loaded.directions.normalization == "input"
    assert np.isnan(loaded.nll_stderr).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "at least one row, got none"),
        ("x,y,l1\n", "19 numbers a row, the coordinates finite, got 'x,y,l1' in row 1"),
        ("1,2,3\n", "got '1,2,3' in row 1"),
        (",".join(["nan"] * 19), "the coordinates finite, got 'nan,nan"),
        (b"\x1f\x8b\x08\xff\n", "in row 1"),
        ('"' + "1" * 200_000, "got '\"1111"),
    ],
    ids=["empty", "header", "short", "no coordinates", "gzip", "long"],
)
def test_foreign_files_are_refused(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"`path` must hold .*{message}"):
        load_published_surface(path)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((0, 1, 2, 3, 4), "1 points missing and 0 repeated"),
        ((0, 1, 2, 3, 4, 4), "1 points missing and 1 repeated"),
        ((0, 1, 2, 3, 4, 5, 5), "0 points missing and 1 repeated"),
    ],
)
def test_broken_grids_are_refused(tmp_path, order, message):
    with pytest.raises(ValueError, match=message):
        load_published_surface(write(tmp_path / "a.csv", POINTS, order))


def test_negative_weight_decay_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`weight_decay` must be at least 0, got -1"):
        load_published_surface(tmp_path / "a.csv", -1)


@pytest.mark.parametrize("name", list(FILES))
def test_published_surfaces_have_their_known_values(name):
    surface = load_published_surface(reference(name))
    (nll, accuracy, ece, norms), radii, missing = FACTS[name]
    np.testing.assert_allclose(surface.x, np.linspace(-1, 1, 21), atol=1e-9)
    np.testing.assert_allclose(surface.y, np.linspace(-1, 1, 21), atol=1e-9)
    centre = (10, 10)
    assert surface.nll[centre] == pytest.approx(nll, abs=5e-5)
    assert surface.accuracy[centre] == pytest.approx(accuracy, abs=5e-5)
    assert surface.ece[centre] == pytest.approx(ece, abs=5e-5)
    assert surface.l2[centre] / 0.05 == pytest.approx(norms, abs=5e-3)
    for steps, value in zip((0, 1, 3, 10), radii, strict=True):
        points = [(10 + steps, 10), (10 - steps, 10), (10, 10 + steps), (10, 10 - steps)]
        mean = np.mean([surface.loss[point] for point in points])
        assert mean == pytest.approx(value, abs=5e-3)
    assert surface.num_nonfinite == missing == np.sum(~np.isfinite(surface.nll))


def test_published_figure_shows_the_missing_points_as_missing(tmp_path, capsys):
    from examples.published_fig1a import main

    arguments = [str(reference("ViT-Ti")), str(reference("ResNet-50"))]
    path = main([*arguments, "--out", str(tmp_path / "figures" / "fig1a.png")])
    assert 20_000 < path.stat().st_size < 300_000
    printed = capsys.readouterr().out
    assert "ResNet-50: loss 78.90 to 123.19, of which NLL 2.19 to 24.05; 31 of 441" in printed
    assert "ViT-Ti: loss 40.96 to 61.20, of which NLL 2.41 to 5.39; 0 of 441" in printed


def test_published_surfaces_draw_through_the_common_code():
    from landscape import plot

    surfaces = {name: load_published_surface(reference(name)) for name in FILES}
    figure = plot.figure1a(surfaces)
    deep = [ax for ax in figure.axes if ax.name == "3d"]
    notes = [[text.get_text() for text in ax.texts] for ax in deep]
    assert notes == [[], ["×: 31 of 441 not finite"]]
    assert deep[0].get_zlim() == deep[1].get_zlim() == pytest.approx((40.9646, 123.1936), abs=1e-3)
