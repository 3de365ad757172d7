"""PubMed's records in Parquet, and the documents that they become."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from healthslm.corpus.pubmed import RETRACTED_TYPES, RETRACTION_NOTICE_TYPES, read_records
from healthslm.corpus.scrubbing import scrub
from healthslm.documents import pmid_id
from healthslm.tables import StampedWriter

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
    """Yields the records of PubMed's XML files in their order; task i reads file i."""

    name = "PubMed XML"
    type = "📖 - READER"

    def __init__(self, paths: list[Path]):
        super().__init__()
        self.paths = paths

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for record in read_records(self.paths[rank]):
            yield Document(text="", id=pmid_id(record["pmid"]), metadata=record)


def record_writer(paths: list[Path], stamps: list[str]) -> StampedWriter:
    """The block that writes the records of XML file i to paths[i]."""
    return StampedWriter(paths, stamps, RECORD_SCHEMA)


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
        label, content = section["label"], scrub(section["text"])
        if not content:
            continue
        text += " " if text else ""
        text += "" if label in NOT_SHOWN_LABELS else f"{label.rstrip(': ')}: "
        start = len(text)
        text += content
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
