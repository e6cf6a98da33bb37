"""Contexts that leave a model as it was found."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from landscape._checks import check_materialised
from landscape._locks import locked
from landscape._streams import OwnStreams, read_streams, same_streams, write_device_streams
from landscape.kept import Attributes, kept_tensors


@contextmanager
def eval_mode(model: nn.Module, *, lists: bool = False) -> Iterator[None]:
    """Put every module in evaluation mode, and each back in its own mode afterwards.

    Tensors that are plain attributes, or in such a container, are put back too: the weight that
    pruning or the older `torch.nn.utils.weight_norm` computes from its parameters before each call,
    a kept feature, attention biases that LeViT looks up once and forgets in `train()`. Numbers that
    a forward pass writes are not, nor what it adds to a list, which may be a record of its own.

    Args:
        model: Any module.
        lists: Put back what lists of tensors held, too.
    """
    with exclusive(model):
        modes = [(each, each.training, Attributes(each, lists)) for each in model.modules()]
        try:
            for module, training, _ in modes:
                if training:
                    module.training = False
            yield
        finally:
            for module, training, attributes in modes:
                if module.training is not training:  # setting one takes a microsecond of Python
                    module.training = training
                attributes.put_back()


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """Put back which modules are in training mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def same_trainable(model: nn.Module) -> Iterator[None]:
    """Put back which parameters require a gradient."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for p, requires_grad in wanted:
            p.requires_grad_(requires_grad)


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Make other threads wait that want the same model, or what `torch.compile` made of it.

    While a model is called with other parameters, these are in the place of its own.
    """
    with locked(getattr(model, "_orig_mod", model)):
        yield


def own_randomness(model: nn.Module) -> AbstractContextManager[None]:
    """Let a model that is random in evaluation mode draw from a fixed seed.

    Functional dropout is, for example. The global streams of the CPU and of the model's devices are
    put back afterwards.
    """
    return OwnStreams(devices=cuda_devices_of(model)).entered()


@contextmanager
def watched_streams(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Yield what tells, afterwards, whether something was drawn from a global random stream.

    Those of the model's devices are put back.
    """
    devices = cuda_devices_of(model)
    before, drawn = read_streams(devices), [False]
    try:
        yield lambda: drawn[0]
        drawn[0] = not same_streams(before, read_streams(devices))
    finally:
        write_device_streams(before[3])


def cuda_devices_of(model: nn.Module) -> set[torch.device]:
    """Return the CUDA devices that a model is on."""
    return {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}


def check_same_weights(
    versions: Iterable[tuple[str, Tensor, int]], put_back: Iterable[Tensor] = ()
) -> None:
    """Refuse a model that has changed its weights in place.

    Args:
        versions: Name, weight, and how often it had been changed before.
        put_back: Weights that may have changed.
    """
    allowed = {id(t) for t in put_back}
    changed = [n for n, t, before in versions if t._version != before and id(t) not in allowed]
    if changed:
        raise ValueError(
            f"`model` must leave its weights as they are in a forward pass, got {changed[0]!r} "
            "changed in place, as an embedding with `max_norm` does; work on a copy."
        )


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Put back the buffers of a model: the tensors themselves, and their values.

    Yields:
        Returns whether the model still has the same tensors.
    """
    own = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(b, b.clone()) for _, each in own for b in each.values() if b is not None]

    def are_same() -> bool:
        return all(module._buffers[n] is b for module, each in own for n, b in each.items())

    try:
        yield are_same
    finally:
        with torch.no_grad():
            for module, each in own:
                for name, buffer in each.items():  # TorchScript's dictionary has no `update`
                    module._buffers[name] = buffer
            for buffer, value in values:
                if torch.is_inference_mode_enabled() or not buffer.is_inference():
                    buffer.copy_(value)  # one of inference mode has not changed outside of it


@contextmanager
def same_tensors(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Put back the buffers of a model, and the tensors that are plain attributes of its modules.

    Yields:
        Returns whether the model still has the same tensors, whatever their values.
    """
    attributes = [Attributes(module) for module in model.modules()]
    held = [t for _, _, tensors in kept_tensors(model) for t in tensors if not t.requires_grad]
    values = [(t, t.clone()) for t in held]
    try:
        with same_buffers(model) as are_same:
            yield lambda: are_same() and all(own.are_same() for own in attributes)
    finally:
        for own in attributes:
            own.put_back()
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Return the buffers of a model and the tensors that are plain attributes of its modules."""
    kept = [t for _, _, tensors in kept_tensors(model) for t in tensors]
    return [*model.buffers(), *kept]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluate a model in this context: modes, buffers and random streams are put back.

    So are embeddings with `max_norm`, which shorten their rows when they are called.

    Raises:
        ValueError: If its weights are not there yet, or it changes others in place.
    """
    check_materialised(model)
    with exclusive(model), same_buffers(model):
        shortened = [
            p
            for module in model.modules()
            if getattr(module, "max_norm", None) is not None
            for p in module.parameters(recurse=False)
        ]
        lengths = [(p, p.detach().clone()) for p in shortened]
        weights = [(n, p) for n, p in model.named_parameters() if not p.is_inference()]
        versions = [(n, p, p._version) for n, p in weights]
        sizes = [_length(p) for _, p in weights]
        try:
            with eval_mode(model), own_randomness(model):
                yield
            same = {n for (n, p), size in zip(weights, sizes, strict=True) if _length(p) == size}
            check_same_weights([v for v in versions if v[0] not in same], shortened)
        finally:
            with torch.no_grad():
                for p, value in lengths:
                    if not torch.equal(p, value):
                        p.data.copy_(value)  # a graph that the user has built stays valid


def _length(weight: Tensor) -> Tensor:
    """Return the norm of a weight of any type."""
    has_norm = weight.is_complex() or (weight.is_floating_point() and weight.itemsize > 1)
    norm: Tensor = (weight.detach() if has_norm else weight.detach().double()).norm()
    return norm
