"""What the eigenvalues of the Hessian benchmark are compared with, in float64.

SciPy's `eigsh` finds eigenvectors with float32 products. Products of plain autograd in float64, one
a vector, then give the values, those of the Hessian projected onto the vectors (Rayleigh-Ritz), and
their residuals r: an eigenvalue lies within r, and within r²/gap if no other is as near. Where r is
above 1e-3 of the value, `eigsh` runs in float64 throughout; not everywhere, because such a product
of a convolution takes ten gradients.

References are kept on disk. `prepare` makes those that are missing before anything is timed, two
at a time.
"""

import copy
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed

import numpy as np
import solvers
import torch
import workloads
from presets import Which, Workload
from scipy.linalg import eigh
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from workloads import Batch

from landscape import HessianOperator

Products = Callable[[np.ndarray], np.ndarray]  # of each column

TOL = 1e-4  # of `eigsh`
ENOUGH = 1e-3  # residual over value; the error is its square over the relative gap


def reference(model: nn.Module, batches: list[Batch], k: int, which: Which) -> np.ndarray:
    """Return the `k` eigenvalues of the mean over all batches, largest magnitude first."""
    return workloads.cached(
        f"{which}{k}", model, batches, lambda: _eigenvalues(model, batches, k, which)
    )


def prepare(chosen: Iterable[Workload], steps: int, sizes: dict[str, dict[str, int]]) -> None:
    """Train what is not trained and find the references that are missing, on two cores."""
    chosen = list(chosen)
    models = [(name, steps, sizes[name]) for name in dict.fromkeys(w.model for w in chosen)]
    tasks = [
        (w, steps, sizes[w.model], index)
        for w in sorted(chosen, key=lambda w: -w.batches * w.images * (not w.each))
        for index in range(len(w.groups()))
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, torch.set_num_threads, (1,)) as pool:
        list(pool.map(_train, models))
        found = as_completed([pool.submit(_find, task) for task in tasks])
        for done in tqdm(found, desc="float64 references", total=len(tasks), leave=False):
            done.result()


def _train(task: tuple[str, int, dict[str, int]]) -> None:
    name, steps, sizes = task
    workloads.trained(name, steps=steps, **sizes)


def _find(task: tuple[Workload, int, dict[str, int], int]) -> None:
    workload, steps, sizes, index = task
    model = workloads.trained(workload.model, steps=steps, **sizes)
    with sdpa_kernel(SDPBackend.MATH):
        reference(model, workload.groups()[index], workload.k, workload.which)


def _eigenvalues(model: nn.Module, batches: list[Batch], k: int, which: Which) -> np.ndarray:
    operator = HessianOperator(model, batches)

    def single(vectors: np.ndarray) -> np.ndarray:
        return operator.matmat(torch.from_numpy(vectors).float()).numpy()

    def double(vectors: np.ndarray) -> np.ndarray:
        return _float64_products(model, batches, vectors)

    values, residuals = _ritz(_vectors(single, operator.dim, k, which), double)
    if np.any(residuals > ENOUGH * np.abs(values)):
        values, residuals = _ritz(_vectors(double, operator.dim, k, which), double)
    ordered: np.ndarray = values[np.argsort(-np.abs(values))]
    return ordered


def _vectors(product: Products, dim: int, k: int, which: Which) -> np.ndarray:
    """Return eigenvectors `(dim, k)` by `eigsh`, accumulated in float64."""
    operator = LinearOperator(
        (dim, dim), matvec=lambda v: product(v.reshape(dim, 1)).ravel(), dtype=np.float64
    )
    start = np.random.default_rng(1234).standard_normal(dim)
    found: np.ndarray = eigsh(operator, k, which=which, tol=TOL, v0=start)[1]
    return found


def _ritz(vectors: np.ndarray, product: Products) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues of the operator projected onto vectors, and residuals, `(k,)` each."""
    basis = np.linalg.qr(vectors)[0]
    products = product(basis)
    values, mixing = eigh(basis.T @ products)
    residuals = np.linalg.norm(products @ mixing - basis @ mixing * values, axis=0)
    return values, residuals


def _float64_products(model: nn.Module, batches: list[Batch], vectors: np.ndarray) -> np.ndarray:
    """Return the Hessian times each column by plain autograd, the graph of one batch at a time."""
    exact = copy.deepcopy(model).double()
    total = sum(len(y) for _, y in batches)
    out = np.zeros_like(vectors)
    for x, y in batches:
        operator = solvers.plain_operator(exact, [(x.double(), y)])
        out += len(y) / total * np.stack([operator.matvec(v) for v in vectors.T], axis=1)
    return out
