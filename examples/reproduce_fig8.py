"""Figure 8 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022).

    python examples/reproduce_fig8.py               # on the models of Figure 1
    python examples/reproduce_fig8.py --alternet    # and on an AlterNet, minutes more
    python examples/reproduce_fig8.py --quick       # the same path in little

High-frequency amplitude (at π, relative to that at 0) against depth: MSAs (grey) lower it, Convs,
MLPs and subsampling (blue) raise it. `--model timm:NAME` as in Figure 2's example.
"""

import numpy as np
from claims import ZERO, Claim, averaged
from subjects import Results, Study, Subject, run

import landscape
from landscape import plot

NOTE = (
    "Intervals (95 %) of the spread between blocks around their mean; one alone has none. One "
    "training run a model: no interval covers the choice of seed. Maps with an even side have a "
    "bin at π, where noise reads ½ ln 2 lower than elsewhere; odd ones end just before it."
)


def compute(subject: Subject) -> dict[str, landscape.Result]:
    """Return the amplitudes of every block."""
    return {"fourier": landscape.fourier_amplitude(subject.model, subject.data, progress=True)}


def draw(results: Results):
    """Return the figure, still and interactive."""
    fourier = results["fourier"]
    return plot.figure8(fourier), plot.interactive.fourier_depth(fourier)


def claims(results: Results) -> list[Claim]:
    """Compare the changes over each kind of block with none."""
    found = []
    for name, result in results["fourier"].items():
        change, kinds = np.diff(result.highest), np.array(result.kinds[1:])
        groups = {
            "MSAs": (kinds == "msa", "lower"),
            "Convs": ((kinds == "conv") & ~result.subsamples[1:], "raise"),
            "MLPs": (kinds == "mlp", "raise"),
            "subsampling blocks": (result.subsamples[1:], "raise"),
        }
        for label, (chosen, verb) in groups.items():
            if chosen.any():
                step = (f"{name} {label}", averaged(change[chosen]))
                low, high = (step, ZERO) if verb == "lower" else (ZERO, step)
                text = f"{label} {verb} the high-frequency amplitude"
                found.append(Claim(text, "change at π over a block", low, high, about=2))
    return found


if __name__ == "__main__":
    run(Study("fig8", compute, draw, claims, NOTE), __doc__)
