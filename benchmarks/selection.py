"""Measure time and memory of selecting the documents to drop, on as many synthetic records as PubMed has.

    python benchmarks/selection.py --records 41000000 --documents 0
    python benchmarks/selection.py --records 4100000 --documents 2900000

Records have random PMIDs; one in three occurs again, and one in fifty is a deletion. One document in fifty shares its
text key with another document, and one in twenty a MinHash band.
"""

import argparse
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from healthslm.corpus.records import RECORD_SCHEMA
from healthslm.corpus.screening import HELD_OUT_SCHEMA, SIGNATURE_SCHEMA
from healthslm.corpus.selection import write_drop_list
from healthslm.corpus.signatures import BANDS

ROWS = 30_000  # per file, like the citations in NCBI's files


def write_records(folder: Path, count: int, chance: np.random.Generator) -> list[Path]:
    paths = []
    for number, start in enumerate(range(0, count, ROWS), start=1):
        rows = min(ROWS, count - start)
        columns = {name: pa.nulls(rows, RECORD_SCHEMA.field(name).type) for name in RECORD_SCHEMA.names}
        columns |= {
            "pmid": pa.array(chance.integers(1, max(2 * count // 3, 2), rows)),
            "version": pa.array(np.ones(rows, np.int32)),
            "deleted": pa.array(chance.random(rows) < 0.02),
        }
        paths.append(folder / f"pubmed26n{number:04}.parquet")
        pq.write_table(pa.table(columns, RECORD_SCHEMA), paths[-1], compression="zstd")
    return paths


def write_signatures(folder: Path, count: int, chance: np.random.Generator) -> list[Path]:
    paths = []
    for number, start in enumerate(range(0, max(count, 1), ROWS), start=1):
        rows = min(ROWS, count - start)
        bands = chance.integers(-(2**62), 2**62, (rows, BANDS))
        text_keys = chance.integers(-(2**62), 2**62, rows)
        # Small numbers are keys that several documents have.
        copies = chance.random(rows)
        bands[copies < 0.05, 0] = chance.integers(0, max(count // 10, 1), (copies < 0.05).sum())
        text_keys[copies < 0.02] = chance.integers(0, max(count // 20, 1), (copies < 0.02).sum())
        columns = {
            "position": pa.array(np.arange(rows)),
            "split": pa.array(["train"] * rows, pa.string()),
            "reason": pa.nulls(rows, pa.string()),
            "retraction": pa.nulls(rows, pa.string()),
            "id_key": pa.array(np.arange(start, start + rows)),
            "text_key": pa.array(text_keys),
            "bands": pa.ListArray.from_arrays(pa.array(np.arange(0, rows * BANDS + 1, BANDS, np.int32)), bands.ravel()),
            "held_out_ngrams": pa.array([[]] * rows, pa.list_(pa.int64())),
        }
        paths.append(folder / f"pubmed26n{number:04}.parquet")
        pq.write_table(pa.table(columns, SIGNATURE_SCHEMA), paths[-1], compression="zstd")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=4_100_000)
    parser.add_argument("--documents", type=int, default=2_900_000)
    options = parser.parse_args()
    chance = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for inner in ("records", "signatures", "work"):
            (folder / inner).mkdir()
        records = write_records(folder / "records", options.records, chance)
        signatures = write_signatures(folder / "signatures", options.documents, chance)
        held_out, dropped = folder / "work" / "held_out.parquet", folder / "work" / "dropped.parquet"
        pq.write_table(HELD_OUT_SCHEMA.empty_table(), held_out)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

        peak_disk = 0
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak_disk
            while not ended.wait(0.5):
                sizes = []
                for path in (folder / "work").rglob("*"):
                    try:
                        sizes.append(path.stat().st_size)
                    except OSError:  # removed meanwhile
                        continue
                peak_disk = max(peak_disk, sum(sizes))

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        write_drop_list(signatures, records, held_out, dropped)
        seconds = time.perf_counter() - started
        ended.set()
        watcher.join()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(
            f"{options.records:,} records, {options.documents:,} documents: {seconds:.0f} s, peak {peak:,.0f} MiB "
            f"({before:,.0f} before), {peak_disk / 1e9:.1f} GB on disk; {pq.read_metadata(dropped).num_rows:,} dropped"
        )


if __name__ == "__main__":
    main()
