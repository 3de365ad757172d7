"""Baselines of classifiers that need no neural network: a dictionary of mentions, the most frequent label, and logistic
regression on TF-IDF."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from healthslm.classification.labeled_data import Example
from healthslm.classification.options import Task
from healthslm.classification.tagging import mentions

_FEATURES = 100_000

Predictions = list[list[str]]
"""For each example the labels of its units."""


def baseline_predictions(task: Task, train: Sequence[Example], test: Sequence[Example]) -> dict[str, Predictions]:
    """The predictions of every baseline of a task, by name."""
    if task == "mentions":
        return {"dictionary": tag_with_dictionary(train, test)}
    predictions = {"majority": majority(train, test), "TF-IDF": tfidf_regression(train, test)}
    if task == "sentences":
        predictions["TF-IDF with position"] = tfidf_regression(train, test, with_position=True)
    return predictions


def tag_with_dictionary(train: Sequence[Example], test: Sequence[Example]) -> Predictions:
    """Tag the longest matches of the mentions in the training data, from left to right and ignoring case.

    Words that are a mention in fewer than half of their occurrences in the training data are not in the dictionary.
    """
    kinds: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for example in train:
        words = [word.lower() for word in example.units]
        for start, end, kind in mentions(example.labels):
            kinds[tuple(words[start:end])][kind] += 1
    longest = max(map(len, kinds), default=0)
    occurrences: Counter[tuple[str, ...]] = Counter()
    for example in train:
        words = [word.lower() for word in example.units]
        for start in range(len(words)):
            for end in range(start + 1, min(start + longest, len(words)) + 1):
                if (phrase := tuple(words[start:end])) in kinds:
                    occurrences[phrase] += 1
    dictionary = {
        phrase: counts.most_common(1)[0][0]
        for phrase, counts in kinds.items()
        if 2 * counts.total() >= occurrences[phrase]
    }
    return [_tag([word.lower() for word in example.units], dictionary, longest) for example in test]


def majority(train: Sequence[Example], test: Sequence[Example]) -> Predictions:
    """The most frequent label of the training data."""
    (label, _), *_ = Counter(label for example in train for label in example.labels).most_common(1)
    return [[label] * len(example.units) for example in test]


def tfidf_regression(train: Sequence[Example], test: Sequence[Example], with_position: bool = False) -> Predictions:
    """Logistic regression on the TF-IDF of words and pairs of words.

    Args:
        with_position: Add the place of a sentence in its document: its share of the way, and whether it is one of the
            first or last three.
    """
    from scipy.sparse import csr_array, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", max_features=_FEATURES, sublinear_tf=True)
    features = []
    for transform, examples in ((vectorizer.fit_transform, train), (vectorizer.transform, test)):
        words = transform([unit for example in examples for unit in example.units])
        positions = csr_array(np.concatenate([_positions(len(example.units)) for example in examples]))
        features.append(hstack([words, positions], format="csr") if with_position else words)
    regression = LogisticRegression(C=10, max_iter=1000)
    regression.fit(features[0], [label for example in train for label in example.labels])
    found = iter(regression.predict(features[1]).tolist())
    return [[next(found) for _ in example.units] for example in test]


def _positions(sentences: int) -> np.ndarray:
    """(sentences, 7)"""
    place = np.arange(sentences)
    from_end = sentences - 1 - place
    ends = [counted == number for counted in (place, from_end) for number in range(3)]
    return np.stack([place / max(sentences - 1, 1), *ends], axis=1).astype(float)


def _tag(words: list[str], dictionary: dict[tuple[str, ...], str], longest: int) -> list[str]:
    tags = ["O"] * len(words)
    start = 0
    while start < len(words):
        ends = range(min(start + longest, len(words)), start, -1)
        end = next((end for end in ends if tuple(words[start:end]) in dictionary), None)
        if end is None:
            start += 1
            continue
        kind = dictionary[tuple(words[start:end])]
        tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
        start = end
    return tags
