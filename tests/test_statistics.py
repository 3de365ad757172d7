"""Intervals: against the equations that define them, and how often they hold the truth."""

import numpy as np
import pytest

from healthslm.statistics import Z, mean, share


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (512.5, 1000), (1, 1)])
def test_the_bounds_of_a_share_are_the_shares_from_which_it_lies_just_so_far(successes, trials):
    result = share(successes, trials)
    assert result["share"] == successes / trials
    for bound in result["interval"]:
        deviation = Z * np.sqrt(bound * (1 - bound) / trials)
        assert abs(result["share"] - bound) == pytest.approx(deviation, abs=1e-9)


def test_the_interval_of_a_share_holds_the_true_one_nineteen_times_in_twenty():
    wins = np.random.default_rng(0).binomial(200, 0.3, 4000)
    intervals = np.array([share(int(number), 200)["interval"] for number in wins])
    assert np.mean((intervals[:, 0] <= 0.3) & (intervals[:, 1] >= 0.3)) == pytest.approx(0.95, abs=0.015)


def test_the_interval_of_a_mean_of_many_is_two_standard_errors_wide_on_each_side():
    values = np.random.default_rng(0).exponential(size=1000)
    error = values.std() / np.sqrt(1000)
    result = mean(values)
    assert result["mean"] == pytest.approx(values.sum() / 1000)
    assert result["interval"] == pytest.approx([values.mean() - Z * error, values.mean() + Z * error], abs=0.15 * error)


def test_the_interval_of_a_mean_stays_within_the_values():
    low, high = mean(np.array([0.0] * 30 + [1.0]))["interval"]
    assert low == 0 < high < 1
