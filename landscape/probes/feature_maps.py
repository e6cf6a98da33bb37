"""What the probes of features share: the table of the blocks, and means over samples of maps."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from landscape.blocks import Block, Blocks, check_blocks
from landscape.probes.scores import Moments, tracked_batches
from landscape.provenance import forward_provenance
from landscape.restore import untouched
from landscape.results import Provenance, Result

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BlockTable(Result):
    """The `b` blocks that a result speaks of, in network order.

    Attributes:
        names: Name of each block.
        kinds: Kind of each: `"stem"`, `"conv"`, `"msa"`, `"mlp"`, `"pool"`, `"head"`, `"other"`.
        depth: `(b,)`: relative depth in the network, from 0 (first) to 1 (last).
        subsamples: `(b,)`: whether the map is smaller than the one before.
        stage: `(b,)`: number of the stage, which changes where the map gets smaller.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    depth: np.ndarray
    subsamples: np.ndarray
    stage: np.ndarray


def table_fields(blocks: Iterable[Block]) -> dict[str, Any]:
    """Return the fields of a `BlockTable` for blocks in their order."""
    blocks = list(blocks)
    return {
        "names": tuple(block.name for block in blocks),
        "kinds": tuple(block.kind for block in blocks),
        "depth": np.array([block.depth for block in blocks], dtype=np.float64),
        "subsamples": np.array([block.subsamples for block in blocks], dtype=bool),
        "stage": np.array([block.stage for block in blocks], dtype=np.int64),
    }


@dataclass(frozen=True)
class MapMeans:
    """Means over samples of what was read off the map of each block.

    Attributes:
        blocks: The `b` blocks that have a map.
        sizes: Height and width of the map of each.
        means: `b` arrays, each the mean over samples of the values of one block.
        stderrs: `b` arrays: its standard error over samples, NaN for one sample.
        provenance: Where they came from.
    """

    blocks: tuple[Block, ...]
    sizes: tuple[tuple[int, int], ...]
    means: tuple[np.ndarray, ...]
    stderrs: tuple[np.ndarray, ...]
    provenance: Provenance


def average_maps(
    model: nn.Module,
    data: Iterable[Any],
    reduce: Reduce,
    *,
    blocks: Blocks | None,
    description: str,
    progress: bool,
    settings: dict[str, Any] | None = None,
) -> MapMeans:
    """Return means and standard errors over all samples of a function of each map.

    One pass over the data; each map is reduced as it appears, and its sums stay on the device, in
    float64, until the end. Maps of half precision are reduced in float32.

    Args:
        model: The model.
        data: Re-iterable of batches.
        reduce: Map of a block `(n, c, h, w)` to values of each sample `(n, l)`.
        blocks: Blocks of the model; found with the first batch by default.
        description: Text in front of the progress bar.
        progress: Show the bar.
        settings: Arguments of the probe, for the provenance.

    Raises:
        TypeError: If `blocks` is no `Blocks`.
        ValueError: If no block has a map, its size is not the same in all batches, or `blocks`
            are those of another model.
    """
    started = time.perf_counter()
    moments: dict[str, Moments] = {}
    sizes: dict[str, tuple[int, int]] = {}

    def add(block: Block, feature: Tensor) -> None:
        if not block.is_map:
            return
        height, width = feature.shape[-2:]
        if sizes.setdefault(block.name, (height, width)) != (height, width):
            raise ValueError(
                f"`data` must hold inputs of one size, got maps of {sizes[block.name]} and "
                f"{(height, width)} in {block.name!r}; resize the images or crop them."
            )
        values = reduce(at_least_single(feature))
        values = values.view(size, -1, values.shape[1]).mean(1)  # over the windows of a sample
        moments.setdefault(block.name, Moments()).add(values)

    batches, num_samples = tracked_batches(model, data, description, progress), 0
    check_blocks("blocks", model, blocks)
    # Not inference_mode: a model that caches what it computes could not train on.
    with untouched(model), torch.no_grad():
        for inputs, _, size in batches:
            blocks = Blocks(model, example=inputs) if blocks is None else blocks
            blocks.visit(inputs, add)
            num_samples += size
    mapped = tuple(block for block in blocks or () if block.name in moments)
    if not mapped:
        raise ValueError(
            "`blocks` must hold a block with a map (n, c, h, w), got none; name modules that "
            "return maps, as in Blocks(model, [names])."
        )
    both = [moments[block.name].result() for block in mapped]  # (2, l) each
    means, stderrs = torch.cat(both, dim=1).cpu().numpy()  # the one transfer
    cuts = np.cumsum([each.shape[1] for each in both])[:-1]
    return MapMeans(
        blocks=mapped,
        sizes=tuple(sizes[block.name] for block in mapped),
        means=tuple(np.split(means, cuts)),
        stderrs=tuple(np.split(stderrs, cuts)),
        provenance=forward_provenance(
            model,
            num_samples=num_samples,
            seconds=time.perf_counter() - started,
            num_forwards=1,
            settings=settings,
        ),
    )


def at_least_single(feature: Tensor) -> Tensor:
    """Return a feature in float32, or as it is in float64."""
    return feature if feature.dtype == torch.float64 else feature.float()
