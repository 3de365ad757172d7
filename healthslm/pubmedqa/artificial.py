"""Artificial training questions for PubMedQA, made from the abstracts of a corpus.

PubMedQA (Jin et al., EMNLP 2019, "PubMedQA: a dataset for biomedical research question answering") has 1,000 questions
answered by experts, too few to learn from. Its authors made 211,000 more (PQA-A): a title that is a statement becomes a
question, its polarity the answer, and the abstract without its conclusion the context. We do the same with the
statements in titles and, since only 4% of those are negated, with those in conclusions.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as pq
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from tqdm import tqdm

from healthslm.corpus.reader import split_files
from healthslm.corpus.signatures import OVERLAP_WORDS, ngram_hashes
from healthslm.corpus.sources import read_rows
from healthslm.documents import DOCUMENT_SCHEMA, pmid_id, split_position, text_hash
from healthslm.errors import UserError, one_line
from healthslm.files import check_output_folder, file_sha256, replacing, write_json
from healthslm.pubmedqa.conclusions import Abstract, divide
from healthslm.pubmedqa.options import ArtificialQuestionsOptions, Statement
from healthslm.pubmedqa.statements import Question, question_of

logger = logging.getLogger(__name__)

ANSWERS = ("yes", "no", "maybe")
QUESTIONS, REPORT = "questions.jsonl", "report.json"
_NO_PER_GROUP = 90
_COLUMNS = ("id", "part", "title", "text", "kind", "sections")

Row = dict[str, Any]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "pmid": ("a number", lambda value: str(value).isdecimal()),
    "QUESTION": ("text", _is_text),
    "CONTEXTS": ("a list of texts", lambda value: isinstance(value, list) and all(map(_is_text, value))),
    "LONG_ANSWER": ("text or missing", lambda value: value is None or _is_text(value)),
    "final_decision": ("yes, no or maybe", lambda value: value in ANSWERS),
}
"""What a question of PubMedQA must have."""


class HeldOut:
    """What the expert questions are recognized by: their ids, titles and questions, and runs of 13 words."""

    def __init__(self, questions: Iterable[Row]):
        self.ids, self.titles = set(), set()
        self.ngrams: set[int] = set()
        for question in questions:
            self.ids.add(pmid_id(question["pmid"]))
            self.titles.add(text_hash(question["QUESTION"]))
            text = "\n".join([*question["CONTEXTS"], question.get("LONG_ANSWER") or ""])
            for shared in (text, question["QUESTION"]):
                self.ngrams.update(ngram_hashes(shared).tolist())

    def reason(self, document: Row, question: str) -> str | None:
        """Why a question from this document must not be trained on; None if it may."""
        if document["id"] in self.ids:
            return "held_out_id"
        if {text_hash(document["title"]), text_hash(question)} & self.titles:
            return "held_out_title"
        texts = (document["text"], document["title"])
        shares_words = any(not self.ngrams.isdisjoint(ngram_hashes(text).tolist()) for text in texts)
        return "held_out_overlap" if shares_words else None


def build_pubmedqa_artificial(options: ArtificialQuestionsOptions) -> None:
    """Write artificial questions in PubMedQA's format, and a report that counts what was kept and dropped.

    The result depends on the corpus and the options alone.

    Raises:
        UserError: There is no such corpus or held-out file, a file isn't what it should be, or no question remains.
    """
    files = split_files(options.corpus, "train")
    if not files:
        raise UserError(
            f"{options.corpus}: no files train/*.parquet in this folder; scripts/build_corpus.py builds a corpus"
        )
    check_output_folder(options.output, "artificial questions", lambda folder: (folder / REPORT).is_file())
    held_out = HeldOut(row for file in options.held_out for row in read_questions(file))
    counts: Counter[str] = Counter()
    questions = []
    for document in tqdm(read_abstracts(files), unit=" abstracts", disable=None):
        counts["abstracts"] += 1
        row = artificial_question(document, options, counts)
        if row is None:
            continue
        if reason := held_out.reason(document, row["QUESTION"]):
            counts[reason] += 1
            continue
        questions.append(row)
    kept = select(questions, options.yes_per_no)
    if not kept:
        raise UserError(
            f"{options.corpus}: no statement in {' or '.join(options.statements)} of {counts['abstracts']} abstracts"
        )
    report = {
        "abstracts": counts.pop("abstracts"),
        "questions": _by_origin(questions),
        "dropped": dict(sorted(counts.items())),
        "kept": _by_origin(kept),
        "kept_by_beginning": _by_beginning(kept),
        "settings": {
            "statements": options.statements,
            "yes_per_no": options.yes_per_no,
            "min_context_words": options.min_context_words,
            "max_words": options.max_words,
            "overlap_words": OVERLAP_WORDS,
        },
        "corpus": {file.name: file_sha256(file) for file in files},
        "held_out": [{"name": file.name, "sha256": file_sha256(file)} for file in options.held_out],
    }
    with replacing(options.output) as folder:
        folder.mkdir()
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
        (folder / QUESTIONS).write_text("".join(lines), encoding="utf-8")
        report["sha256"] = file_sha256(folder / QUESTIONS)
        write_json(folder / REPORT, report)
    answers = Counter(row["final_decision"] for row in kept)
    logger.info(
        "%s: %d questions, %d yes and %d no, from %d abstracts",
        *(options.output / QUESTIONS, len(kept), answers["yes"], answers["no"], report["abstracts"]),
    )


def read_questions(file: Path) -> list[Row]:
    """The rows of a file of PubMedQA.

    Raises:
        UserError: There is no such file, it has no rows, or a row is not a question of PubMedQA.
    """
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file; PubMedQA's questions are JSON Lines with pmid, QUESTION and CONTEXTS")
    rows = list(read_rows(str(file)))
    for number, row in enumerate(rows, start=1):
        for name, (expected, is_valid) in _FIELDS.items():
            if not is_valid(value := row.get(name)):
                problem = f"{name} is {value!r:.60}, but must be {expected}"
                raise UserError(f"{file}: row {number:,}: not a question of PubMedQA: {problem}")
    if not rows:
        raise UserError(f"{file}: no questions in this file")
    return rows


def read_abstracts(files: Iterable[Path]) -> Iterator[Row]:
    """The abstracts with a title, except those so long that the corpus holds them in chunks."""
    for file in files:
        try:
            table = pq.read_table(file, columns=list(_COLUMNS), schema=DOCUMENT_SCHEMA)
        except (pyarrow.ArrowException, KeyError) as error:
            raise UserError(f"{file}: not a Parquet file of a corpus: {one_line(error)}") from error
        ids, parts = table.column("id").to_pylist(), table.column("part").to_pylist()
        in_chunks = {identifier for identifier, part in zip(ids, parts, strict=True) if part > 1}
        for batch in table.to_batches(1024):
            for row in batch.to_pylist():
                if row["kind"] == "abstract" and row["title"] and row["id"] not in in_chunks:
                    yield row


def artificial_question(document: Row, options: ArtificialQuestionsOptions, counts: Counter[str]) -> Row | None:
    """The question of an abstract as a row in PubMedQA's format, with the statement; None if it has none.

    Args:
        counts: Counts why abstracts give no question.
    """
    abstract = divide(document["text"], document["sections"])
    if abstract is None:
        counts["no_conclusion"] += 1
        return None
    if sum(len(context.split()) for context in abstract.contexts) < options.min_context_words:
        counts["short_context"] += 1
        return None
    for origin in options.statements:
        for statement in [document["title"]] if origin == "title" else abstract.conclusion:
            if question := question_of(statement, document["text"]):
                row = _row(document, abstract, question, statement, origin)
                return row | {"text": input_text(row, options.max_words)}
    counts["no_statement"] += 1
    return None


def input_text(question: Row, max_words: int) -> str:
    """What a model reads: the question, a newline and the end of the contexts, like a title and its abstract."""
    words = " ".join(question["CONTEXTS"]).split()
    return f"{question['QUESTION']}\n{' '.join(words[-max_words:])}"


def _row(document: Row, abstract: Abstract, question: Question, statement: str, origin: Statement) -> Row:
    return {
        "pmid": document["id"].removeprefix("pmid:"),
        "QUESTION": question.text,
        "CONTEXTS": abstract.contexts,
        "LABELS": abstract.labels,
        "LONG_ANSWER": " ".join(abstract.conclusion),
        "final_decision": question.answer,
        "statement": statement,
        "origin": origin,
    }


def select(questions: list[Row], yes_per_no: float) -> list[Row]:
    """Questions with both answers, so that the words of a question don't tell the answer.

    Questions are compared by how much their words look like a question with the answer no. In each group of similar
    ones, no more are kept with the answer no than there are with yes, and `yes_per_no` times as many with yes. The
    lowest hashes of the ids are chosen; the order is that of another hash, so that it is mixed.
    """
    ordered = sorted(questions, key=lambda row: (split_position(row["pmid"]), row["QUESTION"]))
    kept = ordered
    if yes_per_no:
        no = np.array([row["final_decision"] == "no" for row in ordered], dtype=bool)
        groups = _groups([row["QUESTION"] for row in ordered], no)
        places: list[int] = []
        for group in range(groups.max(initial=0) + 1):
            inside = groups == group
            with_no, with_yes = np.flatnonzero(inside & no), np.flatnonzero(inside & ~no)
            with_no = with_no[: len(with_yes)]
            places += [*with_no, *with_yes[: int(len(with_no) * yes_per_no)]]
        kept = [ordered[place] for place in places]
    return sorted(kept, key=lambda row: split_position(row["QUESTION"]))


def _groups(questions: Sequence[str], no: np.ndarray) -> np.ndarray:
    """(questions,), groups with the same number of questions with the answer no, by what word counts predict.

    The classifier has not seen the questions that it judges (cross-validation).
    """
    groups = int(no.sum()) // _NO_PER_GROUP
    if groups < 2:
        return np.zeros(len(questions), dtype=np.int64)
    words = TfidfVectorizer(sublinear_tf=True, min_df=3, ngram_range=(1, 2))
    classifier = make_pipeline(words, LogisticRegression(class_weight="balanced", max_iter=1000))
    scores = cross_val_predict(classifier, list(questions), no, cv=5, method="predict_proba")[:, 1]
    return np.digitize(scores, np.quantile(scores[no], np.linspace(0, 1, groups + 1)[1:-1]))


def _beginning(row: Row) -> str:
    first, second, *_ = row["QUESTION"].lower().split()
    return f"{first} there" if second == "there" else first


def _by_origin(questions: list[Row]) -> dict[str, dict[str, int]]:
    return _nested((row["origin"], row["final_decision"]) for row in questions)


def _by_beginning(questions: list[Row]) -> dict[str, dict[str, int]]:
    return _nested((_beginning(row), row["final_decision"]) for row in questions)


def _nested(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for outer, inner in pairs:
        counts[outer][inner] += 1
    return {outer: dict(sorted(inner.items())) for outer, inner in sorted(counts.items())}
