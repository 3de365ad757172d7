"""Writing the corpus: the documents that stay, cut to the length of a context, into the files of their splits."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import ParquetWriter

from healthslm.corpus.passages import split_passages
from healthslm.corpus.screening import Criteria
from healthslm.documents import DOCUMENT_SCHEMA, split_of

REMOVED = "removed"
REMOVED_SCHEMA = pa.schema([*DOCUMENT_SCHEMA.remove(DOCUMENT_SCHEMA.get_field_index("part")), ("reason", pa.string())])


class DroppedFilter(BaseFilter):
    """Drops what `healthslm.corpus.selection` has listed, and writes it with its reason where wanted."""

    name = "drop as listed"

    def __init__(self, dropped: Path, removed: Path | None):
        writer = None
        if removed is not None:
            writer = ParquetWriter(
                str(removed), "${file}.parquet", "zstd", adapter=_removed_row, schema=REMOVED_SCHEMA, max_file_size=-1
            )
        super().__init__(exclusion_writer=writer)
        self.dropped = dropped
        self.file: str | None = None
        self.reasons: dict[int, str] = {}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if doc.metadata["file"] != self.file:
            self.file = doc.metadata["file"]
            rows = pq.read_table(self.dropped, filters=[("file", "=", self.file)])
            self.reasons = dict(zip(rows["position"].to_pylist(), rows["reason"].to_pylist(), strict=True))
        reason = self.reasons.get(doc.metadata["position"])
        return True if reason is None else (False, reason)


class Passages(PipelineStep):
    """Cuts documents that are too long for a context at paragraphs, into parts of the same id, title and split."""

    name = "passages"
    type = "✂️ - FORMAT"

    def __init__(self, max_bytes: int, criteria: Criteria):
        super().__init__()
        self.max_bytes = max_bytes
        self.criteria = criteria

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            split = split_of(document.id, self.criteria.validation_fraction, self.criteria.test_fraction)
            start = 0
            for part, text in enumerate(split_passages(document.text, self.max_bytes), start=1):
                start = document.text.index(text, start)
                sections = _sections_within(document.metadata["sections"], start, start + len(text))
                metadata = document.metadata | {"split": split, "part": part, "sections": sections}
                yield Document(text=text, id=document.id, metadata=metadata)
                start += len(text)


def _sections_within(sections: list[dict[str, Any]], start: int, end: int) -> list[dict[str, Any]]:
    """What lies of the sections between two places of a text, counted from the first of them."""
    return [
        section | {"start": max(section["start"], start) - start, "end": min(section["end"], end) - start}
        for section in sections
        if section["start"] < end and section["end"] > start
    ]


def corpus_writer(corpus: Path) -> ParquetWriter:
    """The block that writes one Parquet file of documents for each source into the folder of each split."""
    return ParquetWriter(
        str(corpus), "${split}/${file}.parquet", "zstd", adapter=_row, schema=DOCUMENT_SCHEMA, max_file_size=-1
    )


def _row(writer: ParquetWriter, document: Document) -> dict[str, Any]:
    values = {"id": document.id, "text": document.text} | document.metadata
    return {column: values.get(column) for column in writer.schema.names}


def _removed_row(writer: ParquetWriter, document: Document) -> dict[str, Any]:
    return _row(writer, document) | {"reason": document.metadata["filter_reason"]}
