"""Deterministic weights and images for the reference checks in `reference/models.json`.

Every tensor is a function of its name and shape alone, drawn by `np.random.RandomState`, which
NumPy's compatibility policy has frozen. `models.json` holds names, shapes, parameter counts and the
logits that the published implementations give with these weights on `reference_images()`.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

SMALL_NORMAL = ("pos_embed", "pos_embedding", "cls_token", "relative_position_bias_table")


def reference_table() -> dict[str, dict[str, Any]]:
    path = Path(__file__).parent / "reference" / "models.json"
    return json.loads(path.read_text(encoding="utf-8"))


def reference_images() -> torch.Tensor:
    """Two float32 images, `(2, 3, 32, 32)`."""
    values = np.random.RandomState(0).standard_normal((2, 3, 32, 32))  # noqa: NPY002 (frozen)
    return torch.from_numpy(values.astype(np.float32))


def reference_state(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """A state dict with these names and shapes."""
    return {name: torch.from_numpy(_values(name, tuple(s))) for name, s in shapes.items()}


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    seed = zlib.crc32(name.encode()) & 0x7FFFFFFF
    z = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)  # noqa: NPY002
    if leaf in SMALL_NORMAL:
        z = 0.02 * z
    elif leaf == "running_var":
        z = np.exp(0.1 * z)
    elif len(shape) == 1:
        z = 0.1 * z + (leaf == "weight")  # norms around 1; biases and running means around 0
    else:
        z = z / math.sqrt(math.prod(shape[1:]))
    return z.astype(np.float32)
