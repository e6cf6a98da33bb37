"""The loss surfaces that Park & Kim (2022) published beside their code, as `LossSurface`.

Their files, `*_losslandscape.csv`, hold one row per point of the grid and no header. The columns,
in order, are those of `COLUMNS`: coordinates, the sums of L1 and L2 norms of the parameters, and
the measurements on augmented training data. Fig. 1a was drawn from NLL + λ Σ_p ‖p‖ with λ = 0.05.
"""

import os
from pathlib import Path

import numpy as np

from landscape._checks import check_at_least
from landscape.probes.directions import Directions
from landscape.probes.surface import LossSurface
from landscape.results import Provenance

# fmt: off
COLUMNS = (
    "x", "y", "l1", "l2", "nll", "cutoff", "cutoff90", "accuracy", "accuracy90", "uncertainty",
    "uncertainty90", "iou", "iou90", "freq", "freq90", "top5", "brier", "ece", "ecse",
)
# fmt: on


def load_published_surface(path: str | os.PathLike[str], weight_decay: float = 0.05) -> LossSurface:
    """Read a published surface.

    The order of the rows does not matter: the axes are the distinct coordinates in the file. The
    files have no standard errors and no directions; these were random ones, rescaled by the rule
    `"input"` of `random_directions`.

    Args:
        path: A `*_losslandscape.csv` file.
        weight_decay: λ, the factor of the sum of norms.

    Returns:
        The surface; `nll_stderr` is NaN, `l2` is λ Σ_p ‖p‖.

    Raises:
        ValueError: If a row does not have 19 numbers, or the rows do not make a full grid with
            every point once.
    """
    check_at_least("weight_decay", weight_decay, 0)
    table = _read(Path(path))
    x, i = np.unique(table[:, 0].round(9), return_inverse=True)
    y, j = np.unique(table[:, 1].round(9), return_inverse=True)
    count = np.zeros((len(x), len(y)), dtype=np.int64)
    np.add.at(count, (i, j), 1)
    if not (count == 1).all():
        raise ValueError(
            f"`path` must hold every point of a grid once, got {len(table)} rows for "
            f"{len(x)} × {len(y)} coordinates, {np.sum(count == 0)} points missing and "
            f"{np.sum(count > 1)} repeated, in {str(path)!r}; fetch the file again."
        )
    grid = np.empty((len(x), len(y), len(COLUMNS)))
    grid[i, j] = table
    column = {name: grid[..., index].copy() for index, name in enumerate(COLUMNS)}
    l2 = weight_decay * column["l2"]
    loss = column["nll"] + l2
    return LossSurface(
        x=x,
        y=y,
        nll=column["nll"],
        nll_stderr=np.full_like(loss, np.nan),
        l2=l2,
        loss=loss,
        accuracy=column["accuracy"],
        ece=column["ece"],
        num_nonfinite=int(np.sum(~np.isfinite(loss))),
        directions=Directions(vectors=({}, {}), kind="random", normalization="input"),
        provenance=Provenance(
            objective=f"NLL + {weight_decay:g} Σ‖p‖, published by Park & Kim (2022)",
            settings={"file": Path(path).name, "l2": "norms", "weight_decay": weight_decay},
        ),
    )


def _read(path: Path) -> np.ndarray:
    rows = []
    with path.open(
        encoding="utf-8-sig", errors="replace"
    ) as file:  # what is no number is told below
        for number, line in enumerate(file, start=1):
            row = line.strip()
            try:
                values = [float(cell) for cell in row.split(",")]
            except ValueError:
                values = []
            if row and (len(values) != len(COLUMNS) or not np.isfinite(values[:2]).all()):
                raise ValueError(
                    f"`path` must hold {len(COLUMNS)} numbers a row, the coordinates finite, got "
                    f"{row[:40]!r} in row {number} of {str(path)!r}; is it a published "
                    "`*_losslandscape.csv`?"
                )
            if row:
                rows.append(values)
    if not rows:
        raise ValueError(f"`path` must hold at least one row, got none in {str(path)!r}.")
    return np.array(rows)
