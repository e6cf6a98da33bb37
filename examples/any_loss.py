"""How flat and how convex the loss of any vision model is: three panels in one figure, and numbers.

    python examples/any_loss.py timm:convnext_atto            # 4 minutes of one CPU core
    python examples/any_loss.py timm:convnext_atto --quick    # one minute
    python examples/any_loss.py torchvision:resnet18 --weights resnet18.pth \
        --images imagenet/train --weight-decay 1e-4

(a) the loss around the weights, in a plane of two random directions; (b) the largest Hessian
eigenvalues of each mini-batch, with NEP (non-convexity) and APE (sharpness); (c) the density and
both edges of the Hessian over all images. Without `--weights` the model is a random one; without
`--images` so are the images and labels, four mini-batches from seed 0: both run offline. Measure
with the weight decay, and on the images, that the model was trained with.

Most of the time goes to Hessian products of a mini-batch: the first command makes 475 of 2 images
(3.7 million parameters, 224 pixels), the second 116. With `OMP_NUM_THREADS=1` they took 237 and
50 s of processor time on an AMD EPYC; on cores that others use, two threads wait for each other and
take longer.
"""

import matplotlib as mpl
import torch
from any_model import load, parser
from matplotlib.figure import Figure

import landscape
from landscape.plot import style
from landscape.training import FolderImages


def main() -> None:
    """Build the model, measure, save, draw."""
    options = parser(__doc__.split("\n")[0], max_images=64, out="any_loss.png")
    options.add_argument(
        "--batch-size",
        type=int,
        help="of a mini-batch: by default 16 as in the paper, 2 where images are random",
    )
    options.add_argument("--weight-decay", type=float, default=0.0, help="that of the training")
    options.add_argument("--points", type=int, help="of the surface, along each axis: 11")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument(
        "--quick",
        action="store_true",
        help="2 mini-batches, 5 x 5 points, 2 eigenvalues, no search for missed ones",
    )
    args = options.parse_args()

    torch.manual_seed(0)
    model, images = load(args)
    size = images["size"]
    model.to(args.device)
    if args.images:
        folder = FolderImages(args.images, max_images=args.max_images, **images)
        data = mixed(folder, args.batch_size or 16)
    else:
        n = args.batch_size or 2
        data = [(torch.randn(n, 3, size, size), torch.randint(10, (n,))) for _ in range(4)]
    data = data[:2] if args.quick else data
    points = args.points or (5 if args.quick else 11)
    common = {"objective": landscape.Objective(weight_decay=args.weight_decay), "progress": True}
    search = {"k": 2, "certify": False} if args.quick else {}
    results = {
        "surface": landscape.loss_surface(model, data, points=points, **common),
        "max_spectrum": landscape.hessian_max_spectrum(model, data, **search, **common),
        "spectrum": landscape.hessian_spectrum(model, data, **search, **common),
    }
    for kind, result in results.items():
        result.save(args.out.with_name(f"{args.out.stem}_{kind}"))
        print(result)
    with mpl.rc_context(style.rc()):
        figure = Figure((style.TEXT_WIDTH, 1.9), layout="constrained")
        panels = figure.subplots(1, 3)
        results["surface"].plot(ax=panels[0], kind="contour")
        results["max_spectrum"].plot(ax=panels[1])
        results["spectrum"].plot(ax=panels[2])
        figure.savefig(args.out)
    print(f"wrote {args.out}, {args.out.stem}_*.npz")


def mixed(images: FolderImages, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return mini-batches of all classes, where a folder has one class after the other."""
    x, y = (torch.cat(parts) for parts in zip(*images, strict=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return list(zip(x[order].split(batch_size), y[order].split(batch_size), strict=True))


if __name__ == "__main__":
    main()
