"""Figure 6 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022).

    python examples/reproduce_fig6.py                  # two CPU cores, offline
    python examples/reproduce_fig6.py --quick          # the same path in little: a smoke test
    python examples/reproduce_fig6.py --preset paper   # the paper's setting, on a GPU

A ViT that reads a class token against one that averages its patches (global average pooling):
Hessian max eigenvalue spectra at the end of warm-up (a) and of training (b), and predictions. The
average is to smooth the loss: fewer negative eigenvalues.
"""

from collections.abc import Sequence

import matplotlib as mpl
from claims import Claim, averaged
from comparisons import LAST, TEST, WARMUP, Arm, Results, Study, run
from hessian_claims import NOTE, smaller_nep
from matplotlib.figure import Figure

from landscape.plot import style
from landscape.plot.seeds import draw_spectra_over_runs

CLS, GAP = "ViT, CLS", "ViT, GAP"


def arms(preset: str) -> Sequence[Arm]:
    """Return the networks."""
    return Arm(CLS, "ViT"), Arm(GAP, "ViT", {"pool": "gap"})


def draw(results: Results) -> Figure:
    """Draw the spectra at the end of warm-up above those at the end of training."""
    with mpl.rc_context(style.rc()):
        figure = Figure(figsize=(style.TEXT_WIDTH, 3.8))
        parts = figure.subfigures(2, 1)
        for part, letter, kind in zip(parts, "ab", (WARMUP, LAST), strict=True):
            draw_spectra_over_runs(part, results[kind])
            part.text(0.005, 0.98, letter, va="top", weight="bold", size=10)
        figure.draw_without_rendering()
    return figure


def claims(results: Results) -> list[Claim]:
    """Return the paper's claims next to what was measured."""
    moments = ((WARMUP, "end of warm-up"), (LAST, "end of training"))
    found = [
        smaller_nep(f"{when}: GAP makes ViT more convex", *((n, results[k][n]) for n in (GAP, CLS)))
        for k, when in moments
    ]
    error = {n: averaged([1 - e.accuracy for e in runs]) for n, runs in results[TEST].items()}
    text = "GAP predicts better than a class token"
    found.append(Claim(text, "test error", (GAP, error[GAP]), (CLS, error[CLS]), about=6))
    return found


if __name__ == "__main__":
    run(Study("fig6", arms, (WARMUP, LAST, TEST), draw, claims, NOTE, {"default": 4}), __doc__)
