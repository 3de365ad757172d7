"""Selecting the documents to drop by comparing all documents: outdated, held-out, copied and retracted ones.

DuckDB queries the signatures of all sources (see `healthslm.corpus.screening`) and PubMed's records. It can sort and
group more rows than fit into memory.
"""

import errno
from pathlib import Path
from typing import Any

import duckdb

from healthslm.corpus.signatures import BANDS
from healthslm.documents import SPLITS
from healthslm.errors import one_line

MEMORY_LIMIT = "700MB"
COMMON_NGRAM = 10  # documents; an n-gram in more of them is a common phrase (Brown et al., 2020, appendix C)

# Reasons to drop a document because of another one; the first that applies is given.
_REASONS = ["held_out", "held_out_overlap", "duplicate_id", "duplicate_text", "near_duplicate"]
_KEYS = {"id_key": "duplicate_id", "text_key": "duplicate_text"} | {
    f"band_{number}": "near_duplicate" for number in range(1, BANDS + 1)
}
_BAND_COLUMNS = ", ".join(f"bands[{number}] AS band_{number}" for number in range(1, BANDS + 1))
_POSITION_BITS = 36  # of a row number: the position in a source; the next 24 bits are the number of the source
_ROW_BITS = 60  # of a priority: the row number

# The current record of a PMID is the last one of its highest version, in the order of file names and within files. If
# it is a deletion, the citation is deleted, unless a later file brings it back.
_OUTDATED = f"""
    SELECT (list_position($names, parse_filename(filename, true))::BIGINT << {_POSITION_BITS}) + position AS row,
           CASE WHEN deleted THEN 'deletion' WHEN newest_deleted THEN 'deleted' ELSE 'superseded' END AS reason
    FROM (
        SELECT filename, file_row_number AS position, deleted,
               row_number() OVER newest_first AS rank, first_value(deleted) OVER newest_first AS newest_deleted
        FROM read_parquet($records, filename = true, file_row_number = true)
        WINDOW newest_first AS (PARTITION BY pmid ORDER BY version DESC, filename DESC, file_row_number DESC)
    )
    WHERE deleted OR rank > 1
"""
_NO_RECORDS = "SELECT 0::BIGINT AS row, '' AS reason WHERE false"

_DOCUMENTS = f"""
    SELECT row, coalesce(outdated.reason, signature.reason) AS reason, signature.* EXCLUDE (row, reason)
    FROM (
        SELECT *, (list_position($names, parse_filename(filename, true))::BIGINT << {_POSITION_BITS}) + position AS row
        FROM read_parquet($signatures, filename = true)
    ) AS signature
    LEFT JOIN outdated USING (row)
"""
# Of several copies the one with the lowest priority number is kept: first a retracted article, so that its copies are
# dropped with it; then a document of the test or validation split, so that training has no copy of it; then the
# document of the source named first.
_USABLE = f"""
    SELECT row + ((if(retraction IS NULL, 4, 0) + list_position($split_order, split) - 1)::BIGINT << {_ROW_BITS})
               AS priority,
           row, retraction, held_out_ngrams, id_key, text_key,
           {_BAND_COLUMNS}
    FROM documents WHERE reason IS NULL
"""
_OVERLAPS = """
    WITH ngrams AS (SELECT priority, unnest(held_out_ngrams) AS ngram FROM usable)
    SELECT DISTINCT priority, 'held_out_overlap' FROM ngrams
    WHERE ngram NOT IN (SELECT ngram FROM ngrams GROUP BY ngram HAVING count(*) > $common)
"""
_HELD_OUT = "SELECT priority, 'held_out' FROM usable WHERE {key} IN (SELECT {key} FROM held_out)"
_COPIES = """
    SELECT priority, '{reason}' FROM usable
    JOIN (SELECT {key}, min(priority) AS first FROM usable GROUP BY {key} HAVING count(*) > 1) USING ({key})
    WHERE priority > first
"""
_DROP_LIST = f"""
    SELECT $names[row >> {_POSITION_BITS}] AS file, row & {2**_POSITION_BITS - 1} AS position, reason
    FROM (
        SELECT row, reason FROM documents WHERE reason IS NOT NULL
        UNION ALL
        SELECT row, coalesce($reasons[rank], retraction) FROM usable
        LEFT JOIN (SELECT priority, min(list_position($reasons, reason)) AS rank FROM found GROUP BY ALL)
            USING (priority)
        WHERE rank IS NOT NULL OR retraction IS NOT NULL
    )
    ORDER BY file, position
"""


def write_drop_list(signatures: list[Path], records: list[Path], held_out: Path, output: Path) -> None:
    """Write the documents to drop, with the reason, to a Parquet file with the columns file, position and reason.

    Args:
        signatures: Signature files of all sources; of several copies, that of the first source is kept.
        records: Record files of PubMed's XML files.
        held_out: Keys file, written by `healthslm.corpus.screening.write_held_out`.
        output: Parquet file to write.

    Raises:
        OSError: The disk is full, or another error in reading or writing.
    """
    values = {
        "records": [str(path) for path in records],
        "signatures": [str(path) for path in signatures],
        "names": [path.stem for path in signatures],
        "split_order": list(reversed(SPLITS)),
        "held_out": str(held_out),
        "common": COMMON_NGRAM,
        "reasons": _REASONS,
    }
    database = output.with_suffix(".duckdb")
    database.unlink(missing_ok=True)  # left by a run that was killed
    config: dict[str, Any] = {"memory_limit": MEMORY_LIMIT, "preserve_insertion_order": False}
    try:
        with duckdb.connect(str(database), config=config) as connection:
            _run(connection, output, values)
    except duckdb.IOException as error:
        raise OSError(errno.EIO, one_line(error), str(output)) from error
    finally:
        database.unlink(missing_ok=True)


def _run(connection: duckdb.DuckDBPyConnection, output: Path, values: dict[str, Any]) -> None:
    def execute(query: str) -> None:
        connection.execute(query, {name: value for name, value in values.items() if f"${name}" in query})

    execute(f"CREATE TABLE outdated AS {_OUTDATED if values['records'] else _NO_RECORDS}")
    execute(f"CREATE TABLE documents AS {_DOCUMENTS}")
    execute(f"CREATE TABLE usable AS {_USABLE}")
    execute("CREATE TABLE found (priority BIGINT, reason VARCHAR)")
    execute(f"INSERT INTO found {_OVERLAPS}")
    execute(f"CREATE TABLE held_out AS SELECT id_key, text_key, {_BAND_COLUMNS} FROM read_parquet($held_out)")
    for key, reason in _KEYS.items():  # one by one, so that memory holds one key per document
        execute(f"INSERT INTO found {_HELD_OUT.format(key=key)}")
        execute(f"INSERT INTO found {_COPIES.format(key=key, reason=reason)}")
    target = str(output).replace("'", "''")
    execute(f"COPY ({_DROP_LIST}) TO '{target}' (FORMAT parquet, COMPRESSION zstd)")
