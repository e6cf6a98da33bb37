"""Extreme eigenpairs of a symmetric operator, each with its residual.

The iteration stops on residuals (`eigenpairs`), never on a change. No residual tells that an
eigenvalue is missing: the probability of that is bounded over the random start vectors
(`certificate`).
"""

from functools import partial
from typing import Literal

import numpy as np
import torch

from landscape._checks import check_choice, check_generator
from landscape._progress import progress_bar
from landscape.linalg.eigenpairs import Eigenpairs, warn_unconverged
from landscape.linalg.operators import SymmetricOperator
from landscape.linalg.search import EigenSearch, finish, may_be_rough, search_roughly, start_vector

Which = Literal["LM", "LA", "SA"]


def top_eigenpairs(
    operator: SymmetricOperator,
    k: int = 5,
    which: Which = "LM",
    *,
    tol: float = 1e-3,
    max_iter: int = 300,
    max_basis: int | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    certify: bool | float = True,
    vectors: bool = False,
    start: torch.Tensor | np.ndarray | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Eigenpairs:
    """Extreme eigenpairs by Lanczos with full reorthogonalisation and thick restart.

    A Krylov space of one start vector cannot see that an eigenvalue is multiple. With `certify`,
    once all wanted pairs have converged, a chain from a fresh random start vector grows beside the
    first until a copy of any of them but the last, or another eigenvalue beyond the last, would
    have shown itself but with a probability of 1 % (the module says how that is known), and at most
    for as long as the first chain took to tell the wanted pairs apart (relative error 10 %), or 8
    products where that was sooner. What it finds joins the wanted set, until a chain finds nothing
    new.

    Where a Hessian's loss has no kinks, or with `certify` only those of ReLUs and max pooling, on a
    CPU, and `tol` is 5e-4 or more, the search multiplies by differences of gradients, one gradient
    each (`landscape.linalg.differences`). One accurate product a pair then gives the values and
    their residuals, and pairs that these do not show to have converged get further ones.

    Args:
        operator: Any symmetric operator.
        k: Number of eigenpairs.
        which: `"LM"` largest magnitude, `"LA"` largest, `"SA"` smallest.
        tol: Stop when every error estimate is at most `tol` · |θ|.
        max_iter: Largest number of products.
        max_basis: Largest number of basis vectors kept; by default as many as fit 4 GiB, but at
            least 2 `k` + 10.
        basis_dtype: Precision of the basis: float64 by default where that fits, else float32, which
            rounds the values at 1e-6 of the largest. For `tol` of 1e-4 and more float32 is the
            default of long vectors in float32 on a CPU: fewer bytes in memory and on their way.
        basis_device: Device of the basis; the operator's by default, `"cpu"` spares a GPU's memory.
        certify: Look for multiple and missed eigenvalues, at about a third as many products again;
            a number instead of `True` is the probability of a miss to admit.
        vectors: Return the eigenvectors too.
        start: First start vector, shape `(dim,)`, or vectors whose sum is taken, shape `(m, dim)`,
            such as the eigenvectors at the checkpoint before; with `certify` a random vector as
            long is added. By default random alone.
        generator: Source of the random start vectors.
        progress: Show a progress bar.

    Returns:
        The eigenpairs, with residuals. A simple isolated set of 5 takes 10 to 17 products, and 4
        to 8 more to certify; differences of gradients count as products.

    Raises:
        ValueError: If an argument is out of range or a product is not finite.
        TypeError: If `operator` lacks what a SymmetricOperator says of itself.
    """
    if not all(hasattr(operator, name) for name in ("dim", "dtype", "device", "matvec")):
        raise TypeError(
            "`operator` must have `dim`, `dtype`, `device` and `matvec`, got "
            f"{type(operator).__name__}; wrap a matrix as `MatrixOperator(matrix)`, and products "
            "in a subclass of `SymmetricOperator`."
        )
    check_choice("which", which, ("LM", "LA", "SA"))
    make = partial(
        EigenSearch,
        operator,
        {which: (k, which)},
        tol=tol,
        max_iter=max_iter,
        max_basis=max_basis,
        basis_dtype=basis_dtype,
        basis_device=basis_device,
        generator=check_generator(generator),
    )
    search = make()
    first = None if start is None else start_vector(start, operator.dim)
    rough = None
    usable = which != "SA" and isinstance(operator, SymmetricOperator)
    if usable and may_be_rough(tol, max_iter, k):
        rough = operator.differences(certify)
    with progress_bar("Eigenpairs", progress, max_iter) as bar:
        if rough is None:
            search.run(operator.matvec, starts=1, certify=certify, first=first, tick=bar.update)
        else:
            work = search_roughly(make, rough, operator.matvec, certify=certify, first=first)
            search = finish(work, bar.update)
    found = search.pairs(which, vectors)
    warn_unconverged([found.converged], search.num_matvecs, tol, search.remedy())
    return found
