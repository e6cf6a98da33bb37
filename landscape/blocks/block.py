"""One block, and the blocks of a trace."""

from dataclasses import dataclass

from landscape.blocks.layout import Layout
from landscape.blocks.structure import Kind, Unit
from landscape.blocks.tracing import Trace


@dataclass(frozen=True)
class Block:
    """One block of a model.

    Attributes:
        name: Unique name: the module that is the block, or that computes its branch.
        kind: `"stem"`, `"conv"`, `"msa"`, `"mlp"`, `"pool"`, `"head"` or `"other"`.
        depth: Relative depth, 0 for the first block and 1 for the last map.
        stage: Number of blocks up to this one that made the map smaller, the stem aside.
        subsamples: Whether its map is smaller than that of the block before.
        is_map: Whether its output is a map (n, c, h, w); that of the head is (n, classes), and
            windows by tokens (NesT) or patches by pixels (MobileViTv2) are none.
        grid: Rows and columns of its map, `None` without one.
        channels: Channels of its output.
    """

    name: str
    kind: Kind
    depth: float
    stage: int
    subsamples: bool
    is_map: bool
    grid: tuple[int, int] | None
    channels: int


@dataclass(frozen=True)
class Traced:
    """What is known of the passes with inputs of one shape: where each block is."""

    trace: Trace
    units: tuple[Unit, ...]
    layouts: tuple[Layout, ...]


def describe(traced: Traced) -> tuple[Block, ...]:
    """Return the blocks of a trace."""
    body = sum(unit.kind != "head" for unit in traced.units)
    blocks: list[Block] = []
    area = stage = 0
    for position, (unit, layout) in enumerate(zip(traced.units, traced.layouts, strict=True)):
        here = 0 if layout.grid is None else layout.grid[0] * layout.grid[1]
        smaller = 0 < here < area
        stage += smaller
        area = here or area
        blocks.append(
            Block(
                name=unit.name,
                kind=unit.kind,
                depth=min(position / max(body - 1, 1), 1.0),
                stage=stage,
                subsamples=smaller,
                is_map=here > 1,
                grid=layout.grid if here > 1 else None,
                channels=layout.shape[layout.channels],
            )
        )
    return tuple(blocks)
