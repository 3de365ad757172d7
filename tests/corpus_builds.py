"""Build a corpus, read it, and check its report."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from healthslm.corpus.build import CorpusOptions, build_corpus
from healthslm.documents import SPLITS, document_text


def words(seed: object) -> str:
    """Thirty words that differ for every seed, so that no text is a near-duplicate of another."""
    return " ".join(f"word{seed}{number}" for number in range(30))


WORDS = words("")


def build(output: Path, **options: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Build a corpus; return its documents by id, with their split, and its report."""
    options = {"workers": 1, "validation_fraction": 0.1, "test_fraction": 0.1} | options
    build_corpus(CorpusOptions(output=output, **options))
    return read(output), json.loads((output / "report.json").read_text())


def read(corpus: Path) -> dict[str, dict[str, Any]]:
    rows = [
        row | {"split": split}
        for split in SPLITS
        for path in sorted((corpus / split).glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    documents = {row["id"]: row for row in rows if row["part"] == 1}
    assert len({(row["id"], row["part"]) for row in rows}) == len(rows), "a chunk is in the corpus twice"
    return documents


def assert_report_adds_up(corpus: Path) -> dict[str, Any]:
    report = json.loads((corpus / "report.json").read_text())
    for counts in (report, *report["files"]):
        assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    for key in ("read", "kept"):
        assert report[key] == sum(file[key] for file in report["files"])
    for split in SPLITS:
        rows = [row for path in (corpus / split).glob("*.parquet") for row in pq.read_table(path).to_pylist()]
        assert report["splits"][split]["parts"] == len(rows)
        assert report["splits"][split]["documents"] == len({row["id"] for row in rows})
        size = sum(len(document_text(row["title"], row["text"]).encode()) for row in rows)
        assert report["splits"][split]["bytes"] == size
    assert report["kept"] == sum(split["documents"] for split in report["splits"].values())
    return report
