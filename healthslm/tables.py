"""Parquet files that a stage keeps for its next run, each with a stamp of what it was made of."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from healthslm.files import replacing

BATCH_ROWS = 1024
_STAMP = b"healthslm_made_of"


class StampedWriter(PipelineStep):
    """Writes of the documents of task i what the schema names to a Parquet file of its own, paths[i], whole or not."""

    name = "Parquet, whole or not at all"
    type = "💽 - WRITER"

    def __init__(self, paths: Sequence[Path], stamps: Sequence[str], schema: pa.Schema):
        super().__init__()
        self.paths = paths
        self.stamps = stamps
        self.schema = schema

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        data = iter(data)
        schema = self.schema.with_metadata({_STAMP: self.stamps[rank]})
        with (
            replacing(self.paths[rank]) as new,
            pq.ParquetWriter(new, schema, compression="zstd") as writer,
        ):
            while rows := [document.metadata for document in itertools.islice(data, BATCH_ROWS)]:
                writer.write_table(pa.Table.from_pylist(rows, schema))


def make_stamp(modules: Sequence[ModuleType], *ingredients: Any) -> str:
    """A checksum of all that decides what a file holds: its ingredients, and the code that turns them into rows."""
    code = [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
    return hashlib.sha256(json.dumps([code, ingredients], sort_keys=True).encode()).hexdigest()


def has_stamp(path: Path, stamp: str) -> bool:
    """Whether there is a whole Parquet file that was made of the same."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return False
    return metadata.get(_STAMP) == stamp.encode()
