"""The Python functions of `pubmedqa_local.yaml`."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from sklearn.metrics import confusion_matrix

from healthslm.corpus.sources import read_rows
from healthslm.errors import UserError
from healthslm.statistics import macro_f1

DECISIONS = ("yes", "no", "maybe")
COLUMNS = ("QUESTION", "CONTEXTS", "final_decision")


def load_questions(questions: str | Path | None = None, **_: Any) -> dict[str, Dataset]:
    """Load PubMedQA's questions from a JSON Lines file with `QUESTION`, `CONTEXTS` and `final_decision`.

    Args:
        questions: The file, such as the 500 questions of the official test split. The harness passes it on from its
            `--metadata`, together with other settings.

    Raises:
        UserError: The file is not given, missing or empty, or one of its rows is not a question of PubMedQA.
    """
    if questions is None:
        raise UserError("pubmedqa_local: give the file of questions with --metadata questions=FILE.jsonl")
    if not Path(questions).is_file() or not str(questions).endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{questions}: expected a JSON Lines file (.jsonl) with the questions of PubMedQA")
    rows = list(read_rows(str(questions)))
    if not rows:
        raise UserError(f"{questions}: this file contains no questions")
    for number, row in enumerate(rows, start=1):
        if missing := [column for column in COLUMNS if column not in row]:
            raise UserError(f"{questions}: row {number:,} is not a question of PubMedQA: no {', '.join(missing)}")
        if row["final_decision"] not in DECISIONS:
            expected = ", ".join(DECISIONS)
            raise UserError(
                f"{questions}: row {number:,}: final_decision must be one of {expected}, not {row['final_decision']!r}"
            )
    return {"test": Dataset.from_list([{column: row[column] for column in COLUMNS} for row in rows])}


def aggregate_macro_f1(items: list[tuple[int, int]]) -> float:
    """Macro-F1 of the (correct option, chosen option) of each question.

    The harness's own `f1` supports two classes only.
    """
    correct, chosen = zip(*items, strict=True)
    return float(macro_f1(confusion_matrix(correct, chosen, labels=range(len(DECISIONS)))))
