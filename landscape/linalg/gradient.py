"""The gradient of a loss with the graph to differentiate it again, and in what precision.

A Hessian product is v ↦ ∇⟨∇L, v⟩. The graph of ∇L does not depend on v and is kept.
"""

import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args
from unittest.mock import patch

import torch
from torch import Tensor

from landscape._checks import check_choice
from landscape.linalg.kinks import Choice, Kinks, Noting, kinks_of
from landscape.linalg.layers import with_cheap_second_derivatives
from landscape.parameters import ParameterSpace
from landscape.switches import eagerly, math_attention, rounding
from landscape.trial import nodes_behind

Precision = Literal["full", "tf32", "bf16"]


class GradientGraph:
    """The gradient of a loss, with the graph to differentiate it again.

    Attributes:
        loss: Value of the loss.
        depends: Whether it depends on any of the leaves.
        kinks: Whether it has kinks; it is looked at where the memory is measured.
        choices: What a model on a CPU chooses at its kinks (`landscape.linalg.kinks`).
        gradient: Its gradient, one tensor a parameter.
        weight: Factor of the loss in the objective.
        num_bytes: Memory of the graph, where it was measured; infinite where it cannot be, for a
            model that takes derivatives by `torch.func`.
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
            precision: `"bf16"` runs the loss under autocast; otherwise it is in full precision.
            measure: Measure the memory of the graph, and check that it can be differentiated.

        Raises:
            ValueError: If it cannot.
        """
        self.weight = weight
        self.kinks: Kinks = "free"
        self.choices: list[Choice] = []
        self._leaves = list(leaves.values())
        sizes: dict[int, int] = {}
        on_cpu = self._leaves[0].device.type == "cpu"

        def pack(tensor: Tensor) -> tuple[Tensor, int]:
            if tensor.layout is torch.strided:  # another has no storage of its own
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            # The tensor itself would hold its own graph for ever.
            return tensor.detach(), tensor._version

        def unpack(packed: tuple[Tensor, int]) -> Tensor:
            tensor, version = packed
            if tensor._version != version:  # PyTorch does not look where there are hooks
                raise RuntimeError(
                    "`model` must not modify in place what its gradient needs, got a tensor of "
                    f"shape {tuple(tensor.shape)} that was modified by an inplace operation."
                )
            return tensor

        def forward() -> Tensor:
            sizes.clear()
            with Noting(self.choices) if on_cpu else nullcontext():
                value = loss()
            if measure:
                self.kinks = kinks_of(check_twice_differentiable([value]), self.choices)
            return value

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack) if measure else nullcontext()
        with unchanged_gradients() if measure else nullcontext():
            try:
                with hooks:
                    self._differentiate(forward, precision)
                self.num_bytes: float = sum(sizes.values())
            except RuntimeError as error:
                if not measure or "saved tensor hooks" not in str(error):
                    raise
                self._differentiate(forward, precision)  # the model uses `torch.func`
                self.num_bytes = math.inf
        if measure:
            check_twice_differentiable(self.gradient)

    def _differentiate(self, loss: Callable[[], Tensor], precision: Precision) -> None:
        with torch.enable_grad():
            with torch.autocast(self._leaves[0].device.type, torch.bfloat16, precision == "bf16"):
                value = with_cheap_second_derivatives(loss)
            self.loss, self.depends = value.detach(), value.requires_grad
            # A parameter that the loss ignores has a zero gradient, and a zero row.
            self.gradient = (
                torch.autograd.grad(value, self._leaves, create_graph=True, materialize_grads=True)
                if self.depends
                else tuple(torch.zeros_like(p) for p in self._leaves)
            )

    def product(self, tangents: list[Tensor], precision: Precision = "full") -> tuple[Tensor, ...]:
        """Return the Hessian of the loss times the tangents, parameter by parameter.

        Args:
            tangents: One a parameter.
            precision: `"tf32"` lets a GPU round the factors of matrix products and convolutions.
        """
        curved = [i for i, g in enumerate(self.gradient) if g.requires_grad]
        if not curved:
            return tuple(torch.zeros_like(p) for p in self._leaves)
        with rounding(precision):
            return torch.autograd.grad(
                [self.gradient[i] for i in curved],
                self._leaves,
                [tangents[i] for i in curved],
                retain_graph=True,
                materialize_grads=True,
            )


def check_twice_differentiable(tensors: Sequence[Tensor]) -> list[str]:
    """Refuse a graph through a function whose derivative PyTorch would leave out.

    That of one marked with `once_differentiable` is refused by `backward` alone, not where
    derivatives are asked for by name; of one without any, as of quantised layers, it only warns.

    Returns:
        The name of every function.

    Raises:
        ValueError: If there is one.
    """
    names = [node.name() for node in nodes_behind(tensors)]
    if "torch::autograd::Error" in names:
        raise ValueError(
            "`model` must be twice differentiable, got a function marked with "
            "`once_differentiable`; write its backward pass in differentiable operations."
        )
    if "torch::autograd::WarnNotImplemented" in names:
        raise ValueError(
            "`model` must be differentiable by the chosen parameters, got a function without a "
            "derivative, such as a quantised layer; take the model as it was before, or choose "
            "parameters behind it with `Objective(parameters=…)`."
        )
    return names


@contextmanager
def unchanged_gradients() -> Iterator[None]:
    """Refuse a model that hooks its activations to put another gradient in the place of theirs.

    Deep equilibrium models do: what the hook solves for is a number to autograd, whose derivative
    is left out of the second derivative.

    Raises:
        ValueError: If a gradient that is taken inside is changed.
    """
    changed = threading.Event()
    register: Callable[..., Any] = Tensor.register_hook

    def watched(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Any:
        def noted(gradient: Tensor) -> Tensor | None:
            other = hook(gradient)
            known = bool(gradient.any())  # of zeros it does not show
            if other is not None and not (known and torch.equal(other, gradient)):
                changed.set()
            return other

        return register(tensor, noted)

    with _one_at_a_time, patch.object(Tensor, "register_hook", watched):
        yield
    if changed.is_set():
        raise ValueError(
            "`model` must be twice differentiable, got one that changes a gradient by a hook "
            "(`register_hook`), which has no derivative of its own; let autograd differentiate the "
            "operations, or the last iterations of a fixed point."
        )


_one_at_a_time = threading.RLock()  # patches of two threads would put each other back


def hessian_product(
    graph: GradientGraph, space: ParameterSpace, precision: Precision, v: Tensor
) -> Tensor:
    """Return the Hessian of a graph's loss times a vector of shape `(dim,)`."""
    return space.flatten(graph.product(list(space.unflatten(v).values()), precision))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run attention under the math kernel, compiled modules eagerly, and nothing rounded.

    Neither the other kernels nor compiled code have a second derivative.

    Raises:
        RuntimeError: In inference mode, which knows of no derivative, or under autocast, which
            would round the derivatives and the vectors as well.
        ValueError: If a function that is differentiated inside has no second derivative.
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
    with math_attention(), eagerly(), rounding("full"):
        try:
            yield
        except RuntimeError as error:
            found = _NO_SECOND_DERIVATIVE.search(str(error))
            if found is None:
                raise
            name = found[1] or found[2]
            remedy = (
                "write it in other operations (a bag of embeddings as `F.embedding` and a sum, for "
                "example)"
            )
            if name.startswith("cudnn"):
                remedy = "let the model call it within `torch.backends.cudnn.flags(enabled=False)`"
            raise ValueError(
                f"`model` and `loss` must be twice differentiable, got {name!r}, which has no "
                f"second derivative; {remedy}."
            ) from error


# as PyTorch and torchvision say it
_NO_SECOND_DERIVATIVE = re.compile(
    r"derivative for '?(?:aten::)?_?(\w+?)_backward'? is not|double backwards on (\w+) not"
)


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
