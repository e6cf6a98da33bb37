"""Ways to the same Hessian eigenvalues and densities: this package, its peers, plain scripts.

Each eigenvalue solver is `solve(model, batches, k, seed) -> Outcome` for the mean cross-entropy
over all batches in evaluation mode, at a relative tolerance of 1e-3 where there is one to set, and
at the package's defaults elsewhere. Peers run under the math attention kernel: the fused one has no
second derivative, which this package takes care of by itself.
"""

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from workloads import Batch

import landscape
from landscape import HessianOperator

TOL = 1e-3


@dataclass(frozen=True)
class Outcome:
    """Eigenvalues by magnitude, shape `(k,)`, and products over all of the data."""

    values: np.ndarray
    num_hvps: float


@dataclass(frozen=True)
class Density:
    """Extreme nodes of an eigen-density, its mass, and the products spent; NaN where not given."""

    extremes: tuple[float, float]
    mass: float
    num_hvps: int


Solve = Callable[[nn.Module, list[Batch], int, int], Outcome]
Estimate = Callable[[nn.Module, list[Batch], int, int, int], Density]


def native(certify: bool) -> Solve:
    """`landscape.top_eigenpairs`, with or without the search for missed eigenvalues."""

    def solve(model: nn.Module, batches: list[Batch], k: int, seed: int) -> Outcome:
        pairs = landscape.top_eigenpairs(
            HessianOperator(model, batches),
            k,
            tol=TOL,
            certify=certify,
            generator=torch.Generator().manual_seed(seed),
        )
        return Outcome(pairs.values, pairs.num_matvecs)

    return solve


def native_each(certify: bool) -> Callable[[nn.Module, list[Batch], int, int], list[Outcome]]:
    """`landscape.hessian_max_spectrum`: every mini-batch by itself, in one call."""

    def solve(model: nn.Module, batches: list[Batch], k: int, seed: int) -> list[Outcome]:
        result = landscape.hessian_max_spectrum(
            model,
            batches,
            k=k,
            tol=TOL,
            certify=certify,
            generator=torch.Generator().manual_seed(seed),
        )
        share = result.num_hvps / len(batches)
        return [Outcome(row, share) for row in result.eigenvalues]

    return solve


def pyhessian(tol: float, max_iter: int) -> Solve:
    """PyHessian as its README uses it; its defaults are 1e-3 and 100."""

    def solve(model: nn.Module, batches: list[Batch], k: int, seed: int) -> Outcome:
        from pyhessian import hessian

        counted = _Counter()
        torch.manual_seed(seed)
        one = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
        with quiet_backward():
            engine = hessian(model, nn.CrossEntropyLoss(), cuda=False, **one)
            with counted.wrapping_pyhessian(engine):
                values, _ = engine.eigenvalues(maxIter=max_iter, tol=tol, top_n=k)
        model.zero_grad(set_to_none=True)
        return Outcome(_by_magnitude(values), counted.count)

    return solve


def curvlinops(tol: float) -> Solve:
    """The operator of curvlinops with SciPy's `eigsh`; its default tolerance is 0."""

    def solve(model: nn.Module, batches: list[Batch], k: int, seed: int) -> Outcome:
        from curvlinops import HessianLinearOperator

        operator = HessianLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            batches,
            check_deterministic=False,
        )
        return _eigsh(operator.to_scipy(), k, seed, tol=tol)

    return solve


def eigenthings(max_iter: int | None) -> Solve:
    """The Lanczos method of hessian-eigenthings; `None` is its default number of steps."""

    def solve(model: nn.Module, batches: list[Batch], k: int, seed: int) -> Outcome:
        from hessian_eigenthings import HessianOperator as Peer
        from hessian_eigenthings import lanczos, supervised_loss

        operator = Peer(model, batches, supervised_loss(F.cross_entropy))
        found = lanczos(operator, k=k, max_iter=max_iter, seed=seed, tol=TOL)
        return Outcome(_by_magnitude(found.eigenvalues.numpy()), found.iterations)

    return solve


def plain(model: nn.Module, batches: list[Batch], k: int, seed: int) -> Outcome:
    """Double backward through kept gradients, with SciPy's `eigsh`: the script of 20 lines."""
    return _eigsh(plain_operator(model, batches), k, seed)


def plain_operator(model: nn.Module, batches: list[Batch]) -> LinearOperator:
    """Hessian products by plain autograd, in the precision of the model."""
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    total = sum(len(y) for _, y in batches)
    gradients = []
    for x, y in batches:
        loss = F.cross_entropy(model(x), y) * (len(y) / total)
        gradients.append(torch.autograd.grad(loss, parameters, create_graph=True))

    def product(v: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(np.ascontiguousarray(v.ravel())).split(sizes)
        tangents = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        out = np.zeros_like(v.ravel())
        for gradient in gradients:
            hv = torch.autograd.grad(gradient, parameters, tangents, retain_graph=True)
            out += torch.cat([h.reshape(-1) for h in hv]).numpy()
        return out

    dtype = torch.empty(0, dtype=parameters[0].dtype).numpy().dtype
    return LinearOperator((sum(sizes),) * 2, matvec=product, dtype=dtype)


def native_density(
    model: nn.Module, batches: list[Batch], steps: int, probes: int, seed: int
) -> Density:
    """`landscape.hessian_density`."""
    found = landscape.hessian_density(
        model,
        batches,
        num_steps=steps,
        num_probes=probes,
        generator=torch.Generator().manual_seed(seed),
    )
    mass = np.trapezoid(found.values, found.grid)
    return Density((found.nodes.max(), found.nodes.min()), mass, steps * probes)


def products(model: nn.Module, batches: list[Batch], steps: int, probes: int, seed: int) -> Density:
    """As many products of `landscape.HessianOperator`, and nothing else: the floor of a density."""
    operator = HessianOperator(model, batches)
    v = torch.randn(operator.dim, generator=torch.Generator().manual_seed(seed))
    for _ in range(steps * probes):
        operator.matvec(v)
    return Density((np.nan, np.nan), np.nan, steps * probes)


def pyhessian_density(
    model: nn.Module, batches: list[Batch], steps: int, probes: int, seed: int
) -> Density:
    """PyHessian's `density`."""
    from pyhessian import hessian

    torch.manual_seed(seed)
    with quiet_backward():
        engine = hessian(model, nn.CrossEntropyLoss(), data=batches[0], cuda=False)
        try:
            nodes, weights = engine.density(iter=steps, n_v=probes)
        finally:
            model.zero_grad(set_to_none=True)
    mass = np.sum(weights) / probes
    return Density((np.max(nodes), np.min(nodes)), mass, steps * probes)


def eigenthings_density(
    model: nn.Module, batches: list[Batch], steps: int, probes: int, seed: int
) -> Density:
    """The stochastic Lanczos quadrature of hessian-eigenthings."""
    from hessian_eigenthings import HessianOperator as Peer
    from hessian_eigenthings import spectral_density, supervised_loss

    operator = Peer(model, batches, supervised_loss(F.cross_entropy))
    found = spectral_density(operator, num_runs=probes, lanczos_steps=steps, seed=seed)
    nodes = found.raw_eigenvalues.numpy()
    mass = np.trapezoid(found.density.numpy(), found.grid.numpy())
    return Density((np.nanmax(nodes), np.nanmin(nodes)), mass, steps * probes)


def curvlinops_density(
    model: nn.Module, batches: list[Batch], steps: int, probes: int, seed: int
) -> Density:
    """The Lanczos spectrum of curvlinops, which first looks for the edges by `eigsh`."""
    from curvlinops import HessianLinearOperator, lanczos_approximate_spectrum

    counted = _Counter()
    torch.manual_seed(seed)
    loss, parameters = nn.CrossEntropyLoss(), list(model.parameters())
    operator = HessianLinearOperator(model, loss, parameters, batches, check_deterministic=False)
    with counted.wrapping(HessianLinearOperator, "_matmat"):
        grid, density = lanczos_approximate_spectrum(operator, steps, num_repeats=probes)
    mass = np.trapezoid(density.numpy(), grid.numpy())
    return Density((np.nan, np.nan), mass, counted.count)


EIGENVALUES: dict[str, Solve] = {
    "landscape": native(certify=True),
    "landscape, certify=False": native(certify=False),
    "PyHessian": pyhessian(TOL, 100),
    "PyHessian, tol=1e-6, maxIter=1000": pyhessian(1e-6, 1000),
    "curvlinops + eigsh": curvlinops(0.0),
    "curvlinops + eigsh, tol=1e-3": curvlinops(TOL),
    "hessian-eigenthings": eigenthings(None),
    "hessian-eigenthings, max_iter=30": eigenthings(30),
    "kept graph + eigsh": plain,
}
SLOW = ("PyHessian, tol=1e-6, maxIter=1000", "curvlinops + eigsh")
IN_ONE_CALL = {  # every batch by itself
    "landscape": native_each(certify=True),
    "landscape, certify=False": native_each(certify=False),
}
DENSITIES: dict[str, Estimate] = {
    "landscape": native_density,
    "products alone": products,
    "PyHessian": pyhessian_density,
    "curvlinops": curvlinops_density,
    "hessian-eigenthings": eigenthings_density,
}
_MODULES = {"PyHessian": "pyhessian", "curvlinops": "curvlinops", "hessian": "hessian_eigenthings"}


def missing(solver: str) -> str | None:
    """Return the module that a solver needs and that is not installed."""
    for prefix, module in _MODULES.items():
        if solver.startswith(prefix) and find_spec(module) is None:
            return module
    return None


class _Counter:
    """Counts calls of a method or function while it is wrapped."""

    def __init__(self) -> None:
        self.count = 0

    def wrapping(self, owner: Any, name: str) -> AbstractContextManager[Any]:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        return patch.object(owner, name, call)

    def wrapping_pyhessian(self, engine: Any) -> AbstractContextManager[Any]:
        if engine.full_dataset:
            return self.wrapping(engine, "dataloader_hv_product")
        return self.wrapping(sys.modules[type(engine).__module__], "hessian_vector_product")


def quiet_backward() -> AbstractContextManager[Any]:
    """PyHessian's backward(create_graph=True) warns at every call."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _eigsh(operator: LinearOperator, k: int, seed: int, *, tol: float = TOL) -> Outcome:
    counted = _Counter()
    start = np.random.default_rng(seed).standard_normal(operator.shape[0]).astype(operator.dtype)
    with counted.wrapping(operator, "_matvec"):
        values = eigsh(operator, k, tol=tol, v0=start)[0]
    return Outcome(_by_magnitude(values), counted.count)


def _by_magnitude(values: object) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    ordered: np.ndarray = array[np.argsort(-np.abs(array))]
    return ordered
