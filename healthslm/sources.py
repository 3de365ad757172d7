"""Reading text other than PubMed's XML: Parquet, JSON Lines and text files, and data sets of the Hub."""

import glob
import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as pq
from datatrove.data import Document

from healthslm.documents import document_id
from healthslm.errors import UserError

HUB_PREFIX = "hub:"
TABLE_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
TEXT_SUFFIXES = (".txt", ".txt.gz")

# The first of these columns that a row has; PubMedQA's files have the ones in capitals.
ID_COLUMNS = ("id", "pmid", "PMID")
TITLE_COLUMNS = ("title", "QUESTION")
TEXT_COLUMNS = ("text", "abstract", "CONTEXTS")
UNSTATED = "unstated"


@dataclass(frozen=True)
class Source:
    """One file of documents, or one data set of the Hub ("hub:NAME")."""

    name: str
    location: str


def find_sources(patterns: list[str], taken: Iterable[str] = ()) -> list[Source]:
    """The sources that files, folders, glob patterns and "hub:NAME" stand for, in the order given, each with a name of
    its own that is not among those `taken`.

    Raises:
        UserError: one of them is missing, or of a format that is not read.
    """
    locations = [location for pattern in patterns for location in _locations(pattern)]
    sources, taken = [], set(taken)
    for location in dict.fromkeys(locations):
        stem = _stem(location)
        name = next(name for name in _numbered(stem) if name not in taken)
        taken.add(name)
        sources.append(Source(name, location))
    return sources


def _locations(pattern: str) -> list[str]:
    if pattern.startswith(HUB_PREFIX):
        return [pattern]
    path = Path(pattern)
    if path.is_dir():
        files = [str(file) for file in sorted(path.rglob("*")) if _suffix(file.name)]
    elif path.exists():
        files = [pattern]
    else:
        files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise UserError(f"{pattern}: no such file, and no file of documents in it")
    for file in files:
        if not _suffix(file):
            formats = ", ".join(TABLE_SUFFIXES + TEXT_SUFFIXES)
            raise UserError(f"{file}: of no format that is read: {formats}, or {HUB_PREFIX}NAME for the Hub")
    return files


def _suffix(name: str) -> str | None:
    return next((suffix for suffix in TABLE_SUFFIXES + TEXT_SUFFIXES if name.endswith(suffix)), None)


def _stem(location: str) -> str:
    if location.startswith(HUB_PREFIX):
        return location.removeprefix(HUB_PREFIX).strip("/").replace("/", "-")
    return Path(location).name.removesuffix(_suffix(location) or "")


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def read_source_documents(source: Source, default_kind: str = "text") -> Iterator[Document]:
    """Yield every row of a source as a document; text and id may be empty.

    Raises:
        UserError: the source cannot be read, or has no column of text; names it and the row.
    """
    for number, row in enumerate(read_rows(source.location), start=1):
        if not any(column in row for column in TEXT_COLUMNS):
            raise UserError(
                f"{source.location}: row {number:,}: no column {' or '.join(TEXT_COLUMNS)}; it has {list(row)}"
            )
        origin = _string(row.get("source")) or source.name
        kind = _string(row.get("kind")) or default_kind
        given_id = _first(row, ID_COLUMNS)
        yield Document(
            text=_first(row, TEXT_COLUMNS),
            id=document_id(given_id, kind, origin) if given_id else "",
            metadata={
                "title": _first(row, TITLE_COLUMNS),
                "source": origin,
                "kind": kind,
                "license": _string(row.get("license")) or UNSTATED,
                "year": row.get("year") if isinstance(row.get("year"), int) else None,
                "sections": [],
                "retraction": None,
            },
        )


def _first(row: dict[str, Any], columns: tuple[str, ...]) -> str:
    return next((_string(row[column]) for column in columns if column in row), "")


def _string(value: Any) -> str:
    """A value of any type as text that UTF-8 can hold; paragraphs of a list on lines of their own."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "\n".join(map(_string, value))
    return str(value).encode("utf-8", "replace").decode().strip()


def read_rows(location: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file or of a Hub data set's training split; a text file is one row."""
    if location.startswith(HUB_PREFIX):
        yield from _read_hub(location.removeprefix(HUB_PREFIX))
        return
    path = Path(location)
    try:
        match _suffix(location):
            case ".parquet":
                yield from _read_parquet(path)
            case ".jsonl" | ".jsonl.gz":
                yield from _read_json_lines(path)
            case _:
                with _open_text(path) as file:
                    yield {"text": file.read()}
    except (pyarrow.ArrowException, EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged, or not what its suffix says: {error}") from error


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number:,}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number:,}: not a JSON object")
            yield row


def _open_text(path: Path):
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _read_hub(name: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset  # takes seconds to import

    try:
        yield from load_dataset(name, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{HUB_PREFIX}{name}: cannot be loaded: {' '.join(str(error).split())}") from error
