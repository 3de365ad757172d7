"""Reading PubMed's XML: every citation of a file, and every deletion, as one record in the file's order.

The format: https://www.nlm.nih.gov/bsd/licensee/data_elements_doc.html. Nothing outside the file is touched: no DTD is
loaded, no entity is resolved, no network is used. Memory holds one citation at a time.

A file is cut behind each citation. Most of a citation's bytes, its authors for instance, say nothing of its record:
these are checked, and a tree, which takes three times as long, is built of the rest alone. So a parser of XML reads
every byte, and damage anywhere is found.
"""

import gzip
import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lxml import etree

from healthslm.corpus.markup import inner_text
from healthslm.errors import UserError

Record = dict[str, Any]

NO_TITLE = {"[Not Available].", "[Not Available]", "[In Process Citation].", "[In Process Citation]"}
RETRACTED_TYPES = {"Retracted Publication"}
RETRACTION_NOTICE_TYPES = {"Retraction of Publication", "Retraction Notice"}

# The most authors that a paper has had, 15,025, at 800 bytes each. A tree of XML takes up to 60 times its bytes.
MAX_CITATION_BYTES = 12 * 2**20
# NCBI's files expand 6 to 11 times; gzip's limit is 1,032.
MAX_EXPANSION = 100

_CHUNK_BYTES = 2**18
# MedlineCitationSet was the root of NCBI's files until 2015; Entrez also gives sets of books.
_CITATION_ENDS = {
    b"PubmedArticleSet": b"</PubmedArticle>",
    b"MedlineCitationSet": b"</MedlineCitation>",
    b"PubmedBookArticleSet": b"</PubmedBookArticle>",
}
# UTF-8 alone, and no declarations in the DOCTYPE, so that a file has no entities of its own.
_COMMENTS = rb"(?>\s+|<!--(?s:.*?)-->)*+"
_BEGINNING = re.compile(
    rb"""(?:\xef\xbb\xbf)?(?:<\?xml\s+version=["']1\.0["'](?:\s+encoding=["'](?i:utf-8)["'])?\s*\?>)?"""
    rb"%b(?:<!DOCTYPE\s[^\[\]<>]*>)?%b(?P<root><(?P<name>\w+)(?:\s[^<>]*)?>)" % (_COMMENTS, _COMMENTS)
)
# What stands between these tags is not read, unless it holds the one list behind the article that is.
_UNREAD = (
    (b"<PubmedData>", b"</PubmedData"),
    (b"</Article>", b"</MedlineCitation"),
    (b'<AuthorList CompleteYN="Y">', b"</AuthorList"),
)
_READ_BEHIND_ARTICLE = b"<CommentsCorrectionsList"
_YEAR = re.compile(r"\b(?:1[5-9]|20)\d\d\b", re.ASCII)


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of an .xml or .xml.gz file: its citations, and a record with `deleted` for each deletion.

    A record has the columns of `healthslm.corpus.records.RECORD_SCHEMA`.

    Raises:
        UserError: the file is missing, cut short, damaged, not XML or not PubMed's, has entities, expands to more than
            `MAX_EXPANSION` times its size, or has a citation of more than `MAX_CITATION_BYTES`; names the file and the
            record.
    """
    count = 0
    parser = etree.XMLParser(resolve_entities=False, remove_comments=True, remove_pis=True)
    with _refusing_bad_files(path, lambda: count):
        for document in _documents(_chunks(path)):
            for element in etree.fromstring(document, parser):
                for record in _records(element):
                    count += 1
                    yield record
        if count == 0:
            raise UserError("is missing: the file has neither a citation nor a deletion")


@contextmanager
def _refusing_bad_files(path: Path, count: Callable[[], int]) -> Iterator[None]:
    """Add the file and the place to all errors. What is wrong with a record comes as a UserError without a subject."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: record {count() + 1:,} {error}") from error
    except EOFError as error:
        raise UserError(f"{path}: the gzip file is cut short, after record {count():,}: fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file, after record {count():,}: {error}: fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except etree.XMLSyntaxError as error:
        reason = re.split(", line |\n", error.msg)[0].strip()  # of a part of the file; text may follow
        raise UserError(f"{path}: damaged XML, after record {count():,}: {reason}: fetch it again") from error


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as packed, gzip.open(packed) if path.suffix == ".gz" else packed as file:
        size = 0
        while chunk := file.read1(_CHUNK_BYTES):  # read() would lose what stands before the place of an error
            size += len(chunk)
            if size > max(MAX_CITATION_BYTES, MAX_EXPANSION * packed.tell()):
                raise UserError(f"is not reached: the file expands to more than {MAX_EXPANSION} times its size")
            yield chunk


def _documents(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Cut a file into documents of one citation each, within its root element; what is not read is left out."""
    beginning, rest = None, b""
    while beginning is None and len(rest) < _CHUNK_BYTES and (chunk := next(chunks, b"")):
        rest += chunk
        beginning = _BEGINNING.match(rest)
    if beginning is None:
        raise UserError(
            "is not reached: the file does not begin with a declaration of XML in UTF-8, a DOCTYPE without "
            "declarations inside it, and a root element"
        )
    root, name = beginning["root"], beginning["name"]
    if name not in _CITATION_ENDS:
        raise UserError(f"is missing: no PubMed citations in a file whose root element is {name.decode()}")
    root_end = b"</%b>" % name
    etree.fromstring(beginning[0] + root_end)

    checker = etree.XMLParser(target=_NoTree(), resolve_entities=False)
    citation_end, rest = _CITATION_ENDS[name], rest[beginning.end() :]
    for chunk in itertools.chain([b""], chunks):
        *parts, rest = (rest + chunk).split(citation_end)
        for citation in (part + citation_end for part in parts):
            read, unread = _divide(citation)
            try:
                checker.feed(unread)
                checker.close()
            except etree.XMLSyntaxError:
                read = citation  # in which the parser finds the true place
            yield root + read + root_end
        if len(rest) > MAX_CITATION_BYTES:
            raise UserError(f"is longer than {MAX_CITATION_BYTES:,} bytes of XML")
    yield root + rest


class _NoTree:
    """Makes nothing of XML, so that a parser does no more than check it."""

    def close(self) -> None: ...


def _divide(citation: bytes) -> tuple[bytes, bytes]:
    """Divide a citation into what is read and what is not.

    A part between two tags that is well-formed by itself, which the caller checks, is the content of the first tag or
    follows it within the same element: no other citation can be lost with it.
    """
    read, unread, place = [], [], len(citation)
    for start, end in _UNREAD:
        last = citation.rfind(end, 0, place)
        first = citation.rfind(start, 0, last) + len(start)
        if len(start) <= first <= last and citation.find(_READ_BEHIND_ARTICLE, first, last) < 0:
            read.append(citation[last:place])
            unread += b"<part>", citation[first:last], b"</part>"
            place = first
    read.append(citation[:place])
    return b"".join(reversed(read)), b"".join([b"<parts>", *unread, b"</parts>"])


def _records(element: etree._Element) -> Iterator[Record]:
    """The records of one child of the root element."""
    if element.tag in ("DeleteCitation", "DeleteDocument"):
        for pmid in element:
            yield _empty_record(pmid) | {"deleted": True}
        return
    citations = element if element.tag in ("PubmedArticle", "PubmedBookArticle") else [element]
    records = [_record(citation) for citation in citations if citation.tag in ("MedlineCitation", "BookDocument")]
    if not records:
        raise UserError(f"is no citation but an element {element.tag}")
    yield from records


def _record(citation: etree._Element) -> Record:
    parts = _children(citation)
    # The record's own PMID is its direct child; those of cited articles stand deeper.
    record = _empty_record(parts.get("PMID"))
    corrections = parts.get("CommentsCorrectionsList", ())
    record["retracted_in"] = any([correction.get("RefType") == "RetractionIn" for correction in corrections])
    article = citation if citation.tag == "BookDocument" else parts.get("Article", ())
    parts = _children(article)
    record["title"], record["title_translated"] = clean_title(inner_text(parts.get("ArticleTitle")))
    record["sections"] = list(_sections(parts.get("Abstract", ())))
    record["year"] = _year(parts.get("Journal", parts.get("Book")))
    record["language"] = ";".join([part.text or "" for part in article if part.tag == "Language"])
    kinds = parts.get("PublicationTypeList", article)  # a book has no list of them
    record["publication_types"] = [inner_text(kind) for kind in kinds if kind.tag == "PublicationType"]
    return record


def _children(element: Sequence[etree._Element]) -> dict[str, etree._Element]:
    """The children by name; of several with one name, the first."""
    return {child.tag: child for child in reversed(element)}


def _empty_record(pmid: etree._Element | None) -> Record:
    digits = "" if pmid is None else (pmid.text or "").strip()
    version = "1" if pmid is None else pmid.get("Version", "1")
    if not (_is_number(digits, max_digits=18) and _is_number(version, max_digits=9)):
        raise UserError(f"has no PMID and version, or they are no numbers: {digits[:40]!r}, {version[:40]!r}")
    return {
        "pmid": int(digits),
        "version": int(version),
        "deleted": False,
        "title": "",
        "title_translated": False,
        "sections": [],
        "year": None,
        "language": "",
        "publication_types": [],
        "retracted_in": False,
    }


def _is_number(text: str, max_digits: int) -> bool:
    return text.isdigit() and text.isascii() and len(text) <= max_digits


def clean_title(title: str) -> tuple[str, bool]:
    """Return the title without the brackets that mark a translation, and whether it had them; "" for `[Not Available].`

    >>> clean_title("[Asthma in children].")
    ('Asthma in children.', True)
    """
    if title in NO_TITLE:
        return "", False
    bare = title.rstrip(".")
    if not (bare.startswith("[") and bare.endswith("]") and _first_bracket_closes_at_end(bare)):
        return title, False
    inner = bare[1:-1].strip()
    return (inner if inner.endswith((".", "?", "!")) or not inner else f"{inner}."), True


def _first_bracket_closes_at_end(text: str) -> bool:
    """False for "[3H]thymidine and [14C]uridine in [cells]", which no translation brackets enclose."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth == 0:
            return place == len(text) - 1
    return False


def _sections(abstract: Iterable[etree._Element]) -> Iterator[dict[str, str]]:
    """The sections that have text. CopyrightInformation is no AbstractText, and OtherAbstract stands elsewhere."""
    for section in abstract:
        text = inner_text(section) if section.tag == "AbstractText" else ""
        if text:
            label = " ".join(section.get("Label", "").split())
            yield {"label": label, "category": section.get("NlmCategory", ""), "text": text}


def _year(publication: etree._Element | None) -> int | None:
    """The year of a journal's issue or a book; the first one of a MedlineDate ("1998 Dec-1999 Jan")."""
    date = None if publication is None else next(publication.iter("Year", "MedlineDate"), None)
    year = None if date is None else _YEAR.search(date.text or "")
    return int(year[0]) if year else None
