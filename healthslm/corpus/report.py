"""The report of a corpus: how many documents of each source were read, kept and dropped, and with which settings."""

import importlib.metadata
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.compute as pc
import pyarrow.parquet as pq

import healthslm
from healthslm.corpus.selection import COMMON_NGRAM
from healthslm.corpus.signatures import BANDS, OVERLAP_WORDS, ROWS, SEED, SHINGLE_WORDS
from healthslm.corpus.sources import Source
from healthslm.documents import SPLITS

REPORT = "report.json"
COUNTS = ("documents", "parts", "bytes")  # of a split; parts are chunks
LIBRARIES = ("datatrove", "lxml", "pyarrow", "duckdb", "datasets", "py3langid", "rensa", "xxhash")
# The definition of overlaps and near-duplicates, see `healthslm.corpus.signatures` and `healthslm.corpus.selection`.
SELECTION = {
    "overlap_words": OVERLAP_WORDS,
    "common_ngram": COMMON_NGRAM,
    "shingle_words": SHINGLE_WORDS,
    "bands": BANDS,
    "rows": ROWS,
    "seed": SEED,
}


def corpus_report(
    sources: list[Source],
    signature_files: list[Path],
    held_out: list[Source],
    drop_list: Path,
    corpus: Path,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The content of report.json. For each source, and for all of them, read = kept + sum of dropped.

    It has no dates and no paths, so the same input gives the same report.
    """
    reasons = _count_reasons(drop_list)
    files = [
        _source_report(source, pq.read_metadata(signature_file).num_rows, reasons.get(source.name, {}), corpus)
        for source, signature_file in zip(sources, signature_files, strict=True)
    ]
    total = sum((Counter(file["dropped"]) for file in files), Counter())
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    return {
        "read": sum(file["read"] for file in files),
        "kept": sum(file["kept"] for file in files),
        "dropped": dict(sorted(total.items())),
        "splits": {split: _split_report(corpus / split) for split in SPLITS},
        "settings": settings,
        "selection": SELECTION,
        "held_out": [{"name": source.name, "sha256": source.sha256} for source in held_out],
        "files": files,
        "versions": {"healthslm": healthslm.__version__} | versions,
    }


def _count_reasons(drop_list: Path) -> dict[str, dict[str, int]]:
    """Count the dropped documents of each source, by reason."""
    reasons: dict[str, dict[str, int]] = {}
    query = "SELECT file, reason, count(*) FROM read_parquet($drop_list) GROUP BY ALL ORDER BY ALL"
    for file, reason, count in _fetch_rows(query, {"drop_list": str(drop_list)}):
        reasons.setdefault(file, {})[reason] = count
    return reasons


def _source_report(source: Source, read: int, dropped: dict[str, int], corpus: Path) -> dict[str, Any]:
    paths = [corpus / split / f"{source.name}.parquet" for split in SPLITS]
    written = [pq.read_table(path, columns=["part"]) for path in paths if path.exists()]
    kept = sum(pc.sum(pc.equal(table["part"], 1)).as_py() or 0 for table in written)
    if read != kept + sum(dropped.values()):
        raise RuntimeError(f"{source.location}: {read} documents read, but {kept} kept and {dropped} dropped")
    return {"name": source.name, "sha256": source.sha256, "read": read, "kept": kept, "dropped": dropped}


def _split_report(folder: Path) -> dict[str, Any]:
    """Documents, chunks and UTF-8 bytes of a split, in total and by kind of text."""
    files = [str(path) for path in sorted(folder.glob("*.parquet"))]
    kinds = {kind: dict(zip(COUNTS, counts, strict=True)) for kind, *counts in _count_kinds(files)}
    totals = {key: sum(kind[key] for kind in kinds.values()) for key in COUNTS}
    return totals | {"kinds": kinds}


def _count_kinds(files: list[str]) -> list[tuple[Any, ...]]:
    if not files:
        return []
    # Counts the bytes of `document_text`: the title with a newline, if there is one, and the text.
    return _fetch_rows(
        """
        SELECT kind, count(*) FILTER (part = 1), count(*),
               sum(strlen(text) + if(title = '', 0, strlen(title) + 1))::BIGINT
        FROM read_parquet($files) GROUP BY kind ORDER BY kind
        """,
        {"files": files},
    )


def _fetch_rows(query: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
    with duckdb.connect() as connection:
        return connection.execute(query, parameters).fetchall()


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines for the terminal."""
    lines = [f"read {report['read']:,} documents, kept {report['kept']:,}"]
    lines += [f"  dropped {count:>10,}  {reason}" for reason, count in report["dropped"].items()]
    lines += [
        f"  {split:<10} {counts['documents']:>10,} documents {counts['bytes'] / 1e6:>10,.1f} MB"
        for split, counts in report["splits"].items()
    ]
    return "\n".join(lines)
