"""Switches of PyTorch's that hold for the whole process, and are put back."""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVarTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Wanted = TypeVarTuple("Wanted")


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
