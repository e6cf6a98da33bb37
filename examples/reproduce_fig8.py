"""Figure 8 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022).

    python examples/reproduce_fig8.py               # on the models of Figure 1
    python examples/reproduce_fig8.py --alternet    # and on an AlterNet, minutes more
    python examples/reproduce_fig8.py --seeds 8     # on 8 runs of each network
    python examples/reproduce_fig8.py --quick       # the same path in little

High-frequency amplitude (at π, just below it for maps of odd side; relative to that at 0) against
depth: MSAs (violet) lower it, Convs, MLPs and subsampling (yellow) raise it. `--model timm:NAME`
as in Figure 2's example.
"""

import numpy as np
from claims import ZERO, Claim, averaged, over_runs
from comparisons import Results
from subjects import Means, Study, run

from landscape import plot

NOTE = (
    "Intervals (95 %) of means over blocks. With several runs they are those of the mean over "
    "runs (Student's t); with one they are those of the spread between blocks, a block alone has "
    "none, and none covers the choice of seed. Maps with an even side have a bin at π, where noise "
    "reads ½ ln 2 lower than elsewhere; odd ones end just before it."
)


def draw(results: Means):
    """Return the figure, still and interactive."""
    fourier = results["fourier"]
    return plot.figure8(fourier), plot.interactive.fourier_depth(fourier)


def claims(results: Results) -> list[Claim]:
    """Compare the changes over each kind of block with none."""
    found = []
    for name, runs in results["fourier"].items():
        kinds, subsamples = np.array(runs[0].kinds[1:]), runs[0].subsamples[1:]
        groups = {
            "MSAs": (kinds == "msa", "lower"),
            "Convs": ((kinds == "conv") & ~subsamples, "raise"),
            "MLPs": (kinds == "mlp", "raise"),
            "subsampling blocks": (subsamples, "raise"),
        }
        for label, (chosen, verb) in groups.items():
            if chosen.any():
                changes = [averaged(np.diff(run.highest)[chosen]) for run in runs]
                step = (f"{name} {label}", over_runs(changes))
                low, high = (step, ZERO) if verb == "lower" else (ZERO, step)
                text = f"{label} {verb} the high-frequency amplitude"
                found.append(Claim(text, "change at π over a block", low, high, about=2))
    return found


if __name__ == "__main__":
    run(Study("fig8", ("fourier",), draw, claims, NOTE), __doc__)
