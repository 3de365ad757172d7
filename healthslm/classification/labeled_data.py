"""Read labeled data: BIO tags of words from CoNLL files, and labels of words, sentences or texts from tables."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from healthslm.classification.options import CONLL_SUFFIXES, ClassifierOptions, Task
from healthslm.errors import UserError

logger = logging.getLogger(__name__)

FIELDS: dict[Task, tuple[str, str]] = {
    "mentions": ("tokens", "labels"),
    "sentences": ("sentences", "labels"),
    "text": ("text", "label"),
}
"""Default fields of the units and of their labels."""
DOCUMENT_START = "-DOCSTART-"


@dataclass(frozen=True)
class Example:
    """Text in units, each with a label: the words of a sentence, the sentences of a document, or one whole text."""

    units: tuple[str, ...]
    labels: tuple[str, ...]
    place: str
    """Where it was read, for messages: "train.tsv, line 12"."""


def read_examples(paths: Sequence[Path], options: ClassifierOptions) -> list[Example]:
    """Read the labeled examples of files.

    Raises:
        UserError: A file is missing or empty, has no such field, or an example is malformed; names the file and line.
    """
    examples = []
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        if path.suffix in CONLL_SUFFIXES:
            if options.task != "mentions":
                raise UserError(f"{path}: --task {options.task} reads JSON Lines or Parquet, not {path.suffix}")
            found = list(_read_conll(path))
        else:
            found = list(_read_table(path, options))
        if not found:
            raise UserError(f"{path}: no examples in this file")
        examples += found
    if options.task != "mentions":
        return examples
    whole = [_with_whole_mentions(example) for example in examples]
    changed = [before.place for before, after in zip(examples, whole, strict=True) if before != after]
    if changed:
        logger.warning(
            "warning: %s: an I- tag continues no mention and is read as B- (in %d sentences)", changed[0], len(changed)
        )
    return whole


def check_labels(examples: Sequence[Example], known: Sequence[str]) -> None:
    """Check that all labels are known from the training data.

    Raises:
        UserError: One isn't.
    """
    for example in examples:
        for label in example.labels:
            if label not in known:
                raise UserError(f"{example.place}: label {label!r} is not in the training data ({', '.join(known)})")


def _read_conll(path: Path) -> Iterator[Example]:
    """The sentences of a CoNLL file: a word and its tag on each line, in the first and the last column."""
    words: list[str] = []
    tags: list[str] = []
    start = 1
    for number, line in enumerate(_lines(path), start=1):
        columns = [column.strip() for column in line.split("\t")] if "\t" in line else line.split()
        if len(columns) >= 2 and columns[0] and columns[0] != DOCUMENT_START:
            words.append(columns[0])
            tags.append(columns[-1])
            continue
        if words:
            yield Example(tuple(words), tuple(tags), f"{path}, line {start}")
        words, tags, start = [], [], number + 1
        if any(columns) and columns[0] != DOCUMENT_START:
            raise UserError(f"{path}, line {number}: {line.strip()!r} is not a word and its tag")
    if words:
        yield Example(tuple(words), tuple(tags), f"{path}, line {start}")


def _read_table(path: Path, options: ClassifierOptions) -> Iterator[Example]:
    text_field, label_field = FIELDS[options.task]
    text_field, label_field = options.text_field or text_field, options.label_field or label_field
    for place, row in _rows(path):
        for name in (text_field, label_field):
            if name not in row:
                raise UserError(f"{place}: no field {name!r} (it has {', '.join(map(str, row)) or 'none'})")
        units, labels = row[text_field], row[label_field]
        if options.task == "text":
            units, labels = [units], ["" if labels is None else str(labels)]
        for name, values in ((text_field, units), (label_field, labels)):
            if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
                raise UserError(f"{place}: {name!r} must be text, and not empty: {str(row[name])[:60]}")
        if len(units) != len(labels) or not units:
            raise UserError(f"{place}: {len(units)} {text_field} but {len(labels)} {label_field}")
        yield Example(tuple(units), tuple(labels), place)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(path).to_pylist()
        except pa.ArrowException as error:
            raise UserError(f"{path}: not a Parquet file: {error}") from error
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(_lines(path), start=1):
        place = f"{path}, line {number}"
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise UserError(f"{place}: not JSON: {error}") from error
        if row is None:
            continue
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object with fields")
        yield place, row


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from error


def _with_whole_mentions(example: Example) -> Example:
    """Let every mention begin with B-: an I- that continues nothing, as in IOB1 files, is read as B-.

    Raises:
        UserError: A tag is not O, B-TYPE or I-TYPE.
    """
    tags = []
    before = "O"
    for tag in example.labels:
        if tag != "O" and not (tag[:2] in ("B-", "I-") and tag[2:]):
            raise UserError(f"{example.place}: tag {tag!r} is not O, B-TYPE or I-TYPE")
        tags.append(f"B-{tag[2:]}" if tag[:2] == "I-" and before[2:] != tag[2:] else tag)
        before = tag
    return Example(example.units, tuple(tags), example.place)
