"""The held-out PubMed citations of a corpus: published without their text, and downloaded from NCBI by users.

Abstracts are under their publishers' terms. So the published file, JSON, contains no text: only the settings with which
the corpus was built and, for each document of its validation and test splits, the id, the chunk number, the year, and
the size and SHA-256 of the evaluated text (title, newline and text in UTF-8). `fetch_evaluation_set` requests the
records from NCBI's E-utilities, turns them into documents with the code and the settings that built the corpus, and
keeps the documents whose checksum matches.

NCBI's rules for the E-utilities (https://www.ncbi.nlm.nih.gov/books/NBK25497/): at most three requests per second, with
the name of the program and an e-mail address.
"""

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pyarrow as pa
import pyarrow.parquet as pq
import requests
from tqdm import tqdm

from healthslm.corpus.download import TERMS, FetchError, TransferError, fetch, open_session, with_retries
from healthslm.corpus.pubmed import Record, read_records
from healthslm.corpus.reader import split_files
from healthslm.corpus.records import SOURCE as PUBMED
from healthslm.corpus.records import record_document
from healthslm.corpus.screening import Criteria
from healthslm.corpus.sources import Row, read_rows
from healthslm.corpus.splits import ChunkSplitter
from healthslm.documents import DOCUMENT_SCHEMA, document_text
from healthslm.errors import UserError
from healthslm.evaluation.options import FetchOptions
from healthslm.files import check_output_folder, file_sha256, read_json, remove_partials, replacing, write_json

logger = logging.getLogger(__name__)

SPLITS = ("validation", "test")
DOCUMENTS = "documents.parquet"
REPORT = "report.json"
RESPONSES = "xml"
BATCH_RECORDS = 200  # per request; more would need a POST request
PAUSE = 0.35  # seconds before each request

SETTINGS = {field.name for field in fields(Criteria)} | {"max_bytes"}
"""The settings of a corpus that turn records into its documents."""

_ID = re.compile(r"pmid:[1-9][0-9]*")
_SHA256 = re.compile("[0-9a-f]{64}")
_NO_RECORDS = re.compile(rb"<PubmedArticleSet\s*(?:/>|>\s*</PubmedArticleSet>)\s*\Z")


@dataclass(frozen=True)
class EvaluationSet:
    """A published evaluation set."""

    settings: dict[str, Any]
    """Settings of the corpus, see `SETTINGS`."""
    documents: list[Row]
    """The id, chunk and sha256 of each document, and more."""


def read_held_out_pubmed(corpus: Path) -> list[Row]:
    """The documents of a corpus's validation and test splits that come from PubMed's XML, by PMID and chunk."""
    files = [file for split in SPLITS for file in split_files(corpus, split)]
    return sorted((row for file in files for row in read_rows(str(file)) if row["source"] == PUBMED), key=_order)


def write_evaluation_set(path: Path, documents: Iterable[Row], settings: Mapping[str, Any]) -> None:
    """Write the published file of PubMed documents.

    Args:
        settings: Those of the report of the corpus.
    """
    entries = []
    for document in sorted(documents, key=_order):
        text = document_text(document["title"], document["text"])
        entry = {"id": document["id"], "chunk": document["part"], "year": document["year"]}
        entries.append(entry | {"bytes": len(text.encode()), "sha256": _sha256(text)})
    write_json(path, {"settings": {name: settings[name] for name in sorted(SETTINGS)}, "documents": entries})


def read_evaluation_set(path: Path) -> EvaluationSet:
    """Read a file that `write_evaluation_set` wrote.

    Raises:
        UserError: It lacks settings of the corpus, has no documents, or one of them lacks a PubMed id, a chunk number
            or a SHA-256.
    """
    published = read_json(path)
    if not isinstance(published, dict) or not isinstance(published.get("documents"), list):
        raise UserError(f"{path}: not an evaluation set: expected a JSON object with settings and documents")
    settings, documents = published.get("settings", {}), published["documents"]
    if missing := SETTINGS - settings.keys():
        raise UserError(f"{path}: not an evaluation set: the settings lack {', '.join(sorted(missing))}")
    for number, entry in enumerate(documents, start=1):
        if not (
            isinstance(entry, dict)
            and _ID.fullmatch(str(entry.get("id")))
            and isinstance(entry.get("chunk"), int)
            and _SHA256.fullmatch(str(entry.get("sha256")))
        ):
            problem = f"expected id (pmid:123), chunk and sha256, not {str(entry)[:80]}"
            raise UserError(f"{path}: document {number:,}: {problem}")
    if not documents:
        raise UserError(f"{path}: no documents to fetch")
    return EvaluationSet(settings, documents)


def fetch_evaluation_set(options: FetchOptions) -> None:
    """Download the documents of a published set, keep those whose text is unchanged, and report the others.

    report.json counts the unchanged documents (`same`) and lists the ids of those whose text has `changed` or that are
    `missing`. NCBI's responses are kept, so that running the command again resumes the download. To request everything
    again, remove xml/.

    Raises:
        UserError: The output folder holds other files, the set can't be read, or NCBI doesn't respond after all
            retries.
    """
    check_output_folder(
        options.output,
        "a fetched evaluation set",
        lambda folder: any((folder / name).exists() for name in (DOCUMENTS, RESPONSES)),
    )
    published = read_evaluation_set(options.ids)
    logger.info(TERMS)
    for folder in (options.output, options.output / RESPONSES):
        remove_partials(folder)
    pmids = sorted({_pmid(entry) for entry in published.documents})
    rows = _documents(_fetch_records(pmids, options), published.settings)
    found = {(row["id"], row["part"]): row for row in rows}
    same: list[Row] = []
    changed: list[str] = []
    missing: list[str] = []
    for entry in published.documents:
        document = found.get((entry["id"], entry["chunk"]))
        if document is not None and _sha256(document_text(document["title"], document["text"])) == entry["sha256"]:
            same.append(document)
        else:
            (changed if (entry["id"], 1) in found else missing).append(entry["id"])
    with replacing(options.output / DOCUMENTS) as new:
        pq.write_table(pa.Table.from_pylist(same, DOCUMENT_SCHEMA), new)
    report = {
        "ids": options.ids.name,
        "ids_sha256": file_sha256(options.ids),
        "documents": len(published.documents),
        "same": len(same),
        "changed": changed,
        "missing": missing,
    }
    write_json(options.output / REPORT, report)
    logger.info(
        "%s: %s of %s documents are unchanged, %s have changed, %s are missing",
        *(options.output, *(f"{number:,}" for number in (len(same), report["documents"], len(changed), len(missing)))),
    )


def _pmid(document: Row) -> int:
    return int(document["id"].removeprefix("pmid:"))


def _order(document: Row) -> tuple[int, int]:
    return _pmid(document), document["part"]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _documents(records: Iterable[Record], settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The documents, chunk by chunk, that a corpus with these settings makes of the highest version of each record."""
    latest: dict[int, Record] = {}
    for record in records:
        if record["version"] >= latest.get(record["pmid"], record)["version"]:
            latest[record["pmid"]] = record
    criteria = Criteria(**{field.name: settings[field.name] for field in fields(Criteria)})
    for document in ChunkSplitter(settings["max_bytes"], criteria).run(map(record_document, latest.values())):
        yield {"id": document.id, "text": document.text, **document.metadata}


def _fetch_records(pmids: Sequence[int], options: FetchOptions) -> Iterator[Record]:
    """Yield the records that NCBI returns."""
    address = options.base_url.rstrip("/") + "/efetch.fcgi"
    sender = {"tool": "healthslm"} | ({"email": options.email} if options.email else {})
    with tqdm(total=len(pmids), desc="fetching", unit="record") as bar, open_session() as session:
        for start in range(0, len(pmids), BATCH_RECORDS):
            batch = pmids[start : start + BATCH_RECORDS]
            ids = ",".join(map(str, batch))
            path = options.output / RESPONSES / f"{_sha256(ids)[:16]}.xml"
            if not path.exists():
                query = urlencode({"db": "pubmed", "id": ids, "rettype": "xml", "retmode": "xml"} | sender)
                _fetch(session, f"{address}?{query}", path, f"{address}: {len(batch)} records from PMID {batch[0]}")
            yield from _read_response(path)
            bar.update(len(batch))


def _fetch(session: requests.Session, url: str, path: Path, what: str) -> None:
    try:
        with_retries(what, lambda: _fetch_once(session, url, path))
    except FetchError as error:
        raise UserError(f"{what}: download failed: {error}; run the command again to resume") from error


def _fetch_once(session: requests.Session, url: str, path: Path) -> None:
    time.sleep(PAUSE)
    with replacing(path) as new:
        with new.open("wb") as file:
            fetch(session, url, file)
        try:
            _read_response(new)
        except UserError as error:  # NCBI may report an error with status 200
            raise TransferError(str(error).removeprefix(f"{new}: ")) from error


def _read_response(path: Path) -> list[Record]:
    """The records of a response; an empty list if NCBI has none of them."""
    if _NO_RECORDS.search(path.read_bytes()):
        return []
    return [record for record in read_records(path) if not record["deleted"]]
