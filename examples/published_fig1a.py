"""Draw the paper's Fig. 1a from the two loss surfaces that its authors published.

    python examples/published_fig1a.py PATH_VIT PATH_RESNET --out figures/published_fig1a.png

The paths are the authors' `cifar100_vit_ti_losslandscape.csv` and
`cifar100_resnet_dnn_50_losslandscape.csv` (ViT-Ti and ResNet-50 on CIFAR-100). What is drawn is
NLL + λ Σ_p ‖p‖ with their λ = 0.05, and its two terms apart: the difference between the models is
mostly one of weight norms.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from landscape import load_published_surface, plot


def main(arguments: Sequence[str] | None = None) -> Path:
    """Draw the figure and return the path of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vit", type=Path, help="surface of ViT-Ti, a .csv file")
    parser.add_argument("resnet", type=Path, help="surface of ResNet-50, a .csv file")
    parser.add_argument("--out", type=Path, default=Path("figures/published_fig1a.png"))
    parser.add_argument("--weight-decay", type=float, default=0.05, help="λ (default: %(default)s)")
    options = parser.parse_args(arguments)

    surfaces = {
        "ResNet-50": load_published_surface(options.resnet, options.weight_decay),
        "ViT-Ti": load_published_surface(options.vit, options.weight_decay),
    }
    figure = plot.figure1a(surfaces)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(plot.style.rc()):
        figure.savefig(options.out, dpi=200)
    for name, surface in surfaces.items():
        print(
            f"{name}: loss {surface.loss.min():.2f} to {_largest(surface.loss):.2f}, of which NLL "
            f"{surface.nll.min():.2f} to {_largest(surface.nll):.2f}; "
            f"{surface.num_nonfinite} of {surface.loss.size} points not finite"
        )
    print(f"wrote {options.out}")
    return Path(options.out)


def _largest(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)].max())


if __name__ == "__main__":
    main()
