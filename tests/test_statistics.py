"""Intervals, checked with the equations that define them and by how often they contain the true value."""

import itertools

import numpy as np
import pytest

from healthslm.statistics import Z, bootstrap_interval, mean, share


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (512.5, 1000), (1, 1)])
def test_the_bounds_of_a_share_solve_the_equation_of_wilson(successes, trials):
    result = share(successes, trials)
    assert result["share"] == successes / trials
    for bound in result["interval"]:
        deviation = Z * np.sqrt(bound * (1 - bound) / trials)
        assert abs(result["share"] - bound) == pytest.approx(deviation, abs=1e-9)


def test_the_interval_of_a_share_contains_the_true_share_in_95_percent_of_samples():
    wins = np.random.default_rng(0).binomial(200, 0.3, 4000)
    intervals = np.array([share(int(number), 200)["interval"] for number in wins])
    assert np.mean((intervals[:, 0] <= 0.3) & (intervals[:, 1] >= 0.3)) == pytest.approx(0.95, abs=0.015)


def test_the_interval_of_a_mean_of_many_values_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).exponential(size=1000)
    error = values.std() / np.sqrt(1000)
    result = mean(values)
    assert result["mean"] == pytest.approx(values.sum() / 1000)
    assert result["interval"] == pytest.approx([values.mean() - Z * error, values.mean() + Z * error], abs=0.15 * error)


def test_the_interval_of_a_mean_stays_within_the_range_of_the_values():
    low, high = mean(np.array([0.0] * 30 + [1.0]))["interval"]
    assert low == 0 < high < 1


def made_costs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits and bytes like those of documents: sizes vary widely, and bits are roughly proportional."""
    draw = np.random.default_rng(1)
    sizes = draw.lognormal(7, 0.5, count).round()
    return sizes * draw.normal(1.1, 0.2, count), sizes


def test_the_interval_of_a_ratio_of_many_documents_is_that_of_the_normal_approximation():
    """The linearized standard error of a ratio, see Cochran, "Sampling Techniques", 3rd edition, 1977, section 6.4."""
    bits, sizes = made_costs(2_000)
    ratio = bits.sum() / sizes.sum()
    error = np.sqrt(len(bits) * np.var(bits - ratio * sizes, ddof=1)) / sizes.sum()
    low, high = bootstrap_interval(bits, sizes)
    assert low == pytest.approx(ratio - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(ratio + 1.96 * error, abs=0.1 * error)


def test_the_interval_of_a_ratio_of_few_documents_is_that_of_all_resamples():
    """Six documents have 46,656 equally likely resamples, which can be enumerated."""
    bits, sizes = made_costs(6)
    drawn = np.array(list(itertools.product(range(6), repeat=6)))
    ratios = bits[drawn].sum(1) / sizes[drawn].sum(1)
    found = bootstrap_interval(bits, sizes, resamples=100_000)
    for end, percentile in zip(found, (2.5, 97.5), strict=True):
        assert np.percentile(ratios, percentile - 0.25) <= end <= np.percentile(ratios, percentile + 0.25)


def test_the_interval_of_equal_ratios_has_no_width():
    sizes = made_costs(50)[1]
    assert bootstrap_interval(2 * sizes, sizes) == (2.0, 2.0)


def test_the_interval_does_not_depend_on_the_order_and_widens_with_fewer_documents():
    bits, sizes = made_costs(400)
    order = np.random.default_rng(2).permutation(400)
    low, high = bootstrap_interval(bits, sizes)
    assert bootstrap_interval(bits[order], sizes[order]) == (low, high)
    fewer = bootstrap_interval(bits[:100], sizes[:100])
    assert (fewer[1] - fewer[0]) / (high - low) == pytest.approx(2, rel=0.3)  # the square root of four
