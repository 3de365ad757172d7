"""The overlap of generated texts with texts written by people.

- **ROUGE**: the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004, "ROUGE: A Package for Automatic Evaluation of
  Summaries"), with Porter's stemmer.
- **Token F1**: the F-measure of the words that two texts share, without articles and stemming, as in SQuAD (Rajpurkar
  et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text").
"""

import re
import string
from collections import Counter
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from healthslm.statistics import mean

ROUGE = ("rouge1", "rouge2", "rougeL")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_rouge(candidates: list[str], references: list[str]) -> dict[str, Any]:
    """Score each candidate against its reference.

    Returns:
        The mean F-measures `rouge1`, `rouge2` and `rougeL` with 95% intervals, {"mean": …, "interval": [lower, upper]}.
    """
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(*pair) for pair in zip(references, candidates, strict=True)]
    return {name: mean(np.array([score[name].fmeasure for score in scores])) for name in ROUGE}


def score_token_f1(candidates: list[str], references: list[str]) -> dict[str, Any]:
    """Score each candidate against its reference.

    Returns:
        The mean token F1 with its 95% interval, {"mean": …, "interval": [lower, upper]}.
    """
    return mean(np.array([_token_f1(*pair) for pair in zip(candidates, references, strict=True)]))


def _token_f1(candidate: str, reference: str) -> float:
    found, expected = _words(candidate), _words(reference)
    if not found or not expected:
        return float(found == expected)
    return 2 * (Counter(found) & Counter(expected)).total() / (len(found) + len(expected))


def _words(text: str) -> list[str]:
    """The words of a text as SQuAD's evaluation compares them: in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()
