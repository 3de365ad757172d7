"""Parquet files that a stage keeps for its next run, each with a fingerprint of the inputs it was made from."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from healthslm.files import replacing

BATCH_ROWS = 1024
_FINGERPRINT = b"healthslm_fingerprint"


class FingerprintedWriter(PipelineStep):
    """Writes the metadata of task i's documents to the Parquet file `paths[i]`, which appears once it is complete.

    Only the columns of the schema are written. `fingerprints[i]` is stored in the file's metadata.
    """

    name = "Parquet with a fingerprint"
    type = "💽 - WRITER"

    def __init__(self, paths: Sequence[Path], fingerprints: Sequence[str], schema: pa.Schema):
        super().__init__()
        self.paths = paths
        self.fingerprints = fingerprints
        self.schema = schema

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        data = iter(data)
        schema = self.schema.with_metadata({_FINGERPRINT: self.fingerprints[rank]})
        with (
            replacing(self.paths[rank]) as new,
            pq.ParquetWriter(new, schema, compression="zstd") as writer,
        ):
            while rows := [document.metadata for document in itertools.islice(data, BATCH_ROWS)]:
                writer.write_table(pa.Table.from_pylist(rows, schema))


def make_fingerprint(*inputs: Any) -> str:
    """SHA-256 of what decides a file's content: checksums of its inputs, options and versions, all as JSON values."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def has_fingerprint(path: Path, fingerprint: str) -> bool:
    """Whether `path` is a complete Parquet file with this fingerprint."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return False
    return metadata.get(_FINGERPRINT) == fingerprint.encode()
