"""Random streams that are a function of their place in a run, not of what was drawn before.

The stream of epoch 7 can so be had without running epochs 0 to 6, which is what makes a resumed
run equal the uninterrupted one.
"""

import numpy as np
import torch


def stream_seed(seed: int, *place: int) -> int:
    """Return a 63-bit seed, a hash of `seed` and of the place (for instance the epoch).

    Args:
        seed: Seed of the whole run, at least 0.
        place: Non-negative integers that say which stream, such as `(epoch, purpose)`.

    Returns:
        Seed for `torch.Generator.manual_seed`; streams of different places are independent
        (NumPy's `SeedSequence`).
    """
    # The length comes first because SeedSequence takes (5,) and (5, 0) for the same entropy.
    words = np.random.SeedSequence([len(place), seed, *place]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def stream(seed: int, *place: int) -> torch.Generator:
    """Return a CPU generator for the place; see `stream_seed`.

    Args:
        seed: Seed of the whole run, at least 0.
        place: Non-negative integers that say which stream, such as `(epoch, purpose)`.
    """
    return torch.Generator().manual_seed(stream_seed(seed, *place))
