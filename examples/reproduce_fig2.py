"""Figure 2 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022).

    python examples/reproduce_fig2.py            # on the models of Figure 1, offline
    python examples/reproduce_fig2.py --quick    # the same path in little
    python examples/reproduce_fig2.py --seeds 8  # on 8 runs of each network
    python examples/reproduce_fig2.py --model timm:vit_tiny_patch16_224 --weights vit.pth \
        --model timm:resnet50 --weights resnet.pth --images imagenet/val

(a) Fourier amplitudes of the feature maps, a curve per block: MSAs are low-pass filters, Convs
high-pass. (b) Accuracy lost to noise of one frequency: ViT is hurt by low, ResNet by high ones.
"""

import numpy as np
from claims import ZERO, Claim, averaged, estimated, over_runs
from comparisons import Results
from subjects import Means, Study, run

from landscape import plot

NOTE = (
    "Intervals (95 %). (a) Changes over blocks are means over the blocks of a kind. (b) Noise of "
    "root mean square 0.1 of full scale. With several runs, intervals are those of the mean over "
    "runs (Student's t); with one they are those of the spread between blocks (a) and over test "
    "images (b), and none covers the choice of seed."
)


def draw(results: Means):
    """Return the figure, and its first part to hover over."""
    figure = plot.figure2(results["fourier"], results["frequency"])
    return figure, plot.interactive.fourier_amplitude(results["fourier"])


def claims(results: Results) -> list[Claim]:
    """Compare the change at π over each kind of block, and the two ends of the noise."""
    found = []
    for name, runs in results["fourier"].items():
        kinds = np.array(runs[0].kinds[1:])
        for kind in ("msa", "conv", "mlp"):
            if (kinds == kind).any():
                label = {"msa": "MSAs", "conv": "Convs", "mlp": "MLPs"}[kind]
                changes = [averaged(np.diff(run.highest)[kinds == kind]) for run in runs]
                step = (f"{name} {label}", over_runs(changes))
                low, high = (step, ZERO) if kind == "msa" else (ZERO, step)
                verb = "reduce" if kind == "msa" else "amplify"
                which = " (subsampling blocks included)" if kind == "conv" else ""
                found.append(
                    Claim(
                        f"(a) {label}{which} {verb} high frequencies",
                        "change of Δ log amplitude at π over a block",
                        low,
                        high,
                        about=2,
                    )
                )
    curves = results["frequency"]
    pair = [next((n for n in curves if n.lower().startswith(f)), None) for f in ("vit", "resnet")]
    if None not in pair:
        for frequency, worse, better in ((0.3, pair[0], pair[1]), (0.9, pair[1], pair[0])):
            side = {}
            for name in pair:
                i = int(np.abs(curves[name][0].frequencies - frequency).argmin())
                losses = [
                    estimated(run.delta_accuracy[i], run.delta_accuracy_stderr[i])
                    for run in curves[name]
                ]
                side[name] = over_runs(losses)
            found.append(
                Claim(
                    f"(b) noise at {frequency}π hurts {worse} more",
                    "change of accuracy",
                    (worse, side[worse]),
                    (better, side[better]),
                    about=2,
                )
            )
    return found


if __name__ == "__main__":
    run(Study("fig2", ("fourier", "frequency"), draw, claims, NOTE), __doc__)
