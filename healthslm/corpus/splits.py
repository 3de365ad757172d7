"""Writing the corpus: documents that are kept are split into chunks and written to the files of their split."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import ParquetWriter
from loguru import logger

from healthslm.corpus.chunks import split_into_chunks
from healthslm.corpus.screening import Criteria
from healthslm.documents import DOCUMENT_SCHEMA, split_of

# It warns that tasks may overwrite each other's files; here every task writes to files of its own.
logger.disable("datatrove.pipeline.writers.disk_base")

CORPUS_VERSION = 1
"""Version of the corpus. Raise it after any change by which the same signatures give another corpus (in this module,
selection.py, chunks.py or report.py): a run does not resume from the work folder of another version."""

DROPPED = "dropped"
DROPPED_SCHEMA = pa.schema([*DOCUMENT_SCHEMA.remove(DOCUMENT_SCHEMA.get_field_index("part")), ("reason", pa.string())])


class DroppedFilter(BaseFilter):
    """Drops the documents listed by `healthslm.corpus.selection`; writes them to the folder `dropped`, if given."""

    name = "drop listed documents"

    def __init__(self, drop_list: Path, dropped: Path | None):
        writer = None
        if dropped is not None:
            writer = ParquetWriter(
                str(dropped), "${file}.parquet", "zstd", adapter=_dropped_row, schema=DROPPED_SCHEMA, max_file_size=-1
            )
        super().__init__(exclusion_writer=writer)
        self.drop_list = drop_list
        self.file: str | None = None
        self.reasons: dict[int, str] = {}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if doc.metadata["file"] != self.file:
            self.file = doc.metadata["file"]
            rows = pq.read_table(self.drop_list, filters=[("file", "=", self.file)])
            self.reasons = dict(zip(rows["position"].to_pylist(), rows["reason"].to_pylist(), strict=True))
        reason = self.reasons.get(doc.metadata["position"])
        return True if reason is None else (False, reason)


class ChunkSplitter(PipelineStep):
    """Splits documents that are too long for a context into chunks with the same id, title and split."""

    name = "chunks"
    type = "✂️ - FORMAT"

    def __init__(self, max_bytes: int, criteria: Criteria):
        super().__init__()
        self.max_bytes = max_bytes
        self.criteria = criteria

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            split = split_of(document.id, self.criteria.validation_fraction, self.criteria.test_fraction)
            start = 0
            for number, text in enumerate(split_into_chunks(document.text, self.max_bytes), start=1):
                start = document.text.index(text, start)
                sections = _sections_within(document.metadata["sections"], start, start + len(text))
                metadata = document.metadata | {"split": split, "part": number, "sections": sections}
                yield Document(text=text, id=document.id, metadata=metadata)
                start += len(text)


def _sections_within(sections: list[dict[str, Any]], start: int, end: int) -> list[dict[str, Any]]:
    """Clip the sections to the characters from `start` to `end`, with positions relative to `start`."""
    return [
        section | {"start": max(section["start"], start) - start, "end": min(section["end"], end) - start}
        for section in sections
        if section["start"] < end and section["end"] > start
    ]


def corpus_writer(corpus: Path) -> ParquetWriter:
    """The block that writes one Parquet file per source and split."""
    return ParquetWriter(
        str(corpus), "${split}/${file}.parquet", "zstd", adapter=_row, schema=DOCUMENT_SCHEMA, max_file_size=-1
    )


def _row(writer: ParquetWriter, document: Document) -> dict[str, Any]:
    values = {"id": document.id, "text": document.text} | document.metadata
    return {column: values.get(column) for column in writer.schema.names}


def _dropped_row(writer: ParquetWriter, document: Document) -> dict[str, Any]:
    return _row(writer, document) | {"reason": document.metadata["filter_reason"]}
