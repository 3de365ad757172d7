"""Reading PubMed's XML: every citation and every deletion of a file becomes a record, in the order of the file.

The format is described at https://www.nlm.nih.gov/bsd/licensee/data_elements_doc.html. Only the file itself is read: no
DTD is loaded, no entity is resolved and no network is used. Memory holds one citation at a time.

The file is split after each citation. Most of a citation, such as its list of authors, is not needed for the record.
Such pieces are only checked to be well-formed; a tree, which takes three times as long, is built from the rest. So an
XML parser reads every byte, and damage anywhere in the file is found.
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

# The longest author list so far has 15,025 authors of 800 bytes each. A tree takes up to 60 times the bytes of its XML.
MAX_CITATION_BYTES = 12 * 2**20
# NCBI's files expand by a factor of 6 to 11; gzip allows 1,032.
MAX_EXPANSION = 100

_BLOCK_BYTES = 2**18
# MedlineCitationSet was the root of NCBI's files until 2015. Entrez also returns sets of book articles.
_CITATION_ENDS = {
    b"PubmedArticleSet": b"</PubmedArticle>",
    b"MedlineCitationSet": b"</MedlineCitation>",
    b"PubmedBookArticleSet": b"</PubmedBookArticle>",
}
# Only UTF-8, and no declarations in the DOCTYPE: a file cannot define entities.
_COMMENTS = rb"(?>\s+|<!--(?s:.*?)-->)*+"
_PROLOG = re.compile(
    rb"""(?:\xef\xbb\xbf)?(?:<\?xml\s+version=["']1\.0["'](?:\s+encoding=["'](?i:utf-8)["'])?\s*\?>)?"""
    rb"%b(?:<!DOCTYPE\s[^\[\]<>]*>)?%b(?P<root><(?P<name>\w+)(?:\s[^<>]*)?>)" % (_COMMENTS, _COMMENTS)
)
# The content between these tags is skipped, unless it has the one list after the article that is read.
_SKIPPED = (
    (b"<PubmedData>", b"</PubmedData"),
    (b"</Article>", b"</MedlineCitation"),
    (b'<AuthorList CompleteYN="Y">', b"</AuthorList"),
)
_READ_AFTER_ARTICLE = b"<CommentsCorrectionsList"
_YEAR = re.compile(r"\b(?:1[5-9]|20)\d\d\b", re.ASCII)


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of an .xml or .xml.gz file: one per citation, and one with `deleted` set per deletion.

    A record has the columns of `healthslm.corpus.records.RECORD_SCHEMA`.

    Raises:
        UserError: The file is missing, truncated, damaged, not XML or not PubMed's, has entities, expands to more than
            `MAX_EXPANSION` times its size, or has a citation of more than `MAX_CITATION_BYTES`; names the file and the
            record.
    """
    count = 0
    parser = etree.XMLParser(resolve_entities=False, remove_comments=True, remove_pis=True)
    with _refusing_bad_files(path, lambda: count):
        for document in _split_citations(_read_blocks(path)):
            for element in etree.fromstring(document, parser):
                for record in _records(element):
                    count += 1
                    yield record
        if count == 0:
            raise UserError("is missing: the file has neither a citation nor a deletion")


@contextmanager
def _refusing_bad_files(path: Path, count: Callable[[], int]) -> Iterator[None]:
    """Add the file and the number of the record to all errors. A UserError about a record comes without a subject."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: record {count() + 1:,} {error}") from error
    except EOFError as error:
        raise UserError(f"{path}: the gzip file is truncated after record {count():,}; download it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file after record {count():,}: {error}; download it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except etree.XMLSyntaxError as error:
        reason = re.split(", line |\n", error.msg)[0].strip()  # the line number is that within a citation
        raise UserError(f"{path}: damaged XML after record {count():,}: {reason}; download it again") from error


def _read_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as packed, gzip.open(packed) if path.suffix == ".gz" else packed as file:
        size = 0
        while block := file.read1(_BLOCK_BYTES):  # read() would lose the bytes before an error
            size += len(block)
            if size > max(MAX_CITATION_BYTES, MAX_EXPANSION * packed.tell()):
                raise UserError(f"cannot be reached: the file expands to more than {MAX_EXPANSION} times its size")
            yield block


def _split_citations(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Split a file into XML documents of one citation each, inside its root element and without the skipped pieces."""
    prolog, rest = None, b""
    while prolog is None and len(rest) < _BLOCK_BYTES and (block := next(blocks, b"")):
        rest += block
        prolog = _PROLOG.match(rest)
    if prolog is None:
        raise UserError(
            "cannot be reached: the file does not begin with an XML declaration in UTF-8, a DOCTYPE without "
            "declarations inside it, and a root element"
        )
    root, name = prolog["root"], prolog["name"]
    if name not in _CITATION_ENDS:
        raise UserError(f"is missing: no PubMed citations in a file whose root element is {name.decode()}")
    root_end = b"</%b>" % name
    etree.fromstring(prolog[0] + root_end)

    checker = etree.XMLParser(target=_NoTree(), resolve_entities=False)
    citation_end, rest = _CITATION_ENDS[name], rest[prolog.end() :]
    for block in itertools.chain([b""], blocks):
        *citations, rest = (rest + block).split(citation_end)
        for citation in (citation + citation_end for citation in citations):
            read, skipped = _divide(citation)
            try:
                checker.feed(skipped)
                checker.close()
            except etree.XMLSyntaxError:
                read = citation  # the parser then reports the right place
            yield root + read + root_end
        if len(rest) > MAX_CITATION_BYTES:
            raise UserError(f"is longer than {MAX_CITATION_BYTES:,} bytes of XML")
    yield root + rest


class _NoTree:
    """A parser target that builds nothing: the parser only checks the XML."""

    def close(self) -> None: ...


def _divide(citation: bytes) -> tuple[bytes, bytes]:
    """Divide a citation into the XML to read and an XML document of the pieces to skip.

    The caller checks that each skipped piece is well-formed by itself. It is then the content of its first tag, or
    follows that tag in the same element, so no other citation can be skipped with it.
    """
    read: list[bytes] = []
    skipped: list[bytes] = []
    stop = len(citation)
    for start_tag, end_tag in _SKIPPED:
        last = citation.rfind(end_tag, 0, stop)
        first = citation.rfind(start_tag, 0, last) + len(start_tag)
        if len(start_tag) <= first <= last and citation.find(_READ_AFTER_ARTICLE, first, last) < 0:
            read.append(citation[last:stop])
            skipped += b"<piece>", citation[first:last], b"</piece>"
            stop = first
    read.append(citation[:stop])
    return b"".join(reversed(read)), b"".join([b"<pieces>", *skipped, b"</pieces>"])


def _records(element: etree._Element) -> Iterator[Record]:
    """Yield the records of one child of the root element."""
    if element.tag in ("DeleteCitation", "DeleteDocument"):
        for pmid in element:
            yield _empty_record(pmid) | {"deleted": True}
        return
    citations = element if element.tag in ("PubmedArticle", "PubmedBookArticle") else [element]
    records = [_record(citation) for citation in citations if citation.tag in ("MedlineCitation", "BookDocument")]
    if not records:
        raise UserError(f"is not a citation but an element {element.tag}")
    yield from records


def _record(citation: etree._Element) -> Record:
    children = _children(citation)
    # The record's own PMID is a direct child; those of cited articles are deeper.
    record = _empty_record(children.get("PMID"))
    corrections = children.get("CommentsCorrectionsList", ())
    record["retracted_in"] = any([correction.get("RefType") == "RetractionIn" for correction in corrections])
    article = citation if citation.tag == "BookDocument" else children.get("Article", ())
    children = _children(article)
    record["title"], record["title_translated"] = clean_title(inner_text(children.get("ArticleTitle")))
    record["sections"] = list(_sections(children.get("Abstract", ())))
    record["year"] = _year(children.get("Journal", children.get("Book")))
    record["language"] = ";".join([child.text or "" for child in article if child.tag == "Language"])
    kinds = children.get("PublicationTypeList", article)  # in a book they are direct children
    record["publication_types"] = [inner_text(kind) for kind in kinds if kind.tag == "PublicationType"]
    return record


def _children(element: Sequence[etree._Element]) -> dict[str, etree._Element]:
    """Map names to children; of several children with the same name, to the first."""
    return {child.tag: child for child in reversed(element)}


def _empty_record(pmid: etree._Element | None) -> Record:
    digits = "" if pmid is None else (pmid.text or "").strip()
    version = "1" if pmid is None else pmid.get("Version", "1")
    if not (_is_number(digits, max_digits=18) and _is_number(version, max_digits=9)):
        raise UserError(f"has no PMID and version, or they are not numbers: {digits[:40]!r}, {version[:40]!r}")
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
    """Return a title without the brackets of a translation, and whether it had them; "" for `[Not Available].`

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
    """Whether the first bracket encloses the whole text: False for "[3H]thymidine and [14C]uridine in [cells]"."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth == 0:
            return position == len(text) - 1
    return False


def _sections(abstract: Iterable[etree._Element]) -> Iterator[dict[str, str]]:
    """Yield the sections that have text, without CopyrightInformation; OtherAbstract is not part of `abstract`."""
    for section in abstract:
        text = inner_text(section) if section.tag == "AbstractText" else ""
        if text:
            label = " ".join(section.get("Label", "").split())
            yield {"label": label, "category": section.get("NlmCategory", ""), "text": text}


def _year(publication: etree._Element | None) -> int | None:
    """The year of a journal issue or a book; for a MedlineDate ("1998 Dec-1999 Jan") the first year."""
    date = None if publication is None else next(publication.iter("Year", "MedlineDate"), None)
    year = None if date is None else _YEAR.search(date.text or "")
    return int(year[0]) if year else None
