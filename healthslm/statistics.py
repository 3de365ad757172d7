"""Shares, means, ratios and macro-F1 with their 95% confidence intervals, ready for JSON."""

import math
from typing import Any

import numpy as np

Z = 1.959964
"""95% of a normal distribution lie within this many standard deviations of its mean."""
RESAMPLES = 10_000

_PERCENTILES = (2.5, 97.5)
_MAX_DRAWN = 2**21
"""Items drawn at a time, which bounds the memory of a bootstrap."""


def share(successes: float, trials: int) -> dict[str, Any]:
    """A share with Wilson's score interval (Wilson 1927, "Probable inference, the law of succession, and statistical
    inference"), which stays within 0 and 1 and also holds for shares of 0 and 1.

    Args:
        successes: May be fractional: a tie can count as half.

    Returns:
        {"share": …, "interval": [lower, upper]}
    """
    observed = successes / trials
    centre = (observed + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half_width = Z / (1 + Z**2 / trials) * math.sqrt(observed * (1 - observed) / trials + (Z / (2 * trials)) ** 2)
    # At 0 and 1 one bound equals the share, up to rounding.
    lower, upper = min(max(centre - half_width, 0.0), observed), max(min(centre + half_width, 1.0), observed)
    return {"share": observed, "interval": [lower, upper]}


def mean(values: np.ndarray) -> dict[str, Any]:
    """The mean of independent values with its bootstrap interval, which stays within the range of the values.

    Args:
        values: (documents,)

    Returns:
        {"mean": …, "interval": [lower, upper]}
    """
    return {"mean": float(np.mean(values)), "interval": list(bootstrap_interval(values, np.ones(len(values))))}


def bootstrap_interval(
    numerators: np.ndarray, denominators: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of sum(numerators) / sum(denominators), with documents drawn with replacement
    (Efron 1979, "Bootstrap methods: another look at the jackknife").

    The order of the documents does not change it.

    Args:
        numerators: (documents,), such as the bits of each document.
        denominators: (documents,), such as the bytes of each document.
    """
    order = np.lexsort((numerators, denominators))
    numerators, denominators = numerators[order], denominators[order]
    numbers = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    batch = max(_MAX_DRAWN // len(numerators), 1)
    for start in range(0, resamples, batch):
        drawn = numbers.integers(len(numerators), size=(min(batch, resamples - start), len(numerators)))
        ratios[start : start + batch] = numerators[drawn].sum(axis=1) / denominators[drawn].sum(axis=1)
    low, high = np.percentile(ratios, _PERCENTILES)
    return float(low), float(high)


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """The mean of the F1 scores of all options. An option that is neither correct nor chosen anywhere counts as 0.

    scikit-learn computes it from answers and not from counts, which is too slow for the resamples of a bootstrap.

    Args:
        confusion: (..., options, options), integers: how many questions have the row's option as the correct answer
            and the column's as the chosen one.

    Returns:
        (...), float64.
    """
    correct = np.diagonal(confusion, axis1=-2, axis2=-1)
    answered = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    return (2 * correct / np.maximum(answered, 1)).mean(axis=-1)


def macro_f1_interval(confusion: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> list[float]:
    """The percentile bootstrap interval of macro-F1. Drawing questions with replacement is drawing cells of their
    confusion matrix.

    Args:
        confusion: (options, options)
    """
    questions = confusion.sum()
    draws = np.random.default_rng(seed).multinomial(questions, confusion.ravel() / questions, size=resamples)
    return np.percentile(macro_f1(draws.reshape(resamples, *confusion.shape)), _PERCENTILES).tolist()


def macro_f1_interval_of_documents(confusions: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> list[float]:
    """The same for questions that come in documents, which are drawn with all their questions.

    Args:
        confusions: (documents, options, options), the confusion matrix of each document.
    """
    documents, *shape = confusions.shape
    counts, evenly = confusions.reshape(documents, -1), np.full(documents, 1 / documents)
    numbers = np.random.default_rng(seed)
    batches = np.array_split(np.arange(resamples), math.ceil(resamples * documents / _MAX_DRAWN))
    draws = [numbers.multinomial(documents, evenly, size=len(batch)) @ counts for batch in batches]
    return np.percentile(macro_f1(np.concatenate(draws).reshape(-1, *shape)), _PERCENTILES).tolist()
