"""Directions in parameter space along which a loss surface is drawn.

A surface shows L(θ + a·d₁ + b·d₂). How far a step of length a changes a network depends on the
scale of its weights, and layers with normalisation can be rescaled without changing the function;
random directions are therefore rescaled to the weights, filter by filter (Li et al. 2018,
arXiv 1712.09913, sec. 4). With d drawn from a standard normal:

- `"filter"`: d[i] ← d[i] · ‖θ[i]‖ / ‖d[i]‖ for each filter i, the weights that make one output
  channel or unit: dimension 0 of a convolution or linear layer (Li et al., sec. 4).
- `"layer"`: d ← d · ‖θ‖ / ‖d‖, one factor a tensor.
- `"input"`: d[:, j] ← d[:, j] · ‖θ[:, j]‖ / ‖d[:, j]‖, the norms over dimension 0, so one factor
  for each input position j (for a convolution: input channel and place in the kernel). This is what
  the code of Park & Kim (2022) does under the name of filter normalisation; it is not Li et al.
- `None`: d as drawn.

A filter of zeros gets a direction of zeros, and so do weights that `torch.nn.utils.prune` masks:
the norms are of what is left.
"""

import fnmatch
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from landscape._checks import (
    as_texts,
    check_choice,
    check_count,
    check_generator,
    check_type,
    nearest,
)
from landscape.linalg.operators import to_array
from landscape.parameters import Choice, ParameterSpace, aliases, plain_name
from landscape.provenance import weights_provenance
from landscape.results import Provenance, Result

Normalization = Literal["filter", "layer", "input"] | None

POSITION_PARAMETERS = ("*pos_embed*", "*position_embed*", "*relative_position*", "*position_bias*")
"""Position embeddings and relative position biases: Park & Kim (2022) do not move them."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTS = (  # where a module keeps its weight: plain, parametrised, with hooks
    "weight", "parametrizations.weight.original", "parametrizations.weight.original1",
    "weight_orig", "weight_v",
)  # fmt: skip


@dataclass(frozen=True)
class Directions(Result):
    """Directions in the parameter space of one model.

    Attributes:
        vectors: One mapping a direction, from parameter name to an array of its shape.
        kind: How they were made: `"random"`, `"eigen"`, `"pca"` or `"between"`.
        normalization: The rule that rescaled them, as in `random_directions`; `"unit"` where
            each has norm 1.
        ignored: Names of the parameters (and of other entries of checkpoints) that do not move.
        explained_variance: `(num,)`: share of the variance of the checkpoints along each
            principal component; `None` where the directions are none.
        provenance: Where they came from.
    """

    vectors: tuple[dict[str, np.ndarray], ...] = field(repr=False)
    kind: str
    normalization: str | None = None
    ignored: tuple[str, ...] = ()
    explained_variance: np.ndarray | None = None
    provenance: Provenance = field(default_factory=Provenance)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that move."""
        return tuple(self.vectors[0])

    @property
    def inner_products(self) -> np.ndarray:
        """`(num, num)`: inner products of the directions, in float64."""
        if not any(self.vectors):
            raise ValueError(
                "`directions` must hold their vectors, got none: of a published surface, or left "
                "out by `without_vectors`; make or load others."
            )
        flat = [[a.reshape(-1).astype(np.float64) for a in v.values()] for v in self.vectors]
        return np.array(
            [[sum(a @ b for a, b in zip(u, v, strict=True)) for v in flat] for u in flat]
        )

    @property
    def norms(self) -> np.ndarray:
        """`(num,)`: Euclidean length of each direction."""
        norms: np.ndarray = np.sqrt(np.diag(self.inner_products))
        return norms

    @property
    def cosines(self) -> np.ndarray:
        """`(num, num)`: cosine of the angle between each two directions.

        Random directions in n dimensions have cosines of the order 1/√n; they are independent and
        deliberately not orthogonalised.
        """
        products = self.inner_products
        norms = np.sqrt(np.diag(products))
        cosines: np.ndarray = products / np.outer(norms, norms)
        return cosines

    def select(self, *indices: int) -> "Directions":
        """Return the directions with the given indices, in that order.

        Args:
            *indices: Indices into `vectors`.

        Raises:
            IndexError: If there is no such direction.
        """
        for index in indices:
            if not -len(self) <= index < len(self):
                raise IndexError(f"`indices` must be below {len(self)}, got {index}.")
        explained = self.explained_variance
        return replace(
            self,
            vectors=tuple(self.vectors[i] for i in indices),
            explained_variance=None if explained is None else explained[list(indices)],
        )

    def tensors(self, model: nn.Module) -> list[dict[str, Tensor]]:
        """Return the directions as tensors on the model's device, by first parameter name.

        Those of a compiled model suit the model as it was before, and the other way round.

        Args:
            model: A model with the parameters for which the directions were made.

        Returns:
            One mapping a direction, in the precision of each parameter, float32 at least.

        Raises:
            ValueError: If the model's parameters have other names or shapes.
        """
        parameters = dict(model.named_parameters())
        first = aliases(model)
        known = {plain_name(name) for name in (*self.names, *self.ignored)}
        vectors = [{plain_name(n): a for n, a in vector.items()} for vector in self.vectors]
        for name, array in vectors[0].items():
            if name not in first:
                raise ValueError(
                    f"`directions` must be made for this model, got {name!r}, which it lacks; the "
                    f"nearest are {nearest(name, first)}."
                )
            if array.shape != parameters[first[name]].shape:
                raise ValueError(
                    f"`directions` must be made for this model, got shape {array.shape} for "
                    f"{name!r}, which has {tuple(parameters[first[name]].shape)}."
                )
        for name in parameters:
            if not known & {alias for alias in first if first[alias] == name}:
                raise ValueError(
                    f"`directions` must be made for this model, got none for its {name!r}; "
                    "make them again for it."
                )
        return [
            {
                first[name]: torch.from_numpy(array).to(
                    parameters[first[name]].device,
                    torch.promote_types(parameters[first[name]].dtype, torch.float32),
                )
                for name, array in vector.items()
            }
            for vector in vectors
        ]


def random_directions(
    model: nn.Module,
    *,
    num: int = 2,
    normalization: Normalization = "filter",
    ignore_1d: bool = True,
    exclude: Sequence[str] = POSITION_PARAMETERS,
    parameters: Choice = None,
    generator: torch.Generator | None = None,
) -> Directions:
    """Independent standard normal directions, rescaled to the model's weights.

    Cost: no forward pass. The formulas stand at the top of this module. Only parameters with
    `requires_grad` move; tied weights are one parameter and move together.

    Args:
        model: Any module; its present weights set the scale.
        num: Number of directions.
        normalization: `"filter"` (Li et al. 2018, sec. 4), `"layer"`, `"input"` (the code of
            Park & Kim 2022) or `None`.
        ignore_1d: Leave parameters with at most one dimension (biases, norms, scales) in place.
        exclude: Glob patterns of names that stay in place too.
        parameters: Glob pattern(s) or predicate choosing a subset, as in `Objective`.
        generator: Source of randomness; `None` is a fresh one with seed 0.

    Returns:
        The directions. The draws are float64, so a model's precision does not change them.

    Raises:
        ValueError: If an argument is out of range or no parameter is left to move.
    """
    check_count("num", num, 1)
    check_choice("normalization", normalization, ("filter", "layer", "input", None))
    generator = check_generator(generator)
    started = time.perf_counter()
    exclude = as_texts("exclude", exclude, "pass `()` to leave out none")
    values = ParameterSpace(model, parameters).values
    moved = {n: v for n, v in values.items() if not _stays(n, v, ignore_1d, exclude)}
    if not moved:
        raise ValueError(
            "`exclude` and `ignore_1d` must leave a parameter to move, got none; "
            "pass `ignore_1d=False` or fewer patterns."
        )
    groups = _transposed_groups(model)
    masks = _masks(model)
    vectors = []
    for _ in range(num):
        vector = {}
        for name, value in moved.items():
            noise = torch.randn(
                value.shape, generator=generator, device=generator.device, dtype=torch.float64
            )
            if name in masks:
                noise, value = noise * masks[name].to(noise), value * masks[name]
            scaled = _rescale(noise, value.to(noise), normalization, groups.get(name))
            vector[name] = to_array(scaled, value.dtype)
        vectors.append(vector)
    return Directions(
        vectors=tuple(vectors),
        kind="random",
        normalization=normalization,
        ignored=other_parameters(model, moved),
        provenance=weights_provenance(
            model=type(model).__name__,
            num_parameters=sum(v.numel() for v in moved.values()),
            seed=generator.initial_seed(),
            seconds=time.perf_counter() - started,
            settings={"ignore_1d": ignore_1d, "exclude": exclude},
        ),
    )


def check_directions(directions: object) -> None:
    """Refuse what are no directions."""
    makers = "`random_directions`, `eigen_directions`, `pca_directions` or `between`"
    check_type("directions", directions, Directions, "Directions", f"make them with {makers}")


def other_parameters(model: nn.Module, moved: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the model's parameters that are not among `moved`."""
    moved = set(moved)
    return tuple(name for name, _ in model.named_parameters() if name not in moved)


def _stays(name: str, value: Tensor, ignore_1d: bool, exclude: Sequence[str]) -> bool:
    return (ignore_1d and value.dim() <= 1) or any(fnmatch.fnmatch(name, p) for p in exclude)


def _rescale(
    noise: Tensor, value: Tensor, normalization: Normalization, groups: int | None
) -> Tensor:
    dims = range(value.dim())
    if normalization == "filter":
        if groups is not None:
            # A transposed convolution holds (in, out / groups, …): its filters are dimension 1.
            split = (groups, len(value) // groups, *value.shape[1:])
            noise, value = noise.reshape(split), value.reshape(split)
            return _match_norms(noise, value, [1, *range(3, value.dim())]).flatten(0, 1)
        return _match_norms(noise, value, dims[1:])
    if normalization == "input":
        return _match_norms(noise, value, dims[:1])
    if normalization == "layer":
        return _match_norms(noise, value, dims)
    return noise


def _match_norms(noise: Tensor, value: Tensor, over: Sequence[int]) -> Tensor:
    """Return `noise` with the norms of `value`, both taken over the given dimensions."""
    if not over:  # the norm of a single number is its magnitude
        return noise.sign() * value.abs()
    wanted = torch.linalg.vector_norm(value, dim=tuple(over), keepdim=True)
    drawn = torch.linalg.vector_norm(noise, dim=tuple(over), keepdim=True)
    return noise * torch.where(drawn > 0, wanted / drawn, 0.0)


def _masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of `torch.nn.utils.prune`, by the name of the parameter."""
    first, found = aliases(model), {}
    for name, mask in model.named_buffers():
        weight = f"{name.removesuffix('_mask')}_orig"
        if name.endswith("_mask") and weight in first:
            found[first[weight]] = mask
    return found


def _transposed_groups(model: nn.Module) -> Mapping[str, int]:
    first, shapes = aliases(model), {n: p.shape for n, p in model.named_parameters()}
    groups = {}
    for name, module in model.named_modules():
        if isinstance(module, _TRANSPOSED):
            # Not read off the weight: that of a spectral norm takes a step of its iteration then.
            shape = module.in_channels, module.out_channels // module.groups, *module.kernel_size
            for weight in _WEIGHTS:
                known = first.get(f"{name}.{weight}" if name else weight)
                if known is not None and shapes[known] == shape:
                    groups[known] = module.groups
    return groups
