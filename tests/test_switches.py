"""Switches of PyTorch's that hold for all threads, by probes that overlap."""

from functools import partial

import pytest
import torch
import torch._dynamo.eval_frame as dynamo

from landscape.linalg.gradient import twice_differentiable
from landscape.switches import eagerly, rounding, without_fast_path

cuda = torch.backends.cuda


def switches():
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
        dynamo._stance.stance,
    )


@pytest.mark.parametrize(
    "context",
    [eagerly, without_fast_path, twice_differentiable, partial(rounding, "full")],
    ids=["eagerly", "without_fast_path", "twice_differentiable", "rounding"],
)
def test_the_last_to_leave_puts_back_what_was_found(context):
    found = switches()
    first, second = context(), context()
    first.__enter__()
    inside = switches()
    assert inside != found
    second.__enter__()
    first.__exit__(None, None, None)
    assert switches() == inside
    second.__exit__(None, None, None)
    assert switches() == found


def test_the_latest_of_those_inside_decides_on_rounding():
    found = switches()
    with rounding("full"):
        full = switches()
        with rounding("tf32"):
            assert cuda.matmul.fp32_precision == "tf32"
            with rounding("full"):
                assert switches() == full
        assert switches() == full
    assert switches() == found
