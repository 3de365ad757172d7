"""Input and options that cannot work are rejected in one line, and an older corpus stays as it was."""

import gzip
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from corpus_builds import WORDS, build, read, words
from folders import contents
from paths import REPOSITORY, SAMPLE
from row_files import write_lines

from healthslm.corpus import build as corpus_build
from healthslm.errors import UserError


@pytest.fixture
def older(sample, tmp_path) -> Path:
    """A folder with an older corpus, which a failed run must not change."""
    shutil.copytree(sample, tmp_path / "older")
    return tmp_path / "older"


def damaged(name: str, folder: Path) -> dict[str, Any]:
    """Make a folder with a damaged file; return the options that read it."""
    whole = gzip.compress((SAMPLE / "pubmedsample26n0001.xml").read_bytes())
    folder.mkdir()
    match name:
        case "cut gzip":
            (folder / "a.xml.gz").write_bytes(whole[: len(whole) // 2])
        case "damaged gzip":
            (folder / "a.xml.gz").write_bytes(whole[:9000] + bytes(500) + whole[9500:])
        case "cut XML":
            (folder / "a.xml").write_bytes(gzip.decompress(whole)[:50_000])
        case "Parquet":
            (folder / "a.parquet").write_bytes(b"PAR1 and no more")
        case "JSON":
            (folder / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
        case "text":
            (folder / "a.txt").write_bytes(b"\xff\xfe")
        case "no text column":
            write_lines(folder / "a.jsonl", [{"id": "1", "body": "x"}])
    is_xml = name in ("cut gzip", "damaged gzip", "cut XML", "empty")
    return {"pubmed": folder} if is_xml else {"sources": [str(folder)]}


BAD_INPUT = {
    "cut gzip": "a.xml.gz: the gzip file is truncated after record",
    "damaged gzip": "a.xml.gz: damaged",
    "cut XML": "a.xml: damaged XML after record",
    "Parquet": "a.parquet: damaged",
    "JSON": "a.jsonl: line 2: not valid JSON",
    "text": "a.txt: damaged",
    "no text column": "a.jsonl: row 1: no column text",
    "empty": "empty: no PubMed files",
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_does_not_change_the_older_corpus(older, tmp_path, name):
    before = contents(older / "corpus") | contents(older / "records")
    with pytest.raises(UserError, match=BAD_INPUT[name]):
        build(older / "corpus", **damaged(name, tmp_path / name))
    assert contents(older / "corpus") | contents(older / "records") == before
    assert not list(older.rglob(".*.partial-*"))


@pytest.mark.parametrize(("name", "workers"), [("cut gzip", 2), ("JSON", 1), ("empty", 1)])
def test_bad_input_is_one_line_on_the_terminal(run_script, tmp_path, name, workers):
    ((option, value),) = damaged(name, tmp_path / name).items()
    arguments = [f"--{option}", *([value] if option == "pubmed" else value)]
    result = run_script("build_corpus", *arguments, "--output", tmp_path / "out" / "corpus", "--workers", workers)
    assert result.returncode == 1
    assert_one_line(result.stderr, BAD_INPUT[name])
    assert not (tmp_path / "out" / "corpus").exists()


def assert_one_line(stderr: str, message: str) -> None:
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line and not re.search(r"\d+/\d+ \[", line)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ") and message in lines[0]


def test_a_failed_write_is_one_line_and_leaves_nothing(tmp_path):
    """Files are limited to 20,000 bytes here, which has the same effect as a full disk."""
    command = [sys.executable, REPOSITORY / "scripts" / "build_corpus.py", "--pubmed", SAMPLE, "--workers", "1"]
    result = subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "out" / "corpus")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert_one_line(result.stderr, "File too large")
    assert not (tmp_path / "out" / "corpus").exists()
    assert not list((tmp_path / "out").rglob(".*.partial-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no input"),
        ({"sources": ["missing.parquet"]}, "missing.parquet: no such file"),
        ({"sources": [str(SAMPLE.parent / "README.md")]}, "unknown format"),
        ({"sources": ["hub:/no/such/data"]}, "hub:/no/such/data: cannot be read"),
        (
            {"pubmed": SAMPLE, "validation_fraction": 0.5, "test_fraction": 0.5},
            "validation_fraction: 0.5 and test_fraction 0.5 leave no training documents",
        ),
        ({"pubmed": SAMPLE, "test_fraction": -0.1}, "test_fraction: must be at least 0 and at most 1, not -0.1"),
        ({"pubmed": SAMPLE, "min_words": 10_000}, "no training documents are left"),
        ({"pubmed": SAMPLE, "max_bytes": 10}, "max_bytes: must be at least 256, not 10"),
        ({"pubmed": SAMPLE, "held_out": [Path("missing.jsonl")]}, "missing.jsonl: no such file"),
        ({"pubmed": SAMPLE, "held_out": [Path("hub:some/data:test")]}, "held_out: hub:some/data:test: not a file"),
    ],
)
def test_wrong_options_are_rejected(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path / "corpus", **options)
    assert not (tmp_path / "corpus").exists()


def test_a_small_corpus_without_a_validation_document_is_rejected_with_a_fraction_that_gives_one(
    tmp_path, run_script_here
):
    """Twenty text files, of which the usual share is a tenth of a document."""
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number}.txt").write_text(words(f"note{number}"))
    command = ["build_corpus", "--sources", tmp_path / "texts", "--workers", 1, "--output", tmp_path / "corpus"]
    rejected = run_script_here(*command)
    assert rejected.returncode == 2 and "Traceback" not in rejected.stderr
    last = rejected.stderr.splitlines()[-1]
    message = r"error: --validation-fraction: 0.005 of 20 documents gives no validation document; use (0\.\d+) or more"
    least = float(re.match(message, last)[1])
    assert not (tmp_path / "corpus").exists()

    less = run_script_here(*command, "--validation-fraction", least - 1e-4)
    assert f"use {least} or more" in less.stderr
    built = run_script_here(*command, "--validation-fraction", least)
    assert built.returncode == 0, built.stderr
    splits = Counter(document["split"] for document in read(tmp_path / "corpus").values())
    assert splits["validation"] >= 1 and splits["train"] >= 15


def test_signatures_that_another_build_replaces_are_noticed(tmp_path, monkeypatch):
    """The other build, of the same text with another held-out file, runs between two steps of the first one."""
    texts = write_lines(tmp_path / "texts.jsonl", [{"id": f"a:{number}", "text": words(number)} for number in range(9)])
    held_out = write_lines(tmp_path / "held-out.jsonl", [{"id": "a:0", "text": words(0)}])
    options = {"sources": [str(texts)], "validation_fraction": 0.0}
    write_drop_list = corpus_build.write_drop_list

    def build_another_corpus(*arguments: Path) -> None:
        monkeypatch.setattr(corpus_build, "write_drop_list", write_drop_list)
        build(tmp_path / "other", **options, held_out=[held_out])
        write_drop_list(*arguments)

    monkeypatch.setattr(corpus_build, "write_drop_list", build_another_corpus)
    with pytest.raises(UserError, match=f"^{tmp_path}: another build has written to records/ or signatures/ there"):
        build(tmp_path / "corpus", **options)
    assert not (tmp_path / "corpus").exists() and len(read(tmp_path / "other")) == 8
    assert len(build(tmp_path / "corpus", **options)[0]) == 9


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text(WORDS)
    with pytest.raises(UserError, match="thesis: holds other files than a corpus"):
        build(other, pubmed=SAMPLE)
    assert contents(tmp_path) == {"thesis/chapter.txt": WORDS.encode()}


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "corpus").write_text("mine")
    with pytest.raises(UserError, match="corpus: is a file, but a corpus is a folder"):
        build(tmp_path / "corpus", pubmed=SAMPLE)
    assert contents(tmp_path) == {"corpus": b"mine"}
