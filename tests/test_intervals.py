"""Intervals of a mean over few runs, against scipy and against what they promise."""

import numpy as np
import pytest
from scipy import stats

from landscape.intervals import mean_interval


def test_the_interval_is_that_of_the_one_sample_t_test():
    values = np.array([0.3, 0.5, 0.1, 0.45])
    mean, low, high = mean_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_three_runs_cover_their_mean_as_often_as_the_level_says():
    draws = np.random.default_rng(0).normal(size=(2000, 3))
    for level in (0.8, 0.95):
        ends = np.array([mean_interval(draw, level)[1:] for draw in draws])
        covered = float(((ends[:, 0] < 0) & (ends[:, 1] > 0)).mean())
        assert covered == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 2000))


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0]], ids=str)
def test_one_run_or_runs_that_agree_have_no_interval_and_none_no_mean(values):
    mean, low, high = mean_interval(values)
    assert mean == 2
    assert np.isnan(low)
    assert np.isnan(high)
    assert np.isnan(mean_interval([])).all()


def test_a_level_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match="`level` must lie between 0 and 1, got 95"):
        mean_interval([1.0, 2.0], level=95)
