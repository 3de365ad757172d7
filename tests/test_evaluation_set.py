"""The held-out documents of PubMed, published as ids and checksums, come back from NCBI as what was scored."""

import gzip
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
from pipeline_folders import SAMPLE

from healthslm.corpus import download
from healthslm.corpus.build import CorpusOptions, build_corpus
from healthslm.corpus.sources import find_sources, read_rows
from healthslm.errors import UserError
from healthslm.evaluation import evaluation_set
from healthslm.evaluation.evaluation_set import (
    FetchOptions,
    fetch_evaluation_set,
    read_evaluation_set,
    read_held_out_pubmed,
    write_evaluation_set,
)

# As efetch begins its answers.
HEAD = b"""<?xml version="1.0" ?>
<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle, 1st January 2025//EN" "https://dtd.nlm.nih.gov/ncbi/pubmed/out/pubmed_250101.dtd">
<PubmedArticleSet>
"""  # noqa: E501
TAIL = b"</PubmedArticleSet>\n"
ERROR_PAGE = b"<?xml version='1.0'?><eFetchResult><ERROR>Unable to obtain query</ERROR></eFetchResult>"


class EUtilities(ThreadingHTTPServer):
    """A loopback server that gives the citations it has, as NCBI's efetch does, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self, citations: dict[int, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.base_url = f"http://127.0.0.1:{self.server_port}/entrez/eutils/"
        self.citations = citations
        self.requests: list[dict[str, str]] = []
        self.faults: list[int | bytes | None] = []
        """What the next requests get instead, one by one: a status, another page, or nothing else than they should."""

    @property
    def asked(self) -> list[list[int]]:
        """The PMIDs of each request."""
        return [[int(pmid) for pmid in request["id"].split(",")] for request in self.requests]


class _Handler(BaseHTTPRequestHandler):
    server: EUtilities

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self.server.requests.append({name: value for name, (value,) in parse_qs(address.query).items()})
        fault = self.server.faults.pop(0) if self.server.faults else None
        pmids = self.server.asked[-1]
        body = b"".join([HEAD, *(self.server.citations.get(pmid, b"") for pmid in pmids), TAIL])
        known = address.path == "/entrez/eutils/efetch.fcgi"
        self.send_response(fault if isinstance(fault, int) else 200 if known else 404)
        body = fault if isinstance(fault, bytes) else body
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(citations: dict[int, bytes]) -> Iterator[EUtilities]:
    with EUtilities(citations) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def cut_citations(files: list[Path]) -> dict[int, bytes]:
    """The citations of XML files, byte for byte, by PMID; of several with one the last."""
    citations = {}
    for path in files:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for citation in re.findall(rb"<PubmedArticle>.*?</PubmedArticle>\s*", content, re.DOTALL):
            citations[int(ElementTree.fromstring(citation).findtext("MedlineCitation/PMID"))] = citation
    return citations


def made_citation(pmid: int) -> bytes:
    return (
        f'<PubmedArticle><MedlineCitation><PMID Version="1">{pmid}</PMID><Article><Journal><JournalIssue><PubDate>'
        f"<Year>2001</Year></PubDate></JournalIssue></Journal><ArticleTitle>Title {pmid}.</ArticleTitle><Abstract>"
        f"<AbstractText>Text {pmid}.</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>\n"
    ).encode()


def made_entry(pmid: int) -> dict[str, Any]:
    text = f"Title {pmid}.\nText {pmid}."
    return {"id": f"pmid:{pmid}", "part": 1, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setattr(evaluation_set, "PAUSE", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[EUtilities]:
    """Serves 401 made citations, 1 to 401."""
    with serving({pmid: made_citation(pmid) for pmid in range(1, 402)}) as running:
        yield running


@pytest.fixture
def fetch(tmp_path: Path, server: EUtilities) -> Callable[..., dict[str, Any]]:
    """Fetch the made documents of these PMIDs; return the report."""

    def run(pmids: range, **options: Any) -> dict[str, Any]:
        ids = write_lines(tmp_path / "ids.jsonl", [made_entry(pmid) for pmid in pmids])
        given = {"ids": ids, "output": tmp_path / "out", "base_url": server.base_url} | options
        fetch_evaluation_set(FetchOptions(**given))
        return json.loads((given["output"] / "report.json").read_text())

    return run


def publish_and_fetch(corpus: Path, citations: dict[int, bytes], folder: Path) -> tuple[list[dict], list[dict], dict]:
    """The held-out documents of PubMed in a corpus, those that come back from its citations, and the report."""
    documents = read_held_out_pubmed(corpus)
    write_evaluation_set(folder / "ids.jsonl", documents)
    with serving(citations) as server:
        fetch_evaluation_set(FetchOptions(ids=folder / "ids.jsonl", output=folder / "out", base_url=server.base_url))
    report = json.loads((folder / "out" / "report.json").read_text())
    return documents, pq.read_table(folder / "out" / "documents.parquet").to_pylist(), report


def test_real_citations_come_back_as_the_documents_of_the_corpus(test_data: Path, tmp_path: Path) -> None:
    names = ["baseline/pubmed26n0003.xml.gz", "updatefiles/pubmed26n0004.xml.gz"]
    for name in names:
        target = tmp_path / "pubmed" / name
        target.parent.mkdir(parents=True)
        target.symlink_to(test_data / "pubmed" / name)
    build_corpus(
        CorpusOptions(
            output=tmp_path / "corpus",
            pubmed=tmp_path / "pubmed",
            validation_fraction=0.4,
            test_fraction=0.4,
            workers=1,
        )
    )
    citations = cut_citations([test_data / "pubmed" / name for name in names])
    documents, fetched, report = publish_and_fetch(tmp_path / "corpus", citations, tmp_path)
    assert len(documents) > 10
    assert any(len(document["sections"]) > 1 for document in documents)
    assert fetched == documents
    assert (report["same"], report["changed"], report["missing"]) == (len(documents), [], [])


def test_the_documents_of_the_sample_come_back_as_they_are(sample_folders, tmp_path: Path) -> None:
    citations = cut_citations(sorted(SAMPLE.glob("*.xml")))
    documents, fetched, report = publish_and_fetch(sample_folders.corpus, citations, tmp_path)
    assert fetched == documents != []
    assert report["same"] == report["documents"] == len(documents)


def test_what_is_published_tells_the_checksum_and_no_text(sample_folders, tmp_path: Path) -> None:
    documents = read_held_out_pubmed(sample_folders.corpus)
    splits = [row for split in ("validation", "test") for row in read_folder(sample_folders.corpus / split)]
    assert sorted(document["id"] for document in documents) == sorted(row["id"] for row in splits)
    write_evaluation_set(tmp_path / "ids.jsonl", documents[::-1])
    lines = [json.loads(line) for line in (tmp_path / "ids.jsonl").read_text().splitlines()]
    assert lines == read_evaluation_set(tmp_path / "ids.jsonl")
    assert [line["id"] for line in lines] == sorted((row["id"] for row in splits), key=lambda name: int(name[5:]))
    for line, document in zip(lines, documents, strict=True):
        text = f"{document['title']}\n{document['text']}".encode()
        assert line == {
            "id": document["id"],
            "part": 1,
            "year": document["year"],
            "bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
        }


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """What scripts/evaluate.py reads of a folder."""
    return [row for source in find_sources([str(folder)]) for row in read_rows(source.location)]


def test_documents_of_other_sources_are_not_published(tmp_path: Path) -> None:
    rows = [
        {"id": f"text:{number}", "text": " ".join(f"word{number}x{place}" for place in range(40))}
        for number in range(60)
    ]
    build_corpus(
        CorpusOptions(
            output=tmp_path / "corpus",
            sources=[str(write_lines(tmp_path / "other.jsonl", rows))],
            validation_fraction=0.3,
            test_fraction=0.3,
            any_language=True,
            workers=1,
        )
    )
    assert read_folder(tmp_path / "corpus" / "test")
    assert read_held_out_pubmed(tmp_path / "corpus") == []


def test_long_abstracts_come_back_in_the_parts_of_the_corpus(tmp_path: Path) -> None:
    citations = {}
    for pmid in range(1, 21):
        sentences = "".join(f" Then word{pmid}x{number} came." for number in range(300))
        citations[pmid] = made_citation(pmid).replace(f"Text {pmid}.".encode(), f"First.{sentences}".encode())
    (tmp_path / "pubmed").mkdir()
    (tmp_path / "pubmed" / "pubmed26n0001.xml").write_bytes(HEAD + b"".join(citations.values()) + TAIL)
    fractions = {"validation_fraction": 0.3, "test_fraction": 0.3}
    build_corpus(
        CorpusOptions(output=tmp_path / "corpus", pubmed=tmp_path / "pubmed", any_language=True, workers=1, **fractions)
    )
    documents, fetched, report = publish_and_fetch(tmp_path / "corpus", citations, tmp_path)
    assert [document["part"] for document in documents[:4]] == [1, 2, 1, 2]
    assert fetched == documents
    assert report["same"] == len(documents)


def test_changed_and_vanished_records_are_named_and_left_out(server, fetch, tmp_path: Path) -> None:
    server.citations[3] = made_citation(3).replace(b"Text 3", b"RETRACTED: Text 3")
    server.citations[4] = made_citation(4).replace(b"Text 4.", b"Text 4. ")  # white space is no change
    del server.citations[5]
    report = fetch(range(1, 8))
    assert report["changed"] == ["pmid:3"]
    assert report["missing"] == ["pmid:5"]
    assert (report["same"], report["documents"]) == (5, 7)
    assert report["ids_sha256"] == hashlib.sha256((tmp_path / "ids.jsonl").read_bytes()).hexdigest()
    assert [row["id"] for row in read_folder(tmp_path / "out")] == [f"pmid:{pmid}" for pmid in (1, 2, 4, 6, 7)]


def test_an_answer_without_records_means_that_all_are_gone(server, fetch) -> None:
    server.citations.clear()
    assert fetch(range(1, 3))["missing"] == ["pmid:1", "pmid:2"]
    assert len(server.requests) == 1


def test_of_several_versions_the_highest_counts(server, fetch) -> None:
    older = made_citation(1).replace(b"Text 1", b"Older text")
    server.citations[1] = made_citation(1).replace(b'Version="1"', b'Version="2"') + older
    assert fetch(range(1, 2))["same"] == 1


def test_requests_are_as_ncbi_wants_them(server, fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    waits: list[tuple[int, float]] = []
    monkeypatch.setattr("time.sleep", lambda seconds: waits.append((len(server.requests), seconds)))
    report = fetch(range(1, 402), email="someone@example.org")
    assert report["same"] == 401
    assert [len(pmids) for pmids in server.asked] == [200, 200, 1]
    assert sorted(pmid for pmids in server.asked for pmid in pmids) == list(range(1, 402))
    for request in server.requests:
        del request["id"]
        assert request == {
            "db": "pubmed",
            "rettype": "xml",
            "retmode": "xml",
            "tool": "healthslm",
            "email": "someone@example.org",
        }
    assert all(any(asked == number and seconds > 1 / 3 for asked, seconds in waits) for number in range(3))


@pytest.mark.parametrize("fault", [503, 429, ERROR_PAGE, HEAD + made_citation(1), b""], ids=repr)
def test_an_answer_that_fails_or_is_damaged_is_asked_for_again(server, fetch, fault) -> None:
    server.faults = [fault, fault]
    assert fetch(range(1, 4))["same"] == 3
    assert server.asked == [[1, 2, 3]] * 3


def test_a_run_that_failed_goes_on_where_it_was(server, fetch, tmp_path: Path) -> None:
    server.faults = [None, 400]
    with pytest.raises(UserError, match="200 records from 201 on: not fetched: 400"):
        fetch(range(1, 402))
    assert not (tmp_path / "out" / "documents.parquet").exists()
    server.requests.clear()
    assert fetch(range(1, 402))["same"] == 401
    assert [pmids[0] for pmids in server.asked] == [201, 401]


@pytest.mark.parametrize(
    "entry",
    [
        {"id": "pmc:PMC1", "part": 1, "sha256": "0" * 64},
        {"id": "pmid:1", "sha256": "0" * 64},
        {"id": "pmid:1", "part": 1, "sha256": "0"},
        {"part": 1, "sha256": "0" * 64},
    ],
)
def test_a_set_that_is_none_is_refused(entry, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "ids.jsonl", [made_entry(1), entry])
    with pytest.raises(UserError, match="ids.jsonl: entry 2: expected id"):
        read_evaluation_set(path)
    with pytest.raises(UserError, match="no documents to fetch"):
        read_evaluation_set(write_lines(tmp_path / "none.jsonl", []))


def test_the_script_says_what_has_come_of_the_set(server, run_script, tmp_path: Path) -> None:
    ids = write_lines(tmp_path / "ids.jsonl", [made_entry(pmid) for pmid in (1, 2, 999)])
    done = run_script("fetch_evaluation_set", "--ids", ids, "--output", tmp_path / "out", "--base-url", server.base_url)
    assert done.returncode == 0, done.stderr
    assert "of 3 documents 2 are as they were scored, 0 have changed, 1 are gone" in done.stderr
    assert "Courtesy of the U.S. National Library of Medicine" in done.stderr
    assert [row["text"] for row in read_folder(tmp_path / "out")] == ["Text 1.", "Text 2."]
