"""What a data card counts: documents and bytes over a finished corpus, and tokens over the same in tokens.

The corpus is counted by DuckDB, one file after the other, into a table of all documents without their text, which lies
on disk where memory does not hold it. Both counts are held against the corpus's report.json.
"""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from tqdm import tqdm

from healthslm.corpus.options import BINS_PER_CONTEXT
from healthslm.corpus.reader import split_files
from healthslm.corpus.report import COUNTS, REPORT
from healthslm.corpus.selection import MEMORY_LIMIT
from healthslm.documents import SPLITS
from healthslm.errors import UserError
from healthslm.files import read_json
from healthslm.tokenization.tokens import INFO_FILE, TokenizedSplit

BINS_PER_DOUBLING = 4  # of a document's length

# A document's passages all lie in one file. The bytes are those of `document_text`, and those of the text alone; an
# address is something@domain.tld.
_TABLE = """
    CREATE TABLE documents (
        source VARCHAR, kind VARCHAR, license VARCHAR, year INTEGER,
        passages BIGINT, text_bytes BIGINT, bytes BIGINT, addresses BIGINT
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
        SELECT count(*), coalesce(sum(passages), 0), coalesce(sum(bytes), 0), sum(addresses) FROM documents
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
        SELECT kind, count(*), sum(passages), sum(bytes), quantile_disc(text_bytes, 0.05),
               quantile_disc(text_bytes, 0.5), quantile_disc(text_bytes, 0.95), max(text_bytes)
        FROM documents GROUP BY kind ORDER BY 2 DESC, kind
    """,
}

Row = tuple[Any, ...]
Statistics = dict[str, list[Row]]


@dataclass(frozen=True)
class TokenStatistics:
    """What is told of the corpus in tokens."""

    tokenizer_sha256: str
    vocab_size: int
    context: int
    """Tokens of a context."""
    counts: dict[str, int]
    """Tokens of each split, one separator a passage included."""
    histogram: np.ndarray
    """Shape (2 * BINS_PER_CONTEXT,), int64: passages of all splits by `token_edges`, the last of longer ones too."""

    @property
    def passages(self) -> int:
        """Passages of all splits."""
        return int(self.histogram.sum())

    @property
    def too_long(self) -> int:
        """Passages that are longer than a context."""
        return int(self.histogram[BINS_PER_CONTEXT:].sum())


def corpus_statistics(corpus: Path, report: dict[str, Any], database: Path) -> Statistics:
    """What is counted over all documents of a corpus, as the rows of `_QUERIES`.

    Args:
        database: A file to keep the documents in, without their text, while they are counted; the caller removes it.

    Raises:
        UserError: a file is damaged, or together they are not what the report counts.
    """
    paths = [path for split in SPLITS for path in split_files(corpus, split)]
    with duckdb.connect(str(database), config={"memory_limit": MEMORY_LIMIT}) as connection:
        connection.execute(_TABLE)
        for path in tqdm(paths, desc="count", unit="file"):
            try:
                connection.execute(_DOCUMENTS, {"path": str(path)})
            except duckdb.Error as error:
                raise UserError(f"{path}: not a Parquet file of a corpus: {' '.join(str(error).split())}") from error
        statistics = {name: connection.execute(query).fetchall() for name, query in _QUERIES.items()}
    found = statistics["totals"][0][:3]
    counted = tuple(sum_splits(report, count) for count in COUNTS)
    if found != counted:
        raise UserError(
            f"{corpus}: holds {found[0]:,} documents in {found[1]:,} parts where {REPORT} counts {counted[0]:,} in "
            f"{counted[1]:,}; build the corpus again"
        )
    return statistics


def token_statistics(folder: Path, report: dict[str, Any], context: int) -> TokenStatistics:
    """Count tokens by split, and passages by their number of tokens.

    Raises:
        UserError: tokens are missing, or are those of another corpus.
    """
    edges = token_edges(context)
    histogram, counts = np.zeros(len(edges) - 1, np.int64), {}
    for name, counted in report["splits"].items():
        if counted["parts"] == 0:
            counts[name] = 0
            continue
        split = TokenizedSplit(folder, name)
        num_bytes = int(split.document_bytes.sum())
        if (len(split), num_bytes) != (counted["parts"], counted["bytes"]):
            raise UserError(
                f"{folder}: not the tokens of this corpus: {name} holds {len(split):,} passages of {num_bytes:,} bytes "
                f"in tokens, and {counted['parts']:,} of {counted['bytes']:,} in the corpus; tokenise it again"
            )
        for file in split.files:
            histogram += np.histogram(np.diff(file.ends, prepend=0).clip(max=2 * context), edges)[0]
        counts[name] = split.num_tokens
    info = read_json(folder / INFO_FILE)
    return TokenStatistics(info["tokenizer_sha256"], info["vocab_size"], context, counts, histogram)


def token_edges(context: int) -> np.ndarray:
    """Shape (2 * BINS_PER_CONTEXT + 1,), float64: numbers of tokens between which the bins of the histogram lie."""
    return np.arange(2 * BINS_PER_CONTEXT + 1) * (context / BINS_PER_CONTEXT) + 0.5


def sum_splits(report: dict[str, Any], count: str) -> int:
    """Documents, parts or bytes of all splits."""
    return sum(split[count] for split in report["splits"].values())


def sum_by(sources: list[Row], column: int) -> list[Row]:
    """Documents and bytes by one of the columns of the sources, most documents first."""
    groups = groupby(sorted(sources, key=lambda row: row[column]), key=lambda row: row[column])
    sums = [(name, *map(sum, zip(*(row[-2:] for row in rows), strict=True))) for name, rows in groups]
    return sorted(sums, key=lambda row: -row[1])


def shorten(rows: list[Row], length: int) -> list[Row]:
    """The first rows, and the others, if there are two of them at least, as one row of their sums."""
    others = rows[length:]
    if len(others) < 2:
        return rows
    sums = [sum(column) if isinstance(column[0], int) else "" for column in zip(*others, strict=True)]
    return [*rows[:length], (f"{len(others)} others", *sums[1:])]
