"""Reading PubMed's XML: every citation of a file, and every deletion, as one record in the file's order.

The format: https://www.nlm.nih.gov/bsd/licensee/data_elements_doc.html. Nothing outside the file is touched: no DTD is
loaded, no entity of the file's own is resolved, no network is used. Memory holds one citation at a time.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lxml import etree

from healthslm.errors import UserError
from healthslm.markup import inner_text

Record = dict[str, Any]

# The root of a file is PubmedArticleSet, or MedlineCitationSet until 2015, whose citations have no PubmedArticle.
CITATIONS = {"MedlineCitation", "BookDocument"}
NO_TITLE = {"[Not Available].", "[Not Available]", "[In Process Citation].", "[In Process Citation]"}
RETRACTED_TYPES = {"Retracted Publication"}
RETRACTION_NOTICE_TYPES = {"Retraction of Publication", "Retraction Notice"}

_YEAR = re.compile(r"\b(?:1[5-9]|20)\d\d\b")


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of an .xml or .xml.gz file: its citations, and a record with `deleted` for each deletion.

    A record has the columns of `healthslm.records.RECORD_SCHEMA`.

    Raises:
        UserError: the file is missing, cut short, damaged, not XML or not PubMed's; names the file and the place.
    """
    count = 0
    with _refusing_bad_files(path, lambda: count), _open(path) as file:
        # huge_tree stays off: it bounds the depth and the length of a text that one citation may have.
        context = etree.iterparse(
            file,
            events=("end",),
            tag=(*CITATIONS, "DeleteCitation", "PubmedArticle", "PubmedBookArticle"),
            resolve_entities=False,
            load_dtd=False,
            no_network=True,
            remove_comments=True,
            remove_pis=True,
        )
        for _, element in context:
            if element.tag in CITATIONS:
                count += 1
                yield _citation(element, path, count)
            elif element.tag == "DeleteCitation":
                for pmid in element.findall("PMID"):
                    count += 1
                    yield _empty_record(pmid, path, count) | {"deleted": True}
            _free(element)
        if count == 0:
            raise UserError(f"{path}: no PubMed citation in it: its root element is {context.root.tag}")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


@contextmanager
def _refusing_bad_files(path: Path, count: Callable[[], int]) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise UserError(f"{path}: the gzip file is cut short, after record {count():,}: fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file, after record {count():,}: {error}: fetch it again") from error
    except etree.XMLSyntaxError as error:
        raise UserError(f"{path}: damaged XML, after record {count():,}: {error.msg}: fetch it again") from error


def _free(element: etree._Element) -> None:
    """Drop an element that has been read, and what stands before it, from the tree that grows while parsing."""
    element.clear()
    parent = element.getparent()
    while parent is not None and element.getprevious() is not None:
        del parent[0]


def _empty_record(pmid: etree._Element | None, path: Path, number: int) -> Record:
    digits = "" if pmid is None else (pmid.text or "").strip()
    version = "1" if pmid is None else pmid.get("Version", "1")
    if not (digits.isdigit() and version.isdigit()):
        raise UserError(f"{path}: record {number:,} has no PMID, or one that is no number: {digits!r}")
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


def _citation(citation: etree._Element, path: Path, number: int) -> Record:
    # The record's own PMID is its direct child; those of cited articles stand deeper.
    record = _empty_record(citation.find("PMID"), path, number)
    article = citation if citation.tag == "BookDocument" else citation.find("Article")
    if article is None:
        return record
    record["title"], record["title_translated"] = clean_title(inner_text(article.find("ArticleTitle")))
    record["sections"] = list(_sections(article.find("Abstract")))
    record["year"] = _year(article.find("Book/PubDate" if article is citation else "Journal/JournalIssue/PubDate"))
    record["language"] = ";".join(language.text or "" for language in article.findall("Language"))
    record["publication_types"] = [inner_text(kind) for kind in article.iterfind(".//PublicationType")]
    corrections = citation.iterfind("CommentsCorrectionsList/CommentsCorrections")
    record["retracted_in"] = any(correction.get("RefType") == "RetractionIn" for correction in corrections)
    return record


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


def _sections(abstract: etree._Element | None) -> Iterator[dict[str, str]]:
    """The sections that have text. CopyrightInformation is no AbstractText, and OtherAbstract stands elsewhere."""
    for section in abstract.findall("AbstractText") if abstract is not None else ():
        text = inner_text(section)
        if text:
            label = " ".join(section.get("Label", "").split())
            yield {"label": label, "category": section.get("NlmCategory", ""), "text": text}


def _year(date: etree._Element | None) -> int | None:
    """The year of publication; the first one of a MedlineDate ("1998 Dec-1999 Jan")."""
    if date is None:
        return None
    match = _YEAR.search(date.findtext("Year") or date.findtext("MedlineDate") or "")
    return int(match[0]) if match else None
