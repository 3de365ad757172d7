"""Queries over Parquet files by DuckDB, which sorts and groups more rows than memory holds."""

import errno
from pathlib import Path
from typing import Any

import duckdb

MEMORY_LIMIT = "1GB"


def run_query(query: str, parameters: dict[str, Any], output: Path) -> None:
    """Write the result of a query to a Parquet file. What does not fit into memory goes to disk beside it.

    Raises:
        OSError: the disk is full, or another failure of reading or writing.
    """
    target = str(output).replace("'", "''")
    config = {"memory_limit": MEMORY_LIMIT, "temp_directory": str(output.parent / "spill")}
    try:
        with duckdb.connect(config=config) as connection:
            connection.execute(f"COPY ({query}) TO '{target}' (FORMAT parquet, COMPRESSION zstd)", parameters)
    except duckdb.IOException as error:
        raise OSError(errno.EIO, " ".join(str(error).split()), str(output)) from error


def fetch_rows(query: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return the few rows of a query's result."""
    with duckdb.connect() as connection:
        return connection.execute(query, parameters).fetchall()
