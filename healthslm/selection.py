"""Which documents leave the corpus, judged by all of them together: outdated, held out, copies, retracted.

Queries over the signatures of all sources (see `healthslm.screening`) and PubMed's records, by DuckDB, which sorts and
groups more rows than memory holds.
"""

import errno
from pathlib import Path

import duckdb

from healthslm.documents import SPLITS

MEMORY_LIMIT = "700MB"
COMMON_NGRAM = 10  # documents; an n-gram in more is a phrase of the trade (Brown et al., 2020, appendix C)

# Every step is a table of its own, in the order in which they build on each other.
_NO_RECORDS = "SELECT '' AS file, 0 AS position, '' AS reason WHERE false"
_TABLES = {
    # PubMed's present state is, of each PMID, the last record of its highest version, in the order of file names and
    # within files. Where this one is a deletion, the citation is gone, until a later file brings it back.
    "outdated": """
        SELECT file, position,
               CASE WHEN deleted THEN 'deletion' WHEN newest_deleted THEN 'deleted' ELSE 'superseded' END AS reason
        FROM (
            SELECT parse_filename(filename, true) AS file, file_row_number AS position, deleted,
                   row_number() OVER newest_first AS rank, first_value(deleted) OVER newest_first AS newest_deleted
            FROM read_parquet($records, filename = true, file_row_number = true)
            WINDOW newest_first AS (PARTITION BY pmid ORDER BY version DESC, filename DESC, file_row_number DESC)
        )
        WHERE deleted OR rank > 1
    """,
    "documents": """
        SELECT list_position($names, parse_filename(filename, true)) AS priority, signature.position, split, retraction,
               coalesce(outdated.reason, signature.reason) AS reason, id_key, text_key, bands, held_out_ngrams
        FROM read_parquet($signatures, filename = true) AS signature
        LEFT JOIN outdated ON outdated.file = parse_filename(filename, true) AND outdated.position = signature.position
    """,
    # Of copies the first in this order stays: a retracted article, so that its copies leave with it; a document of the
    # test or validation split, so that training holds no copy of it; the document of the source named first.
    "usable": """
        SELECT row_number() OVER (
                   ORDER BY retraction IS NULL, list_position($splits, split) DESC, priority, position
               ) AS place, *
        FROM documents WHERE reason IS NULL
    """,
    "keys": """
        SELECT place, 0 AS kind, id_key AS key FROM usable
        UNION ALL SELECT place, 1, text_key FROM usable
        UNION ALL SELECT place, 1 + generate_subscripts(bands, 1), unnest(bands) FROM usable
    """,
    "held_out_keys": """
        SELECT 0 AS kind, id_key AS key FROM read_parquet($held_out) WHERE id_key IS NOT NULL
        UNION SELECT 1, text_key FROM read_parquet($held_out) WHERE text_key IS NOT NULL
        UNION SELECT 1 + generate_subscripts(bands, 1), unnest(bands) FROM read_parquet($held_out)
    """,
    "phrases": """
        SELECT ngram FROM (SELECT unnest(held_out_ngrams) AS ngram FROM usable) GROUP BY ngram HAVING count(*) > $common
    """,
    "held_out": """
        SELECT DISTINCT place, 'held_out' AS reason FROM keys JOIN held_out_keys USING (kind, key)
        UNION SELECT place, 'held_out_overlap' FROM (SELECT place, unnest(held_out_ngrams) AS ngram FROM usable)
              WHERE ngram NOT IN (FROM phrases)
    """,
    "firsts": "SELECT kind, key, min(place) AS first FROM keys GROUP BY kind, key HAVING count(*) > 1",
    "copies": """
        SELECT place, ['duplicate_id', 'duplicate_text', 'near_duplicate'][least(min(kind), 2) + 1] AS reason
        FROM keys JOIN firsts USING (kind, key) WHERE place > first GROUP BY place
    """,
    "dropped": """
        SELECT $names[priority] AS file, position, reason FROM documents WHERE reason IS NOT NULL
        UNION ALL
        SELECT $names[priority], position, coalesce(out.reason, copies.reason, retraction)
        FROM usable
        LEFT JOIN (SELECT place, min(reason) AS reason FROM held_out GROUP BY place) AS out USING (place)
        LEFT JOIN copies USING (place)
        WHERE coalesce(out.reason, copies.reason, retraction) IS NOT NULL
    """,
}


def list_dropped(signatures: list[Path], records: list[Path], held_out: Path, output: Path) -> None:
    """Write which documents leave, with the reason, to a Parquet file: columns file, position, reason.

    Args:
        signatures: Of all sources, in the order in which their copies are preferred.
        records: Of PubMed's files.
        held_out: What `healthslm.screening.write_held_out` has written.

    Raises:
        OSError: the disk is full, or another failure of reading or writing.
    """
    values = {
        "records": [str(path) for path in records],
        "signatures": [str(path) for path in signatures],
        "names": [path.stem for path in signatures],
        "splits": list(SPLITS),
        "held_out": str(held_out),
        "common": COMMON_NGRAM,
    }
    database = output.with_suffix(".duckdb")
    database.unlink(missing_ok=True)  # of a run that was killed
    try:
        with duckdb.connect(str(database), config={"memory_limit": MEMORY_LIMIT}) as connection:
            for table, query in (_TABLES if records else _TABLES | {"outdated": _NO_RECORDS}).items():
                used = {name: value for name, value in values.items() if f"${name}" in query}
                connection.execute(f"CREATE TABLE {table} AS {query}", used)
            target = str(output).replace("'", "''")
            connection.execute(
                f"COPY (FROM dropped ORDER BY file, position) TO '{target}' (FORMAT parquet, COMPRESSION zstd)"
            )
    except duckdb.IOException as error:
        raise OSError(errno.EIO, " ".join(str(error).split()), str(output)) from error
    finally:
        database.unlink(missing_ok=True)
