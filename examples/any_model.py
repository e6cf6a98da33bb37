"""What the layers of any vision model do: Fourier, variance and lesion panels in one figure.

    python examples/any_model.py timm:convnext_atto
    python examples/any_model.py torchvision:resnet18 --weights resnet18.pth --images imagenet/val

Without `--weights` the model is a random one; without `--images` so are the images (so that lesions
mean nothing), from seed 0: both run offline.
"""

import argparse
from pathlib import Path

import torch

import landscape
from landscape import plot
from landscape.training import FolderImages


def main() -> None:
    """Build the model, measure, draw."""
    args = parser(__doc__.split("\n")[0], max_images=200, out="any_model.png").parse_args()
    torch.manual_seed(0)
    model, size = load(args)
    if args.images:
        data = FolderImages(args.images, size=size, batch_size=25, max_images=args.max_images)
    else:
        data = [(torch.randn(8, 3, size, size), torch.arange(8))]
    blocks = landscape.Blocks(model)
    print(blocks)
    panels = {
        "Fourier": landscape.fourier_amplitude(model, data, blocks=blocks, progress=True),
        "Variance": landscape.feature_variance(model, data, blocks=blocks, progress=True),
        "Lesion": landscape.lesion_study(model, data, blocks=blocks, progress=True),
    }
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


def load(args: argparse.Namespace) -> tuple[torch.nn.Module, int]:
    """Return the model that was asked for and the side of its images."""
    model, size = build(*args.model.split(":", 1))
    if args.weights:
        model.load_state_dict(torch.load(args.weights, weights_only=True))
    return model, size


def build(package: str, name: str) -> tuple[torch.nn.Module, int]:
    """Return a model by name and the side of its images."""
    if package == "timm":
        import timm

        model = timm.create_model(name)
        return model, model.pretrained_cfg["input_size"][-1]
    from torchvision import models

    return models.get_model(name), 224


if __name__ == "__main__":
    main()
