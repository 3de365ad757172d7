"""PubMed's records as Parquet files, and as documents."""

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
from healthslm.fingerprints import FingerprintedWriter

RECORDS_VERSION = 1
"""Version of the record files. Raise it after any change by which the same XML gives other records (in pubmed.py,
markup.py or `RECORD_SCHEMA`): files of another version are made again."""

RECORD_SCHEMA = pa.schema(
    {
        "pmid": pa.int64(),
        "version": pa.int32(),
        "deleted": pa.bool_(),
        "title": pa.string(),
        "title_translated": pa.bool_(),  # the brackets are removed
        "sections": pa.list_(pa.struct({"label": pa.string(), "category": pa.string(), "text": pa.string()})),
        "year": pa.int32(),
        "language": pa.string(),  # several are joined with ";"
        "publication_types": pa.list_(pa.string()),
        "retracted_in": pa.bool_(),  # another record retracts it
    }
)
SOURCE = "pubmed"
LICENSE = "NLM terms; abstracts under their publishers' terms"
HIDDEN_LABELS = {"", "UNASSIGNED"}


class PubmedReader(PipelineStep):
    """Yields the records of a PubMed XML file; task i reads file i."""

    name = "PubMed XML"
    type = "📖 - READER"

    def __init__(self, paths: list[Path]):
        super().__init__()
        self.paths = paths

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for record in read_records(self.paths[rank]):
            yield Document(text="", id=pmid_id(record["pmid"]), metadata=record)


def record_writer(paths: list[Path], fingerprints: list[str]) -> FingerprintedWriter:
    """The block that writes the records of XML file i to `paths[i]`."""
    return FingerprintedWriter(paths, fingerprints, RECORD_SCHEMA)


def read_record_documents(path: Path) -> Iterator[Document]:
    """Yield all records of a Parquet file as documents, including deletions and outdated records."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            for record in batch.to_pylist():
                yield record_document(record)


def record_document(record: dict[str, Any]) -> Document:
    """Convert a record to a document: an abstract, whose sections are joined with spaces as "LABEL: text".

    PubMed's website shows each section as a paragraph. Collections of abstracts, evaluation sets among them, and
    unstructured abstracts have a single line, so structured abstracts get a single line too.
    """
    text, sections = "", []
    for section in record["sections"]:
        label, content = section["label"], scrub(section["text"])
        if not content:
            continue
        text += " " if text else ""
        text += "" if label in HIDDEN_LABELS else f"{label.rstrip(': ')}: "
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
