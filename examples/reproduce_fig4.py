"""Figure 4 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022).

    python examples/reproduce_fig4.py                  # two CPU cores, offline
    python examples/reproduce_fig4.py --quick          # the same path in little: a smoke test
    python examples/reproduce_fig4.py --preset paper   # the paper's setting, on a GPU

Hessian max eigenvalue spectra at the end of warm-up of a ResNet, a ViT, and a ViT that gets 6 % of
the training images: large datasets are to suppress the negative eigenvalues of ViTs.
"""

from collections.abc import Sequence

from claims import Claim
from comparisons import WARMUP, Arm, Results, Study, run
from hessian_claims import NOTE, smaller_ape, smaller_nep
from matplotlib.figure import Figure

from landscape.plot.seeds import spectra_over_runs

FEW = "ViT, 6 %"


def arms(preset: str) -> Sequence[Arm]:
    """Return the networks."""
    return Arm("ResNet", "ResNet"), Arm("ViT", "ViT"), Arm(FEW, "ViT", share=0.06)


def draw(results: Results) -> Figure:
    """Draw the spectra."""
    return spectra_over_runs(results[WARMUP])


def claims(results: Results) -> list[Claim]:
    """Return the paper's claims next to what was measured."""
    resnet, vit, few = ((name, results[WARMUP][name]) for name in ("ResNet", "ViT", FEW))
    return [
        smaller_nep("ViT is less convex than ResNet", resnet, vit),
        smaller_nep("little data makes ViT less convex", vit, few),
        smaller_ape("ViT has smaller Hessian eigenvalues than ResNet", vit, resnet),
    ]


if __name__ == "__main__":
    run(Study("fig4", arms, (WARMUP,), draw, claims, NOTE), __doc__)
