"""Measure the speed and memory of building and tokenizing a corpus, with one process and with several.

    python benchmarks/corpus.py PUBMED TOKENIZER

PUBMED is a folder of NCBI's files. Their citations are written to `--files` files of equal size, `--copies` times; all
copies but the first get other PMIDs, and the words of their plain abstracts are shuffled. The corpus is built and
tokenized by scripts/build_corpus.py and scripts/tokenize_corpus.py, and the times include starting processes. MB are of
uncompressed XML.
"""

import argparse
import gzip
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
CITATION = re.compile(rb"<PubmedArticle>.*?</PubmedArticle>", re.DOTALL)
PMID = re.compile(rb"(<PMID[^>]*>)(\d+)")
PLAIN_TEXT = re.compile(rb"(<AbstractText[^>]*>)([^<]+)(?=</AbstractText>)")


def write_files(pubmed: Path, folder: Path, count: int, copies: int) -> int:
    """Write the citations of all files to `count` files of about equal size; return the total in bytes of XML."""
    contents = (gzip.decompress(path.read_bytes()) for path in sorted(pubmed.rglob("*.xml.gz")))
    originals = [citation for content in contents for citation in CITATION.findall(content)]
    citations = [make_copy(citation, copy) for copy in range(copies) for citation in originals]
    total = sum(map(len, citations))
    groups: list[list[bytes]] = [[] for _ in range(count)]
    position = 0
    for citation in citations:
        groups[position * count // total].append(citation)
        position += len(citation)
    size = 0
    folder.mkdir()
    for number, group in enumerate(groups, start=1):
        content = b"<PubmedArticleSet>\n" + b"\n".join(group) + b"\n</PubmedArticleSet>\n"
        size += len(content)
        (folder / f"pubmed26n{number:04}.xml.gz").write_bytes(gzip.compress(content, 6))
    return size


def make_copy(citation: bytes, copy: int) -> bytes:
    """The citation; if `copy` is not 0, with another PMID and shuffled words."""
    if copy == 0:
        return citation

    def shuffle(match: re.Match[bytes]) -> bytes:
        words = match[2].split()
        random.Random(copy).shuffle(words)
        return match[1] + b" ".join(words)

    citation = PMID.sub(lambda match: match[1] + str(int(match[2]) + copy * 10**8).encode(), citation, count=1)
    return PLAIN_TEXT.sub(shuffle, citation)


def run(name: str, *arguments: object) -> tuple[float, float]:
    """Run a script; return its time in seconds and the peak memory of one of its processes in MiB."""
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    peak = 0.0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            script = psutil.Process(process.pid)
            peak = max(peak, *map(memory, [script, *script.children(recursive=True)]))

    def memory(child: psutil.Process) -> float:
        try:
            return child.memory_info().rss / 2**20
        except psutil.Error:
            return 0.0

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    if status:
        raise SystemExit(f"{name} failed: {' '.join(command)}")
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pubmed", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        megabytes = write_files(options.pubmed, Path(folder) / "pubmed", options.files, options.copies) / 1e6
        print(f"{options.files} files, {megabytes:.0f} MB of XML\n")
        print("| processes | build, s | tokenize, s | MB/s | MB/s per process | memory per process, MiB |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: |")
        for processes in options.processes:
            root = Path(folder) / str(processes)
            root.mkdir()
            corpus, workers = root / "corpus", ("--workers", processes)
            build, memory = run("build_corpus", "--pubmed", Path(folder) / "pubmed", "--output", corpus, *workers)
            tokenize, more_memory = run(
                "tokenize_corpus",
                "--corpus",
                corpus,
                "--tokenizer",
                options.tokenizer,
                "--output",
                root / "tokens",
                *workers,
            )
            speed = megabytes / (build + tokenize)
            print(
                f"| {processes} | {build:.1f} | {tokenize:.1f} | {speed:.1f} | {speed / processes:.1f} | "
                f"{max(memory, more_memory):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
