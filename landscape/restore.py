"""Contexts that leave a model as it was found."""

import copy
import functools
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, TypeVarTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from landscape._checks import check_materialised
from landscape._locks import locked
from landscape._streams import OwnStreams, read_streams, same_streams, write_device_streams

Wanted = TypeVarTuple("Wanted")
Cache = tuple[nn.Module, str, Any]
"""A module, the name of an attribute of it, and what that is when empty: an empty container of its
type (`_EMPTY`), one with `None` in the place of tensors (`_BLANK`), `None`, or not there at all
(`_NONE`)."""


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
        modes = [(each, each.training, _Attributes(each, lists)) for each in model.modules()]
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


@contextmanager
def emptied(caches: Sequence[Cache]) -> Iterator[None]:
    """Let a model fill caches again, and put back afterwards what it had kept there."""
    found = [(vars(module), name, vars(module).get(name, _NONE)) for module, name, _ in caches]
    made: dict[tuple[int, object], Any] = {}  # modules that share a container share the empty one
    try:
        for (own, name, held), (_, _, empty) in zip(found, caches, strict=True):
            if (id(held), empty) not in made:
                made[id(held), empty] = _emptied(held, empty)
            _set(own, name, made[id(held), empty])
        yield
    finally:
        for own, name, held in found:
            _set(own, name, held)


def _emptied(held: Any, empty: object) -> Any:
    """Return what an attribute holds as long as it holds no tensor.

    Args:
        held: What it holds now.
        empty: `_EMPTY`, `_BLANK`, or what it holds.
    """
    if empty is _BLANK:
        return tree_map(lambda leaf: None if isinstance(leaf, Tensor) else leaf, held)
    if empty is not _EMPTY:
        return empty
    held = copy.copy(held)
    held.clear()
    return held


def caches_of(model: nn.Module, run: Callable[[], object], learned: bool = False) -> list[Cache]:
    """Return the plain attributes in which modules keep what they compute at the first call.

    A tensor, or a container of tensors, is such a cache where a second call leaves it as it is, and
    one after it was emptied fills it again; what is written anew at every call is kept for others.
    LeViT looks up its attention biases once in evaluation mode, for example: with other
    parameters in place they would be those of before, and without a gradient.

    Args:
        model: Any module.
        run: Calls it: once; where it then keeps tensors, once more, and up to four times for each
            name of a cache. Most models keep none.
        learned: Only those that are filled with something that requires a gradient.
    """
    caches: list[Cache] = []
    # The caller reports what is wrong.
    with eval_mode(model, lists=True), eagerly(), suppress(Exception):
        run()
        filled = [(module, name, list(held)) for module, name, held in _kept_tensors(model)]
        if not filled:
            return []
        run()
        owners: dict[str, list[nn.Module]] = {}
        for module, name, before in filled:
            now = _held(vars(module).get(name))
            if len(now) == len(before) and all(map(operator.is_, now, before)):
                owners.setdefault(name, []).append(module)
        for name, modules in owners.items():
            held = [vars(module)[name] for module in modules]
            clear = (_EMPTY,) if all(isinstance(value, dict | list) for value in held) else ()
            blank = (_BLANK,) if not any(isinstance(value, Tensor) for value in held) else ()
            for empty in (*clear, *blank, None, _NONE):
                found = _filled_again(run, [(module, name, empty) for module in modules], learned)
                if found is not None:
                    caches += found
                    break
    return caches


def keeps_tensors(model: nn.Module) -> bool:
    """Whether a plain attribute of a module is a tensor now, or holds one."""
    return any(True for _ in _kept_tensors(model))


def _kept_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, list[Tensor]]]:
    """Yield the plain attributes of modules that are tensors, or containers of some."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _OF_MODULES and (held := _held(value)):
                yield module, name, held


def _filled_again(
    run: Callable[[], object], emptied_ones: Sequence[Cache], learned: bool
) -> list[Cache] | None:
    """Return which of some emptied attributes a call fills; `None` if it needs what was there."""
    with emptied(emptied_ones):
        if any(_held(vars(module).get(name)) for module, name, _ in emptied_ones):
            return None  # a container that cannot be emptied so
        try:
            run()
        except Exception:
            return None
        return [
            cache
            for cache in emptied_ones
            if any(t.requires_grad or not learned for t in _held(vars(cache[0]).get(cache[1])))
        ]


_OF_MODULES = frozenset(vars(nn.Module()))
_NONE = object()  # no attribute
_EMPTY = object()  # a dictionary or a list without entries
_BLANK = object()  # a container with `None` in the place of its tensors


class _Attributes:
    """The plain attributes of a module that are tensors or containers, to be put back."""

    def __init__(self, module: nn.Module, lists: bool = False) -> None:
        self._own = vars(module)
        self._before = dict(self._own)
        self._contents = [
            (container, copy.copy(container))
            for name, value in self._own.items()
            if name not in _OF_MODULES
            for container in _below(value)
            if isinstance(container, dict) or (lists and isinstance(container, list))
        ]
        self._buffers = module._buffers, dict(module._buffers)

    def are_same(self) -> bool:
        """Whether none was replaced, whatever the values of the tensors."""
        return not self._replaced() and not self._changed() and not self._made()

    def put_back(self) -> None:
        """Put back what was replaced or changed, and take away what was not there."""
        for name in self._replaced():
            _set(self._own, name, self._before.get(name, _NONE))
        buffers, before = self._buffers
        for name in self._made():
            _set(buffers, name, before.get(name, _NONE))
        for container, content in self._changed():
            container.clear()
            container.update(content) if isinstance(container, dict) else container.extend(content)

    def _replaced(self) -> list[str]:
        """Return the names of attributes that are others than before, or new, or gone.

        None where no tensor is among them: with one go the size or the flag that are kept beside.
        """
        own, was = self._own, self._before
        if _are_same(_entries(own), _entries(was)):
            return []  # as nearly always
        names = (own.keys() | was.keys()) - _OF_MODULES
        found = [name for name in names if own.get(name, _NONE) is not was.get(name, _NONE)]
        kept = any(_is_kept(values.get(name)) for name in found for values in (own, was))
        return found if kept else []

    def _made(self) -> list[str]:
        """Return the names of buffers that are there, where none was."""
        buffers, before = self._buffers
        return [n for n, b in buffers.items() if b is not None and before.get(n) is None]

    def _changed(self) -> list[tuple[Any, Any]]:
        """Return dictionaries, and lists of tensors, that hold others now, with what they held."""
        return [
            (container, content)
            for container, content in self._contents
            if not _are_same(_entries(container), _entries(content))
            and (isinstance(container, dict) or _held(container) or _held(content))
        ]


def _set(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is _NONE:
        attributes.pop(name, None)
    else:
        attributes[name] = value


def _entries(container: dict[Any, Any] | list[Any]) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else container


def _are_same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _is_kept(value: Any) -> bool:
    return isinstance(value, dict) or bool(_held(value))


def _held(value: Any) -> list[Tensor]:
    """Return the tensors of an attribute that is one, or a container of some."""
    return [one for one in _below(value) if isinstance(one, Tensor)]


def _below(value: Any) -> Iterator[Any]:
    """Yield a value and all that is in it: entries of dictionaries, lists and tuples."""
    waiting, seen = [value], set[int]()
    while waiting:
        yield (one := waiting.pop())
        if isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            waiting.extend(reversed(one.values() if isinstance(one, dict) else one))


def for_all_threads(
    context: Callable[[*Wanted], AbstractContextManager[Any]],
) -> Callable[[*Wanted], AbstractContextManager[None]]:
    """Let threads overlap in a context that switches something of PyTorch's, one for all of them.

    What the latest of those inside wants holds; the last to leave puts back what was found.
    """
    lock, held = threading.RLock(), ExitStack()
    inside: dict[object, tuple[*Wanted]] = {}  # what each wants
    now: tuple[*Wanted] | None = None

    def follow() -> None:
        nonlocal now
        latest = next(reversed(inside.values()), None)
        if latest != now:
            held.close()
            now = None
            if latest is not None:
                held.enter_context(context(*latest))
            now = latest

    @functools.wraps(context)
    @contextmanager
    def shared(*wanted: *Wanted) -> Iterator[None]:
        own = object()
        try:
            with lock:
                inside[own] = wanted
                follow()
            yield
        finally:
            with lock:
                inside.pop(own, None)
                follow()

    return shared


def eagerly() -> AbstractContextManager[None]:
    """Run compiled modules as the Python they were made of.

    Compiled code can be differentiated once only, and hides the calls that it makes.
    """
    # A costly import; without it nothing is compiled.
    return _force_eager() if "torch._dynamo" in sys.modules else nullcontext()


_force_eager = for_all_threads(lambda: torch.compiler.set_stance("force_eager"))


@for_all_threads
def math_attention() -> AbstractContextManager[Any]:
    """Compute attention by plain products, which can be differentiated twice and batched."""
    return sdpa_kernel(SDPBackend.MATH)


@for_all_threads
@contextmanager
def without_fast_path() -> Iterator[None]:
    """Keep the encoder layers of PyTorch to one function, with gradients and without.

    Their fast path, taken without, sets what is padded to zero.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@for_all_threads
@contextmanager
def rounding(precision: str) -> Iterator[None]:
    """Let matrix products and convolutions of a GPU round their factors to TF32, or not.

    PyTorch's own default rounds those of convolutions.

    Args:
        precision: `"tf32"` to round; anything else not to.
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


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of a model is compiled."""
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in model.modules()
    )


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
    attributes = [_Attributes(module) for module in model.modules()]
    held = [t for _, _, tensors in _kept_tensors(model) for t in tensors if not t.requires_grad]
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
    kept = [t for _, _, tensors in _kept_tensors(model) for t in tensors]
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
