"""Figure 9 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022).

    python examples/reproduce_fig9.py               # on the models of Figure 1
    python examples/reproduce_fig9.py --alternet    # and on an AlterNet, minutes more
    python examples/reproduce_fig9.py --quick       # the same path in little

Variance of the feature maps against depth: MSAs (grey) lower it, they average; Convs and MLPs
raise it. `--model timm:NAME` as in Figure 2's example.
"""

import numpy as np
from claims import ZERO, Claim, averaged
from subjects import Results, Study, Subject, run

import landscape
from landscape import plot

NOTE = (
    "Intervals (95 %) of the spread between blocks around the mean of log(variance after / before) "
    "(natural logarithm). One training run a model: no interval covers the choice of seed."
)


def compute(subject: Subject) -> dict[str, landscape.Result]:
    """Return the variance after every block."""
    return {"variance": landscape.feature_variance(subject.model, subject.data, progress=True)}


def draw(results: Results):
    """Return the figure, still and interactive."""
    variance = results["variance"]
    return plot.figure9(variance), plot.interactive.feature_variance(variance)


def claims(results: Results) -> list[Claim]:
    """Compare the logarithmic changes over each kind of block with none."""
    found = []
    for name, result in results["variance"].items():
        change, kinds = np.diff(np.log(result.variance)), np.array(result.kinds[1:])
        for kind, label, verb in (
            ("msa", "MSAs", "lower"),
            ("conv", "Convs", "raise"),
            ("mlp", "MLPs", "raise"),
        ):
            chosen = (kinds == kind) & ~result.subsamples[1:]
            if chosen.any():
                step = (f"{name} {label}", averaged(change[chosen]))
                low, high = (step, ZERO) if verb == "lower" else (ZERO, step)
                text = f"{label} {verb} the variance of feature maps"
                found.append(Claim(text, "log ratio over a block", low, high, about=3))
    return found


if __name__ == "__main__":
    run(Study("fig9", compute, draw, claims, NOTE), __doc__)
