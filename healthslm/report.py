"""The report of a corpus: what was read from each source, kept, and dropped by reason."""

import glob
import hashlib
import importlib.metadata
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import healthslm
from healthslm.documents import SPLITS
from healthslm.pipeline import filter_counts
from healthslm.queries import fetch_rows
from healthslm.sources import HUB_PREFIX, Source

REPORT = "report.json"
LIBRARIES = ("datatrove", "lxml", "pyarrow", "duckdb", "datasets")


def corpus_report(
    sources: list[Source], held_out: list[Source], settings: dict[str, Any], logs: Path, corpus: Path
) -> dict[str, Any]:
    """Everything that report.json tells. In each source and in all, read = kept + the sum of dropped.

    It holds no dates and no folders, so that the same input gives the same report.
    """
    files = [_source_report(task, source, logs, corpus) for task, source in enumerate(sources)]
    dropped = sum((Counter(file["dropped"]) for file in files), Counter())
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    return {
        "read": sum(file["read"] for file in files),
        "kept": sum(file["kept"] for file in files),
        "dropped": dict(sorted(dropped.items())),
        "splits": {split: _split_report(corpus / split) for split in SPLITS},
        "settings": settings,
        "held_out": [{"name": source.name, "sha256": _sha256(source.location)} for source in held_out],
        "files": files,
        "versions": {"healthslm": healthslm.__version__} | versions,
    }


def _source_report(task: int, source: Source, logs: Path, corpus: Path) -> dict[str, Any]:
    read, dropped_in_collect = filter_counts(logs, "collect", task)
    _, dropped_in_write = filter_counts(logs, "write", task)
    dropped = dropped_in_collect | dropped_in_write
    kept = sum(pq.read_metadata(path).num_rows for path in corpus.glob(f"*/{glob.escape(source.name)}.parquet"))
    if read != kept + sum(dropped.values()):
        raise RuntimeError(f"{source.location}: {read} documents read, but {kept} kept and {dropped} dropped")
    return {
        "name": source.name,
        "sha256": _sha256(source.location),
        "read": read,
        "kept": kept,
        "dropped": dict(sorted(dropped.items())),
    }


def _split_report(folder: Path) -> dict[str, Any]:
    """Documents and UTF-8 bytes of a split, in all and by kind of text."""
    files = [str(path) for path in sorted(folder.glob("*.parquet"))]
    kinds = {kind: {"documents": documents, "bytes": size} for kind, documents, size in _count_kinds(files)}
    totals = {key: sum(kind[key] for kind in kinds.values()) for key in ("documents", "bytes")}
    return totals | {"kinds": kinds}


def _count_kinds(files: list[str]) -> list[tuple[str, int, int]]:
    if not files:
        return []
    # The bytes of `document_text`: those of the title and the newline behind it, where there is one, and of the text.
    return fetch_rows(
        """
        SELECT kind, count(*), sum(strlen(text) + if(title = '', 0, strlen(title) + 1))::BIGINT
        FROM read_parquet($files) GROUP BY kind ORDER BY kind
        """,
        {"files": files},
    )


def _sha256(location: str) -> str | None:
    """The checksum of a file; none for a data set of the Hub."""
    if location.startswith(HUB_PREFIX):
        return None
    with Path(location).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines for people."""
    lines = [f"read {report['read']:,} documents, kept {report['kept']:,}"]
    lines += [f"  dropped {count:>10,}  {reason}" for reason, count in report["dropped"].items()]
    lines += [
        f"  {split:<10} {counts['documents']:>10,} documents {counts['bytes'] / 1e6:>10,.1f} MB"
        for split, counts in report["splits"].items()
    ]
    return "\n".join(lines)
