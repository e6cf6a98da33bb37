"""Figure 12 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022).

    python examples/reproduce_fig12.py                  # two CPU cores, offline
    python examples/reproduce_fig12.py --quick          # the same path in little: a smoke test
    python examples/reproduce_fig12.py --preset paper   # the paper's setting, on a GPU

Where attention helps: (a) the build-up of an AlterNet from a plain pre-activation ResNet, an MSA a
step; (b) predictions of a ResNet, a ViT and an AlterNet; (c) their Hessian max eigenvalue spectra
at the end of training.
"""

from collections.abc import Sequence

import matplotlib as mpl
from build_up_seeds import VALIDATION, WALK, draw_build_ups, name, run_build_ups
from claims import ZERO, Claim, Measured, averaged
from comparisons import CORRUPTION, LAST, TEST, Arm, Results, Study, run
from hessian_claims import NOTE, smaller_ape, smaller_nep
from matplotlib.figure import Figure, SubFigure

from landscape.plot import style
from landscape.plot.seeds import draw_spectra_over_runs, run_columns, tilt_labels

NETWORKS = ("ResNet", "ViT", "AlterNet")
BUILD_UP_NOTE = (
    " The build-up is walked once a seed; its steps are decided by accuracy on a fifth of the "
    "training images, which are not trained on. Every network that any seed tried is then trained "
    "with all seeds, so that no mean is one over those seeds that did well. Changes are paired: "
    "the two networks of a seed share their initial weights, order and augmentation. The "
    "build-up's networks have another base and other epochs than the AlterNet of (b): see "
    "`build_up` in setting.json."
)


def arms(preset: str) -> Sequence[Arm]:
    """Return the networks."""
    return [Arm(network, network) for network in NETWORKS]


def draw(results: Results) -> Figure:
    """Draw the build-up (a) above predictions (b) and spectra (c)."""
    with mpl.rc_context(style.rc()):
        figure = Figure(figsize=(style.TEXT_WIDTH, 5.6))
        parts = figure.subfigures(3, 1, height_ratios=(2.1, 1.5, 2.0))
        ax = parts[0].add_axes((0.085, 0.3, 0.895, 0.66))
        (walks,) = results[WALK].values()
        draw_build_ups(ax, walks, results[VALIDATION])
        _draw_predictions(parts[1], results)
        draw_spectra_over_runs(parts[2], _networks(results, LAST))
        for part, letter in zip(parts, "abc", strict=True):
            part.text(0.005, 0.98, letter, va="top", weight="bold", size=10)
        figure.draw_without_rendering()  # ticks are made now, in this style
    return figure


def _draw_predictions(figure: SubFigure, results: Results) -> None:
    scores = _networks(results, TEST)
    panels = {
        "Accuracy (%)": {n: [100 * e.accuracy for e in runs] for n, runs in scores.items()},
        "NLL (nats)": {n: [e.nll for e in runs] for n, runs in scores.items()},
        "ECE (%)": {n: [100 * e.ece for e in runs] for n, runs in scores.items()},
        "Corruption\nerror (%)": {
            n: [100 * e.mean_corruption_error for e in runs]
            for n, runs in _networks(results, CORRUPTION).items()
        },
    }
    place = {"left": 0.085, "right": 0.98, "top": 0.93, "bottom": 0.3}
    axes = figure.add_gridspec(1, len(panels), wspace=0.75, **place).subplots()
    for ax, (label, values) in zip(axes, panels.items(), strict=True):
        run_columns(values, ax=ax)
        ax.set_ylabel(label)
        tilt_labels(ax)


def claims(results: Results) -> list[Claim]:
    """Return the paper's claims next to what was measured."""
    resnet, vit, alternet = NETWORKS
    scores = _networks(results, TEST)
    error = {n: averaged([1 - e.accuracy for e in runs]) for n, runs in scores.items()}
    nll = {n: averaged([e.nll for e in runs]) for n, runs in scores.items()}
    corrupted = {
        n: averaged([e.mean_corruption_error for e in runs])
        for n, runs in _networks(results, CORRUPTION).items()
    }
    spectra = {n: (n, runs) for n, runs in _networks(results, LAST).items()}
    return [
        *_build_up_claims(results),
        _better("AlterNet outperforms ResNet in small data", "test error", error, resnet),
        _better("AlterNet outperforms ResNet in small data", "test NLL", nll, resnet),
        _better("AlterNet outperforms ViT in small data", "test error", error, vit),
        _better("AlterNet is more robust than ResNet", "corruption error", corrupted, resnet),
        smaller_ape("AlterNet is flatter than ResNet", spectra[alternet], spectra[resnet], 5),
        smaller_nep("AlterNet is more convex than ViT", spectra[alternet], spectra[vit], 5),
    ]


def _build_up_claims(results: Results) -> list[Claim]:
    """Return what the MSAs of the build-up changed: the first, and all that were kept."""
    (walks,) = results[WALK].values()
    plain, first = (name(walks[0].msas[row].tolist()) for row in (0, 1))
    built = [results[TEST][name(walk.best)][seed] for seed, walk in enumerate(walks)]
    validation, test = results[VALIDATION], results[TEST]
    changes = {
        "an MSA at the end of the last stage helps": (validation[first], validation[plain]),
        "the network built by the rule beats the plain one": (built, test[plain]),
    }
    found = []
    for (text, (now, before)), images in zip(changes.items(), (VALIDATION, TEST), strict=True):
        change = averaged([b.accuracy - n.accuracy for n, b in zip(now, before, strict=True)])
        quantity = f"change of {images} error"
        found.append(Claim(text, quantity, ("with MSAs", change), ZERO, about=5))
    return found


def _better(text: str, quantity: str, measured: dict[str, Measured], other: str) -> Claim:
    sides = ("AlterNet", measured["AlterNet"]), (other, measured[other])
    return Claim(text, quantity, *sides, about=5)


def _networks(results: Results, kind: str) -> dict[str, list]:
    """Return what was measured of the three networks, without those of the build-up."""
    return {network: results[kind][network] for network in NETWORKS}


if __name__ == "__main__":
    kinds = (LAST, TEST, CORRUPTION)
    note = NOTE + BUILD_UP_NOTE
    run(
        Study("fig12", arms, kinds, draw, claims, note, {"default": 3}, run_build_ups),
        __doc__,
    )
