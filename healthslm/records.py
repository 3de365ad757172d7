"""PubMed's records in Parquet, and which of them are PubMed's present state."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers import ParquetWriter

from healthslm.documents import pmid_id
from healthslm.pubmed import RETRACTED_TYPES, RETRACTION_NOTICE_TYPES, read_records
from healthslm.queries import run_query

RECORD_SCHEMA = pa.schema(
    {
        "pmid": pa.int64(),
        "version": pa.int32(),
        "deleted": pa.bool_(),
        "title": pa.string(),
        "title_translated": pa.bool_(),  # its brackets are removed
        "sections": pa.list_(pa.struct({"label": pa.string(), "category": pa.string(), "text": pa.string()})),
        "year": pa.int32(),
        "language": pa.string(),  # several are joined by ";"
        "publication_types": pa.list_(pa.string()),
        "retracted_in": pa.bool_(),  # a notice elsewhere retracts it
    }
)
SOURCE = "pubmed"
LICENSE = "NLM terms; abstracts under their publishers' terms"
NOT_SHOWN_LABELS = {"", "UNASSIGNED"}


class PubmedReader(PipelineStep):
    """Yields the records of PubMed's XML files, in their order; a task reads its share of the files."""

    name = "PubMed XML"
    type = "📖 - READER"

    def __init__(self, paths: list[Path]):
        super().__init__()
        self.paths = paths

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for path in self.paths[rank::world_size]:
            for record in read_records(path):
                yield Document(text="", id=pmid_id(record["pmid"]), metadata={"file": file_name(path), **record})


def record_writer(records: Path) -> ParquetWriter:
    """The block that writes one Parquet file of records for each XML file."""
    return ParquetWriter(
        str(records), "${file}.parquet", "zstd", adapter=_record_row, schema=RECORD_SCHEMA, max_file_size=-1
    )


def _record_row(writer: ParquetWriter, document: Document) -> dict[str, Any]:
    return {column: document.metadata[column] for column in RECORD_SCHEMA.names}


def file_name(path: Path) -> str:
    """The name of an XML file without its suffixes: pubmed26n0001."""
    return path.name.removesuffix(".gz").removesuffix(".xml")


def list_outdated(records: Path, output: Path) -> None:
    """List the records that are not PubMed's present state, with the reason (see `ListedFilter`).

    Of a PMID, the highest version counts, and of that the last record in the order of file names and within files.
    Where this one is a deletion, the citation is gone, until a later file brings it back. Reasons: `deletion` (the
    record is one itself), `deleted`, `superseded`.
    """
    run_query(
        """
        SELECT file, position,
               CASE WHEN deleted THEN 'deletion' WHEN newest_deleted THEN 'deleted' ELSE 'superseded' END AS reason
        FROM (
            SELECT parse_filename(filename, true) AS file, file_row_number AS position, deleted,
                   row_number() OVER newest_first AS rank, first_value(deleted) OVER newest_first AS newest_deleted
            FROM read_parquet($records, filename = true, file_row_number = true)
            WINDOW newest_first AS (PARTITION BY pmid ORDER BY version DESC, filename DESC, file_row_number DESC)
        )
        WHERE deleted OR rank > 1
        ORDER BY file, position
        """,
        {"records": str(records / "*.parquet")},
        output,
    )


def read_record_documents(path: Path) -> Iterator[Document]:
    """Yield all records of a Parquet file as documents, deletions and outdated ones included."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            for record in batch.to_pylist():
                yield record_document(record)


def record_document(record: dict[str, Any]) -> Document:
    """The document of a record: an abstract whose sections are joined by spaces as "LABEL: text".

    PubMed's page shows a paragraph for each section. Collections of abstracts, among them those that models are
    compared on, have them in one line, and so have the unstructured abstracts; a model should not see two conventions.
    """
    text, sections = "", []
    for section in record["sections"]:
        label = section["label"]
        text += " " if text else ""
        text += "" if label in NOT_SHOWN_LABELS else f"{label.rstrip(': ')}: "
        start = len(text)
        text += section["text"]
        sections.append({"label": label, "category": section["category"], "start": start, "end": len(text)})
    return Document(
        text=text,
        id=pmid_id(record["pmid"]),
        metadata={
            "title": record["title"],
            "source": SOURCE,
            "kind": "abstract",
            "license": LICENSE,
            "year": record["year"],
            "sections": sections,
            "retraction": _retraction(record),
        },
    )


def _retraction(record: dict[str, Any]) -> str | None:
    types = set(record["publication_types"])
    if record["retracted_in"] or types & RETRACTED_TYPES:
        return "retracted"
    return "retraction_notice" if types & RETRACTION_NOTICE_TYPES else None
