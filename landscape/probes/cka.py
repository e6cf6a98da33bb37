"""Centred kernel alignment: how similar the blocks of one or two networks represent the data.

For features X (n, p) of one block and Y (n, q) of another, with the linear kernels K = XXᵀ and
L = YYᵀ whose diagonals are set to zero (K̃, L̃), the unbiased estimate of the Hilbert–Schmidt
independence criterion (Nguyen et al. 2021, arXiv 2010.15327, eq. 3) is

    HSIC₁(K, L) = [tr(K̃L̃) + (1ᵀK̃1)(1ᵀL̃1) / ((n−1)(n−2)) − 2 · 1ᵀK̃L̃1 / (n−2)] / (n(n−3)),

    CKA = Σ HSIC₁(K, L) / √(Σ HSIC₁(K, K) · Σ HSIC₁(L, L)),

with sums over mini-batches (eq. 4), each weighted by its size n. It is the inner product

    HSIC₁(K, L) = ⟨A, B⟩ / (n(n−3)),
    A_ij = K̃_ij − (K̃1)_i / (n−2) − (K̃1)_j / (n−2) + 1ᵀK̃1 / ((n−1)(n−2)) for i ≠ j, else 0

of U-centred matrices (Székely & Rizzo 2014, arXiv 1310.2926). So a mini-batch leaves one vector a
block, and all pairs of blocks are one matrix product.
"""

import time
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from landscape._checks import check_module
from landscape.blocks import Block, Blocks, check_blocks
from landscape.probes.feature_maps import BlockTable, at_least_single, table_fields
from landscape.probes.scores import tracked_batches
from landscape.provenance import forward_provenance
from landscape.restore import exclusive, untouched
from landscape.results import Provenance, Result
from landscape.switches import rounding

_PART = 1 << 18  # numbers of a feature at a time on a CPU: they stay in cache
_FEWEST = 4  # samples in a batch: the estimate divides by n − 3


@dataclass(frozen=True)
class CKA(Result):
    """Similarity of `a` blocks of one network to `b` blocks of the same or another one.

    Attributes:
        values: `(a, b)`: CKA, at most 1; 0 for independent features, below 0 by chance. NaN where
            the features of a block are the same for all samples, or not finite.
        stderr: `(a, b)`: jackknife standard error over mini-batches, weighted by their sizes; NaN
            for fewer than two.
        blocks_a: The `a` blocks.
        blocks_b: The `b` blocks.
        hsic: `(m, a, b)`: HSIC₁ of each mini-batch.
        hsic_a: `(m, a)`: HSIC₁ of each block of the first network with itself.
        hsic_b: `(m, b)`: HSIC₁ of each block of the second network with itself.
        batch_sizes: `(m,)`: samples in each mini-batch.
        num_skipped: Samples left out, in batches of fewer than 4.
        provenance: Where the result came from.
    """

    _plot: ClassVar[str | None] = "cka"

    values: np.ndarray
    stderr: np.ndarray
    blocks_a: BlockTable
    blocks_b: BlockTable
    hsic: np.ndarray
    hsic_a: np.ndarray
    hsic_b: np.ndarray
    batch_sizes: np.ndarray
    num_skipped: int
    provenance: Provenance


def cka(
    model_a: nn.Module,
    data: Iterable[Any],
    model_b: nn.Module | None = None,
    *,
    blocks_a: Blocks | None = None,
    blocks_b: Blocks | None = None,
    progress: bool = False,
) -> CKA:
    """Linear CKA between all blocks of one or two networks (Park & Kim 2022, Fig. 10a, D.3).

    The formulas stand at the top of this module. The features of each mini-batch are centred
    first: the estimate does not change, its rounding error does, by orders of magnitude. Maps are
    flattened to `(n, c·h·w)`, without tokens that are no part of a map (class, registers);
    the head takes part. Only samples of one mini-batch are compared: HSIC₁ is unbiased whatever
    its size, but use a hundred samples or so, in random order (sorted by label, a batch would tell
    little of how classes differ).

    Cost: one forward pass of each network over the data, in evaluation mode, and n²·p
    multiplications for p features of a block. One feature is held at a time, and n² / 2 numbers
    in float64 for each block of a mini-batch.

    Args:
        model_a: Any vision model; it is left as found.
        data: Re-iterable of batches of at least 4 samples, each `(x, y)` or a mapping. Smaller
            ones after the first are left out with a warning, and counted.
        model_b: Model to compare it with, on the same data; `model_a` itself by default.
        blocks_a: Blocks of `model_a`; found with the first batch by default.
        blocks_b: Blocks of `model_b`; found with the first batch by default.
        progress: Show a progress bar.

    Returns:
        CKA and standard error of each pair of blocks.

    Raises:
        TypeError: If `data` cannot be iterated over twice, or blocks are no `Blocks`.
        ValueError: If the first batch has fewer than 4 samples, `data` is empty, a block has
            not one feature a sample, blocks are those of another model, or `blocks_b` is given
            without `model_b`.
    """
    check_module(model_a, "model_a")
    if model_b is not None:
        check_module(model_b, "model_b")
    if blocks_b is not None and model_b is None:
        raise ValueError("`blocks_b` must be None without `model_b`, got blocks; pass `model_b`.")
    started = time.perf_counter()
    hsic: list[Tensor] = []
    own: list[tuple[Tensor, Tensor]] = []
    sizes: list[int] = []
    num_skipped = 0
    batches = tracked_batches(model_a, data, "CKA", progress, model_b)
    check_blocks("blocks_a", model_a, blocks_a)
    if model_b is not None:
        check_blocks("blocks_b", model_b, blocks_b)
    # Not inference_mode: a model that caches what it computes could not train on.
    with ExitStack() as stack, torch.no_grad():
        # In one order for all threads, or two of them might wait for each other.
        models = sorted({model_a, model_a if model_b is None else model_b}, key=_number)
        for context in (exclusive, untouched):
            for model in models:
                stack.enter_context(context(model))
        for inputs, _, size in batches:
            if size < _FEWEST:
                _check_first(sizes, size)
                num_skipped += size
                continue
            blocks_a = Blocks(model_a, example=inputs) if blocks_a is None else blocks_a
            grams_a = grams_b = _grams(blocks_a, inputs, size)
            if model_b is not None:
                blocks_b = Blocks(model_b, example=inputs) if blocks_b is None else blocks_b
                grams_b = _grams(blocks_b, inputs, size).to(grams_a.device)
            scale = 2 / (size * (size - 3))  # the vectors hold half of each symmetric matrix
            hsic.append(scale * grams_a @ grams_b.T)
            own.append((scale * grams_a.square().sum(1), scale * grams_b.square().sum(1)))
            sizes.append(size)
    if num_skipped:
        warnings.warn(
            f"{num_skipped} of {sum(sizes) + num_skipped} samples came in batches of fewer than "
            f"{_FEWEST}, for which CKA has no estimate: they were left out.",
            stacklevel=2,
        )
    pairs = torch.stack(hsic).cpu().numpy()
    own_a, own_b = (torch.stack(each).cpu().numpy() for each in zip(*own, strict=True))
    values, stderr = _ratio(pairs, own_a, own_b, np.array(sizes))
    table = BlockTable(**table_fields(blocks_a or ()))
    return CKA(
        values=values,
        stderr=stderr,
        blocks_a=table,
        blocks_b=table if blocks_b is None else BlockTable(**table_fields(blocks_b)),
        hsic=pairs,
        hsic_a=own_a,
        hsic_b=own_b,
        batch_sizes=np.array(sizes),
        num_skipped=num_skipped,
        provenance=forward_provenance(
            model_a,
            num_samples=sum(sizes),
            seconds=time.perf_counter() - started,
            num_forwards=1 if model_b is None else 2,
            settings={"model_b": None if model_b is None else type(model_b).__name__},
        ),
    )


def _number(model: nn.Module) -> int:
    return id(getattr(model, "_orig_mod", model))  # of what `exclusive` locks


def _check_first(sizes: list[int], size: int) -> None:
    """Refuse a first batch that is too small: the others will hardly be larger."""
    if not sizes:
        raise ValueError(
            f"`data` must yield batches of at least {_FEWEST} samples for CKA, got {size} in the "
            "first; use a larger batch size, a hundred or so."
        )


def _grams(blocks: Blocks, inputs: Any, size: int) -> Tensor:
    """Return the U-centred Gram matrix of every block, one triangle each, `(b, n(n−1)/2)`."""
    grams: dict[str, Tensor] = {}

    def add(block: Block, feature: Tensor) -> None:
        if len(feature) != size:  # windows or patches of a sample each by itself
            raise ValueError(
                f"`model_a` and `model_b` must have one feature a sample, got {len(feature)} for "
                f"{size} samples at block {block.name!r}; choose others, as in `blocks_a=Blocks("
                "model_a, [names])`."
            )
        grams[block.name] = _gram(at_least_single(feature))

    blocks.visit(inputs, add)
    return torch.stack([grams[block.name] for block in blocks])


def _gram(feature: Tensor) -> Tensor:
    n, eps = len(feature), torch.finfo(feature.dtype).eps
    gram = feature.new_zeros(n, n, dtype=torch.float64)
    most = _PART if feature.device.type == "cpu" else 1 << 26
    channels = max(1, most // max(1, feature[:, :1].numel()))
    for part in torch.split(feature, channels, dim=1):
        x = part.flatten(1)
        rounded = 4 * eps * _norms(x)  # what may be left of equal entries
        x = x - x.mean(0)
        x.masked_fill_(_norms(x) <= rounded, 0)  # NaN stays NaN
        with rounding("full"):  # as the caller lets a GPU round are the features, not products
            gram += x @ x.T
    gram.fill_diagonal_(0)
    rows = gram.sum(1) / (n - 2)
    centred = gram - rows[:, None] - rows + rows.sum() / (n - 1)
    above = torch.triu_indices(n, n, offset=1, device=gram.device)
    return centred[above[0], above[1]]


def _norms(x: Tensor) -> Tensor:
    return x.square().sum(0).sqrt()  # on a CPU 15 times as fast as `x.norm(dim=0)`


def _ratio(
    hsic: np.ndarray, own_a: np.ndarray, own_b: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return CKA from sums over mini-batches, and its delete-one jackknife standard error.

    With weights w_i that sum to 1, mini-batch i draws the value θ by d_i = (1 − w_i)(θ − θ₋ᵢ). Of a
    mean Σ w_i x_i that is w_i (x_i − θ), and Σ d_i² / (1 − Σ w_i²) has no bias where the variance
    of x_i goes as 1 / w_i. With equal weights it is the usual one.
    """
    weights = sizes / sizes.sum()
    parts = [np.tensordot(weights, each, 1) for each in (hsic, own_a, own_b)]
    values = _alignment(*parts)
    if len(sizes) < 2:
        return values, np.full_like(values, np.nan)
    left = [
        _alignment(
            *(part - w * each[i] for part, each in zip(parts, (hsic, own_a, own_b), strict=True))
        )
        for i, w in enumerate(weights)
    ]
    drawn = (1 - weights)[:, None, None] * (values - left)
    return values, np.sqrt(np.square(drawn).sum(0) / (1 - np.square(weights).sum()))


def _alignment(hsic: np.ndarray, own_a: np.ndarray, own_b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        values: np.ndarray = hsic / np.sqrt(np.outer(own_a, own_b))
    return values
