"""A CUDA device for machines without one: GPU paths run on the CPU, and are checked as they go.

A plugin, loaded only on demand, as it replaces a part of PyTorch for the whole process:

    python -m pytest -p tests.emulated_cuda -m gpu tests/test_recording.py

Tensors on the device are ones of the CPU whose memory carries a mark. A test fails where

- an operation gets tensors or generators of two devices;
- the host waits for the device while a graph is recorded (with sync debug mode "error" the
  operation fails, as on a GPU);
- a stream reads what another one writes, or overwrites what another one reads or writes, and has
  not waited for it;
- a replayed graph works on memory that was freed since. What a graph reads before its first replay
  is NaN, and a capture computes nothing.

Not emulated: kernels of Triton's and everything that depends on a GPU's rounding, speed or memory;
more than one device; events; other threads than the one that runs the tests; the streams on which
autograd does a backward pass (that of each forward operation), here the current one; memory that is
given to another stream when it is freed; parts of a tensor, which count as the whole; copies that
do not block, which are done at once; gradients that go from one device to the other. Tests that
call what is missing of `torch.cuda`, or make a tensor that a CPU works on for too long, are
skipped.
"""

import pytest

from tests.emulated_cuda.interface import install
from tests.emulated_cuda.problems import taken


def pytest_configure():
    install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Fail a test in which a problem was seen."""
    try:
        result = yield
    except BaseException as error:  # skipping is one
        for problem in taken():
            if problem not in str(error):
                error.add_note(problem)
        raise
    problems = taken()
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
    return result
