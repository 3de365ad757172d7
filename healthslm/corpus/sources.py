"""Reading text other than PubMed's XML: Parquet, JSON Lines and text files, and datasets of the Hub."""

import glob
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet as pq
from datatrove.data import Document

from healthslm.corpus.options import HUB_PREFIX, ID_COLUMNS, TEXT_COLUMNS, TITLE_COLUMNS
from healthslm.documents import document_id, document_text
from healthslm.errors import UserError, one_line
from healthslm.files import file_sha256

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt", ".txt.gz")

UNSTATED = "unstated"
MAX_DOCUMENT_LENGTH = 2**26  # characters, far more than a book has

Row = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Names of the columns with the id, the title and the text. Of several names, the first that a row has is read.

    A name may also be `a.b`, the field `b` of column `a`, or `a+b`, the texts of both columns.
    """

    id: tuple[str, ...] = ID_COLUMNS
    title: tuple[str, ...] = TITLE_COLUMNS
    text: tuple[str, ...] = TEXT_COLUMNS


@dataclass(frozen=True)
class Source:
    """A file of documents or a dataset of the Hub, with a name that is unique in the corpus."""

    name: str
    location: str
    read: Callable[[], Iterator[Document]]

    @cached_property
    def sha256(self) -> str | None:
        """Checksum of the file; None for a dataset of the Hub."""
        return None if self.location.startswith(HUB_PREFIX) else file_sha256(Path(self.location))


def find_sources(
    patterns: list[str], taken: Iterable[str] = (), default_kind: str = "text", columns: Columns = Columns()
) -> list[Source]:
    """Find the sources that `patterns` name: files, folders, glob patterns and "hub:NAME". Keeps their order.

    A source is named after its file, with a number if that name is already `taken`.

    Args:
        patterns: Files, folders, glob patterns and datasets of the Hub.
        taken: Names that the sources must not have.
        default_kind: Kind of the documents that do not state one.
        columns: Names of the columns to read.

    Raises:
        UserError: A file is missing, or its format is unknown.
    """
    sources, taken = [], set(taken)
    for location in dict.fromkeys(location for pattern in patterns for location in _locations(pattern)):
        stem = _stem(location)
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        sources.append(Source(name, location, partial(read_documents, location, name, default_kind, columns)))
    return sources


def _locations(pattern: str) -> list[str]:
    if pattern.startswith(HUB_PREFIX):
        return [pattern]
    if Path(pattern).is_dir():
        files = [str(file) for file in sorted(Path(pattern).rglob("*")) if file.name.endswith(SUFFIXES)]
    else:
        files = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise UserError(f"{pattern}: no such file, or no files of documents ({', '.join(SUFFIXES)}) in this folder")
    for file in files:
        if not file.endswith(SUFFIXES):
            raise UserError(f"{file}: unknown format; expected {', '.join(SUFFIXES)} or {HUB_PREFIX}NAME")
    return [str(Path(file).absolute()) for file in files]  # workers may have another current folder


def _stem(location: str) -> str:
    if location.startswith(HUB_PREFIX):
        return location.removeprefix(HUB_PREFIX).strip("/").translate(str.maketrans("/:", "--"))
    return Path(location).name.removesuffix(".gz").rpartition(".")[0]


def read_documents(location: str, name: str, default_kind: str, columns: Columns) -> Iterator[Document]:
    """Yield every row of a source as a document, whose text and id may be empty.

    Raises:
        UserError: The source cannot be read, or a row has no text column or one without text; names the row.
    """
    for number, row in enumerate(read_rows(location), start=1):
        _check_text(row, columns.text, f"{location}: row {number:,}")
        source = _string(row.get("source")) or name
        kind = _string(row.get("kind")) or default_kind
        given_id = _first(row, columns.id)
        yield Document(
            text=_first(row, columns.text),
            id=document_id(given_id, kind, source) if given_id else "",
            metadata={
                "title": _first(row, columns.title),
                "source": source,
                "kind": kind,
                "license": _string(row.get("license")) or UNSTATED,
                "year": _year(row.get("year")),
                "sections": [],
                "retraction": None,
            },
        )


def _check_text(row: Row, names: tuple[str, ...], place: str) -> None:
    name, values = next(_found(row, names), ("", None))
    if values is None:
        raise UserError(f"{place}: no column {' or '.join(names)}; the columns are {', '.join(row) or 'none'}")
    for value in values:
        if value is not None and not isinstance(value, str):
            kind = "numbers" if isinstance(value, int | float) else f"values of type {type(value).__name__}"
            raise UserError(f"{place}: column {name} holds {kind}, such as {str(value)[:40]}, where text is expected")


def _first(row: Row, names: tuple[str, ...]) -> str:
    return next((_string(values) for _, values in _found(row, names)), "")


def _found(row: Row, names: tuple[str, ...]) -> Iterator[tuple[str, list[Any]]]:
    """The names that a row has, with their values."""
    for name in names:
        values = _values(row, name)
        if values is not None:
            yield name, values


def _values(row: Row, name: str) -> list[Any] | None:
    """The values of a column, or of `a.b` or `a+b`; None if the row doesn't have it."""
    if name in row:
        value = row[name]
        return value if isinstance(value, list) else [value]
    if "+" in name:
        parts = [_values(row, part) for part in name.split("+")]
        return None if None in parts else [value for part in parts for value in part or ()]
    column, _, field = name.partition(".")
    return _values(row[column], field) if isinstance(row.get(column), dict) else None


def _string(value: Any) -> str:
    """A value as text that UTF-8 can encode; the items of a list are joined with newlines."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "\n".join(map(_string, value))
    return str(value).encode("utf-8", "replace").decode().strip()


def _year(value: Any) -> int | None:
    digits = _string(value)
    return int(digits) if len(digits) == 4 and digits.isascii() and digits.isdigit() else None


def read_source_texts(patterns: list[str], documents: int | None = None) -> list[str]:
    """The title, if there is one, and the text of the first documents of sources, by default of all that have a text.

    Args:
        patterns: See `find_sources`.

    Raises:
        UserError: A source is missing or cannot be read, or no document has a text.
    """
    found = (
        document_text(document.metadata["title"], document.text)
        for source in find_sources(patterns)
        for document in source.read()
        if document.text
    )
    texts = list(itertools.islice(found, documents))
    if not texts:
        raise UserError(f"{' '.join(patterns)}: no document has any text")
    return texts


def read_rows(location: str) -> Iterator[Row]:
    """Yield the rows of a file, or of a Hub dataset: `hub:NAME` for its split train, `hub:NAME:SPLIT` or
    `hub:NAME:CONFIG:SPLIT`. A text file is one row."""
    if location.startswith(HUB_PREFIX):
        yield from _read_hub(location.removeprefix(HUB_PREFIX))
        return
    path = Path(location)
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_json_lines(path)
        else:
            with _open_text(path) as file:
                yield {"text": _refuse_too_long(file.read(MAX_DOCUMENT_LENGTH + 1), f"{path}")}
    except (pyarrow.ArrowException, EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged, or in another format: {one_line(error)}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def _read_json_lines(path: Path) -> Iterator[Row]:
    with _open_text(path) as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_DOCUMENT_LENGTH + 1), ""), start=1):
            if not _refuse_too_long(line, f"{path}: line {number:,}").strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number:,}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number:,}: not a JSON object")
            yield row


def _refuse_too_long(text: str, place: str) -> str:
    if len(text) > MAX_DOCUMENT_LENGTH:
        raise UserError(f"{place}: longer than {MAX_DOCUMENT_LENGTH:,} characters; split it into documents first")
    return text


def _open_text(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _read_hub(name: str) -> Iterator[Row]:
    from datasets import load_dataset  # slow to import and rarely needed

    dataset, *config, split = name.split(":") if ":" in name else (name, "train")
    try:
        yield from load_dataset(dataset, *config, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{HUB_PREFIX}{name}: cannot be read: {one_line(error)}") from error
