"""Build labeled data from PubMed's structured abstracts: the role of each sentence in its abstract.

The category that NLM assigns to a section (BACKGROUND, OBJECTIVE, METHODS, RESULTS or CONCLUSIONS) is the label of its
sentences. Section labels such as "METHODS:" are not part of them.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from healthslm.classification.options import SentenceRolesOptions
from healthslm.corpus.reader import split_files
from healthslm.documents import SPLITS, split_of
from healthslm.errors import UserError
from healthslm.files import check_output_folder, replacing
from healthslm.sentences import sentences

logger = logging.getLogger(__name__)

ROLES = ("BACKGROUND", "OBJECTIVE", "METHODS", "RESULTS", "CONCLUSIONS")
_FEWEST_ROLES = 3


def build_sentence_roles(options: SentenceRolesOptions) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl with `id`, `sentences` and `labels` of each abstract.

    An abstract is left out if NLM gives one of its sections no category, or if it has fewer than 3 roles.

    Raises:
        UserError: The corpus has no structured abstracts, or the output folder holds other files.
    """
    names = {f"{split}.jsonl" for split in SPLITS}
    check_output_folder(
        options.output, "labeled sentences", lambda folder: {path.name for path in folder.iterdir()} <= names
    )
    files = [path for split in SPLITS for path in split_files(options.corpus, split)]
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for document in _structured_documents(files):
        split = split_of(document["id"], options.validation_fraction, options.test_fraction)
        rows[split].append({"id": document["id"], **label_sentences(document)})
    if not any(rows.values()):
        raise UserError(f"{options.corpus}: no abstracts with sections in this corpus; PubMed's have them")
    with replacing(options.output) as new:
        new.mkdir()
        for split, found in rows.items():
            found.sort(key=lambda row: row["id"])
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
            (new / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            counts = Counter(label for row in found for label in row["labels"])
            roles = ", ".join(f"{counts[role]:,} {role}" for role in ROLES)
            logger.info("%s: %s abstracts, %s sentences: %s", split, f"{len(found):,}", f"{counts.total():,}", roles)


def label_sentences(document: dict[str, Any]) -> dict[str, list[str]]:
    """The `sentences` of a structured document of a corpus, and the category of its section for each as `labels`."""
    found = [
        (sentence, section["category"])
        for section in document["sections"]
        for sentence in sentences(document["text"][section["start"] : section["end"]])
    ]
    return {"sentences": [sentence for sentence, _ in found], "labels": [category for _, category in found]}


def _structured_documents(files: list[Path]) -> Iterator[dict[str, Any]]:
    for path in files:
        try:
            documents = pq.read_table(path, columns=["id", "text", "sections"]).to_pylist()
        except pa.ArrowException as error:
            raise UserError(f"{path}: not a Parquet file of a corpus: {error}") from error
        for document in documents:
            categories = {section["category"] for section in document["sections"] or ()}
            if len(categories) >= _FEWEST_ROLES and categories <= set(ROLES):
                yield document
