"""One thread at a time with an object, for as long as the object lives."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary


@contextmanager
def locked(thing: object) -> Iterator[None]:
    """Make other threads wait that want the same object; a thread that has it may enter again."""
    with _guard:
        lock = _locks.setdefault(thing, threading.RLock())
    with lock:
        yield


_locks: WeakKeyDictionary[object, Any] = WeakKeyDictionary()
_guard = threading.Lock()
