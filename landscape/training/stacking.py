"""Models of one architecture as rows of common tensors, and a training step of all at once.

Row k of a matrix `(members, parameters)` holds the parameters of model k, which become views of
it, and so do buffers and the state of AdamW. Whatever looks at one model, a checkpoint or a
validation, sees an ordinary model; the step sees tensors with a leading dimension of members:

    values = vmap(loss)(parameters, buffers, inputs, targets); values.sum().backward()

No gradient crosses between members, so the gradient of the sum holds that of each.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from landscape.batches import Inputs
from landscape.parameters import call_with
from landscape.switches import math_attention
from landscape.training.draws import replayed
from landscape.training.loop import Step, Tally, forward, optimized
from landscape.training.row_adamw import RowAdamW


class Stack:
    """Models as rows of common tensors; made by `stacked`.

    Attributes:
        steps: What a step of each member does.
        parameters: Trained parameters by name, each `(members, …)`.
        state: Buffers, and parameters that are not trained, by name, each `(members, …)`.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        """Copy the models' tensors into rows, and make the models' tensors views of these."""
        self.steps = steps
        self._trained = [trained(step) for step in steps]
        names = {p: name for name, p in steps[0].model.named_parameters()}
        self._sizes = [p.numel() for p in self._trained[0]]
        rows = torch.stack([torch.cat([p.detach().flatten() for p in ps]) for ps in self._trained])
        self.parameters: dict[str, Tensor] = {}
        for index, piece in enumerate(torch.split(rows, self._sizes, 1)):
            first = self._trained[0][index]
            stacked = piece.view(len(steps), *first.shape)
            self.parameters[names[first]] = stacked.detach().requires_grad_()
            for row, parameters in zip(stacked, self._trained, strict=True):
                parameters[index].data = row
        self.state: dict[str, Tensor] = {}
        for name, tensors in _others(steps, self.parameters).items():
            self.state[name] = torch.stack([tensor.detach() for tensor in tensors])
            for row, tensor in zip(self.state[name], tensors, strict=True):
                tensor.data = row
        optimizers = [step.optimizer for step in steps]
        self._adamw = (
            RowAdamW(optimizers, self._trained, rows) if RowAdamW.fits(optimizers) else None
        )

    def losses(self, inputs: Inputs, targets: Tensor, masks: Sequence[Tensor]) -> Tally:
        """Return what `loop.forward` returns, for every member.

        Args:
            inputs: Inputs of each member, `(members, batch, …)`, or a mapping of such.
            targets: Targets of each member, `(members, batch, …)`.
            masks: Dropout masks of each member, `(members, …)` each.

        Returns:
            Mean loss, amount averaged over, correct and counted predictions, `(members,)` each.
        """
        step = self.steps[0]

        def of_one(
            parameters: dict[str, Tensor],
            state: dict[str, Tensor],
            masks: Sequence[Tensor],
            inputs: Inputs,
            targets: Tensor,
        ) -> Tally:
            def call(*args: Any, **kwargs: Any) -> Any:
                replay: AbstractContextManager[Any] = replayed(masks) if masks else nullcontext()
                with replay:
                    return call_with(step.model, {**parameters, **state}, *args, **kwargs)

            return forward(step, call, inputs, targets)

        arguments = (self.parameters, self.state, list(masks), inputs, targets)
        with _batched_attention(step.device):
            losses: Tally = vmap(of_one, randomness="different")(*arguments)
        return losses

    def gradients(self, losses: Tensor) -> Tensor:
        """Return the gradient of every member, `(members, parameters)`.

        Args:
            losses: Mean loss of each member `(members,)`.
        """
        found = torch.autograd.grad(
            losses.sum(), list(self.parameters.values()), materialize_grads=True
        )
        return torch.cat([grad.reshape(len(grad), -1) for grad in found], 1)

    def gradient_alone(self, member: int, loss: Tensor) -> Tensor:
        """Return the gradient of a loss of one member's own model, `(parameters,)`.

        Args:
            member: Its number.
            loss: The loss.
        """
        found = torch.autograd.grad(loss, self._trained[member], materialize_grads=True)
        return torch.cat([grad.flatten() for grad in found])

    def update(self, losses: Tensor) -> None:
        """Take a step of every member: gradient, clip by its own norm, optimizer.

        Args:
            losses: Mean loss of each member `(members,)`.
        """
        leaves = list(self.parameters.values())
        for leaf in leaves:
            leaf.grad = None
        losses.sum().backward()  # type: ignore[no-untyped-call]
        used = [leaf.grad for leaf in leaves if leaf.grad is not None]
        gradient = torch.cat([grad.reshape(len(grad), -1) for grad in used], 1)
        clip = self.steps[0].clip
        if clip is not None:  # as `torch.nn.utils.clip_grad_norm_` does
            norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient.mul_((clip / (norms + 1e-6)).clamp(max=1.0))
        if self._adamw is not None and len(used) == len(leaves) and self._adamw.in_step():
            self._adamw.step(gradient)
            return
        pieces = iter(torch.split(gradient, [grad[0].numel() for grad in used], 1))
        for index, leaf in enumerate(leaves):
            piece = next(pieces) if leaf.grad is not None else None
            for row, parameters in enumerate(self._trained):
                own = None if piece is None else piece[row].view_as(parameters[index])
                parameters[index].grad = own
        for step in self.steps:
            step.optimizer.step()

    def check_alike(self) -> None:
        """Refuse models that a callback has made different from each other, or from the stack."""
        modes = [[module.training for module in step.model.modules()] for step in self.steps]
        same = all(
            len(now) == len(then) and all(p is q for p, q in zip(now, then, strict=True))
            for now, then in zip(map(trained, self.steps), self._trained, strict=True)
        )
        for row, step in enumerate(self.steps):  # what is exchanged is no view of its row any more
            own = {**dict(step.model.named_parameters()), **dict(step.model.named_buffers())}
            for name, rows in (*self.parameters.items(), *self.state.items()):
                same &= name in own and own[name].data_ptr() == rows[row].data_ptr()
        if not same or any(mode != modes[0] for mode in modes):
            raise ValueError(
                "`callbacks` must leave what is trained as it is, and training flags alike in all "
                'models, got a change; take method="loop".'
            )

    def unlink(self) -> None:
        """Give the optimizers tensors of their own again."""
        if self._adamw is not None:
            self._adamw.unlink()


@contextmanager
def stacked(steps: Sequence[Step]) -> Iterator[Stack]:
    """Make models rows of common tensors meanwhile; afterwards each has its own ones again.

    Args:
        steps: What a step of each member does, with models of one architecture.

    Yields:
        The stack.
    """
    own = _memory(steps)
    stack = None
    try:
        stack = Stack(steps)
        yield stack
    finally:
        for tensor, data in own:
            tensor.data = data.copy_(tensor.data)
        if stack is not None:
            stack.unlink()


@contextmanager
def doubled(steps: Sequence[Step]) -> Iterator[None]:
    """Let models be in float64; afterwards they and their optimizers have their own tensors again.

    Args:
        steps: What a step of each model does.
    """
    own = _memory(steps)
    states = [dict(step.optimizer.state) for step in steps]
    try:
        for tensor, data in own:
            tensor.data = data.double() if data.is_floating_point() else data.clone()
        yield
    finally:
        for tensor, data in own:
            tensor.data = data
        for step, state in zip(steps, states, strict=True):
            step.optimizer.state.clear()
            step.optimizer.state.update(state)


def _memory(steps: Sequence[Step]) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of all models, each with the memory that it has now."""
    models = [step.model for step in steps]
    return [(t, t.data) for model in models for t in (*model.parameters(), *model.buffers())]


def stack_batches(batches: Sequence[Any]) -> Any:
    """Return tensors, or mappings of tensors, stacked along a leading dimension of members.

    Args:
        batches: One a member, all of one shape.

    Raises:
        ValueError: If the shapes differ, or an entry of a mapping is no tensor.
    """
    first = batches[0]
    if isinstance(first, Mapping):
        return {name: stack_batches([batch[name] for batch in batches]) for name in first}
    if not isinstance(first, Tensor):
        raise ValueError(
            f"`data` must hold tensors alone to be stacked, got a {type(first).__name__}; take "
            'method="loop".'
        )
    shapes = {tuple(batch.shape) for batch in batches}
    if len(shapes) > 1:
        raise ValueError(
            "`data` must give every member batches of one shape to be stacked, got "
            f"{' and '.join(str(shape) for shape in sorted(shapes))}; take subsets of equal "
            'length, or method="loop".'
        )
    return torch.stack(list(batches))


def check_stackable(steps: Sequence[Step]) -> None:
    """Refuse what cannot be trained with `vmap`.

    Args:
        steps: What a step of each member does, with models of one architecture.

    Raises:
        ValueError: If autocast is wanted, the optimizers are not all on the same parameters of
            their models, of one dtype, or parameters have hooks or other buffers that are not
            in the state.
    """
    chosen: list[list[str]] = []
    for k, step in enumerate(steps):
        if step.bfloat16:
            raise ValueError('`bfloat16` needs method="loop", because `vmap` ignores autocast.')
        names = {p: name for name, p in step.model.named_parameters()}
        parameters = trained(step)
        if not names.keys() >= set(parameters):
            raise ValueError(
                f"`optimizers` must have parameters of the models alone, but number {k} has "
                'others; take method="loop".'
            )
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
            raise ValueError('`models` must have no hooks on parameters; take method="loop".')
        if not _same_constants(step.model, steps[0].model):
            raise ValueError(
                "`models` must have the same buffers where these are not in the state, but number "
                f'{k} differs from number 0; take method="loop".'
            )
        chosen.append([names[p] for p in parameters])
        if chosen[k] != chosen[0]:
            raise ValueError(
                f"`optimizers` must be on the same parameters in the same order, but number {k} "
                'differs from number 0; make them alike, or take method="loop".'
            )
        if len({p.dtype for p in parameters}) > 1:
            raise ValueError('`models` must have parameters of one dtype; take method="loop".')


def trained(step: Step) -> list[nn.Parameter]:
    """Return the parameters that the step changes, in the order of the optimizer."""
    return [p for p in optimized(step.optimizer) if p.requires_grad]


def _same_constants(model: nn.Module, other: nn.Module) -> bool:
    """Whether the buffers of two models that are not in their state are equal."""
    kept, buffers = model.state_dict().keys(), dict(other.named_buffers())
    return all(
        name in kept or torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers()
    )


def _others(steps: Sequence[Step], names: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Return all tensors of the models' states but those named, one per member by name.

    Buffers that are no part of the state, such as masks, belong to the architecture: they are
    taken from the first member.
    """
    rest: dict[str, list[Tensor]] = {}
    for step in steps:
        persistent = step.model.state_dict().keys()
        for name, tensor in (*step.model.named_parameters(), *step.model.named_buffers()):
            if name in persistent and name not in names:
                rest.setdefault(name, []).append(tensor)
    return rest


def _batched_attention(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which attention has a batching rule; the fused one of CPUs has none."""
    return math_attention() if device.type == "cpu" else nullcontext()
