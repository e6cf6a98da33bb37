"""Values on a grid from a part of its points: measured where it is rough, interpolated elsewhere.

The grid is covered by cells, rectangles of grid points. The first ones meet at the point nearest
to the origin, where a loss is sharpest. In a cell the ends and the middle of each side make 3 × 3
nodes, through which goes the polynomial of degree two in each coordinate; at the middles of its
four quarters it is compared with measured values. With the surplus

    s = max(largest |measured − interpolated| at points in the cell that are no nodes,
            a quarter of the surplus of the cell that it was split off),

the error estimate of a cell is

    e = max(3 s, 1.5 × the largest surplus of a cell that touches it),

and a cell with e > tol × range in any quantity is split into its quarters, whose nodes and middles
are measured, until no such cell is left or every point of it is measured; the range is that of the
values measured so far. A cell with a value that is not finite is split until all of it is measured,
and by the rule so are the cells that touch it.

This is an estimate and no bound: a feature that lies between all measured points leaves no trace in
them. The factors are heuristics, chosen such that the true error stays below the estimate on the
published surfaces of Park & Kim (2022): at most 0.82 of it, over NLL, NLL + L2 and accuracy of both
and 60 tolerances from 0.001 to 0.5. On random functions (`benchmarks/adaptive.py`) it is above in
0.3 % of the grids that are interpolated in part where points are evenly spaced, in 3 % where they
are not, up to 2.2 and 8.8 times; in 15 % where a pit is three steps of the grid wide: up to twice
the estimate where that is at the origin, any number of times where it is not.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Measure = Callable[[np.ndarray], np.ndarray]

SAFETY = 3.0
"""Error estimate over the surplus of the cell itself."""

NEIGHBOUR = 1.5
"""Error estimate over the surplus of a cell that touches it."""

INHERITED = 0.25
"""Share of its surplus that a cell hands on to its quarters."""


@dataclass(frozen=True)
class Interpolated:
    """Values on a grid, some of them interpolated.

    Attributes:
        values: `(p, q, quantities)`: measured where `measured`, interpolated elsewhere.
        measured: `(p, q)`: which points were measured.
        error: `(quantities,)`: estimate of the largest error at the other points; 0 without any.
    """

    values: np.ndarray
    measured: np.ndarray
    error: np.ndarray


@dataclass(frozen=True)
class _Cell:
    """The grid points x[a … b], y[c … d] and the surplus there, `(quantities,)`."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    surplus: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        (a, b), (c, d) = self.rows, self.columns
        return slice(a, b + 1), slice(c, d + 1)

    @property
    def nodes(self) -> tuple[np.ndarray, ...]:
        return np.ix_(_thirds(*self.rows), _thirds(*self.columns))

    @property
    def middles(self) -> tuple[np.ndarray, ...]:
        rows, columns = (
            [(low + high) // 2 for low, high in _halves(*ends)]
            for ends in (self.rows, self.columns)
        )
        return np.ix_(rows, columns)

    def quarters(self) -> Iterator["_Cell"]:
        handed_on = np.where(np.isfinite(self.surplus), INHERITED * self.surplus, 0.0)
        for rows, columns in itertools.product(_halves(*self.rows), _halves(*self.columns)):
            yield _Cell(rows, columns, handed_on)

    def interpolate(self, x: np.ndarray, y: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the polynomial through the nodes at the points of the cell."""
        across = _lagrange(x, _thirds(*self.rows), self.rows)
        along = _lagrange(y, _thirds(*self.columns), self.columns)
        with np.errstate(all="ignore"):  # of quantities that do not matter
            inside: np.ndarray = np.einsum("ip,jq,ijk->pqk", across, along, values[self.nodes])
        return inside

    def compared(
        self, x: np.ndarray, y: np.ndarray, values: np.ndarray, asked: np.ndarray
    ) -> "_Cell":
        """Return the cell with its surplus, infinite where a measured value is not finite."""
        known = asked[self.window]
        measured = values[self.window]
        finite = np.isfinite(measured[known]).all(0)
        with np.errstate(all="ignore"):
            error = np.abs(measured - self.interpolate(x, y, values))[known].max(0)
        surplus = np.where(finite, np.fmax(error, self.surplus), np.inf)
        return _Cell(self.rows, self.columns, surplus)


def interpolate(
    x: np.ndarray,
    y: np.ndarray,
    measure: Measure,
    tol: np.ndarray,
    known: np.ndarray,
) -> Interpolated:
    """Measure the points of a grid that have to be, and interpolate the others.

    Args:
        x: `(p,)`: increasing coordinates.
        y: `(q,)`: the same along the other axis.
        measure: From a mask `(p, q)` of wanted points to values `(p, q, quantities)`, of which
            those at wanted points count. Each call wants more points than the one before.
        tol: `(quantities,)`: error allowed in each quantity over its range; infinite where it
            does not matter: such a quantity stays within what is measured at the nodes of its cell.
        known: `(p, q, quantities)`: a part of the quantity that is not in `measure` because it is
            known everywhere; it counts in the range.

    Returns:
        The values, without the known part, and the error estimate.
    """
    asked = np.zeros((len(x), len(y)), dtype=bool)
    nothing = np.zeros(len(tol))
    split = [_Cell(a, b, nothing) for a, b in itertools.product(_first(x), _first(y))]
    cells: list[_Cell] = []
    while split:
        for cell in split:
            asked[cell.nodes] = asked[cell.middles] = True
        values = measure(asked)
        cells += [cell.compared(x, y, values, asked) for cell in split]
        errors = _errors(cells, asked.shape)
        open_ = np.array([not asked[cell.window].all() for cell in cells])
        limits = _limits(values[asked], known[asked], tol)
        rough = (errors > limits).any(1) & open_
        split = [q for cell, bad in zip(cells, rough, strict=True) if bad for q in cell.quarters()]
        cells = [cell for cell, bad in zip(cells, rough, strict=True) if not bad]
    filled = np.full_like(values, np.nan)
    for cell in cells:
        if not asked[cell.window].all():
            inside, nodes = cell.interpolate(x, y, values), values[cell.nodes]
            within = np.clip(inside, nodes.min((0, 1)), nodes.max((0, 1)))
            filled[cell.window] = np.where(np.isfinite(tol), inside, within)
    filled[asked] = values[asked]
    return Interpolated(filled, asked, errors[open_].max(0, initial=0.0))


def _limits(values: np.ndarray, known: np.ndarray, tol: np.ndarray) -> np.ndarray:
    """Return the largest error allowed in each quantity, its rounding error at least."""
    total = np.where(np.isfinite(values), values + known, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a quantity that is nowhere finite
        spread = np.nanmax(total, 0) - np.nanmin(total, 0)
        size = np.nanmax(np.abs(total), 0)
    matters = np.isfinite(tol)
    rounding = 16 * np.finfo(np.float64).eps * size
    limits = np.nan_to_num(np.maximum(np.where(matters, tol, 0) * spread, rounding))
    return np.where(matters, limits, np.inf)


def _errors(cells: list[_Cell], shape: tuple[int, ...]) -> np.ndarray:
    """Return the error estimate of each cell, `(cells, quantities)`."""
    largest = np.zeros((*shape, len(cells[0].surplus)))
    for cell in cells:
        largest[cell.window] = np.maximum(largest[cell.window], cell.surplus)
    around = np.array([largest[cell.window].max((0, 1)) for cell in cells])
    own = np.array([cell.surplus for cell in cells])
    return np.maximum(SAFETY * own, NEIGHBOUR * around)


def _first(coordinates: np.ndarray) -> list[tuple[int, int]]:
    """Return the first intervals of an axis: they meet at the origin, or in the middle."""
    last = len(coordinates) - 1
    origin = int(np.argmin(np.abs(coordinates)))
    meet = origin if 0 < origin < last else last // 2
    ends = sorted({0, meet, last})
    return list(itertools.pairwise(ends)) or [(0, 0)]


def _thirds(low: int, high: int) -> list[int]:
    return sorted({low, (low + high) // 2, high})


def _halves(low: int, high: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(_thirds(low, high))) or [(low, high)]


def _lagrange(coordinates: np.ndarray, nodes: list[int], ends: tuple[int, int]) -> np.ndarray:
    """Return the values `(nodes, points)` of the Lagrange polynomials of the nodes."""
    at = coordinates[ends[0] : ends[1] + 1]
    rows = []
    for node in nodes:
        others = coordinates[[other for other in nodes if other != node]]
        rows.append(np.prod((at[:, None] - others) / (coordinates[node] - others), axis=1))
    return np.array(rows)
