"""Judging each document by itself: whether it is usable, and the keys by which its copies are found.

The results for a source are its signatures, signatures/NAME.parquet: all that `healthslm.corpus.selection` needs to
know about its documents. They depend only on that source and on the held-out files, so they are kept when other sources
change.
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
from healthslm.fingerprints import FingerprintedWriter

SIGNATURES_VERSION = 1
"""Version of the signature files. Raise it after any change by which the same document gets another signature (in this
module, scrubbing.py, language.py, signatures.py, sources.py or documents.py): files of another version are made again.
"""

KEYS = {
    "id_key": pa.int64(),
    "text_key": pa.int64(),
    "bands": pa.list_(pa.int64()),
}
SIGNATURE_SCHEMA = pa.schema(
    {
        "position": pa.int64(),  # of the document in its source, from 0
        "split": pa.string(),
        "reason": pa.string(),  # why the document is not usable; null if it is
        "retraction": pa.string(),
        **KEYS,
        "held_out_ngrams": pa.list_(pa.int64()),  # n-grams that it shares with held-out documents
    }
)
HELD_OUT_SCHEMA = pa.schema(KEYS)

_TRUNCATED = re.compile(r"ABSTRACT TRUNCATED(?: AT \d+ WORDS)?\W*$")


@dataclass(frozen=True)
class Criteria:
    """Which documents are usable, and the shares of the splits."""

    min_words: int
    english_only: bool
    validation_fraction: float
    test_fraction: float


class SourceReader(PipelineStep):
    """Yields the scrubbed documents of a source, each with an id and its position; task i reads source i."""

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
    """Remove addresses and copyright notices. PubMed's documents were scrubbed section by section before."""
    if not document.metadata["sections"]:
        document.text = scrub(document.text)
    return document


class Screen(PipelineStep):
    """Adds the columns of `SIGNATURE_SCHEMA` to each document; drops none."""

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
    """The reason why a document is not usable; None if it is."""
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
    """The keys of a document: two documents with an equal key are copies. A missing id or text gives no key."""
    return {
        "id_key": hash_key(document.id) if document.id else None,
        "text_key": hash_key(text_hash(document.text)) if document.text else None,
        "bands": minhash_bands(document.text),
    }


def _common_values(values: np.ndarray, sorted_values: np.ndarray) -> list[int]:
    """The distinct `values` that are also in `sorted_values`."""
    if len(sorted_values) == 0 or len(values) == 0:
        return []
    indices = np.searchsorted(sorted_values, values).clip(max=len(sorted_values) - 1)
    return np.unique(values[sorted_values[indices] == values]).tolist()


def signature_writer(paths: list[Path], fingerprints: list[str]) -> FingerprintedWriter:
    """The block that writes the signatures of source i to `paths[i]`."""
    return FingerprintedWriter(paths, fingerprints, SIGNATURE_SCHEMA)


def write_held_out(sources: list[Source], keys: Path, ngrams: Path) -> None:
    """Write the keys of all held-out documents to a Parquet file, and their sorted n-grams to a NumPy file.

    Raises:
        UserError: A source cannot be read, or a document in it has neither an id nor a text.
    """
    rows, hashes = [], [np.zeros(0, np.int64)]
    for source in sources:
        for number, document in enumerate(map(_scrubbed, source.read()), start=1):
            if not (document.id or document.text):
                raise UserError(f"{source.location}: row {number:,}: has neither an id nor a text")
            rows.append(document_keys(document))
            hashes.append(ngram_hashes(document.text))
    pq.write_table(pa.Table.from_pylist(rows, HELD_OUT_SCHEMA), keys)
    np.save(ngrams, np.unique(np.concatenate(hashes)))
