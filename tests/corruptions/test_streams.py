import numpy as np
import pytest
import torch
from scipy import stats

from landscape.corruptions.streams import Streams, mix64
from tests.corruptions.cases import streams


def test_numbers_have_their_distributions():
    drawn = streams(64)
    uniform = drawn.uniform(50, 40).numpy().ravel()
    normal = drawn.normal(50, 41).numpy().ravel()
    assert 0 < uniform.min() < 1e-4
    assert 1 - 1e-4 < uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 0.01
    assert stats.kstest(normal, "norm").pvalue > 0.01
    assert np.isfinite(normal).all()
    whole = drawn.integers(-3, 5, 1000).numpy().ravel()
    counts = np.bincount(whole + 3)
    assert len(counts) == 8
    assert stats.chisquare(counts).pvalue > 0.01
    bits = drawn.bits(3000).numpy()
    assert bits.min() >= 0
    shares = [((bits >> place) & 1).mean() for place in range(31)]
    np.testing.assert_allclose(shares, 0.5, atol=0.005)


def test_numbers_are_independent_within_and_across_samples():
    drawn = streams(400).normal(500).double()
    n = drawn.shape[1]
    across = torch.corrcoef(drawn)[~torch.eye(400, dtype=torch.bool)]
    assert float(across.std()) == pytest.approx(n**-0.5, rel=0.02)
    assert float(across.abs().max()) < 6 * n**-0.5
    power = torch.fft.rfft(drawn).abs().square().mean(0)[1:-1] / n  # white: 1 everywhere
    assert float((power - 1).abs().max()) < 6 * 400**-0.5
    other = streams(400, key=6).normal(500).double()
    assert abs(float((drawn * other).mean())) < 5 / 447  # neighbouring keys
    squares = drawn.square() - 1
    assert abs(float((squares[:, :-1] * squares[:, 1:]).mean())) < 5 * 2 / 447


def test_a_sample_has_its_stream_wherever_it_is_batched():
    key = torch.tensor(11)
    whole, part = Streams(key, 0, 7), Streams(key, 3, 2)
    assert len(part) == 2
    for _ in range(2):  # the second call goes on where the first ended
        first, second = whole.normal(5, 3), part.normal(5, 3)
        assert torch.equal(first[3:5], second)
    assert not torch.equal(whole.uniform(4), Streams(key, 0, 7).uniform(4))


def test_hash_is_that_of_splitmix():
    # The first outputs of SplitMix64 with seed 0 (Steele, Lea & Flood, 2014).
    states = torch.arange(1, 3) * (0x9E3779B97F4A7C15 - (1 << 64))
    expected = [0xE220A8397B1DCDAF - (1 << 64), 0x6E789E6AA1B965F4]
    assert mix64(states).tolist() == expected
