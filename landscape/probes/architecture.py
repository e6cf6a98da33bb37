"""What a model is made of, as a table to draw: blocks in order, with their kinds and maps."""

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from landscape._checks import check_module
from landscape.blocks import Blocks, check_blocks
from landscape.probes.feature_maps import BlockTable, table_fields
from landscape.provenance import forward_provenance
from landscape.results import Provenance


@dataclass(frozen=True)
class Architecture(BlockTable):
    """The `b` blocks of a model and the maps that they compute.

    Attributes:
        names: Name of each block.
        kinds: Kind of each.
        depth: `(b,)`: relative depth, from 0 (first) to 1 (last).
        subsamples: `(b,)`: whether the map is smaller than the one before.
        stage: `(b,)`: number of the stage.
        channels: `(b,)`: channels of the output; classes for the head.
        grid: `(b, 2)`: rows and columns of its map; 0 and 0 without one.
        provenance: Where the table came from; the parameters of the whole model are counted there.
    """

    _plot: ClassVar[str | None] = "block_diagram"

    channels: np.ndarray
    grid: np.ndarray
    provenance: Provenance


def architecture(
    model: nn.Module, *, blocks: Blocks | None = None, example: Any = None
) -> Architecture:
    """Return the blocks of a model as a table (drawn as in Park & Kim, 2022, Fig. 11).

    The blocks are those of `Blocks`, found in the dataflow of a forward pass of three samples.
    Cost: that pass, several where the model keeps tensors between calls; none where `blocks` is
    given.

    Args:
        model: Any vision model; it is left as found.
        blocks: Blocks of the model; found by default.
        example: A batch of inputs of the size that the model takes, where `Blocks` cannot guess it.

    Returns:
        The table.

    Raises:
        TypeError: If `model` is no module, or `blocks` no `Blocks`.
        ValueError: If no block is found, no example fits, or `blocks` are those of another model.
    """
    start = time.perf_counter()
    check_module(model)
    check_blocks("blocks", model, blocks)
    blocks = Blocks(model, example=example) if blocks is None else blocks
    found = list(blocks)
    return Architecture(
        **table_fields(found),
        channels=np.array([block.channels for block in found], dtype=np.int64),
        grid=np.array([block.grid or (0, 0) for block in found], dtype=np.int64),
        provenance=forward_provenance(
            blocks.model, num_samples=0, seconds=time.perf_counter() - start
        ),
    )
