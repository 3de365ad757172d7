"""Facts about the training corpus for the documents of a release. The corpus has a card of its own as well."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from healthslm.corpus.report import REPORT
from healthslm.data_card.describe import PAGE
from healthslm.data_card.statistics import Row, corpus_statistics, sum_by, token_statistics
from healthslm.errors import UserError
from healthslm.files import file_sha256, read_json

CORPUS_CARD = Path("docs/corpus-card") / PAGE
CORPUS_CARD_RECIPE = Path("docs/corpus-card.yaml")


@dataclass(frozen=True)
class TrainingData:
    """The corpus in numbers, with its input files."""

    report_sha256: str
    """SHA-256 of the corpus's report.json, which records those of all input files."""
    train: dict[str, Any]
    """Documents and bytes of the training split."""
    train_tokens: int
    tokenizer_sha256: str
    licenses: list[Row]
    """License as stated by the source, documents and bytes, over all splits."""
    files: list[dict[str, Any]]
    """Name, SHA-256 and number of documents kept of each input file."""
    held_out: list[dict[str, Any]]
    """Name and SHA-256 of the files that were held out."""


def describe_training_data(corpus: Path, tokens: Path, context: int, repository: Path) -> TrainingData:
    """Count the documents and tokens of a corpus, and name its files as its card does.

    Raises:
        UserError: The corpus or its tokens are missing or don't match, or the repository's card describes another
            corpus.
    """
    report_file = corpus / REPORT
    if not report_file.is_file():
        raise UserError(f"{corpus}: not a corpus: {REPORT} is missing; build one with scripts/build_corpus.py")
    report = read_json(report_file)
    files = [*report["files"], *report["held_out"]]
    _check_card(repository / CORPUS_CARD, corpus, [file["sha256"] for file in files if file["sha256"]])
    recipe = repository / CORPUS_CARD_RECIPE
    names = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("names", {}) if recipe.is_file() else {}
    for file in files:
        file["name"] = names.get(file["name"], file["name"])
    with tempfile.TemporaryDirectory(prefix="healthslm-") as folder:
        statistics = corpus_statistics(corpus, report, Path(folder) / "documents.duckdb")
    in_tokens = token_statistics(tokens, report, context)
    return TrainingData(
        report_sha256=file_sha256(report_file),
        train=report["splits"]["train"],
        train_tokens=in_tokens.counts["train"],
        tokenizer_sha256=in_tokens.tokenizer_sha256,
        licenses=sum_by(statistics["sources"], column=1),
        files=report["files"],
        held_out=report["held_out"],
    )


def _check_card(card: Path, corpus: Path, checksums: list[str]) -> None:
    page = card.read_text(encoding="utf-8") if card.is_file() else ""
    if any(checksum not in page for checksum in checksums):
        raise UserError(f"{card}: not the card of {corpus}: write it with scripts/describe_corpus.py")
