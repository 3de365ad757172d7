"""ROUGE: the overlap of generated texts with texts written by people.

Scores are the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004, "ROUGE: A Package for Automatic Evaluation of
Summaries"), with Porter's stemmer.
"""

from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from healthslm.statistics import mean

ROUGE = ("rouge1", "rouge2", "rougeL")


def score_rouge(candidates: list[str], references: list[str]) -> dict[str, Any]:
    """Score each candidate against its reference.

    Returns:
        The mean F-measures `rouge1`, `rouge2` and `rougeL` with 95% intervals, {"mean": …, "interval": [lower, upper]}.
    """
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(*pair) for pair in zip(references, candidates, strict=True)]
    return {name: mean(np.array([score[name].fmeasure for score in scores])) for name in ROUGE}
