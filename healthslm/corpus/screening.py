"""What can be said of a document by itself: whether it is of use, and the keys by which its copies are found.

What is said of a source's documents is a Parquet file, signatures/NAME.parquet, from which
`healthslm.corpus.selection` learns all that it needs of them. It depends on that source and on what is held out, so it
stands while other sources change.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from healthslm.corpus.language import is_english
from healthslm.corpus.records import SOURCE as PUBMED
from healthslm.corpus.scrubbing import scrub
from healthslm.corpus.signatures import minhash_bands, ngram_hashes
from healthslm.corpus.sources import Source
from healthslm.documents import hash_key, split_of, text_hash
from healthslm.errors import UserError
from healthslm.tables import StampedWriter

KEYS = {
    "id_key": pa.int64(),
    "text_key": pa.int64(),
    "bands": pa.list_(pa.int64()),
}
SIGNATURE_SCHEMA = pa.schema(
    {
        "position": pa.int64(),  # of the document in its source
        "split": pa.string(),
        "reason": pa.string(),  # why it is of no use, if it is not
        "retraction": pa.string(),
        **KEYS,
        "held_out_ngrams": pa.list_(pa.int64()),  # that a held-out document holds too
    }
)
HELD_OUT_SCHEMA = pa.schema(KEYS)

_TRUNCATED = re.compile(r"ABSTRACT TRUNCATED(?: AT \d+ WORDS)?\W*$")


@dataclass(frozen=True)
class Criteria:
    """What makes a document of use, and the shares of the splits."""

    min_words: int
    english_only: bool
    validation_fraction: float
    test_fraction: float


class SourceReader(PipelineStep):
    """Yields the documents of source i, as task i, scrubbed, each with an id and its position."""

    name = "sources"
    type = "📖 - READER"

    def __init__(self, sources: list[Source]):
        super().__init__()
        self.sources = sources

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        source = self.sources[rank]
        for position, document in enumerate(map(_scrubbed, source.read())):
            document.id = document.id or f"sha:{text_hash(document.text)}"
            document.metadata |= {"file": source.name, "position": position}
            yield document


def _scrubbed(document: Document) -> Document:
    """The document without addresses and copyright lines. PubMed's have lost them section by section."""
    if not document.metadata["sections"]:
        document.text = scrub(document.text)
    return document


class Screen(PipelineStep):
    """Adds to each document what SIGNATURE_SCHEMA holds of it; drops none."""

    name = "screen"
    type = "✂️ - FORMAT"

    def __init__(self, criteria: Criteria, held_out_ngrams: Path):
        super().__init__()
        self.criteria = criteria
        self.held_out_ngrams = held_out_ngrams

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        held_out = np.load(self.held_out_ngrams)
        for document in data:
            reason = unusable(document, self.criteria)
            self.stat_update(reason or "usable")
            document.metadata |= {"reason": reason, "split": self._split(document), **document_keys(document)}
            document.metadata["held_out_ngrams"] = (
                [] if reason else _common_values(ngram_hashes(document.text), held_out)
            )
            yield document

    def _split(self, document: Document) -> str:
        return split_of(document.id, self.criteria.validation_fraction, self.criteria.test_fraction)


def unusable(document: Document, criteria: Criteria) -> str | None:
    """The reason why a document is of no use as a text, if there is one."""
    is_abstract = document.metadata["kind"] == "abstract"
    if not document.text:
        return "no_abstract" if is_abstract else "no_text"
    if document.metadata["source"] == PUBMED and not document.metadata["title"]:
        return "no_title"
    if _TRUNCATED.search(document.text):
        return "truncated"
    if len(document.text.split()) < criteria.min_words:
        return "too_short"
    return "not_english" if criteria.english_only and not is_english(document.text) else None


def document_keys(document: Document) -> dict[str, Any]:
    """Two documents that share a key of any kind are copies; what a document lacks gives no key."""
    return {
        "id_key": hash_key(document.id) if document.id else None,
        "text_key": hash_key(text_hash(document.text)) if document.text else None,
        "bands": minhash_bands(document.text),
    }


def _common_values(values: np.ndarray, sorted_values: np.ndarray) -> list[int]:
    """The different ones among `values` that are in `sorted_values`."""
    if len(sorted_values) == 0 or len(values) == 0:
        return []
    places = np.searchsorted(sorted_values, values).clip(max=len(sorted_values) - 1)
    return np.unique(values[sorted_values[places] == values]).tolist()


def signature_writer(paths: list[Path], stamps: list[str]) -> StampedWriter:
    """The block that writes the signatures of source i to paths[i]."""
    return StampedWriter(paths, stamps, SIGNATURE_SCHEMA)


def write_held_out(sources: list[Source], keys: Path, ngrams: Path) -> None:
    """Write the keys of all held-out documents to a Parquet file, and their n-grams, sorted, to a NumPy array.

    Raises:
        UserError: a source cannot be read, or holds a document with neither id nor text.
    """
    rows, hashes = [], [np.zeros(0, np.int64)]
    for source in sources:
        for number, document in enumerate(map(_scrubbed, source.read()), start=1):
            if not (document.id or document.text):
                raise UserError(f"{source.location}: row {number:,}: neither an id nor a text to know the document by")
            rows.append(document_keys(document))
            hashes.append(ngram_hashes(document.text))
    pq.write_table(pa.Table.from_pylist(rows, HELD_OUT_SCHEMA), keys)
    np.save(ngrams, np.unique(np.concatenate(hashes)))
