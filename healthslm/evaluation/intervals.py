"""Shares and means with their 95% confidence intervals, ready for JSON."""

import math

import numpy as np

from healthslm.evaluation.held_out import bootstrap_interval

Z = 1.959964  # of the normal distribution: 95% lie within so many standard deviations


def share(successes: float, trials: int) -> dict[str, float | list[float]]:
    """A share with Wilson's score interval (Wilson 1927, "Probable inference, the law of succession, and statistical
    inference"), which stays within 0 and 1 and is right for shares of 0 as well.

    Args:
        successes: Need not be whole: a tie may count half.

    Returns:
        {"share": …, "interval": [lower, upper]}
    """
    observed = successes / trials
    centre = (observed + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half_width = Z / (1 + Z**2 / trials) * math.sqrt(observed * (1 - observed) / trials + (Z / (2 * trials)) ** 2)
    # At 0 and 1 a bound is the share itself, but for rounding.
    lower, upper = min(max(centre - half_width, 0.0), observed), max(min(centre + half_width, 1.0), observed)
    return {"share": observed, "interval": [lower, upper]}


def mean(values: np.ndarray) -> dict[str, float | list[float]]:
    """The mean of independent values, one a document, with its bootstrap interval (see `bootstrap_interval`), which
    stays within the range of the values.

    Returns:
        {"mean": …, "interval": [lower, upper]}
    """
    return {"mean": float(np.mean(values)), "interval": list(bootstrap_interval(values, np.ones(len(values))))}
