"""Figure 10 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022).

    python examples/reproduce_fig10.py               # on the models of Figure 1
    python examples/reproduce_fig10.py --alternet    # and on an AlterNet, minutes more
    python examples/reproduce_fig10.py --seeds 8     # on 8 runs of each network
    python examples/reproduce_fig10.py --quick       # the same path in little

(a) Similarity (CKA) of all blocks: networks of several stages look like small networks in series.
(b) Accuracy lost with one unit removed: Convs matter at the beginning of a stage, MSAs at its end.
`--model timm:NAME` as in Figure 2's example.
"""

import numpy as np
from claims import ZERO, Claim, Measured, estimated, over_runs
from comparisons import Results
from subjects import Means, Study, run

from landscape import CKA, LesionStudy, plot

NOTE = (
    "Intervals (95 %). With several runs they are those of the mean over runs (Student's t). With "
    "one, CKA: by the jackknife over mini-batches of 100 test images; lesions: paired over test "
    "images; the error of a mean is the mean of the errors, as they go together; none covers the "
    "choice of seed. (a) Near blocks are alike in any network, and those of a stage are near: "
    "pairs are compared with pairs as many blocks apart, and differences averaged over the "
    "distances. ViT has one stage, so it has no stages to compare."
)


def draw(results: Means):
    """Return the figure, and the lesions to hover over."""
    figure = plot.figure10(results["cka"], results["lesion"])
    return figure, plot.interactive.lesion_study(results["lesion"])


def claims(results: Results) -> list[Claim]:
    """Compare similarity within stages and between them, and ends of stages with beginnings."""
    found = []
    for name, runs in results["cka"].items():
        more = [stage_similarity(run) for run in runs]
        if None not in more:
            found.append(
                Claim(
                    "(a) stages are blocks of similar features",
                    "CKA of two blocks of one stage less that of two as far apart of two stages",
                    ZERO,
                    (name, over_runs(more)),
                    about=4,
                )
            )
    for name, runs in results["lesion"].items():
        for kind, label, costly in (("msa", "MSAs", "end"), ("conv", "Convs", "beginning")):
            ends = [ends_of_stages(run, kind) for run in runs]
            if ends[0] is None:
                continue
            side = {end: over_runs([of_run[end] for of_run in ends]) for end in ends[0]}
            cheap = "beginning" if costly == "end" else "end"
            found.append(
                Claim(
                    f"(b) {label} matter most at the {costly} of a stage",
                    "change of accuracy without one",
                    (f"{name} {costly}", side[costly]),
                    (f"{name} {cheap}", side[cheap]),
                    about=4,
                )
            )
    return found


def stage_similarity(result: CKA) -> Measured | None:
    """Return how much more alike two blocks are if of one stage, than two as far apart if not.

    Near blocks are alike in any network, and those of a stage are near: so pairs are compared at
    each distance, in blocks, that there are pairs of both kinds at, and their differences averaged.
    """
    table = result.blocks_a
    body = np.array([kind not in {"stem", "head"} for kind in table.kinds])
    same = table.stage[:, None] == table.stage[None, :]
    order = np.arange(len(body))
    apart = np.where(body[:, None] & body, order - order[:, None], 0)
    differences, errors = [], []
    for distance in range(1, len(body)):
        within, between = (apart == distance) & same, (apart == distance) & ~same
        if within.any() and between.any():
            differences.append(result.values[within].mean() - result.values[between].mean())
            # Errors of pairs go together (same images): the mean error is that of the mean.
            errors.append(np.hypot(result.stderr[within].mean(), result.stderr[between].mean()))
    return estimated(np.mean(differences), np.mean(errors)) if differences else None


def ends_of_stages(result: LesionStudy, kind: str) -> dict[str, Measured] | None:
    """Return the mean loss of accuracy at the first and at the last unit of a kind in a stage."""
    kinds, stages = np.array(result.kinds), result.stage
    chosen: dict[str, list[int]] = {"beginning": [], "end": []}
    for stage in np.unique(stages):
        units = np.flatnonzero((kinds == kind) & (stages == stage))
        if len(units) > 1:
            chosen["beginning"].append(units[0])
            chosen["end"].append(units[-1])
    if len(np.unique(stages)) < 2 or not chosen["end"]:
        return None
    sides = {}
    for side, units in chosen.items():
        stderr = result.delta_accuracy_stderr[units].mean()  # they go together, too
        sides[side] = estimated(result.delta_accuracy[units].mean(), stderr)
    return sides


if __name__ == "__main__":
    run(Study("fig10", ("cka", "lesion"), draw, claims, NOTE), __doc__)
