"""The pipeline from NCBI's server to tokens loses nothing and adds nothing, even if downloads fail."""

import filecmp
import gzip
import json
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from ncbi_server import NcbiServer, write_pubmed_file
from paths import SAMPLE
from random_documents import random_rows, random_text
from row_files import write_lines, write_rows
from tokenizers import Tokenizer

SPLITS = ("train", "validation", "test")
MAY_BE_SCRUBBED = re.compile(r"@|©|\(c\)|\b(copyright|published|email|rights)\b", re.IGNORECASE)

# The server has a file of that name, so following any of these links would download a valid file.
ODD_LINKS = [
    "../updatefiles/pubmed26n0004.xml.gz",
    "../../pubmed26n0001.xml.gz",
    "/etc/pubmed26n0001.xml.gz",
    "http://127.0.0.1:9/pubmed26n0001.xml.gz",
    "%2e%2e%2fpubmed26n0001.xml.gz",
    "..\\pubmed26n0001.xml.gz",
    "pubmed26n0001.xml.gz;rm -rf .xml.gz",
    "pubmed26n00001.xml.gz",
    "-pubmed26n0001.xml.gz",
]


def read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:  # the rows may hold other line breaks than those between them
        return [json.loads(line) for line in file]


@dataclass(frozen=True)
class Input:
    """What a run starts from."""

    served: Path
    """A folder in NCBI's layout."""
    other_text: Path
    held_out: list[Path]
    vocab_size: int


def sample_input(root: Path) -> Input:
    """The embedded sample under NCBI's names, and random text."""
    for number, folder in enumerate(("baseline", "updatefiles", "updatefiles"), start=1):
        content = (SAMPLE / f"pubmedsample26n000{number}.xml").read_bytes()
        write_pubmed_file(root / "ncbi" / folder / f"pubmed26n000{number}.xml.gz", content)
    questions = [{"pmid": str(99_000_001 + number), "CONTEXTS": [random_text(f"q{number}")]} for number in range(5)]
    held_out = write_lines(root / "questions.jsonl", questions)
    rows = random_rows("other", 100) + leaks(held_out)
    return Input(root / "ncbi", write_rows(root / "other.parquet", rows), [held_out], 600)


def real_input(root: Path, test_data: Path, numbers: range) -> Input:
    """NCBI's files and a sample of other real text, with PubMedQA's questions held out."""
    for path in test_data.glob("pubmed/*/pubmed26n*"):
        if int(path.name[9:13]) in numbers:
            target = root / "ncbi" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    held_out = sorted((test_data / "pubmedqa").glob("*.jsonl"))
    rows = pq.read_table(test_data / "corpus" / "validation.parquet").to_pylist()[:1000]
    return Input(root / "ncbi", write_rows(root / "other.parquet", rows + leaks(held_out[0])), held_out, 2000)


def leaks(held_out: Path) -> list[dict[str, Any]]:
    """Documents that must not reach training: with a held-out PMID, with a held-out text, and with one inside."""
    first, second, third = read_lines(held_out)[:3]
    return [
        {"id": first["pmid"], "kind": "abstract", "text": random_text("leak by PMID")},
        {"id": "leak:2", "kind": "text", "text": "\n".join(second["CONTEXTS"])},
        {
            "id": "leak:3",
            "kind": "text",
            "text": f"{random_text('before')} {third['CONTEXTS'][0]} {random_text('after')}",
        },
    ]


@pytest.mark.parametrize(
    "name",
    [
        "sample",
        pytest.param("small real files", marks=pytest.mark.slow),
        pytest.param("a file of the baseline", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_the_pipeline_from_ncbis_server_to_tokens_loses_and_adds_nothing(name, tmp_path, request, run_script):
    if name == "sample":
        given = sample_input(tmp_path)
    else:
        numbers = range(3, 6) if name == "small real files" else range(2, 6)
        given = real_input(tmp_path, request.getfixturevalue("test_data"), numbers)
    root = tmp_path / "home"
    run_all_stages(given, root, run_script, workers=2 if name == "a file of the baseline" else 1)

    assert_that_the_files_arrived(given.served, root / "pubmed")
    files = {path.name.removesuffix(".xml.gz"): read_xml(path) for path in sorted(root.glob("pubmed/*/*.xml.gz"))}
    assert_that_updates_were_applied(files, root)
    assert_that_texts_are_of_the_newest_records(files, root)
    assert_that_held_out_text_is_not_in_training(given.held_out, root)
    assert_that_tokens_spell_the_corpus(root)


def run_all_stages(
    given: Input, root: Path, run_script: Callable[..., subprocess.CompletedProcess[str]], workers: int
) -> None:
    def run(script: str, *arguments: object) -> str:
        done = run_script(script, *arguments, env={"NO_PROXY": "127.0.0.1"})
        assert done.returncode == 0, done.stderr
        return done.stderr

    paths = sorted(str(path.relative_to(given.served)) for path in given.served.glob("*/*.xml.gz"))
    with NcbiServer(given.served) as server:
        server.odd_links = ODD_LINKS
        server.faults[paths[0]] = ["cut"]
        server.faults[paths[-1]] = ["wrong bytes"]
        log = run("download_pubmed", "--files", "all", "--output", root / "pubmed", "--base-url", server.base_url)
        tries = Counter(path for path in server.requests if path.endswith(".xml.gz"))
    assert tries == Counter(paths) + Counter([paths[0], paths[-1]])
    for link in ODD_LINKS:
        assert f"ignored {link!r}" in log

    corpus, tokenizer, tokens = root / "corpus", root / "tokenizer", root / "tokens"
    arguments = ["--pubmed", root / "pubmed", "--sources", given.other_text, "--held-out", *given.held_out]
    arguments += ["--validation-fraction", 0.05, "--test-fraction", 0.05, "--write-dropped"]
    run("build_corpus", *arguments, "--output", corpus, "--workers", workers)
    run("train_tokenizer", "--corpus", corpus, "--output", tokenizer, "--vocab-size", given.vocab_size)
    arguments = ["--corpus", corpus, "--tokenizer", tokenizer, "--workers", workers]
    run("tokenize_corpus", *arguments, "--output", tokens)


def assert_that_the_files_arrived(served: Path, pubmed: Path) -> None:
    names = sorted(path.relative_to(served) for path in served.rglob("pubmed26n*"))
    assert sorted(path.relative_to(pubmed) for path in pubmed.rglob("*") if path.is_file()) == names
    for name in names:
        assert filecmp.cmp(served / name, pubmed / name, shallow=False)


@dataclass(frozen=True)
class XmlRecord:
    pmid: int
    version: int
    deleted: bool
    title: ElementTree.Element | None
    sections: list[ElementTree.Element]


def read_xml(path: Path) -> list[XmlRecord]:
    """The records of a file, in order, parsed as one document."""
    records = []
    for child in ElementTree.fromstring(gzip.decompress(path.read_bytes())):
        if child.tag == "DeleteCitation":
            records += [XmlRecord(*number_and_version(pmid), True, None, []) for pmid in child]
            continue
        assert child.tag in ("PubmedArticle", "PubmedBookArticle"), child.tag
        citation = child[0]
        article = citation if citation.tag == "BookDocument" else citation.find("Article")
        title, sections = article.find("ArticleTitle"), article.findall("Abstract/AbstractText")
        records.append(XmlRecord(*number_and_version(citation.find("PMID")), False, title, sections))
    return records


def number_and_version(pmid: ElementTree.Element) -> tuple[int, int]:
    return int(pmid.text), int(pmid.get("Version", "1"))


def newest_records(files: dict[str, list[XmlRecord]]) -> dict[int, tuple[str, XmlRecord]]:
    """PubMed's state after all files: for each PMID, the last record of the highest version, even if a deletion."""
    state: dict[int, tuple[str, XmlRecord]] = {}
    for file, records in files.items():
        for record in records:
            if record.pmid not in state or record.version >= state[record.pmid][1].version:
                state[record.pmid] = (file, record)
    return state


def assert_that_updates_were_applied(files: dict[str, list[XmlRecord]], root: Path) -> None:
    state = newest_records(files)
    expected = {file: Counter() for file in files}
    for file, records in files.items():
        for record in records:
            _, newest = state[record.pmid]
            if record.deleted:
                expected[file]["deletion"] += 1
            elif newest.deleted:
                expected[file]["deleted"] += 1
            elif record is not newest:
                expected[file]["superseded"] += 1

    report = json.loads((root / "corpus" / "report.json").read_text())
    outdated = ("deletion", "deleted", "superseded")
    for part in report["files"]:
        if part["name"] in files:
            assert part["read"] == len(files[part["name"]])
            dropped = Counter({reason: part["dropped"].get(reason, 0) for reason in outdated})
            assert dropped == expected[part["name"]], part["name"]
    assert {part["name"] for part in report["files"]} == {*files, "other"}
    for part in (report, *report["files"]):
        assert part["read"] == part["kept"] + sum(part["dropped"].values())

    current = {
        (pmid, file)
        for file in files
        for pmid in (record_pmids(root / "records" / f"{file}.parquet") - dropped_pmids(root, file, outdated))
    }
    assert current == {(pmid, file) for pmid, (file, record) in state.items() if not record.deleted}
    kept = {(row["id"], row["file"]) for row in corpus_rows(root) if row["file"] in files}
    assert kept <= {(f"pmid:{pmid}", file) for pmid, file in current}
    assert len(kept) == sum(part["kept"] for part in report["files"] if part["name"] in files) > 0


def record_pmids(path: Path) -> Counter[int]:
    return Counter(pq.read_table(path, columns=["pmid"])["pmid"].to_pylist())


def dropped_pmids(root: Path, file: str, reasons: tuple[str, ...]) -> Counter[int]:
    path = root / "corpus" / "dropped" / f"{file}.parquet"
    rows = pq.read_table(path, columns=["id", "reason"]).to_pylist() if path.exists() else []
    return Counter(int(row["id"].removeprefix("pmid:")) for row in rows if row["reason"] in reasons)


def corpus_rows(root: Path) -> Iterator[dict[str, Any]]:
    """All rows of the corpus, in the order of the files' names in each split, with their split and file."""
    for split in SPLITS:
        for path in sorted((root / "corpus" / split).glob("*.parquet")):
            for row in pq.read_table(path).to_pylist():
                yield row | {"split": split, "file": path.stem}


def assert_that_texts_are_of_the_newest_records(files: dict[str, list[XmlRecord]], root: Path) -> None:
    """Compare titles without markup, and abstracts of a single section without markup or text that is scrubbed."""
    state = newest_records(files)
    titles = texts = 0
    for row in corpus_rows(root):
        if row["file"] not in files or row["part"] > 1:
            continue
        newest = state[int(row["id"].removeprefix("pmid:"))][1]
        title, sections = newest.title, newest.sections
        if len(title) == 0:
            titles += 1
            assert without_brackets(row["title"]) == without_brackets(title.text), row["id"]
        if len(sections) != 1 or len(sections[0]) > 0 or sections[0].get("Label"):
            continue
        if not MAY_BE_SCRUBBED.search(sections[0].text) and len(sections[0].text.encode()) <= 4096:
            texts += 1
            assert row["text"].split() == sections[0].text.split(), row["id"]
    assert titles > 0 and texts > 0


def without_brackets(title: str) -> str:
    """The title without white space, full stops and the brackets of a translation."""
    return re.sub(r"[][.\s]", "", title)


def assert_that_held_out_text_is_not_in_training(held_out: list[Path], root: Path) -> None:
    questions = [question for path in held_out for question in read_lines(path)]
    pmids = {f"pmid:{question['pmid']}" for question in questions}
    contexts = [context.split() for question in questions for context in question["CONTEXTS"]]
    # Contexts are found by their first eight words, then compared word by word. Those of fewer than 13 words may occur
    # in any text.
    by_start = {tuple(words[:8]): words for words in contexts if len(words) >= 13}
    for row in corpus_rows(root):
        assert row["id"] not in pmids
        words = row["text"].split()
        for start in range(len(words) - 7):
            context = by_start.get(tuple(words[start : start + 8]))
            assert context is None or words[start : start + len(context)] != context, row["id"]
    removed = pq.read_table(root / "corpus" / "dropped" / "other.parquet", columns=["id", "reason"]).to_pylist()
    reasons = {row["id"]: row["reason"] for row in removed}
    assert [reason for identifier, reason in reasons.items() if identifier in pmids] == ["held_out"]
    assert (reasons["leak:2"], reasons["leak:3"]) == ("held_out", "held_out_overlap")


def assert_that_tokens_spell_the_corpus(root: Path) -> None:
    """Read the tokens with NumPy and the tokenizers library only."""
    tokenizer = Tokenizer.from_file(str(root / "tokens" / "tokenizer" / "tokenizer.json"))
    info = json.loads((root / "tokens" / "tokens.json").read_text())
    rows = list(corpus_rows(root))
    for split in SPLITS:
        decoded = []
        for path in sorted((root / "tokens" / split).glob("*.tokens.npy")):
            tokens, ends = np.load(path), np.load(str(path).replace(".tokens.", ".ends."))
            documents = [tokens[start:end].tolist() for start, end in pairwise([0, *ends])]
            assert all(document[0] == info["separator_id"] for document in documents)
            assert not any(info["separator_id"] in document[1:] for document in documents)
            decoded += tokenizer.decode_batch([document[1:] for document in documents], skip_special_tokens=False)
        expected = [
            f"{row['title']}\n{row['text']}" if row["title"] else row["text"] for row in rows if row["split"] == split
        ]
        assert decoded == expected
        assert len(expected) > 0
        assert info["splits"][split]["documents"] == len(expected)
