"""Held-out PubMed citations, published as ids and checksums, are downloaded from NCBI as the evaluated documents."""

import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
from local_server import LocalServer
from paths import SAMPLE
from row_files import write_lines

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

# The beginning of efetch's responses.
HEAD = b"""<?xml version="1.0" ?>
<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle, 1st January 2025//EN" "https://dtd.nlm.nih.gov/ncbi/pubmed/out/pubmed_250101.dtd">
<PubmedArticleSet>
"""  # noqa: E501
TAIL = b"</PubmedArticleSet>\n"
ERROR_PAGE = b"<?xml version='1.0'?><eFetchResult><ERROR>Unable to obtain query</ERROR></eFetchResult>"


class EUtilities(LocalServer):
    """A local server that returns citations like NCBI's efetch and records the requests."""

    def __init__(self, citations: dict[int, bytes]):
        super().__init__(_Handler)
        self.base_url = f"{self.origin}/entrez/eutils/"
        self.citations = citations
        self.requests: list[dict[str, str]] = []
        self.faults: list[int | bytes | None] = []
        """Faults of the next requests, one by one: a status, another page, or None for a correct response."""

    @property
    def requested(self) -> list[list[int]]:
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
        pmids = self.server.requested[-1]
        body = b"".join([HEAD, *(self.server.citations.get(pmid, b"") for pmid in pmids), TAIL])
        known = address.path == "/entrez/eutils/efetch.fcgi"
        self.send_response(fault if isinstance(fault, int) else 200 if known else 404)
        body = fault if isinstance(fault, bytes) else body
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def cut_citations(files: list[Path]) -> dict[int, bytes]:
    """The citations of XML files, byte for byte, by PMID. The last one of a PMID counts."""
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
    return {"id": f"pmid:{pmid}", "chunk": 1, "sha256": hashlib.sha256(text.encode()).hexdigest()}


SETTINGS = {
    "min_words": 20,
    "english_only": True,
    "validation_fraction": 0.005,
    "test_fraction": 0.005,
    "max_bytes": 4096,
}


def write_set(path: Path, documents: list[dict[str, Any]], settings: dict[str, Any] = SETTINGS) -> Path:
    path.write_text(json.dumps({"settings": settings, "documents": documents}))
    return path


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setattr(evaluation_set, "PAUSE", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[EUtilities]:
    """A server with 401 made-up citations, 1 to 401."""
    with EUtilities({pmid: made_citation(pmid) for pmid in range(1, 402)}) as running:
        yield running


@pytest.fixture
def fetch(tmp_path: Path, server: EUtilities) -> Callable[..., dict[str, Any]]:
    """Fetch the documents of these PMIDs and return the report."""

    def run(pmids: range, **options: Any) -> dict[str, Any]:
        ids = write_set(tmp_path / "ids.json", [made_entry(pmid) for pmid in pmids])
        given = {"ids": ids, "output": tmp_path / "out", "base_url": server.base_url} | options
        fetch_evaluation_set(FetchOptions(**given))
        return json.loads((given["output"] / "report.json").read_text())

    return run


def publish_and_fetch(corpus: Path, citations: dict[int, bytes], folder: Path) -> tuple[list[dict], list[dict], dict]:
    """The held-out PubMed documents of a corpus, the documents fetched for them, and the report."""
    documents = read_held_out_pubmed(corpus)
    settings = json.loads((corpus / "report.json").read_text())["settings"]
    write_evaluation_set(folder / "ids.json", documents, settings)
    with EUtilities(citations) as server:
        fetch_evaluation_set(FetchOptions(ids=folder / "ids.json", output=folder / "out", base_url=server.base_url))
    report = json.loads((folder / "out" / "report.json").read_text())
    return documents, pq.read_table(folder / "out" / "documents.parquet").to_pylist(), report


def test_real_citations_are_fetched_as_the_documents_of_the_corpus(test_data: Path, tmp_path: Path) -> None:
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


def test_the_documents_of_the_sample_are_fetched_unchanged(sample_folders, tmp_path: Path) -> None:
    citations = cut_citations(sorted(SAMPLE.glob("*.xml")))
    documents, fetched, report = publish_and_fetch(sample_folders.corpus, citations, tmp_path)
    assert fetched == documents != []
    assert report["same"] == report["documents"] == len(documents)


def test_the_published_file_contains_checksums_and_no_text(sample_folders, tmp_path: Path) -> None:
    documents = read_held_out_pubmed(sample_folders.corpus)
    splits = [row for split in ("validation", "test") for row in read_folder(sample_folders.corpus / split)]
    assert sorted(document["id"] for document in documents) == sorted(row["id"] for row in splits)
    settings = json.loads((sample_folders.corpus / "report.json").read_text())["settings"]
    write_evaluation_set(tmp_path / "ids.json", documents[::-1], settings)
    published = json.loads((tmp_path / "ids.json").read_text())
    assert published["settings"] == settings == read_evaluation_set(tmp_path / "ids.json").settings
    entries = published["documents"]
    assert entries == read_evaluation_set(tmp_path / "ids.json").documents
    assert [entry["id"] for entry in entries] == sorted((row["id"] for row in splits), key=lambda name: int(name[5:]))
    for entry, document in zip(entries, documents, strict=True):
        text = f"{document['title']}\n{document['text']}".encode()
        assert entry == {
            "id": document["id"],
            "chunk": 1,
            "year": document["year"],
            "bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
        }


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """The documents that scripts/evaluate.py reads from a folder."""
    return [row for source in find_sources([str(folder)]) for row in read_rows(source.location)]


def test_documents_of_other_sources_are_not_published(tmp_path: Path) -> None:
    rows = [
        {"id": f"text:{number}", "text": " ".join(f"word{number}x{place}" for place in range(40))}
        for number in range(60)
    ]
    source = write_lines(tmp_path / "other.jsonl", rows)
    build_corpus(
        CorpusOptions(
            output=tmp_path / "corpus",
            sources=[str(source)],
            validation_fraction=0.3,
            test_fraction=0.3,
            any_language=True,
            workers=1,
        )
    )
    assert read_folder(tmp_path / "corpus" / "test")
    assert read_held_out_pubmed(tmp_path / "corpus") == []


@pytest.mark.parametrize(("max_bytes", "chunks"), [(4096, 2), (1024, 7)])
def test_long_abstracts_are_fetched_in_the_chunks_of_the_corpus(tmp_path: Path, max_bytes: int, chunks: int) -> None:
    """Also if the corpus was not built with the default settings."""
    citations = {}
    for pmid in range(1, 21):
        sentences = "".join(f" Then word{pmid}x{number} came." for number in range(300))
        citations[pmid] = made_citation(pmid).replace(f"Text {pmid}.".encode(), f"First.{sentences}".encode())
    (tmp_path / "pubmed").mkdir()
    (tmp_path / "pubmed" / "pubmed26n0001.xml").write_bytes(HEAD + b"".join(citations.values()) + TAIL)
    settings = {"validation_fraction": 0.3, "test_fraction": 0.3, "any_language": True, "max_bytes": max_bytes}
    build_corpus(CorpusOptions(output=tmp_path / "corpus", pubmed=tmp_path / "pubmed", workers=1, **settings))
    documents, fetched, report = publish_and_fetch(tmp_path / "corpus", citations, tmp_path)
    assert [document["part"] for document in documents[: chunks + 1]] == [*range(1, chunks + 1), 1]
    assert fetched == documents
    assert report["same"] == len(documents)


def test_changed_and_missing_records_are_reported_and_left_out(server, fetch, tmp_path: Path) -> None:
    server.citations[3] = made_citation(3).replace(b"Text 3", b"RETRACTED: Text 3")
    server.citations[4] = made_citation(4).replace(b"Text 4.", b"Text 4. ")  # white space is no change
    del server.citations[5]
    report = fetch(range(1, 8))
    assert report["changed"] == ["pmid:3"]
    assert report["missing"] == ["pmid:5"]
    assert (report["same"], report["documents"]) == (5, 7)
    assert report["ids_sha256"] == hashlib.sha256((tmp_path / "ids.json").read_bytes()).hexdigest()
    assert [row["id"] for row in read_folder(tmp_path / "out")] == [f"pmid:{pmid}" for pmid in (1, 2, 4, 6, 7)]


def test_a_response_without_records_means_that_all_are_missing(server, fetch) -> None:
    server.citations.clear()
    assert fetch(range(1, 3))["missing"] == ["pmid:1", "pmid:2"]
    assert len(server.requests) == 1


def test_the_highest_version_of_a_record_counts(server, fetch) -> None:
    older = made_citation(1).replace(b"Text 1", b"Older text")
    server.citations[1] = made_citation(1).replace(b'Version="1"', b'Version="2"') + older
    assert fetch(range(1, 2))["same"] == 1


def test_requests_follow_the_rules_of_ncbi(server, fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    waits: list[tuple[int, float]] = []
    monkeypatch.setattr("time.sleep", lambda seconds: waits.append((len(server.requests), seconds)))
    report = fetch(range(1, 402), email="someone@example.org")
    assert report["same"] == 401
    assert [len(pmids) for pmids in server.requested] == [200, 200, 1]
    assert sorted(pmid for pmids in server.requested for pmid in pmids) == list(range(1, 402))
    for request in server.requests:
        del request["id"]
        assert request == {
            "db": "pubmed",
            "rettype": "xml",
            "retmode": "xml",
            "tool": "healthslm",
            "email": "someone@example.org",
        }
    assert all(any(requests == number and seconds > 1 / 3 for requests, seconds in waits) for number in range(3))


@pytest.mark.parametrize("fault", [503, 429, ERROR_PAGE, HEAD + made_citation(1), b""], ids=repr)
def test_a_failed_or_damaged_response_is_requested_again(server, fetch, fault) -> None:
    server.faults = [fault, fault]
    assert fetch(range(1, 4))["same"] == 3
    assert server.requested == [[1, 2, 3]] * 3


def test_a_failed_download_is_resumed(server, fetch, tmp_path: Path) -> None:
    server.faults = [None, 400]
    with pytest.raises(UserError, match="200 records from PMID 201: download failed: 400.*; run the command again"):
        fetch(range(1, 402))
    assert not (tmp_path / "out" / "documents.parquet").exists()
    server.requests.clear()
    assert fetch(range(1, 402))["same"] == 401
    assert [pmids[0] for pmids in server.requested] == [201, 401]


@pytest.mark.parametrize(
    "entry",
    [
        {"id": "pmc:PMC1", "chunk": 1, "sha256": "0" * 64},
        {"id": "pmid:1", "sha256": "0" * 64},
        {"id": "pmid:1", "chunk": 1, "sha256": "0"},
        {"chunk": 1, "sha256": "0" * 64},
        "pmid:1",
    ],
)
def test_a_set_with_an_invalid_document_is_refused(entry, tmp_path: Path) -> None:
    path = write_set(tmp_path / "ids.json", [made_entry(1), entry])
    with pytest.raises(UserError, match="ids.json: document 2: expected id"):
        read_evaluation_set(path)


def test_a_file_that_is_not_an_evaluation_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no documents to fetch"):
        read_evaluation_set(write_set(tmp_path / "none.json", []))
    fewer = {name: value for name, value in SETTINGS.items() if name != "max_bytes"}
    with pytest.raises(UserError, match="not an evaluation set: the settings lack max_bytes"):
        read_evaluation_set(write_set(tmp_path / "fewer.json", [made_entry(1)], fewer))
    (tmp_path / "list.json").write_text(json.dumps([made_entry(1)]))
    with pytest.raises(UserError, match="list.json: not an evaluation set: expected a JSON object"):
        read_evaluation_set(tmp_path / "list.json")


def test_a_corpus_is_not_overwritten(sample_folders, fetch, server) -> None:
    before = (sample_folders.corpus / "report.json").read_bytes()
    with pytest.raises(UserError, match="corpus: holds other files than a fetched evaluation set"):
        fetch(range(1, 3), output=sample_folders.corpus)
    assert (sample_folders.corpus / "report.json").read_bytes() == before and not server.requests


def test_an_evaluation_set_is_fetched_again_without_its_responses(server, fetch, tmp_path: Path) -> None:
    first = fetch(range(1, 3))
    shutil.rmtree(tmp_path / "out" / "xml")
    assert fetch(range(1, 3)) == first and len(server.requests) == 2


def test_the_script_reports_the_number_of_unchanged_documents(server, run_script, tmp_path: Path) -> None:
    ids = write_set(tmp_path / "ids.json", [made_entry(pmid) for pmid in (1, 2, 999)])
    done = run_script("fetch_evaluation_set", "--ids", ids, "--output", tmp_path / "out", "--base-url", server.base_url)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 documents are unchanged, 0 have changed, 1 are missing" in done.stderr
    assert "Courtesy of the U.S. National Library of Medicine" in done.stderr
    assert [row["text"] for row in read_folder(tmp_path / "out")] == ["Text 1.", "Text 2."]


def test_the_published_set_of_the_release_can_be_read(repository: Path) -> None:
    published = read_evaluation_set(repository / "results" / "pubmed_ids.json")
    evaluated = json.loads((repository / "results" / "pubmed.json").read_text())
    assert published.settings.keys() == SETTINGS.keys()
    assert sum(document["bytes"] for document in published.documents) == evaluated["bytes"]
