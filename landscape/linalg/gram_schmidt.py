"""Gram-Schmidt, lengths and inner products, with care for long vectors in single precision.

On a CPU a sum over 20 million numbers in float32 loses three digits, and a pass over them goes
through memory. So long vectors are worked on in parts that stay in cache, with sums in float64.
"""

import torch
from torch import Tensor


def orthogonalise(
    w: Tensor, basis: Tensor, always_twice: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Take from a vector its components along orthonormal ones.

    Args:
        w: Vector of shape `(dim,)`; not changed.
        basis: Orthonormal vectors, one per row, shape `(m, dim)`.
        always_twice: Make the second pass without a look at whether it is needed, for which the
            host would have to wait for the device.
        out: Like `w`; where the rest may be written.

    Returns:
        The rest of `w`, orthogonal to the basis to 1e-13 of its length (float32: 1e-5), and the
        components, shape `(m,)`.
    """
    if _is_long(w):
        return _orthogonalise_in_parts(w, basis, torch.empty_like(w) if out is None else out)
    total = basis @ w
    rest = torch.addmv(w, basis.T, total, alpha=-1, out=out)
    # One pass leaves what the basis itself lacks of orthogonality times |total|, which is more than
    # |rest| for a spectrum that is not centred on 0: it would grow from step to step.
    left = basis @ rest
    limit = _ORTHOGONAL if w.dtype == torch.float64 else _ORTHOGONAL_SINGLE
    if always_twice or not length(left) <= limit * length(rest):
        rest.addmv_(basis.T, left, alpha=-1)
        total += left
    return rest, total


def _orthogonalise_in_parts(w: Tensor, basis: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `orthogonalise` does in parts that stay in cache, with sums in float64.

    What the first pass leaves along the basis is measured while a part is in cache.
    """
    columns = torch.split(basis, CHUNK, dim=1)
    parts = list(zip(columns, torch.split(w, CHUNK), torch.split(rest, CHUNK), strict=True))
    total = torch.zeros(len(basis), dtype=torch.float64, device=basis.device)
    for rows, piece, _ in parts:
        total += (rows @ piece).double()
    left = torch.zeros_like(total)
    for rows, piece, kept in parts:
        torch.addmv(piece, rows.T, total.to(w), alpha=-1, out=kept)
        left += rows @ kept
    if not left.norm() <= _ORTHOGONAL_SINGLE * length(rest):
        for rows, _, kept in parts:
            kept.addmv_(rows.T, left.to(w), alpha=-1)
        total += left
    return rest, total


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return aᵀb; PyTorch's own loses three digits of 20 million numbers in float32 on a CPU."""
    if not _is_long(a):
        return a @ b
    pieces = zip(torch.split(a, CHUNK), torch.split(b, CHUNK), strict=True)
    total: Tensor = torch.stack([x @ y for x, y in pieces]).double().sum()
    return total


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Return A Bᵀ in float64, shape `(m, k)`, of vectors that are the rows of A and B."""
    pieces = zip(torch.split(a, CHUNK, 1), torch.split(b, CHUNK, 1), strict=True)
    total: Tensor = torch.stack([x.double() @ y.double().T for x, y in pieces]).sum(0)
    return total


def length(v: Tensor) -> Tensor:
    """Return ‖v‖, a scalar tensor, on a CPU without under- or overflow of the squares."""
    if v.is_cuda or v.dtype == torch.float64:
        plain: Tensor = v.norm()
        return plain
    square = inner(v, v)
    if _SQUARES[0] < square < _SQUARES[1]:
        return square.double().sqrt()
    exact: Tensor = torch.linalg.vector_norm(v, dtype=torch.float64)
    return exact


def are_long(dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether sums over vectors want care, and passes over them go through memory."""
    return device.type == "cpu" and dtype == torch.float32 and dim > CHUNK


def _is_long(v: Tensor) -> bool:
    return are_long(len(v), v.dtype, v.device)


_SQUARES = 1e-25, 1e35  # what a sum of squares in float32 tells without under- or overflow
_ORTHOGONAL = 1e-13  # a unit vector's component along the basis that does no harm ...
_ORTHOGONAL_SINGLE = 1e-5  # ... to products in float32 (Simon, 1984: the root of ε would do)
CHUNK = 1 << 18  # entries of each vector that are worked on at a time
