"""Compare the speed of two parsers of PubMed's XML, from the gzip file to records with their full text, on one core.

    pip install pubmed_parser==0.5.1
    python benchmarks/parsing.py pubmed/baseline/pubmed26n0001.xml.gz

The other parser is `parse_medline_xml` of `pubmed_parser`. Both read the same file in turn in one process, and the best
of `--rounds` counts. CPU time is measured, because other work on the machine affects it less than wall-clock time.
"""

import argparse
import gzip
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from healthslm.corpus.pubmed import read_records

try:
    from pubmed_parser import parse_medline_xml
except ImportError:
    sys.exit("pubmed_parser is not installed: pip install pubmed_parser==0.5.1")

PARSERS: dict[str, Callable[[Path], Iterable]] = {
    "healthslm": read_records,
    f"pubmed_parser {version('pubmed_parser')}": lambda path: parse_medline_xml(str(path)),
}


def count_bytes(path: Path) -> int:
    with gzip.open(path) as file:
        return sum(map(len, iter(lambda: file.read(2**20), b"")))


def measure(parse: Callable[[Path], Iterable], path: Path) -> tuple[float, int]:
    """Return CPU seconds and number of records."""
    start = time.process_time()
    records = sum(1 for _ in parse(path))
    return time.process_time() - start, records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    print("| file | parser | records | records/s | MB/s of XML | ratio |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for path in options.files:
        megabytes = count_bytes(path) / 1e6
        rounds = [[measure(parse, path) for parse in PARSERS.values()] for _ in range(options.rounds)]
        bests = [min(results) for results in zip(*rounds, strict=True)]
        speeds = [records / seconds for seconds, records in bests]
        for name, (seconds, records), speed in zip(PARSERS, bests, speeds, strict=True):
            row = (path.name, name, f"{records:,}", f"{speed:,.0f}", f"{megabytes / seconds:.1f}")
            print(f"| {' | '.join(row)} | {speed / speeds[-1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
