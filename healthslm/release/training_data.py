"""What a model card tells of the corpus that a model was trained on, next to the card of the corpus itself."""

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
    """The corpus in numbers, and the files that it was made of."""

    report_sha256: str
    """Checksum of the corpus's report.json, which holds those of all its input."""
    train: dict[str, Any]
    """Documents and bytes of the training split."""
    train_tokens: int
    tokenizer_sha256: str
    licences: list[Row]
    """Licence as stated, documents and bytes, of all splits."""
    files: list[dict[str, Any]]
    """Name, checksum and documents kept of each input file."""
    held_out: list[dict[str, Any]]
    """Name and checksum of the files of which nothing is in the corpus."""


def describe_training_data(corpus: Path, tokens: Path, context: int, repository: Path) -> TrainingData:
    """Count a corpus and its tokens, and name its files as the card of the corpus does.

    Raises:
        UserError: The corpus or its tokens are missing or not of each other, or the repository has no card of it.
    """
    report_file = corpus / REPORT
    if not report_file.is_file():
        raise UserError(f"{corpus}: no corpus, for there is no {REPORT} in it; scripts/build_corpus.py writes one")
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
        licences=sum_by(statistics["sources"], column=1),
        files=report["files"],
        held_out=report["held_out"],
    )


def _check_card(card: Path, corpus: Path, checksums: list[str]) -> None:
    page = card.read_text(encoding="utf-8") if card.is_file() else ""
    if any(checksum not in page for checksum in checksums):
        raise UserError(f"{card}: not the card of {corpus}: write it by scripts/describe_corpus.py")
