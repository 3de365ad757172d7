"""The report of a corpus: what was read from each input, kept, and dropped by reason."""

import hashlib
import importlib.metadata
from collections import Counter
from pathlib import Path
from typing import Any

import healthslm
from healthslm.candidates import Input
from healthslm.documents import SPLITS
from healthslm.pipeline import task_counts
from healthslm.queries import fetch_rows
from healthslm.sources import HUB_PREFIX, Source

LIBRARIES = ("datatrove", "lxml", "pyarrow", "duckdb", "datasets")


def corpus_report(
    inputs: list[Input], held_out: list[Source], settings: dict[str, Any], corpus: Path
) -> dict[str, Any]:
    """Everything that report.json tells. Of each input, read = kept + all dropped. It holds no date and no path, so
    that the same input gives the same report."""
    files = [_input_report(task, input, corpus) for task, input in enumerate(inputs)]
    dropped = sum((Counter(file["dropped"]) for file in files), Counter())
    return {
        "read": sum(file["read"] for file in files),
        "kept": sum(file["kept"] for file in files),
        "dropped": dict(sorted(dropped.items())),
        "splits": {split: _split_report(corpus / split) for split in SPLITS},
        "settings": settings,
        "held_out": [{"name": source.name, "sha256": sha256(source.location)} for source in held_out],
        "files": files,
        "versions": {"healthslm": healthslm.__version__}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _input_report(task: int, input: Input, corpus: Path) -> dict[str, Any]:
    collected, written = (task_counts(corpus / "logs" / step, task) for step in ("collect", "write"))
    read = collected.pop("read")
    candidates = written.pop("read")
    dropped = collected | written
    return {
        "name": input.name,
        "sha256": sha256(input.location),
        "read": read,
        "kept": candidates - sum(written.values()),
        "dropped": dropped,
    }


def _split_report(folder: Path) -> dict[str, Any]:
    """Documents and UTF-8 bytes of a split, in all and by kind of text."""
    rows = (
        fetch_rows(
            """
        SELECT kind, count(*), sum(strlen(text) + if(title = '', 0, strlen(title) + 1))
        FROM read_parquet($files) GROUP BY kind ORDER BY kind
        """,
            {"files": [str(path) for path in sorted(folder.glob("*.parquet"))]},
        )
        if any(folder.glob("*.parquet"))
        else []
    )
    kinds = {kind: {"documents": documents, "bytes": int(size)} for kind, documents, size in rows}
    return {key: sum(kind[key] for kind in kinds.values()) for key in ("documents", "bytes")} | {"kinds": kinds}


def sha256(location: str) -> str | None:
    """The checksum of a file; none for a data set of the Hub."""
    if location.startswith(HUB_PREFIX):
        return None
    with Path(location).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines for people."""
    lines = [f"read {report['read']:,} documents, kept {report['kept']:,}"]
    lines += [f"  dropped {count:>10,}  {reason}" for reason, count in report["dropped"].items()]
    for split, counts in report["splits"].items():
        lines.append(f"  {split:<10} {counts['documents']:>10,} documents {counts['bytes'] / 1e6:>10,.1f} MB")
    return "\n".join(lines)
