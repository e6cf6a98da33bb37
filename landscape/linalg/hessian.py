"""Curvature matrices of a frozen objective: Hessian, Gauss-Newton and Fisher.

With per-sample loss ℓ_n(f(x_n; θ)), J_n = ∂f(x_n; θ)/∂θ and the objective of `landscape.objective`:

    Hessian         H = (1/N) Σ_n ∂²ℓ_n/∂θ²                 + λI
    Gauss-Newton    G = (1/N) Σ_n J_nᵀ (∂²ℓ_n/∂f²) J_n      + λI
    Fisher          F = (1/N) Σ_n J_nᵀ (diag p_n − p_n p_nᵀ) J_n + λI,   p_n = softmax f(x_n; θ)
    empirical       E = (1/N) Σ_n ∇ℓ_n ∇ℓ_nᵀ                + λI

Attention runs under the math kernel, the only one with a second derivative.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape._checks import check_at_least, check_choice
from landscape.batches import PreparedBatch
from landscape.linalg.layers import cheap_second_derivatives
from landscape.linalg.operators import SymmetricOperator
from landscape.memory import free_memory
from landscape.objective import FrozenObjective, Objective
from landscape.parameters import ParameterSpace
from landscape.restore import eagerly

Memory = int | float | str
Precision = Literal["full", "tf32", "bf16"]


class CurvatureOperator(SymmetricOperator):
    """A curvature matrix over all samples, as the weighted sum of its batches plus λI.

    The operator is taken at the parameters as they are when it is built.

    Attributes:
        frozen: The objective on one fixed draw of the data.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        objective: Objective = Objective(),
        *,
        memory: Memory = "auto",
    ) -> None:
        """Draw the data and fix the parameters.

        Args:
            model: Any module; see `Objective`.
            data: Re-iterable of batches.
            objective: Whose curvature.
            memory: What may be kept between products: bytes, a fraction of the free memory of the
                device, or `"auto"` (half of it).

        Raises:
            ValueError: If the loss is not finite on some batch, an argument is out of range, or the
                model has gradient checkpointing on.
        """
        self.memory = _memory_budget(memory)
        self._set_frozen(objective.freeze(model, data))

    @classmethod
    def of(cls, frozen: FrozenObjective, *, memory: Memory = "auto") -> Self:
        """Return the operator of an objective that is already frozen.

        Args:
            frozen: The objective on one fixed draw of the data.
            memory: As in the constructor.
        """
        self = cls.__new__(cls)
        self.memory = _memory_budget(memory)
        self._set_frozen(frozen)
        return self

    def _set_frozen(self, frozen: FrozenObjective) -> None:
        if frozen.recomputes:
            raise ValueError(
                "`model` must not compute its activations again, got gradient checkpointing; "
                "switch it off, in timm by `model.set_grad_checkpointing(False)`."
            )
        self.frozen = frozen
        space = frozen.space
        super().__init__(space.dim, space.dtype, space.device)
        self._weight_decay = frozen.objective.weight_decay
        self._setup()

    def _setup(self) -> None:
        """Prepare what is kept between products; refuse a loss that is not finite."""
        losses = []
        with torch.no_grad():
            for batch in self.frozen.batches:
                losses.append(self.frozen.data_term(self.frozen.space.values, batch))
        check_finite_losses(losses)


class HessianOperator(CurvatureOperator):
    """The Hessian, by double backward.

    The graph of each batch's gradient is kept for as many batches as fit `memory`; the product
    with a kept batch costs about 1.5 to 2 gradients, with another 2.5 to 3.5.

    Attributes:
        num_kept: Number of batches whose graph is kept.
        precision: Of the products: `"full"` is the model's, `"tf32"` lets a GPU round the factors
            of matrix products and convolutions to 10 bits, `"bf16"` runs the model under bfloat16
            autocast; both accumulate in float32. What that does to a spectrum, `hessian_spectrum`
            measures.
    """

    precision: Precision = "full"

    @classmethod
    def of(
        cls, frozen: FrozenObjective, *, memory: Memory = "auto", precision: Precision = "full"
    ) -> Self:
        """Return the operator of an objective that is already frozen.

        Args:
            frozen: The objective on one fixed draw of the data.
            memory: As in the constructor.
            precision: Of the products; see the class.

        Raises:
            ValueError: If the model is not in float32 for a reduced precision, or `"tf32"` has no
                GPU to run on.
        """
        check_precision(precision, frozen.space)
        self = cls.__new__(cls)
        self.precision = precision
        self.memory = _memory_budget(memory)
        self._set_frozen(frozen)
        return self

    def _setup(self) -> None:
        budget = _bytes(self.memory, self.device)
        self._graphs: list[GradientGraph] = []
        # Leaves of our own: the user's parameters and their `.grad` take no part.
        self._leaves = {n: v.requires_grad_() for n, v in _copies(self.frozen).items()}
        losses: list[Tensor] = []
        per_sample = 0.0
        with twice_differentiable():
            for batch in self.frozen.batches:
                if len(self._graphs) < len(losses) or per_sample * batch.size > budget:
                    with torch.no_grad():
                        losses.append(self.frozen.data_term(self._leaves, batch))
                    continue
                graph = self._graph(batch, measure=not per_sample)
                if not losses and not graph.depends:
                    _warn_independent()
                losses.append(graph.loss)
                per_sample = per_sample or graph.num_bytes / batch.size
                if per_sample * batch.size <= budget:
                    self._graphs.append(graph)
                    budget -= int(per_sample * batch.size)
        check_finite_losses(losses)

    @property
    def num_kept(self) -> int:
        """Number of batches whose gradient graph is kept between products."""
        return len(self._graphs)

    def gradient(self) -> Tensor:
        """Return the gradient of the objective, shape `(dim,)`; one gradient over all data."""
        space = self.frozen.space
        out = self._weight_decay * space.flatten(space.values)
        with twice_differentiable():
            for graph in self._each_graph():
                out.add_(space.flatten([g.detach() for g in graph.gradient]), alpha=graph.weight)
        return out

    def _graph(self, batch: PreparedBatch, measure: bool = False) -> "GradientGraph":
        def loss() -> Tensor:
            return self.frozen.data_term(self._leaves, batch)

        return GradientGraph(loss, self._leaves, batch.weight, self.precision, measure)

    def _each_graph(self) -> Iterator["GradientGraph"]:
        yield from self._graphs
        if len(self._graphs) < self.frozen.num_batches:
            for index, batch in enumerate(self.frozen.batches):
                if index >= len(self._graphs):
                    yield self._graph(batch)

    def _matmat(self, vectors: Tensor) -> Tensor:
        space = self.frozen.space
        out = self._weight_decay * vectors
        with twice_differentiable():
            for graph in self._each_graph():
                for column in range(vectors.shape[1]):
                    tangents = list(space.unflatten(vectors[:, column]).values())
                    product = graph.product(tangents)
                    out[:, column].add_(space.flatten(product), alpha=graph.weight)
        return out


class GradientGraph:
    """The gradient of a loss, with the graph to differentiate it again.

    Attributes:
        loss: Value of the loss.
        depends: Whether it depends on any of the leaves.
        gradient: Its gradient, one tensor a parameter.
        weight: Factor of the loss in the objective.
        num_bytes: Memory of the graph, where it was measured.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor],
        leaves: Mapping[str, Tensor],
        weight: float = 1.0,
        precision: Precision = "full",
        measure: bool = False,
    ) -> None:
        """Take the gradient.

        Args:
            loss: Returns the loss, a scalar of the leaves.
            leaves: Parameters by name, which require a gradient.
            weight: Factor of the loss in the objective.
            precision: As in `HessianOperator`.
            measure: Measure the memory of the graph.
        """
        self.weight = weight
        self._precision = precision
        self._leaves = list(leaves.values())
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> tuple[Tensor, int]:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            # The tensor itself would hold its own graph for ever.
            return tensor.detach(), tensor._version

        def unpack(packed: tuple[Tensor, int]) -> Tensor:
            tensor, version = packed
            if tensor._version != version:  # PyTorch does not look where there are hooks
                raise RuntimeError(
                    "`model` must leave what its gradient needs as it is, got a tensor of shape "
                    f"{tuple(tensor.shape)} that was modified by an inplace operation."
                )
            return tensor

        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, unpack)
            if measure
            else torch.enable_grad(),
            _rounding(precision),
        ):
            with (
                torch.autocast(self._leaves[0].device.type, torch.bfloat16, precision == "bf16"),
                cheap_second_derivatives(),
            ):
                value = loss()
            self.loss, self.depends = value.detach(), value.requires_grad
            # A parameter that the loss ignores has a zero gradient, and a zero row.
            self.gradient = (
                torch.autograd.grad(value, self._leaves, create_graph=True, materialize_grads=True)
                if self.depends
                else tuple(torch.zeros_like(p) for p in self._leaves)
            )
        self.num_bytes = sum(sizes.values())

    def product(self, tangents: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the Hessian of the loss times the tangents, parameter by parameter."""
        curved = [i for i, g in enumerate(self.gradient) if g.requires_grad]
        if not curved:
            return tuple(torch.zeros_like(p) for p in self._leaves)
        with _rounding(self._precision):
            return torch.autograd.grad(
                [self.gradient[i] for i in curved],
                self._leaves,
                [tangents[i] for i in curved],
                retain_graph=True,
                materialize_grads=True,
            )


class _OutputCurvature(CurvatureOperator):
    """J_nᵀ C_n J_n with a small matrix C_n on the outputs of each sample.

    J v is taken by reverse mode twice: Jᵀu is linear in u, and its derivative along v is J v. So
    every model that has a Hessian has these matrices, whatever its forward-mode support.
    """

    def _matmat(self, vectors: Tensor) -> Tensor:
        out = self._weight_decay * vectors  # the Hessian of (λ/2)‖θ‖² is λI
        with twice_differentiable():
            for batch in self.frozen.batches:
                for column in range(vectors.shape[1]):
                    product = self._batch_product(batch, vectors[:, column])
                    out[:, column].add_(product, alpha=batch.weight)
        return out

    def _batch_product(self, batch: PreparedBatch, v: Tensor) -> Tensor:
        space = self.frozen.space
        leaves = {n: t.detach().requires_grad_() for n, t in space.values.items()}
        parameters = list(leaves.values())
        with torch.enable_grad():
            outputs = self._outputs(leaves, batch)
            if not outputs.requires_grad:
                _warn_independent()
                return torch.zeros_like(v)
            dual = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                outputs, parameters, dual, create_graph=True, materialize_grads=True
            )
        pairs = [
            (g, t)
            for g, t in zip(pulled, space.unflatten(v).values(), strict=True)
            if g.requires_grad
        ]
        (tangent,) = torch.autograd.grad(
            [g for g, _ in pairs], dual, [t for _, t in pairs], retain_graph=True
        )
        curved = self._output_product(batch, outputs.detach(), tangent)
        return space.flatten(
            torch.autograd.grad(outputs, parameters, curved, materialize_grads=True)
        )

    def _outputs(self, leaves: dict[str, Tensor], batch: PreparedBatch) -> Tensor:
        """Return what C_n acts on: the logits, one row a sample."""
        return self.frozen.logits(leaves, batch.inputs)

    @abstractmethod
    def _output_product(self, batch: PreparedBatch, outputs: Tensor, tangent: Tensor) -> Tensor:
        """Return the curvature of the batch's mean loss in the outputs, times `tangent`."""


class GaussNewtonOperator(_OutputCurvature):
    """The generalised Gauss-Newton matrix; a product costs about 3 gradients.

    It equals the Hessian of the objective with the network linearised at θ, and is positive
    semi-definite where the loss is convex in the outputs (Schraudolph, 2002).
    """

    def _output_product(self, batch: PreparedBatch, outputs: Tensor, tangent: Tensor) -> Tensor:
        logits = outputs.requires_grad_()
        with torch.enable_grad():
            loss = self.frozen.loss(logits, batch)
            (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
            if not gradient.requires_grad:
                return torch.zeros_like(logits)
            (product,) = torch.autograd.grad(gradient, logits, tangent, materialize_grads=True)
        return product


class FisherOperator(_OutputCurvature):
    """The true Fisher information of the softmax model, by exact expectation over the classes.

    E_{y∼p}[∇log p(y) ∇log p(y)ᵀ] = Jᵀ (diag p − p pᵀ) J: labels are not used, nothing is sampled
    (Martens, 2020, sec. 9). Outputs are logits of shape `(n, classes)`.
    """

    def _setup(self) -> None:
        batch = next(iter(self.frozen.batches))
        with torch.no_grad():
            logits = self.frozen.logits(self.frozen.space.values, batch.inputs)
        if logits.dim() != 2:
            raise ValueError(
                f"`model` must return logits of shape (n, classes) for a Fisher matrix, got "
                f"{tuple(logits.shape)}."
            )
        super()._setup()

    def _output_product(self, batch: PreparedBatch, outputs: Tensor, tangent: Tensor) -> Tensor:
        p = outputs.softmax(-1)
        return p * (tangent - (p * tangent).sum(-1, keepdim=True)) / batch.size


class EmpiricalFisherOperator(_OutputCurvature):
    """Second moment of the per-sample gradients at the labels given.

    Not the Fisher information: it uses the labels of the data, and differs from the Hessian even
    at a minimum of a misspecified model (Kunstner et al., 2019).
    """

    def _outputs(self, leaves: dict[str, Tensor], batch: PreparedBatch) -> Tensor:
        loss, targets = self.frozen.objective.loss, batch.targets
        if loss is None or targets is None:
            raise ValueError("`loss` must be given, and `data` must hold targets, got neither.")

        def one(logits: Tensor, target: Tensor) -> Tensor:
            return loss(logits[None], target[None])

        each: Tensor = vmap(one)(super()._outputs(leaves, batch), targets)
        return each

    def _output_product(self, batch: PreparedBatch, outputs: Tensor, tangent: Tensor) -> Tensor:
        return tangent / batch.size


def _warn_independent() -> None:
    warnings.warn(
        "The loss depends on none of the chosen parameters, so its curvature is zero. If it "
        "should, take `no_grad`, `inference_mode` and `detach` out of the model.",
        stacklevel=2,
    )


def check_finite_losses(losses: list[Tensor]) -> None:
    """Refuse NaN and infinite batch losses.

    Raises:
        ValueError: If one is not finite.
    """
    bad = (~torch.isfinite(torch.stack(losses))).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"`model` must have a finite loss on every batch, got {float(losses[bad[0]])} on batch "
            f"{bad[0]} ({len(bad)} of {len(losses)} batches)."
        )


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run attention under the math kernel, and compiled modules eagerly.

    Neither the other kernels nor compiled code have a second derivative.

    Raises:
        RuntimeError: In inference mode, which knows of no derivative, or under autocast, which
            would round the derivatives and the vectors as well.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Curvature must be computed outside `torch.inference_mode`; use `torch.no_grad`."
        )
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise RuntimeError(
            "Curvature must be computed outside `torch.autocast`; use it in the model's forward "
            'pass, or `precision="bf16"` where a probe has it.'
        )
    with sdpa_kernel(SDPBackend.MATH), eagerly():
        yield


def check_precision(precision: str, space: ParameterSpace) -> None:
    """Refuse a precision that the model or its device does not have.

    Raises:
        ValueError: If it is unknown, the model is not in float32, or `"tf32"` has no GPU.
    """
    check_choice("precision", precision, get_args(Precision))
    if precision != "full" and space.dtype != torch.float32:
        raise ValueError(f"`precision` must be 'full' for a model in {space.dtype}.")
    if precision == "tf32" and space.device.type != "cuda":
        raise ValueError(f"`precision` 'tf32' needs a CUDA device, got a model on {space.device}.")


@contextmanager
def _rounding(precision: Precision) -> Iterator[None]:
    """Let matrix products and convolutions of a GPU round their factors to TF32, or not.

    PyTorch's own default rounds those of convolutions.
    """
    cudnn: Any = torch.backends.cudnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def _copies(frozen: FrozenObjective) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in frozen.space.values.items()}


def _memory_budget(memory: Memory) -> Memory:
    if memory != "auto":
        if isinstance(memory, str):
            raise ValueError(f"`memory` must be 'auto', bytes or a fraction, got {memory!r}.")
        check_at_least("memory", memory, 0)
    return memory


def _bytes(memory: Memory, device: torch.device) -> int:
    if memory == "auto":
        memory = 0.5
    if isinstance(memory, float):
        return int(memory * free_memory(device))
    return int(memory)
