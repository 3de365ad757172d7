"""The held-out documents that come from PubMed: published without their text, and fetched from NCBI by who wants it.

Abstracts are under their publishers' terms. What is published of the validation and the test split is therefore one
line of JSON a document: its id, the number of its part, the year, the bytes and the SHA-256 of the text that was scored
(title, newline and text, in UTF-8). `fetch_evaluation_set` asks NCBI's E-utilities for the records, makes text of them
by the code that made the corpus, and keeps the documents whose text has that checksum.

NCBI's rules for the E-utilities, https://www.ncbi.nlm.nih.gov/books/NBK25497/: at most three requests a second, with
the name of the program and an e-mail address.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pyarrow as pa
import pyarrow.parquet as pq
import requests
from tqdm import tqdm

from healthslm.corpus.build import CorpusOptions
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
from healthslm.files import file_sha256, remove_partials, replacing, write_json

logger = logging.getLogger(__name__)

SPLITS = ("validation", "test")
DOCUMENTS = "documents.parquet"
REPORT = "report.json"
BATCH_RECORDS = 200  # to a request: more would have to be posted
PAUSE = 0.35  # seconds before each request

_ID = re.compile(r"pmid:[1-9][0-9]*")
_NO_RECORDS = re.compile(rb"<PubmedArticleSet\s*(?:/>|>\s*</PubmedArticleSet>)\s*\Z")


def read_held_out_pubmed(corpus: Path) -> list[Row]:
    """The documents of a corpus's validation and test split that come from PubMed's XML, by PMID and part."""
    files = [file for split in SPLITS for file in split_files(corpus, split)]
    return sorted((row for file in files for row in read_rows(str(file)) if row["source"] == PUBMED), key=_place)


def write_evaluation_set(path: Path, documents: Iterable[Row]) -> None:
    """Write what is published of documents of PubMed, by PMID and part, as JSON Lines."""
    with replacing(path) as new, new.open("w", encoding="utf-8") as file:
        for document in sorted(documents, key=_place):
            text = document_text(document["title"], document["text"])
            entry = {name: document[name] for name in ("id", "part", "year")}
            file.write(json.dumps(entry | {"bytes": len(text.encode()), "sha256": _sha256(text)}) + "\n")


def read_evaluation_set(path: Path) -> list[Row]:
    """Read what `write_evaluation_set` has written.

    Raises:
        UserError: An entry has no id of PubMed's, no part or no SHA-256, or there is none; names the entry.
    """
    entries = list(read_rows(str(path)))
    for number, entry in enumerate(entries, start=1):
        if not (
            _ID.fullmatch(str(entry.get("id")))
            and isinstance(entry.get("part"), int)
            and re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256")))
        ):
            raise UserError(f"{path}: entry {number:,}: expected id (pmid:123), part and sha256, got {str(entry)[:80]}")
    if not entries:
        raise UserError(f"{path}: no documents to fetch")
    return entries


def fetch_evaluation_set(options: FetchOptions) -> None:
    """Fetch the documents of a published set, keep those that are what was scored, and report the others.

    report.json says how many documents are the `same`, and gives the ids of those that have `changed` since or are
    `missing`. NCBI's answers are kept, so a run that was stopped goes on where it was; without xml/ all is asked anew.

    Raises:
        UserError: The set cannot be read, or NCBI does not answer in spite of all tries.
    """
    entries = read_evaluation_set(options.ids)
    logger.info(TERMS)
    for folder in (options.output, options.output / "xml"):
        remove_partials(folder)
    pmids = sorted({_place(entry)[0] for entry in entries})
    found = {_key(row): row for row in _documents(_fetch_records(pmids, options))}
    same, changed, missing = [], [], []
    for entry in entries:
        document = found.get(_key(entry))
        if document is not None and _sha256(document_text(document["title"], document["text"])) == entry["sha256"]:
            same.append(document)
        else:
            (changed if (entry["id"], 1) in found else missing).append(entry["id"])
    with replacing(options.output / DOCUMENTS) as new:
        pq.write_table(pa.Table.from_pylist(same, DOCUMENT_SCHEMA), new)
    report = {"ids": options.ids.name, "ids_sha256": file_sha256(options.ids), "documents": len(entries)}
    write_json(options.output / REPORT, report | {"same": len(same), "changed": changed, "missing": missing})
    logger.info(
        "%s: of %s documents %s are as they were scored, %s have changed, %s are gone",
        *(options.output, *(f"{number:,}" for number in (len(entries), len(same), len(changed), len(missing)))),
    )


def _place(document: Row) -> tuple[int, int]:
    return int(document["id"].removeprefix("pmid:")), document["part"]


def _key(document: Row) -> tuple[str, int]:
    return document["id"], document["part"]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _documents(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """The documents of the corpus that records become, part by part; of a PMID's records the highest version counts."""
    latest: dict[int, Record] = {}
    for record in records:
        if record["version"] >= latest.get(record["pmid"], record)["version"]:
            latest[record["pmid"]] = record
    criteria = Criteria(
        min_words=CorpusOptions.min_words,
        english_only=not CorpusOptions.any_language,
        validation_fraction=CorpusOptions.validation_fraction,
        test_fraction=CorpusOptions.test_fraction,
    )
    for document in ChunkSplitter(CorpusOptions.max_bytes, criteria).run(map(record_document, latest.values())):
        yield {"id": document.id, "text": document.text, **document.metadata}


def _fetch_records(pmids: Sequence[int], options: FetchOptions) -> Iterator[Record]:
    """Yield the records that NCBI has of these, as it answers."""
    address = options.base_url.rstrip("/") + "/efetch.fcgi"
    sender = {"tool": "healthslm"} | ({"email": options.email} if options.email else {})
    with tqdm(total=len(pmids), desc="fetching", unit="record") as bar, open_session() as session:
        for start in range(0, len(pmids), BATCH_RECORDS):
            batch = pmids[start : start + BATCH_RECORDS]
            ids = ",".join(map(str, batch))
            path = options.output / "xml" / f"{_sha256(ids)[:16]}.xml"
            if not path.exists():
                query = urlencode({"db": "pubmed", "id": ids, "rettype": "xml", "retmode": "xml"} | sender)
                _fetch(session, f"{address}?{query}", path, f"{address}: {len(batch)} records from {batch[0]} on")
            yield from _read_answer(path)
            bar.update(len(batch))


def _fetch(session: requests.Session, url: str, path: Path, what: str) -> None:
    try:
        with_retries(what, lambda: _fetch_once(session, url, path))
    except FetchError as error:
        raise UserError(f"{what}: not fetched: {error}: run the command again for the rest") from error


def _fetch_once(session: requests.Session, url: str, path: Path) -> None:
    time.sleep(PAUSE)
    with replacing(path) as new:
        with new.open("wb") as file:
            fetch(session, url, file)
        try:
            _read_answer(new)
        except UserError as error:  # NCBI may report its trouble in a page of status 200
            raise TransferError(str(error).removeprefix(f"{new}: ")) from error


def _read_answer(path: Path) -> list[Record]:
    """The records of an answer; none where NCBI has none of those asked for."""
    if _NO_RECORDS.search(path.read_bytes()):
        return []
    return [record for record in read_records(path) if not record["deleted"]]
