"""Where a result came from, read off the frozen objective or said by a probe of weights alone."""

import functools
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from landscape.batches import Placement
from landscape.objective import FrozenObjective
from landscape.results import Provenance


def provenance(
    frozen: FrozenObjective,
    *,
    seed: int | None,
    seconds: float,
    num_hvps: float = 0.0,
    num_forwards: float = 0.0,
    settings: dict[str, Any],
) -> Provenance:
    """Return the provenance of a probe of an objective; `Provenance` explains the arguments."""
    return Provenance(
        landscape=_version(),
        torch=torch.__version__,
        model=type(frozen.model).__name__,
        num_parameters=frozen.space.dim,
        objective=frozen.objective.describe(),
        num_samples=frozen.num_samples,
        device=_device_name(frozen.space.device),
        dtype=str(frozen.space.dtype).removeprefix("torch."),
        seed=seed,
        seconds=seconds,
        num_hvps=num_hvps,
        num_forwards=num_forwards,
        settings=settings,
    )


def forward_provenance(
    model: nn.Module,
    *,
    num_samples: int,
    seed: int | None = None,
    seconds: float = 0.0,
    num_forwards: float = 0.0,
    settings: dict[str, Any] | None = None,
) -> Provenance:
    """Return the provenance of a probe that takes forward passes and no objective."""
    placement = Placement.of(model)
    return Provenance(
        landscape=_version(),
        torch=torch.__version__,
        model=type(model).__name__,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_samples=num_samples,
        device=_device_name(placement.device),
        dtype=str(placement.dtype).removeprefix("torch."),
        seed=seed,
        seconds=seconds,
        num_forwards=num_forwards,
        settings=settings or {},
    )


def weights_provenance(
    *,
    model: str,
    num_parameters: int,
    seconds: float,
    seed: int | None = None,
    settings: dict[str, Any] | None = None,
) -> Provenance:
    """Return the provenance of a result that weights alone went into, no data."""
    return Provenance(
        landscape=_version(),
        torch=torch.__version__,
        model=model,
        num_parameters=num_parameters,
        seed=seed,
        seconds=seconds,
        settings=settings or {},
    )


def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return f"{device} ({name})" if name else str(device)


@functools.cache
def _version() -> str:
    try:
        return version("landscape-probes")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"
