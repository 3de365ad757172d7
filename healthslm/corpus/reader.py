"""Reading a finished corpus: the Parquet files of its splits and the texts in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq

from healthslm.documents import document_text
from healthslm.errors import UserError

BATCH_DOCUMENTS = 1024


def split_files(corpus: Path, split: str) -> list[Path]:
    """List the Parquet files of one split by name; the list is empty if the corpus has no such split."""
    if not corpus.is_dir():
        raise UserError(f"{corpus}: no such folder; scripts/build_corpus.py builds a corpus")
    return sorted((corpus / split).glob("*.parquet"))


def count_documents(path: Path) -> int:
    """The number of rows in one corpus file, from its footer."""
    with _refusing_bad_files(path):
        return pq.read_metadata(path).num_rows


def read_texts(path: Path) -> Iterator[list[str]]:
    """Yield the texts of one corpus file in batches, each text with its title."""
    with _refusing_bad_files(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_DOCUMENTS, columns=["title", "text"]):
            titles, texts = batch.column("title").to_pylist(), batch.column("text").to_pylist()
            yield [document_text(title, text) for title, text in zip(titles, texts, strict=True)]


def read_kinds(path: Path) -> list[str]:
    """The kind of each row of one corpus file, such as "abstract"."""
    with _refusing_bad_files(path):
        return pq.read_table(path, columns=["kind"]).column("kind").to_pylist()


@contextmanager
def _refusing_bad_files(path: Path) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, KeyError) as error:
        raise UserError(f"{path}: not a Parquet file of a corpus: {error}") from error
