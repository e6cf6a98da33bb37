"""Figure 9 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022).

    python examples/reproduce_fig9.py               # on the models of Figure 1
    python examples/reproduce_fig9.py --alternet    # and on an AlterNet, minutes more
    python examples/reproduce_fig9.py --seeds 8     # on 8 runs of each network
    python examples/reproduce_fig9.py --quick       # the same path in little

Variance of the feature maps against depth: MSAs (violet) lower it, they average; Convs and MLPs
raise it. `--model timm:NAME` as in Figure 2's example.
"""

import numpy as np
from claims import ZERO, Claim, averaged, over_runs
from comparisons import Results
from subjects import Means, Study, run

from landscape import plot

NOTE = (
    "Intervals (95 %) of the mean of log(variance after / before) over blocks (natural logarithm). "
    "With several runs they are those of the mean over runs (Student's t); with one they are those "
    "of the spread between blocks, and none covers the choice of seed."
)


def draw(results: Means):
    """Return the figure, still and interactive."""
    variance = results["variance"]
    return plot.figure9(variance), plot.interactive.feature_variance(variance)


def claims(results: Results) -> list[Claim]:
    """Compare the logarithmic changes over each kind of block with none."""
    found = []
    for name, runs in results["variance"].items():
        kinds, subsamples = np.array(runs[0].kinds[1:]), runs[0].subsamples[1:]
        for kind, label, verb in (
            ("msa", "MSAs", "lower"),
            ("conv", "Convs", "raise"),
            ("mlp", "MLPs", "raise"),
        ):
            chosen = (kinds == kind) & ~subsamples
            if chosen.any():
                changes = [averaged(np.diff(np.log(run.variance))[chosen]) for run in runs]
                step = (f"{name} {label}", over_runs(changes))
                low, high = (step, ZERO) if verb == "lower" else (ZERO, step)
                text = f"{label} {verb} the variance of feature maps"
                found.append(Claim(text, "log ratio over a block", low, high, about=3))
    return found


if __name__ == "__main__":
    run(Study("fig9", ("variance",), draw, claims, NOTE), __doc__)
