"""Metrics of classifiers with 95% bootstrap intervals, in which the examples of a dataset are drawn with replacement.

Mentions: precision, recall and F1 of whole mentions, where the type and both ends must match (strict, as seqeval with
mode="strict" and IOB2 counts). Examples are sentences. Sentences and texts: accuracy and macro-F1. Examples are
documents with all their sentences, or texts.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from healthslm.classification.options import Task
from healthslm.classification.tagging import mentions
from healthslm.statistics import RESAMPLES, bootstrap_interval, macro_f1, macro_f1_interval_of_documents

Labels = Sequence[Sequence[str]]
"""For each example the labels of its units."""

MAIN_METRIC: dict[Task, str] = {"mentions": "f1", "sentences": "macro_f1", "text": "macro_f1"}


def score(task: Task, expected: Labels, predicted: Labels, resamples: int = RESAMPLES) -> dict[str, Any]:
    """The metrics of predictions, as `mention_scores` or `label_scores` returns them."""
    scores = mention_scores if task == "mentions" else label_scores
    return scores(expected, predicted, resamples)


def mention_scores(expected: Labels, predicted: Labels, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Micro-averaged precision, recall and F1 of mentions.

    Returns:
        `examples`, `mentions`, `precision`, `recall`, `f1`, `interval` (of F1; None with too few mentions) and
        `by_type`, which has the same for each type.
    """
    found = {"": np.zeros((len(expected), 3), dtype=np.int64)}
    for number, (right, guess) in enumerate(zip(expected, predicted, strict=True)):
        right_mentions, guessed = mentions(right), mentions(guess)
        for column, group in enumerate((right_mentions & guessed, guessed, right_mentions)):
            for _, _, kind in group:
                found.setdefault(kind, np.zeros((len(expected), 3), dtype=np.int64))[number, column] += 1
                found[""][number, column] += 1
    scores = {kind: _f1(counts, resamples) for kind, counts in found.items()}
    return {"examples": len(expected), **scores.pop(""), "by_type": dict(sorted(scores.items()))}


def label_scores(expected: Labels, predicted: Labels, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Accuracy and macro-F1 over the labels of the data.

    Returns:
        `examples`, `units`, `accuracy`, `accuracy_interval`, `macro_f1`, `interval` (of macro-F1), `labels` and
        `confusion`: how many units have the row's label and were given the column's.
    """
    names = sorted({label for labels in (*expected, *predicted) for label in labels})
    index = {name: place for place, name in enumerate(names)}
    counts = np.zeros((len(expected), len(names), len(names)), dtype=np.int64)
    for number, (right, guess) in enumerate(zip(expected, predicted, strict=True)):
        for cell, count in Counter(zip(right, guess, strict=True)).items():
            counts[number, index[cell[0]], index[cell[1]]] += count
    total = counts.sum(axis=0)
    correct, units = np.trace(counts, axis1=1, axis2=2), counts.sum(axis=(1, 2))
    return {
        "examples": len(expected),
        "units": int(units.sum()),
        "accuracy": float(correct.sum() / units.sum()),
        "accuracy_interval": list(bootstrap_interval(correct, units, resamples)),
        "macro_f1": float(macro_f1(total)),
        "interval": macro_f1_interval_of_documents(counts, resamples),
        "labels": names,
        "confusion": total.tolist(),
    }


def _f1(counts: np.ndarray, resamples: int) -> dict[str, Any]:
    """Scores from the correct, predicted and expected mentions of each sentence: (sentences, 3)."""
    correct, predicted, expected = counts.sum(axis=0)
    with np.errstate(invalid="ignore"):  # resamples without mentions
        interval = bootstrap_interval(2 * counts[:, 0], counts[:, 1] + counts[:, 2], resamples)
    return {
        "mentions": int(expected),
        "precision": float(correct / predicted) if predicted else 0.0,
        "recall": float(correct / expected) if expected else 0.0,
        "f1": float(2 * correct / (predicted + expected)) if predicted + expected else 0.0,
        "interval": None if np.isnan(interval).any() else list(interval),
    }
