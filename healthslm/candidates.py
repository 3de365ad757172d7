"""Candidates for the corpus: the documents of all sources in one form, from which held-out ones and copies then leave.

The blocks of the pipelines `collect` and `write` of `healthslm.corpus`, and the query between the two.
"""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers import ParquetWriter

from healthslm.documents import DOCUMENT_SCHEMA, split_of, text_hash
from healthslm.errors import UserError
from healthslm.queries import run_query
from healthslm.sources import ID_COLUMNS, Source

CANDIDATE_SCHEMA = pa.schema(
    [
        *DOCUMENT_SCHEMA,
        pa.field("file", pa.string()),
        pa.field("position", pa.int64()),  # in that file
        pa.field("priority", pa.int32()),  # of the file: of two copies, the one with the lower number is kept
        pa.field("text_hash", pa.string()),
        pa.field("retraction", pa.string()),
    ]
)
HELD_OUT_SCHEMA = pa.schema({"id": pa.string(), "text_hash": pa.string()})

_TRUNCATED = re.compile(r"ABSTRACT TRUNCATED(?: AT \d+ WORDS)?\W*$")


class SourceReader(PipelineStep):
    """Yields the documents of its share of the sources, each with its place among all documents."""

    name = "sources"
    type = "📖 - READER"

    def __init__(self, sources: list[Source]):
        super().__init__()
        self.sources = sources

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for priority in range(rank, len(self.sources), world_size):
            source = self.sources[priority]
            for position, document in enumerate(source.read()):
                document.metadata |= {"file": source.name, "position": position, "priority": priority}
                yield document


def unusable(document: Document, min_words: int) -> str | None:
    """The reason why a document is of no use as a text, if there is one."""
    if not document.text:
        return "no_abstract" if document.metadata["kind"] == "abstract" else "no_text"
    if _TRUNCATED.search(document.text):
        return "truncated"
    return "too_short" if len(document.text.split()) < min_words else None


class Fingerprint(PipelineStep):
    """Adds the hash of the text by which copies are found, and gives documents without an id one made of it."""

    name = "fingerprint"
    type = "✂️ - FORMAT"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            document.metadata["text_hash"] = text_hash(document.text)
            document.id = document.id or f"sha:{document.metadata['text_hash']}"
            yield document


def candidate_writer(candidates: Path) -> ParquetWriter:
    """The block that writes one Parquet file of candidates for each source."""
    return ParquetWriter(
        str(candidates), "${file}.parquet", "zstd", adapter=_row, schema=CANDIDATE_SCHEMA, max_file_size=-1
    )


def _row(writer: ParquetWriter, document: Document) -> dict[str, Any]:
    values = {"id": document.id, "text": document.text} | document.metadata
    return {column: values[column] for column in writer.schema.names}


def write_held_out(sources: list[Source], output: Path) -> None:
    """Write ids and text hashes of all held-out documents to one Parquet file.

    Raises:
        UserError: a source cannot be read, or holds a document with neither id nor text.
    """
    rows = []
    for source in sources:
        for number, document in enumerate(source.read(), start=1):
            if not (document.id or document.text):
                raise UserError(f"{source.location}: row {number:,}: neither {' or '.join(ID_COLUMNS)} nor a text")
            rows.append({"id": document.id or None, "text_hash": text_hash(document.text) if document.text else None})
    pq.write_table(pa.Table.from_pylist(rows, HELD_OUT_SCHEMA), output)


def list_duplicates(candidates: Path, held_out: Path, output: Path) -> None:
    """List the candidates that are held out, or have the id or the text of one in front of them (see `ListedFilter`).

    Reasons: `held_out`, `duplicate_id`, `duplicate_text`.
    """
    run_query(
        """
        WITH keys AS (
            SELECT file, position, priority, id, text_hash,
                   id IN (SELECT id FROM read_parquet($held_out) WHERE id IS NOT NULL) OR text_hash IN
                   (SELECT text_hash FROM read_parquet($held_out) WHERE text_hash IS NOT NULL) AS held_out
            FROM read_parquet($candidates)
        ), ranked AS (
            SELECT *,
                   row_number() OVER (PARTITION BY held_out, id ORDER BY priority, position) AS id_rank,
                   row_number() OVER (PARTITION BY held_out, text_hash ORDER BY priority, position) AS text_rank
            FROM keys
        )
        SELECT file, position,
               CASE WHEN held_out THEN 'held_out' WHEN id_rank > 1 THEN 'duplicate_id' ELSE 'duplicate_text' END
               AS reason
        FROM ranked
        WHERE held_out OR id_rank > 1 OR text_rank > 1
        ORDER BY file, position
        """,
        {"held_out": str(held_out), "candidates": str(candidates / "*.parquet")},
        output,
    )


class CandidateReader(PipelineStep):
    """Yields the candidates of its share of the files; none where no document of a source became one."""

    name = "candidates"
    type = "📖 - READER"

    def __init__(self, paths: list[Path]):
        super().__init__()
        self.paths = paths

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for path in filter(Path.exists, self.paths[rank::world_size]):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(1024):
                    for row in batch.to_pylist():
                        yield Document(text=row.pop("text"), id=row.pop("id"), metadata=row)


def retraction(document: Document) -> str | None:
    """`retracted` or `retraction_notice`, where PubMed says so."""
    return document.metadata["retraction"]


class Split(PipelineStep):
    """Adds the name of its split to each document."""

    name = "split"
    type = "✂️ - FORMAT"

    def __init__(self, validation_fraction: float, test_fraction: float):
        super().__init__()
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            document.metadata["split"] = split_of(document.id, self.validation_fraction, self.test_fraction)
            yield document


def corpus_writer(corpus: Path) -> ParquetWriter:
    """The block that writes one Parquet file of documents for each source into the folder of each split."""
    return ParquetWriter(
        str(corpus), "${split}/${file}.parquet", "zstd", adapter=_row, schema=DOCUMENT_SCHEMA, max_file_size=-1
    )
