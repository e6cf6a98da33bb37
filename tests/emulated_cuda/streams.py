"""Streams with clocks: what happens before what, and where a program does not see to it.

A stream knows until when it has waited for each other one, and the host what it has seen done. An
operation must have waited for the last write to what it touches; one that writes, for reads since.
"""

import threading
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

from tests.emulated_cuda.memory import CUDA
from tests.emulated_cuda.problems import place, report

_numbers = count()
_launched = {}
_thread = threading.local()


class Host:
    """What it has seen done, whether it may wait, and whether it records a graph."""

    def __init__(self):
        self.clock, self.sync_debug_mode, self.recording = {}, 0, False

    def refuse_in_recording(self, what):
        if self.recording:
            raise RuntimeError(report(f"while a graph is recorded, {what}"))

    def refuse_waiting(self, operation):
        self.refuse_in_recording(f"{operation} waits for the device")
        if self.sync_debug_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    def set_sync_debug_mode(self, mode):
        self.sync_debug_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)


host = Host()


class Stream:
    def __init__(self, device=None):
        self.device, self.number, self.time, self.clock = CUDA, next(_numbers), 0, {}

    def launch(self):
        """The time of the next operation, which follows all that the host has seen."""
        _join(self.clock, host.clock)
        self.time += 1
        self.clock[self.number] = _launched[self.number] = self.time
        return self.time

    def wait_stream(self, other):
        _join(self.clock, other.clock)

    def synchronize(self):
        _join(host.clock, self.clock)

    def query(self):
        self.synchronize()
        return True

    def is_capturing(self):
        return host.recording


default = Stream()


def current(device=None):
    return getattr(_thread, "stream", default)


@contextmanager
def entered(stream):
    before = current()
    _thread.stream = stream or before
    try:
        yield
    finally:
        _thread.stream = before


def synchronize(device=None):
    _join(host.clock, _launched)


class Access(NamedTuple):
    stream: int
    time: int
    operation: str
    place: str


def touch(operation, reads, writes):
    """Launch an operation on the current stream, and report what it has not waited for."""
    stream = current()
    access = Access(stream.number, stream.launch(), operation, place())
    for memory in reads:
        _check(stream, memory.written, f"{operation} reads what", "writes")
        memory.read[stream.number] = access
    for memory in writes:
        for other in (memory.written, *memory.read.values()):
            does = "writes" if other is memory.written else "reads"
            _check(stream, other, f"{operation} overwrites what", does)
        memory.written, memory.read = access, {}


def _check(stream, other, what, does):
    if other is not None and stream.clock.get(other.stream, 0) < other.time:
        where = f"on another stream ({other.place})"
        report(f"race: {what} {other.operation} {does} {where}, without waiting for it")


def _join(clock, other):
    for number, time in other.items():
        clock[number] = max(clock.get(number, 0), time)
