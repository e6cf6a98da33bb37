"""The packages that the correctness table compares, each behind the same few methods.

Everything is called as its documentation shows, with defaults unless said. A method that a package
lacks is outside its scope; a documented refusal is not a wrong answer.
"""

import itertools
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

import landscape
from landscape import HessianOperator, Objective

Loss = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


class OutsideScope(Exception):
    """The package does not claim to do this."""


class Refuses(Exception):
    """The package says, as documented, that it cannot do this."""


class _Landscape:
    """This package."""

    def operator(
        self, model: nn.Module, loss: Loss, batches: Batches, weight_decay: float = 0.0
    ) -> Any:
        return HessianOperator(model, batches, Objective(loss=loss, weight_decay=weight_decay))

    def product(self, operator: Any, v: Tensor) -> Tensor:
        found: Tensor = operator.matvec(v)
        return found

    def top(self, operator: Any, k: int) -> np.ndarray:
        return landscape.top_eigenpairs(operator, k).values

    def trace(self, model: nn.Module, loss: Loss, batches: Batches, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        objective = Objective(loss=loss)
        found = landscape.hessian_trace(model, batches, objective=objective, generator=generator)
        return found.value

    def density(self, model: nn.Module, loss: Loss, batches: Batches) -> tuple[float, float]:
        objective = Objective(loss=loss)
        found = landscape.hessian_density(model, batches, objective=objective, num_probes=10)
        return _moments(found.grid, found.values)

    def on_cpu_by_default(self, model: nn.Module, batches: Batches) -> None:
        landscape.hessian_spectrum(model, batches, k=1, density=False)

    def plane(
        self, model: nn.Module, ends: list[nn.Module], loss: Loss, batches: Batches, steps: int
    ) -> np.ndarray:
        return landscape.loss_surface(
            model,
            batches,
            directions=landscape.between(model, *ends),
            points=np.arange(steps) / steps,
            objective=Objective(loss=loss),
            metrics=("loss",),
        ).nll

    def random_line(
        self, model: nn.Module, loss: Loss, batches: Batches, distance: float, seed: int = 0
    ) -> np.ndarray:
        return landscape.loss_line(
            model,
            batches,
            directions=landscape.random_directions(
                model, num=1, generator=torch.Generator().manual_seed(seed)
            ),
            span=(0, distance),
            points=10,
            objective=Objective(loss=loss),
            metrics=("loss",),
        ).nll

    def surface_of(self, model: nn.Module, data: Any, **arguments: Any) -> Any:
        return landscape.loss_surface(model, data, metrics=("loss",), **arguments)


class _PyHessian:
    """PyHessian, on the CPU."""

    def operator(self, model: nn.Module, loss: Loss, batches: Batches) -> Any:
        from pyhessian import hessian

        known = list(batches) if isinstance(batches, list) else []
        data = {"data": known[0]} if len(known) == 1 else {"dataloader": batches}
        return hessian(model, loss, cuda=False, **data)

    def product(self, operator: Any, v: Tensor) -> Tensor:
        from pyhessian.utils import hessian_vector_product

        parts = _pieces(v, operator.params)
        if operator.full_dataset:
            found = operator.dataloader_hv_product(parts)[1]
        else:
            found = hessian_vector_product(operator.gradsH, operator.params, parts)
        return torch.cat([part.reshape(-1) for part in found]).detach()

    def top(self, operator: Any, k: int) -> np.ndarray:
        return np.array(operator.eigenvalues(top_n=k)[0])

    def trace(self, model: nn.Module, loss: Loss, batches: Batches, seed: int) -> float:
        torch.manual_seed(seed)
        return float(np.mean(self.operator(model, loss, batches).trace()))

    def density(self, model: nn.Module, loss: Loss, batches: Batches) -> tuple[float, float]:
        nodes, weights = self.operator(model, loss, batches).density(n_v=10)
        return float(np.sum(weights)) / 10, float(np.sum(np.multiply(nodes, weights))) / 10

    def on_cpu_by_default(self, model: nn.Module, batches: Batches) -> None:
        from pyhessian import hessian

        hessian(model, nn.CrossEntropyLoss(), data=next(iter(batches))).eigenvalues()


class _HessianEigenthings:
    """hessian-eigenthings 1: defaults, more steps where it reports that they were too few."""

    scope: ClassVar[dict[str, str]] = {"uneven_batches": "its documentation says mean over batches"}

    def operator(self, model: nn.Module, loss: Loss, batches: Batches) -> Any:
        from hessian_eigenthings import HessianOperator as Peer
        from hessian_eigenthings import supervised_loss

        return Peer(model, batches, supervised_loss(loss))

    def product(self, operator: Any, v: Tensor) -> Tensor:
        found: Tensor = operator.matvec(v)
        return found

    def top(self, operator: Any, k: int) -> np.ndarray:
        from hessian_eigenthings import lanczos

        found = lanczos(operator, k=k, seed=0)
        if not bool(found.converged.all()):  # it says so: give it all the steps that there are
            found = lanczos(operator, k=k, seed=0, max_iter=operator.size)
        if not bool(found.converged.all()):
            raise Refuses(f"it reports {int(found.converged.sum())} of {k} as converged")
        return np.asarray(found.eigenvalues)

    def trace(self, model: nn.Module, loss: Loss, batches: Batches, seed: int) -> float:
        from hessian_eigenthings import trace

        return float(trace(self.operator(model, loss, batches), seed=seed).estimate)

    def density(self, model: nn.Module, loss: Loss, batches: Batches) -> tuple[float, float]:
        from hessian_eigenthings import spectral_density

        found = spectral_density(self.operator(model, loss, batches), seed=0)
        return _moments(found.grid.numpy(), found.density.numpy())

    def on_cpu_by_default(self, model: nn.Module, batches: Batches) -> None:
        self.top(self.operator(model, nn.CrossEntropyLoss(), batches), 1)


class _Curvlinops:
    """curvlinops, with SciPy's `eigsh` for eigenvalues as in its tutorial."""

    def operator(self, model: nn.Module, loss: Loss, batches: Batches) -> Any:
        from curvlinops import HessianLinearOperator

        parameters = [p for p in model.parameters() if p.requires_grad]
        try:
            return HessianLinearOperator(model, loss, parameters, batches)
        except RuntimeError as error:
            if "determinis" in str(error).lower() or "check" in str(error).lower():
                raise Refuses(str(error).splitlines()[0]) from error
            raise

    def product(self, operator: Any, v: Tensor) -> Tensor:
        found: Tensor = operator @ v
        return found

    def top(self, operator: Any, k: int) -> np.ndarray:
        return _by_magnitude(eigsh(operator.to_scipy(), k)[0])

    def trace(self, model: nn.Module, loss: Loss, batches: Batches, seed: int) -> float:
        from curvlinops import hutchpp_trace

        torch.manual_seed(seed)
        return float(hutchpp_trace(self.operator(model, loss, batches), num_matvecs=60))

    def density(self, model: nn.Module, loss: Loss, batches: Batches) -> tuple[float, float]:
        from curvlinops import lanczos_approximate_spectrum

        operator = self.operator(model, loss, batches)
        grid, density = lanczos_approximate_spectrum(operator, 40, num_repeats=10)
        return _moments(grid.numpy(), density.numpy())

    def on_cpu_by_default(self, model: nn.Module, batches: Batches) -> None:
        self.top(self.operator(model, nn.CrossEntropyLoss(), batches), 1)


class _Script:
    """The script of 20 lines: double backward over the batches, SciPy's `eigsh`."""

    def operator(self, model: nn.Module, loss: Loss, batches: Batches) -> Any:
        parameters = list(model.parameters())

        def product(v: Any) -> Any:
            total, out = 0, torch.zeros(sum(p.numel() for p in parameters))
            for x, y in batches:
                gradients = torch.autograd.grad(loss(model(x), y), parameters, create_graph=True)
                tangents = _pieces(torch.as_tensor(v, dtype=torch.float32).reshape(-1), parameters)
                hv = torch.autograd.grad(gradients, parameters, tangents)
                out += len(y) * torch.cat([part.reshape(-1) for part in hv])
                total += len(y)
            return (out / total).numpy()

        size = sum(p.numel() for p in parameters)
        return LinearOperator((size, size), matvec=product, dtype=np.float32)

    def product(self, operator: Any, v: Tensor) -> Tensor:
        return torch.from_numpy(operator @ v.numpy())

    def top(self, operator: Any, k: int) -> np.ndarray:
        return _by_magnitude(eigsh(operator, k)[0])

    def on_cpu_by_default(self, model: nn.Module, batches: Batches) -> None:
        self.top(self.operator(model, nn.CrossEntropyLoss(), batches), 1)


class _LossLandscapes:
    """loss-landscapes 3 with its own metric `Loss`, which takes one batch."""

    def plane(
        self, model: nn.Module, ends: list[nn.Module], loss: Loss, batches: Batches, steps: int
    ) -> np.ndarray:
        from loss_landscapes import planar_interpolation

        return np.asarray(planar_interpolation(model, *ends, self._metric(loss, batches), steps))

    def random_line(
        self, model: nn.Module, loss: Loss, batches: Batches, distance: float, seed: int = 0
    ) -> np.ndarray:
        from loss_landscapes import random_line

        torch.manual_seed(seed)
        metric = self._metric(loss, batches)
        return np.asarray(random_line(model, metric, distance=distance, steps=10))

    def __getattr__(self, name: str) -> Any:
        raise OutsideScope(f"it has no {name}")

    def _metric(self, loss: Loss, batches: Batches) -> Any:
        from loss_landscapes.metrics import Loss as Metric

        known = list(batches)
        if len(known) > 1:
            raise OutsideScope("its metric takes one batch")
        return Metric(loss, *known[0])


PEERS: dict[str, tuple[str, type]] = {
    "landscape": ("landscape", _Landscape),
    "PyHessian": ("pyhessian", _PyHessian),
    "hessian-eigenthings": ("hessian_eigenthings", _HessianEigenthings),
    "curvlinops": ("curvlinops", _Curvlinops),
    "script with eigsh": ("scipy", _Script),
    "loss-landscapes": ("loss_landscapes", _LossLandscapes),
}
"""Name in the table -> (module that must be installed, adapter)."""


def installed(name: str) -> bool:
    """Whether the package behind a name can be imported."""
    return find_spec(PEERS[name][0]) is not None


def method(peer: Any, name: str) -> Any:
    """Return a method of an adapter.

    Raises:
        OutsideScope: If the package has no such thing.
    """
    found = getattr(peer, name, None)
    if found is None:
        raise OutsideScope(f"it has no {name.replace('_', ' ')}")
    return found


def _moments(grid: np.ndarray, density: np.ndarray) -> tuple[float, float]:
    """Return the integrals of a density and of the eigenvalue under it."""
    return float(np.trapezoid(density, grid)), float(np.trapezoid(density * grid, grid))


def _pieces(v: Tensor, parameters: Iterable[Any]) -> list[Tensor]:
    shapes = [p.shape for p in parameters]
    ends = list(itertools.accumulate((shape.numel() for shape in shapes), initial=0))
    return [v[a:b].view(s) for a, b, s in zip(ends, ends[1:], shapes, strict=False)]


def _by_magnitude(values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    ordered: np.ndarray = array[np.argsort(-np.abs(array))]
    return ordered
