"""Counts for a data card: documents and bytes of a finished corpus, and tokens of the same corpus after tokenization.

DuckDB counts the corpus file by file, into a table of all documents without their text; the table is on disk, so it may
be larger than memory. Both counts are checked against the corpus's report.json.
"""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from tqdm import tqdm

from healthslm.corpus.reader import split_files
from healthslm.corpus.report import COUNTS, REPORT
from healthslm.corpus.selection import MEMORY_LIMIT
from healthslm.data_card.options import BINS_PER_CONTEXT
from healthslm.documents import SPLITS
from healthslm.errors import UserError, one_line
from healthslm.tokenization.tokens import TokenizedSplit, read_info

BINS_PER_DOUBLING = 4  # of a document's length

# All chunks of a document are in one file. `bytes` counts `document_text`, `text_bytes` the text without its title.
# An address is something@domain.tld.
_TABLE = """
    CREATE TABLE documents (
        source VARCHAR, kind VARCHAR, license VARCHAR, year INTEGER,
        chunks BIGINT, text_bytes BIGINT, bytes BIGINT, addresses BIGINT
    )
"""
_DOCUMENTS = """
    INSERT INTO documents
    SELECT source, kind, license, year,
           count(*), sum(strlen(text)), sum(strlen(text) + if(title = '', 0, strlen(title) + 1)),
           count(*) FILTER (contains(text, '@') AND regexp_matches(text, '[\\w.+-]+@[\\w-]+\\.[A-Za-z]{2,}'))
    FROM read_parquet($path) GROUP BY id, source, kind, license, year
"""
_QUERIES = {
    "totals": """
        SELECT count(*), coalesce(sum(chunks), 0), coalesce(sum(bytes), 0), sum(addresses) FROM documents
    """,
    "sources": """
        SELECT source, license, string_agg(DISTINCT kind, ', ' ORDER BY kind), count(*), sum(bytes)
        FROM documents GROUP BY source, license ORDER BY 4 DESC, source, license
    """,
    "years": "SELECT year, count(*) FROM documents GROUP BY year ORDER BY year NULLS LAST",
    "lengths": f"""
        SELECT kind, floor(log2(greatest(text_bytes, 1)) * {BINS_PER_DOUBLING})::INTEGER, count(*)
        FROM documents GROUP BY ALL ORDER BY ALL
    """,
    "kinds": """
        SELECT kind, count(*), sum(chunks), sum(bytes), quantile_disc(text_bytes, 0.05),
               quantile_disc(text_bytes, 0.5), quantile_disc(text_bytes, 0.95), max(text_bytes)
        FROM documents GROUP BY kind ORDER BY 2 DESC, kind
    """,
}

Row = tuple[Any, ...]
Statistics = dict[str, list[Row]]


@dataclass(frozen=True)
class TokenStatistics:
    """Counts of a tokenized corpus."""

    tokenizer_sha256: str
    vocab_size: int
    context: int
    """Tokens per context."""
    counts: dict[str, int]
    """Tokens of each split, with one separator per chunk."""
    histogram: np.ndarray
    """Shape (2 * BINS_PER_CONTEXT,), int64: chunks of all splits by `token_edges`; the last bin has no upper limit."""

    @property
    def chunks(self) -> int:
        """Number of chunks in all splits."""
        return int(self.histogram.sum())

    @property
    def too_long(self) -> int:
        """Number of chunks that are longer than a context."""
        return int(self.histogram[BINS_PER_CONTEXT:].sum())


def corpus_statistics(corpus: Path, report: dict[str, Any], database: Path) -> Statistics:
    """Run all `_QUERIES` over the documents of a corpus.

    Args:
        corpus: Corpus folder.
        report: The corpus's report.json.
        database: Temporary file for DuckDB, which holds the documents without their text; the caller removes it.

    Raises:
        UserError: A file is damaged, or the counts differ from the report's.
    """
    paths = [path for split in SPLITS for path in split_files(corpus, split)]
    with duckdb.connect(str(database), config={"memory_limit": MEMORY_LIMIT}) as connection:
        connection.execute(_TABLE)
        for path in tqdm(paths, desc="count", unit="file"):
            try:
                connection.execute(_DOCUMENTS, {"path": str(path)})
            except duckdb.Error as error:
                raise UserError(f"{path}: not a Parquet file of a corpus: {one_line(error)}") from error
        statistics = {name: connection.execute(query).fetchall() for name, query in _QUERIES.items()}
    found = statistics["totals"][0][:3]
    expected = tuple(sum_splits(report, count) for count in COUNTS)
    if found != expected:
        raise UserError(
            f"{corpus}: has {found[0]:,} documents in {found[1]:,} chunks, but {REPORT} counts {expected[0]:,} in "
            f"{expected[1]:,}; build the corpus again"
        )
    return statistics


def token_statistics(folder: Path, report: dict[str, Any], context: int) -> TokenStatistics:
    """Count the tokens of each split, and the chunks by their number of tokens.

    Raises:
        UserError: The tokens are missing or belong to another corpus.
    """
    edges = token_edges(context)
    histogram, counts = np.zeros(len(edges) - 1, np.int64), {}
    for name, expected in report["splits"].items():
        if expected["parts"] == 0:
            counts[name] = 0
            continue
        split = TokenizedSplit(folder, name)
        num_bytes = int(split.document_bytes.sum())
        if (len(split), num_bytes) != (expected["parts"], expected["bytes"]):
            raise UserError(
                f"{folder}: not the tokens of this corpus: its {name} split has {len(split):,} chunks of "
                f"{num_bytes:,} bytes, the corpus's has {expected['parts']:,} of {expected['bytes']:,}; tokenize the "
                "corpus again"
            )
        for file in split.files:
            histogram += np.histogram(np.diff(file.ends, prepend=0).clip(max=2 * context), edges)[0]
        counts[name] = split.num_tokens
    info = read_info(folder)
    return TokenStatistics(info["tokenizer_sha256"], info["vocab_size"], context, counts, histogram)


def token_edges(context: int) -> np.ndarray:
    """Edges of the histogram's bins, in tokens: shape (2 * BINS_PER_CONTEXT + 1,), float64."""
    return np.arange(2 * BINS_PER_CONTEXT + 1) * (context / BINS_PER_CONTEXT) + 0.5


def sum_splits(report: dict[str, Any], count: str) -> int:
    """Sum one of the report's `COUNTS` over all splits."""
    return sum(split[count] for split in report["splits"].values())


def sum_by(sources: list[Row], column: int) -> list[Row]:
    """Sum the documents and bytes of the sources by one of their columns, most documents first."""
    groups = groupby(sorted(sources, key=lambda row: row[column]), key=lambda row: row[column])
    sums = [(name, *map(sum, zip(*(row[-2:] for row in rows), strict=True))) for name, rows in groups]
    return sorted(sums, key=lambda row: -row[1])


def shorten(rows: list[Row], length: int) -> list[Row]:
    """Keep the first `length` rows and sum the others in one row; a single other row is kept as it is."""
    others = rows[length:]
    if len(others) < 2:
        return rows
    sums = [sum(column) if isinstance(column[0], int) else "" for column in zip(*others, strict=True)]
    return [*rows[:length], (f"{len(others)} others", *sums[1:])]
