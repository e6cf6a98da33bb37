"""Figure 11 of "How Do Vision Transformers Work?" (Park & Kim, ICLR 2022).

    python examples/reproduce_fig11.py                      # ResNet-50, ViT-Ti, Alter-ResNet-50
    python examples/reproduce_fig11.py --model timm:NAME    # any model of timm instead
    python examples/reproduce_fig11.py --quick              # the same path on small models

The blocks are found in the models themselves (32x32 images, 100 classes, as for CIFAR-100), and the
build-up rule makes the Alter-ResNet-50: what is drawn is what is trained.
"""

import argparse
import time
from pathlib import Path

import torch
from outputs import save_figure
from torch import nn

from landscape import Architecture, architecture, plot
from landscape.models import alternate, alternet50, create_model

MSAS = (0, 1, 3, 2)  # MSAs per stage of Alter-ResNet-50


def models(quick: bool) -> dict[str, nn.Module]:
    """Return the networks of the figure, at a quarter of their width in little."""
    width, dim = (16, 48) if quick else (64, 192)
    plain = alternet50(width=width, msas=(0, 0, 0, 0), num_classes=100)
    return {
        "ResNet-50": create_model("resnet50", width=width, num_classes=100),
        "ViT-Ti": create_model("vit_tiny", dim=dim, num_classes=100),
        "Alter-ResNet-50": alternate(plain, MSAS),
    }


def compute(args: argparse.Namespace) -> dict[str, Architecture]:
    """Return the blocks of every model."""
    if not args.model:
        example = torch.zeros(1, 3, 32, 32)
        return {n: architecture(m, example=example) for n, m in models(args.quick).items()}
    import timm

    names = [name.removeprefix("timm:") for name in args.model]
    return {name: architecture(timm.create_model(name)) for name in names}


def main() -> None:
    """Compute, save, draw; `--draw` begins with what is saved."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the same path on small models")
    parser.add_argument("--model", action="append", default=[], metavar="timm:NAME")
    parser.add_argument("--out", type=Path, help="folder for the figure")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw saved results again")
    args = parser.parse_args()
    out = args.out or Path("figures/quick" if args.quick else "figures")
    began = time.perf_counter()
    folder = args.draw or out / "fig11"
    if not args.draw:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.npz"):
            stale.unlink()
        for index, (name, result) in enumerate(compute(args).items()):
            result.save(folder / f"{index}_{name}.npz")
    paths = sorted(folder.glob("*_*.npz"))
    if not paths:
        parser.error(f"{folder} holds no results (INDEX_MODEL.npz).")
    results = {path.stem.split("_", 1)[1]: Architecture.load(path) for path in paths}
    figure = plot.figure11(results)
    save_figure(figure, out / "fig11")
    seconds = time.perf_counter() - began
    print(f"wrote {out}/fig11.png, .pdf, fig11/*.npz in {seconds:.0f} s")


if __name__ == "__main__":
    main()
