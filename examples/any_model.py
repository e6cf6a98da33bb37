"""What the layers of any vision model do: Fourier, variance and lesion panels in one figure.

    python examples/any_model.py timm:convnext_atto
    python examples/any_model.py torchvision:resnet18 --weights resnet18.pth --images imagenet/val
    python examples/any_model.py torchvision:vgg11 --blocks "features.*"

Without `--weights` the model is a random one; without `--images` so are the images (so that lesions
mean nothing), from seed 0: both run offline. Where no residual blocks are found, or none with a
map, `--blocks` names modules; there are no lesions then.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

import landscape
from landscape import plot
from landscape.training import FolderImages


def main() -> None:
    """Build the model, measure, draw."""
    arguments = parser(__doc__.split("\n")[0], max_images=200, out="any_model.png")
    arguments.add_argument("--blocks", nargs="+", help="names or patterns of modules")
    args = arguments.parse_args()
    torch.manual_seed(0)
    model, images = load(args)
    size = images["size"]
    if args.images:
        data = FolderImages(args.images, batch_size=25, max_images=args.max_images, **images)
    else:
        data = [(torch.randn(8, 3, size, size), torch.arange(8))]
    blocks = landscape.Blocks(model, args.blocks)
    print(blocks)
    panels = {
        "Fourier": landscape.fourier_amplitude(model, data, blocks=blocks, progress=True),
        "Variance": landscape.feature_variance(model, data, blocks=blocks, progress=True),
    }
    if not args.blocks:
        panels["Lesion"] = landscape.lesion_study(model, data, blocks=blocks, progress=True)
    plot.panels(panels).savefig(args.out)
    print(f"wrote {args.out}")


def parser(description: str, *, max_images: int, out: str) -> argparse.ArgumentParser:
    """Return a parser of which model, which images, and where the figure goes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="timm:NAME or torchvision:NAME")
    parser.add_argument("--weights", help="file with a state dict")
    parser.add_argument("--images", help="folder of images, one class a folder")
    parser.add_argument("--max-images", type=int, default=max_images)
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def load(args: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return the model that was asked for, and what `FolderImages` makes its images by."""
    package, _, name = args.model.partition(":")
    if package not in ("timm", "torchvision") or not name:
        raise SystemExit(f"model must be timm:NAME or torchvision:NAME, got {args.model}")
    model, images = build(package, name)
    if args.weights:
        model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
    return model, images


def build(package: str, name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return a model by name, and the size and normalisation of its images."""
    if package == "timm":
        import timm

        model = timm.create_model(name)
        return model, images_of(timm.data.resolve_model_data_config(model))
    from torchvision import models

    return models.get_model(name), {"size": 299 if name == "inception_v3" else 224}


def images_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return how `FolderImages` makes the images that a configuration of timm's wants."""
    size = config["input_size"][-1]
    return {
        "size": size,
        "resize": math.floor(size / config["crop_pct"]),  # as timm does
        "interpolation": config["interpolation"],
        "crop_mode": config["crop_mode"],
        "mean": config["mean"],
        "std": config["std"],
    }


if __name__ == "__main__":
    main()
