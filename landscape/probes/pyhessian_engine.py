"""PyHessian (Yao, Gholami, Keutzer & Mahoney, 2020) on a frozen objective: a second opinion.

PyHessian runs as it is, on a module that holds copies of the chosen parameters and returns the
whole objective of one batch, so the user's model never meets it. Weight decay is part of that loss,
which also gives a parameter that the loss ignores its zero row. What its methods mean here:

- Eigenvalues come from power iteration with deflation. It stops when a value changes by less than
  `tol`, not when the pair has converged, and may return a wrong set: the residuals tell. It finds
  the largest by magnitude only.
- Its trace stops when the running mean changes by less than `tol`, which is after two samples
  where the mean is negative. The standard error is that of the samples it returned.
- Its density calls `torch.eig`, which PyTorch has removed, and so fails by itself.
  `torch.linalg.eigh` stands in for it, for that one symmetric matrix and inside PyHessian only;
  Lanczos iteration, nodes and weights are PyHessian's.
"""

import dataclasses
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from landscape._streams import OwnStreams
from landscape.batches import PreparedBatch
from landscape.linalg.eigenpairs import Eigenpairs, error_estimates, warn_unconverged
from landscape.linalg.gradient import twice_differentiable
from landscape.linalg.hessian import HessianOperator
from landscape.linalg.krylov import RitzPairs
from landscape.linalg.operators import to_array
from landscape.linalg.quadrature import SpectralDensity, spectral_density
from landscape.objective import FrozenObjective
from landscape.probes.hessian import HessianSpectrum
from landscape.provenance import provenance

_DENSITY_STEPS = 100  # PyHessian's own default

REMEDY = 'PyHessian stops on the change of a value, `engine="native"` on residuals'
"""What to do about pairs that have not converged."""


def spectrum(
    operator: HessianOperator,
    k: int,
    *,
    density: bool,
    tol: float,
    max_iter: int,
    num_probes: int,
    vectors: bool,
    generator: torch.Generator,
    began: float,
) -> HessianSpectrum:
    """Eigenvalues, density and trace by PyHessian, of the operator's frozen objective.

    Args:
        operator: Whose objective; its own products check the eigenpairs.
        k: Number of eigenvalues, by magnitude: both edges together.
        density: Also run PyHessian's stochastic Lanczos quadrature.
        tol: Its relative change at which power iteration and trace stop.
        max_iter: Its largest number of products for each eigenvalue, for the trace, and for a
            probe of the density (100 at most there).
        num_probes: Probes of the density.
        vectors: Return the eigenvectors too.
        generator: Source of the seed of PyHessian's random vectors.
        began: `time.perf_counter()` when the probe began.

    Returns:
        The spectrum. `largest` holds those of the `k` that are not negative and `smallest` the
        negative ones, so either may be shorter than `k`. `trace_stderr` is NaN for one sample.
        The standard errors of the density are those of probes uniform on the sphere, an upper
        bound (but for a factor 1 + 1/dim) for PyHessian's random signs. `num_hvps` counts
        PyHessian's products; `k` more by the operator check the residuals.

    Raises:
        ValueError: If `k` is above the dimension, or PyHessian does not know the device.
    """
    seed = generator.initial_seed()
    _check(operator, k)
    steps = min(_DENSITY_STEPS, max_iter, operator.dim)
    with _pyhessian(operator.frozen, generator) as run:
        found = run.engine.eigenvalues(maxIter=max_iter, tol=tol, top_n=k)
        spent = run.num_matvecs
        samples = np.array(run.engine.trace(maxIter=max_iter, tol=tol))
        measure = _density(run.engine, steps, num_probes, operator.dim) if density else None
        num_hvps = run.num_matvecs
    pairs, asymmetry = _checked(operator, found, tol, spent, vectors)
    warn_unconverged([pairs.converged], spent, tol, REMEDY, stacklevel=4)
    return HessianSpectrum(
        largest=_part(pairs, pairs.values >= 0, "LA"),
        smallest=_part(pairs, pairs.values < 0, "SA"),
        density=measure,
        trace=float(samples.mean()),
        trace_stderr=_standard_error(samples),
        dim=operator.dim,
        num_hvps=num_hvps,
        asymmetry=asymmetry,
        shapes=operator.frozen.space.shapes_by_name,
        others=tuple(operator.frozen.space.fixed),
        provenance=provenance(
            operator.frozen,
            seed=seed,
            seconds=time.perf_counter() - began,
            num_hvps=num_hvps,
            settings={"engine": "pyhessian", "pyhessian": version("pyhessian")}
            | {"k": k, "tol": tol, "max_iter": max_iter, "trace_samples": len(samples)}
            | ({"num_probes": num_probes, "density_steps": steps} if density else {}),
        ),
    )


def top_eigenpairs(
    operator: HessianOperator,
    k: int,
    *,
    tol: float,
    max_iter: int,
    generator: torch.Generator,
) -> Eigenpairs:
    """The `k` eigenpairs that PyHessian finds largest by magnitude.

    Args:
        operator: Whose objective; its own products check the eigenpairs.
        k: Number of eigenvalues.
        tol: Relative change of an eigenvalue at which PyHessian stops.
        max_iter: PyHessian's largest number of products for each eigenvalue.
        generator: Source of the seed of PyHessian's random vectors.

    Returns:
        PyHessian's values with the residuals of its vectors. The gap of an error estimate r² / gap
        is at most that to the smallest magnitude found: PyHessian has not seen what lies below.

    Raises:
        ValueError: If `k` is above the dimension, or PyHessian does not know the device.
    """
    _check(operator, k)
    with _pyhessian(operator.frozen, generator) as run:
        found = run.engine.eigenvalues(maxIter=max_iter, tol=tol, top_n=k)
        spent = run.num_matvecs
    return _checked(operator, found, tol, spent, vectors=False)[0]


class _Loss(nn.Module):
    """The objective of one batch, as a module over the frozen copies of the parameters."""

    def __init__(self, frozen: FrozenObjective) -> None:
        super().__init__()
        self.copies = nn.ParameterList(frozen.space.values.values())
        self.frozen = frozen
        self.num_calls = 0

    def forward(self, handle: "_Handle") -> Tensor:
        self.num_calls += 1
        parameters = dict(zip(self.frozen.space.names, self.copies, strict=True))
        loss = self.frozen.data_term(parameters, handle.batch)
        # At weight decay 0 too: PyHessian needs every parameter in the graph.
        return loss + self.frozen.penalty(parameters)


@dataclass(frozen=True)
class _Handle:
    """A prepared batch where PyHessian expects a tensor; it weights batches by `size(0)`."""

    batch: PreparedBatch

    def size(self, dim: int) -> float:
        return self.batch.weight

    def to(self, device: str) -> "_Handle":
        return self

    def cuda(self) -> "_Handle":
        return self


@dataclass(frozen=True)
class _Loader:
    frozen: FrozenObjective

    def __iter__(self) -> Iterator[tuple[_Handle, _Handle]]:
        for batch in self.frozen.batches:
            yield _Handle(batch), _Handle(batch)


class _Run:
    """One PyHessian object, and the number of products it has spent."""

    def __init__(self, frozen: FrozenObjective, loss: _Loss) -> None:
        from pyhessian import hessian

        def criterion(outputs: Tensor, targets: _Handle) -> Tensor:
            return outputs

        self._loss, self._batches = loss, frozen.num_batches
        cuda = frozen.space.device.type == "cuda"
        if self._batches > 1:
            self.engine = hessian(loss, criterion, dataloader=_Loader(frozen), cuda=cuda)
            return
        (handles,) = _Loader(frozen)  # one batch: PyHessian keeps the graph of its gradient
        self.engine = hessian(loss, criterion, data=handles, cuda=cuda)
        passes = self._passes = [0]

        def count(_: Tensor) -> None:
            passes[0] += 1

        self.engine.gradsH[0].register_hook(count)

    @property
    def num_matvecs(self) -> int:
        if self._batches > 1:
            return self._loss.num_calls // self._batches
        return self._passes[0]


@contextmanager
def _pyhessian(frozen: FrozenObjective, generator: torch.Generator) -> Iterator[_Run]:
    """PyHessian on the objective: its own random stream, its warning silenced, nothing left."""
    device = frozen.space.device
    seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
    loss = _Loss(frozen)
    with ExitStack() as stack:
        # It differentiates by backward(create_graph=True): gradients that hold their own graph.
        stack.callback(loss.zero_grad)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Using backward", UserWarning)
        stack.enter_context(twice_differentiable())
        stack.enter_context(torch.enable_grad())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if torch.get_default_device().type not in ("cpu", device.type):
            stack.enter_context(torch.device("cpu"))  # it makes its vectors without a device
        stack.enter_context(OwnStreams(seed, [device]).entered())
        yield _Run(frozen, loss)


def _check(operator: HessianOperator, k: int) -> None:
    if k > operator.dim:
        raise ValueError(f"`k` must be at most the dimension {operator.dim}, got {k}; lower `k`.")
    if operator.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"`model` must be on the CPU or a CUDA device for engine='pyhessian', got "
            f"{operator.device}; use engine='native'."
        )


def _checked(
    operator: HessianOperator,
    found: tuple[list[float], list[list[Tensor]]],
    tol: float,
    num_matvecs: int,
    vectors: bool,
) -> tuple[Eigenpairs, float]:
    """Return PyHessian's pairs by magnitude, with residuals, and the asymmetry of our products."""
    values, directions = found
    order = np.argsort(-np.abs(values), kind="stable")
    theta = np.array(values)[order]
    basis = torch.stack([operator.frozen.space.flatten(directions[i]) for i in order]).double()
    basis /= basis.norm(dim=1, keepdim=True)  # a null vector has no direction: NaN
    products = (operator @ basis.T.to(operator.dtype)).T.double()
    shift = torch.from_numpy(theta).to(basis)[:, None]
    residuals = (products - shift * basis).norm(dim=1).cpu().numpy()
    overlaps = basis @ products.T
    asymmetry = float((overlaps - overlaps.T).abs().max())
    # PyHessian's vector is a step ahead of its value, so the value is not its Rayleigh quotient ρ:
    # |θ − λ| ≤ |θ − ρ| + ‖Hv − ρv‖² / gap.
    rayleigh = overlaps.diagonal()
    own = (products - rayleigh[:, None] * basis).norm(dim=1).cpu().numpy()
    rho = rayleigh.cpu().numpy()
    # A value that PyHessian has not seen may lie anywhere up to the smallest that it has found.
    unseen = np.array([1.0, -1.0]) * np.abs(rho).min()
    around = RitzPairs(np.append(rho, unseen), np.append(own, [0.0, 0.0]), np.zeros(0))
    errors = np.minimum(residuals, np.abs(theta - rho) + error_estimates(around)[: len(rho)])
    converged = errors <= tol * np.abs(theta)
    rows = to_array(basis, operator.dtype) if vectors else None
    return Eigenpairs(theta, residuals, errors, converged, "LM", num_matvecs, rows), asymmetry


def _part(pairs: Eigenpairs, chosen: np.ndarray, which: str) -> Eigenpairs:
    """Return some of the pairs, by magnitude: largest or smallest first."""
    names = ["values", "residuals", "errors", "converged"]
    names += [] if pairs.vectors is None else ["vectors"]
    rows: dict[str, Any] = {name: getattr(pairs, name)[chosen] for name in names}
    return dataclasses.replace(pairs, which=which, **rows)


def _density(engine: Any, steps: int, num_probes: int, dim: int) -> SpectralDensity:
    # `pyhessian.hessian` is the class; its module is found by its name.
    module = sys.modules[type(engine).__module__]
    with patch.object(module, "torch", _TorchWithEig("torch")):
        nodes, weights = engine.density(iter=steps, n_v=num_probes)
    return spectral_density(np.array(nodes, np.float64), np.array(weights, np.float64), dim)


class _TorchWithEig(type(torch)):  # type: ignore[misc]  # the class of modules
    """`torch`, with the `eig` that it had for the symmetric matrices of PyHessian."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        """Return eigenvalues as (real, imaginary) rows, and the eigenvectors as columns."""
        values, vectors = torch.linalg.eigh(matrix.double())
        return torch.stack([values, torch.zeros_like(values)], 1), vectors


def _standard_error(samples: np.ndarray) -> float:
    if len(samples) < 2:
        return float("nan")
    return float(samples.std(ddof=1) / np.sqrt(len(samples)))
