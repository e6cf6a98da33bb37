"""Draw the embedded Fashion-MNIST subset: `make_fashion_mnist_mini.py FOLDER [OUTPUT]`.

FOLDER holds the four published files (`train-images-idx3-ubyte.gz` and so on). From each split a
fixed number of images a class is drawn without replacement (NumPy PCG64, seed 0) and written in
the original order and the original format. The same input always gives the same bytes (of the
same zlib).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from landscape.training.formats import read_idx, write_idx

DEFAULT_OUTPUT = Path(__file__).parents[1] / "landscape/training/embedded/fashion_mnist_mini"
PER_CLASS = {"train": 600, "t10k": 200}


def main() -> None:
    """Read the four files, draw the subset, write the four small files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=DEFAULT_OUTPUT)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    for split, per_class in PER_CLASS.items():
        images = read_idx(arguments.folder / f"{split}-images-idx3-ubyte.gz")
        labels = read_idx(arguments.folder / f"{split}-labels-idx1-ubyte.gz")
        drawn = [
            rng.choice(np.flatnonzero(labels == label), size=per_class, replace=False)
            for label in range(10)
        ]
        keep = np.sort(np.concatenate(drawn))
        write_idx(arguments.output / f"{split}-images-idx3-ubyte.gz", images[keep])
        write_idx(arguments.output / f"{split}-labels-idx1-ubyte.gz", labels[keep])


if __name__ == "__main__":
    main()
