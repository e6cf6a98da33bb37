"""Small results to draw: every array is known, so that what is drawn can be compared with it."""

import numpy as np

from landscape.linalg.eigenpairs import Eigenpairs
from landscape.linalg.quadrature import SpectralDensity
from landscape.probes.directions import Directions
from landscape.probes.hessian import HessianSpectrum
from landscape.probes.hessian_max import HessianMaxSpectrum
from landscape.probes.surface import LossLine, LossSurface
from landscape.probes.trajectory import PolarTrajectory, Trajectory
from landscape.results import Provenance
from landscape.training import FitResult


def surface(nll=None, *, p=7, q=5, missing=(), accuracy=True):
    """A plane with different slopes and ranges along x and y, so that a swap of axes shows."""
    x, y = np.linspace(-1, 1, p), np.linspace(-0.4, 0.8, q)
    nll = 12 + 3 * x[:, None] + 10 * y[None, :] if nll is None else nll
    for point in missing:
        nll[point] = np.inf
    l2 = 0.5 + 0.1 * (x[:, None] ** 2 + y[None, :] ** 2)
    return LossSurface(
        x=x,
        y=y,
        nll=nll,
        nll_stderr=0.01 * np.ones_like(nll),
        l2=l2,
        loss=nll + l2,
        accuracy=np.clip(1 - np.abs(nll) / 30, 0, 1) if accuracy else None,
        ece=None,
        num_nonfinite=int(np.sum(~np.isfinite(nll))),
        directions=Directions(vectors=({}, {}), kind="random", normalization="filter"),
        provenance=Provenance(),
    )


def line(nll, stderr=0.1):
    nll = np.asarray(nll, dtype=float)
    l2 = np.full_like(nll, 0.5)
    return LossLine(
        x=np.linspace(-1, 1, len(nll)),
        nll=nll,
        nll_stderr=np.full_like(nll, stderr),
        l2=l2,
        loss=nll + l2,
        accuracy=None,
        ece=None,
        num_nonfinite=int(np.sum(~np.isfinite(nll))),
        directions=Directions(vectors=({},), kind="random"),
        provenance=Provenance(),
    )


def history(epochs=4, validated=True, loss="cross_entropy"):
    epoch = np.arange(1.0, epochs + 1)
    return FitResult(
        epoch=epoch,
        learning_rate=0.1 / epoch,
        train_loss=2 / epoch,
        train_accuracy=1 - 0.8 / epoch,
        validation_loss=2.5 / epoch if validated else np.full_like(epoch, np.nan),
        validation_accuracy=1 - 0.9 / epoch if validated else np.full_like(epoch, np.nan),
        seconds=np.ones_like(epoch),
        checkpoints={},
        trajectory=(),
        provenance=Provenance(settings={"loss": loss}),
    )


def polar(radius=(1, 0.9, 0.5, 0), angle=(0, 0.6, 1.2, np.nan)):
    return PolarTrajectory(
        radius=np.array(radius, dtype=float),
        angle=np.array(angle, dtype=float),
        steps=np.arange(len(radius)),
        distance=1.0,
        provenance=Provenance(),
    )


def trajectory(coordinates):
    coordinates = np.asarray(coordinates, dtype=float)
    length = len(coordinates)
    return Trajectory(coordinates, np.zeros(length), np.arange(length), Provenance())


def max_spectrum(eigenvalues, converged=True):
    values = np.asarray(eigenvalues, dtype=float)
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    nep = float(np.mean(finite < 0)) if finite.size else np.nan
    ape = float(positive.mean()) if positive.size else np.nan
    return HessianMaxSpectrum(
        eigenvalues=values,
        residuals=1e-3 * np.abs(values),
        converged=np.full(values.shape, converged),
        nep=nep,
        nep_interval=(max(nep - 0.1, 0), nep + 0.1),
        ape=ape,
        ape_interval=(0.9 * ape, 1.1 * ape),
        num_hvps=100,
        provenance=Provenance(),
    )


def random_spectrum(seed=0, batches=30, k=5, negative=0.2, scale=30.0):
    """Log-normal eigenvalues, the given share of them negative and a third as large."""
    rng = np.random.default_rng(seed)
    values = scale * np.exp(0.5 * rng.standard_normal((batches, k)))
    return max_spectrum(np.where(rng.random((batches, k)) < negative, -values / 3, values))


def eigenpairs(values, converged, which):
    values = np.asarray(values, dtype=float)
    residuals = 0.01 * np.abs(values)
    return Eigenpairs(values, residuals, residuals, np.asarray(converged), which, 20)


def density(dim=50, sigma=0.3):
    nodes = np.array([[-1.0, 0.0, 4.0]])
    weights = np.array([[0.1, 0.8, 0.1]])
    grid = np.linspace(-4, 7, 301)
    kernels = np.exp(-0.5 * ((grid[:, None] - nodes) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    values = kernels @ weights[0]
    return SpectralDensity(
        outliers=np.empty(0),
        nodes=nodes,
        weights=weights,
        dim=dim,
        grid=grid,
        values=values,
        values_stderr=0.1 * values,
        sigma=sigma,
    )


def full_spectrum(with_density=True):
    return HessianSpectrum(
        largest=eigenpairs([4.0, 3.5], [True, True], "LA"),
        smallest=eigenpairs([-1.0, -0.5], [True, False], "SA"),
        density=density() if with_density else None,
        trace=20.0,
        trace_stderr=1.5,
        dim=50,
        num_hvps=40,
        asymmetry=0.0,
        provenance=Provenance(),
    )
