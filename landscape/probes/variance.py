"""Spread of feature maps over space: what attention averages out and convolution restores."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from landscape.blocks import Blocks
from landscape.probes.feature_maps import BlockTable, average_maps, table_fields
from landscape.results import Provenance


@dataclass(frozen=True)
class FeatureVariance(BlockTable):
    """Variance of the feature maps of `b` blocks.

    Attributes:
        names: Name of each block.
        kinds: Kind of each.
        depth: `(b,)`: relative depth, from 0 (first) to 1 (last).
        subsamples: `(b,)`: whether the map is smaller than the one before.
        stage: `(b,)`: number of the stage.
        variance: `(b,)`: variance over positions, mean over samples and channels, in squared units
            of the feature.
        stderr: `(b,)`: its standard error over samples.
        provenance: Where the result came from.
    """

    _plot: ClassVar[str | None] = "feature_variance"

    variance: np.ndarray
    stderr: np.ndarray
    provenance: Provenance


def feature_variance(
    model: nn.Module,
    data: Iterable[Any],
    *,
    blocks: Blocks | None = None,
    progress: bool = False,
) -> FeatureVariance:
    """Variance of the feature map of every block (Park & Kim 2022, Fig. 9 and D.1).

    For the map x (n, c, h, w) of a block with P = h·w positions,

        (1 / nc) Σ_nc (1 / (P − 1)) Σ_p (x_ncp − x̄_nc)²,

    the unbiased variance over positions, as in the authors' notebook. It scales with the square of
    the features: compare it along a network, not between networks.

    Cost: one forward pass over the data, in evaluation mode; one map is held at a time.

    Args:
        model: Any vision model; it is left as found.
        data: Re-iterable of batches, each `(x, y)` or a mapping.
        blocks: Blocks of the model; found with the first batch by default. Those without a map
            (the head) are left out.
        progress: Show a progress bar.

    Returns:
        Variance and standard error of each block.

    Raises:
        TypeError: If `data` cannot be iterated over twice, or `blocks` is no `Blocks`.
        ValueError: If `data` is empty or holds images of different sizes, no block has a map, or
            `blocks` are those of another model.
    """
    means = average_maps(
        model,
        data,
        _variances,
        blocks=blocks,
        description="Feature variance",
        progress=progress,
    )
    return FeatureVariance(
        **table_fields(means.blocks),
        variance=np.concatenate(means.means),
        stderr=np.concatenate(means.stderrs),
        provenance=means.provenance,
    )


def _variances(maps: Tensor) -> Tensor:
    """Return the variance over positions, mean over channels, of each sample `(n, 1)`."""
    centred = maps - maps.mean((-2, -1), keepdim=True)
    squares = centred.square_().sum((-2, -1)).double()  # six times as fast as `var` on a CPU
    return squares.mean(1, keepdim=True) / (maps.shape[-2:].numel() - 1)
