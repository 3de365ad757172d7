"""Macro-averaged F1 of PubMedQA for lm-evaluation-harness, whose own `f1` takes two classes alone."""

from sklearn.metrics import f1_score


def macro_f1(items: list[tuple[int, int]]) -> float:
    """The mean over the three options of F1, from (right option, chosen option) of each question.

    An option that is neither right nor chosen anywhere counts as 0.
    """
    right, chosen = zip(*items, strict=True)
    return f1_score(right, chosen, labels=[0, 1, 2], average="macro", zero_division=0)
