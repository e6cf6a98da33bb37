"""Figure 11 from the models themselves, and again from its results."""

from landscape.probes.architecture import Architecture
from tests.test_package import ROOT, run


def test_figure_11_in_little_and_again_from_its_results(tmp_path):
    script = str(ROOT / "examples/reproduce_fig11.py")
    done = run(script, "--quick", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tables = sorted((tmp_path / "out/fig11").glob("*.npz"))
    assert [path.stem for path in tables] == ["0_ResNet-50", "1_ViT-Ti", "2_Alter-ResNet-50"]
    kinds = [Architecture.load(path).kinds for path in tables]
    assert kinds[0] == ("stem", *["conv"] * 16, "head")
    assert kinds[1] == ("stem", *["msa", "mlp"] * 12, "head")
    letters = "".join({"conv": "C", "msa": "A"}.get(kind, " ") for kind in kinds[2])
    assert letters == " CCCCCCACACACACACA "
    drawn = run(script, "--draw", "out/fig11", "--out", "drawn", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    png = (tmp_path / "out/fig11.png").read_bytes()
    assert png == (tmp_path / "drawn/fig11.png").read_bytes()
    assert (tmp_path / "drawn/fig11.pdf").exists()
