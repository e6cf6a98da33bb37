"""Figure 7 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022).

    python examples/reproduce_fig7.py                  # two CPU cores, offline
    python examples/reproduce_fig7.py --quick          # the same path in little: a smoke test
    python examples/reproduce_fig7.py --preset paper   # the paper's setting, on a GPU

ViTs whose patches attend to 3 x 3 or 5 x 5 neighbours, or to all patches (8 x 8 on the paper's
images, 7 x 7 on those of the default): test error and NLL of the training images (a), and Hessian
max eigenvalue spectra at the end of warm-up (b). Local attention is to suppress negative
eigenvalues, and 5 x 5 to predict best.
"""

from collections.abc import Sequence

import matplotlib as mpl
from claims import Claim, averaged
from comparisons import TEST, TRAIN, WARMUP, Arm, Results, Study, run
from hessian_claims import NOTE, smaller_nep
from matplotlib.figure import Figure

from landscape.plot import style
from landscape.plot.seeds import draw_spectra_over_runs, run_curves

SMALLEST, MIDDLE, GLOBAL = "ViT, 3×3", "ViT, 5×5", "ViT, global"


def arms(preset: str) -> Sequence[Arm]:
    """Return the networks, without a class token, which would see all patches."""
    plain: dict[str, str | int] = {"pool": "gap"}
    if preset in {"gpu", "paper"}:
        plain |= {"patch_size": 4}  # 8 x 8 patches, as in the paper; small networks have it anyway
    return (
        Arm(SMALLEST, "ViT", {**plain, "window": 3}),
        Arm(MIDDLE, "ViT", {**plain, "window": 5}),
        Arm(GLOBAL, "ViT", plain),
    )


def draw(results: Results) -> Figure:
    """Draw the predictions against the window above the spectra."""
    windows = range(len(results[TEST]))
    with mpl.rc_context(style.rc()):
        figure = Figure(figsize=(style.TEXT_WIDTH, 3.7))
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.6, 2.1))
        error, nll = top.subplots(1, 2)
        top.subplots_adjust(left=0.09, right=0.98, top=0.93, bottom=0.24, wspace=0.3)
        errors = [[100 * (1 - e.accuracy) for e in runs] for runs in results[TEST].values()]
        run_curves(windows, errors, label="ViT", ax=error)
        error.set_ylabel("Test error (%)")
        losses = [[e.nll for e in runs] for runs in results[TRAIN].values()]
        run_curves(windows, losses, label="ViT", ax=nll)
        nll.set_ylabel("NLL, augmented\ntraining images (nats)")
        for ax in (error, nll):
            ax.set_xticks(windows, [label.removeprefix("ViT, ") for label in results[TEST]])
            ax.set_xlabel("Patches attended to")
        draw_spectra_over_runs(bottom, results[WARMUP])
        for part, letter in ((top, "a"), (bottom, "b")):
            part.text(0.005, 0.98, letter, va="top", weight="bold", size=10)
        figure.draw_without_rendering()
    return figure


def claims(results: Results) -> list[Claim]:
    """Return the paper's claims next to what was measured."""
    spectra = {name: (name, runs) for name, runs in results[WARMUP].items()}
    error = {n: averaged([1 - e.accuracy for e in runs]) for n, runs in results[TEST].items()}
    nll = {n: averaged([e.nll for e in runs]) for n, runs in results[TRAIN].items()}
    found = [
        smaller_nep("local attention makes ViT more convex", spectra[name], spectra[GLOBAL])
        for name in (SMALLEST, MIDDLE)
    ]
    for name in (SMALLEST, GLOBAL):
        best, other = (MIDDLE, error[MIDDLE]), (name, error[name])
        found.append(Claim("5×5 predicts best", "test error", best, other, about=6))
        best, other = (MIDDLE, nll[MIDDLE]), (name, nll[name])
        found.append(Claim("5×5 fits best", "NLL, augmented training images", best, other, about=6))
    return found


if __name__ == "__main__":
    run(Study("fig7", arms, (WARMUP, TEST, TRAIN), draw, claims, NOTE, {"default": 3}), __doc__)
