"""Every record of PubMed's XML is read completely, with its own PMID."""

import gzip
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from paths import SAMPLE

from healthslm.corpus.pubmed import read_records

SMALL_FILES = [
    "baseline/pubmed26n0003.xml.gz",
    "updatefiles/pubmed26n0004.xml.gz",
    "updatefiles/pubmed26n0005.xml.gz",
    "samples/medsamp2014.xml.gz",
    "samples/pubmed25n0001.xml",
    "samples/pubmed25n0002.xml",
    "samples/pubmed25n0004.xml",
    "samples/pubmed6.xml",
    "samples/pubmed7.xml",
    "samples/pubmed_37041114.xml",
]
LARGE_FILES = {"baseline/pubmed26n0001.xml.gz": 29466, "baseline/pubmed26n0002.xml.gz": 20067}


def sample_records() -> dict[tuple[int, int], dict]:
    records = (record for path in sorted(SAMPLE.glob("*.xml")) for record in read_records(path))
    return {(record["pmid"] - 99_000_000, record["version"]): record for record in records if not record["deleted"]}


def abstract(record: dict) -> str:
    return " ".join(section["text"] for section in record["sections"])


@dataclass
class Expected:
    """A record as another parser reads it."""

    pmid: int
    version: int
    deleted: bool = False
    title: Element | None = None
    sections: list[Element] = field(default_factory=list)
    date: str = ""
    languages: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    retracted_in: bool = False


def read_by_the_standard_library(path: Path) -> Iterator[Expected]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag in ("MedlineCitation", "BookDocument"):
                article = element.find("Article") if element.tag == "MedlineCitation" else element
                yield Expected(
                    *pmid_and_version(element.find("PMID")),
                    title=article.find("ArticleTitle"),
                    sections=[section for section in article.findall("Abstract/AbstractText") if plain_text(section)],
                    date=plain_text(next(article.iter("PubDate"), None)),
                    languages=[language.text for language in article.findall("Language")],
                    types=[plain_text(kind) for kind in article.iter("PublicationType")],
                    retracted_in=element.find(".//CommentsCorrections[@RefType='RetractionIn']") is not None,
                )
            elif element.tag == "DeleteCitation":
                yield from (Expected(*pmid_and_version(pmid), deleted=True) for pmid in element)
            if element.tag in ("MedlineCitation", "PubmedArticle"):
                element.clear()


def pmid_and_version(pmid: Element) -> tuple[int, int]:
    return int(pmid.text), int(pmid.get("Version", "1"))


def plain_text(element: Element | None) -> str:
    return "" if element is None else " ".join("".join(element.itertext()).split())


def assert_says(text: str, element: Element) -> None:
    """Check for the same text or, if it has superscripts or formulas, the same letters and digits in any order."""
    expected = plain_text(element)
    if any("sup" in child.tag or "math" in child.tag for child in element.iter()):
        assert letters(text) == letters(expected)
    else:
        assert text == expected


def letters(text: str) -> list[str]:
    return sorted(character for character in text if character.isalnum())


def assert_equal_to_the_standard_library(path: Path) -> None:
    for record, expected in zip(read_records(path), read_by_the_standard_library(path), strict=True):
        assert (record["pmid"], record["version"]) == (expected.pmid, expected.version)
        assert (record["deleted"], record["retracted_in"]) == (expected.deleted, expected.retracted_in)
        assert (record["language"], record["publication_types"]) == (";".join(expected.languages), expected.types)
        assert str(record["year"]) in expected.date if record["year"] else not re.search(r"\d{4}", expected.date)
        if plain_text(expected.title) == "[Not Available].":
            assert record["title"] == ""
        else:
            assert letters(record["title"]) == letters(plain_text(expected.title))
        for section, element in zip(record["sections"], expected.sections, strict=True):
            assert section["label"] == element.get("Label", "").strip()
            assert section["category"] == element.get("NlmCategory", "")
            assert_says(section["text"], element)


@pytest.mark.parametrize("path", sorted(SAMPLE.glob("*.xml")), ids=lambda path: path.stem)
def test_no_record_and_no_letter_of_the_sample_is_lost(path):
    assert_equal_to_the_standard_library(path)


@pytest.mark.parametrize("name", SMALL_FILES)
def test_no_record_and_no_letter_of_real_files_is_lost(test_data, name):
    assert_equal_to_the_standard_library(test_data / "pubmed" / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_FILES)
def test_no_record_and_no_letter_of_whole_files_is_lost(test_data, name):
    path = test_data / "pubmed" / name
    assert sum(not record["deleted"] for record in read_records(path)) == LARGE_FILES[name]
    assert_equal_to_the_standard_library(path)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(test_data):
    peaks = []
    for name in ("samples/pubmed6.xml", "baseline/pubmed26n0001.xml.gz"):
        code = (
            "import resource, sys; from pathlib import Path; from healthslm.corpus.pubmed import read_records\n"
            "for record in read_records(Path(sys.argv[1])): pass\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", code, str(test_data / "pubmed" / name)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    small, large = peaks  # KiB; the large file holds 166,000 KiB of XML
    assert large < small + 32 * 1024


def test_prescripts_of_a_real_formula_come_before_their_symbol(test_data):
    (record,) = read_records(test_data / "pubmed" / "samples" / "pubmed7.xml")
    assert "(1) inhaled 3He/129Xe MRI ventilation" in abstract(record)
    assert "ultrashort echo-time 1H MRI proton density" in abstract(record)


def test_translated_missing_and_bracketed_titles_of_the_sample():
    records = sample_records()
    assert records[8, 1]["title"] == "Treatment of chronic ankle instability with balance training."
    assert records[8, 1]["title_translated"]
    assert records[9, 1]["title"] == records[10, 1]["title"] == ""
    assert records[23, 1]["title"].startswith("[18F]Fluorotracer uptake and [11C]tracer")
    assert not records[23, 1]["title_translated"]


def test_sections_keep_their_labels_and_categories():
    records = sample_records()
    assert [section["label"] for section in records[1, 1]["sections"]] == [
        "BACKGROUND",
        "METHODS",
        "RESULTS",
        "CONCLUSIONS",
    ]
    assert {section["label"] for section in records[5, 1]["sections"]} == {""}
    assert [section["category"] for section in records[5, 1]["sections"]] == [
        "OBJECTIVE",
        "METHODS",
        "RESULTS",
        "CONCLUSIONS",
    ]
    assert records[21, 1]["sections"][0]["label"] == "UNASSIGNED"


def test_the_abstract_leaves_out_other_abstracts_and_copyright():
    records = sample_records()
    assert "OtherAbstract" not in abstract(records[9, 1])
    assert "Copyright" not in abstract(records[1, 1]) and "©" not in abstract(records[29, 1])


def test_years_languages_and_types_are_read():
    records = sample_records()
    assert records[11, 1]["year"] == 1998  # MedlineDate 1998 Dec-1999 Jan
    assert records[12, 1]["year"] == 1986
    assert records[59, 1]["language"] == "eng;fre"
    assert records[8, 1]["publication_types"] == ["English Abstract", "Journal Article"]
    assert (records[62, 1]["year"], records[62, 1]["title"]) == (2019, "Why people faint")  # a PubmedBookArticle


def test_only_a_notice_of_retraction_marks_a_record_as_retracted_in():
    marked = [number for (number, _), record in sample_records().items() if record["retracted_in"]]
    assert marked == [16]  # number 17 has RetractionOf, 19 CommentOn


def test_cited_articles_are_not_records():
    first = list(read_records(SAMPLE / "pubmedsample26n0001.xml"))
    assert [record["pmid"] - 99_000_000 for record in first] == [*range(1, 25), 24, *range(26, 61)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        # mml:mover, mml:msub and superscripts in one sentence
        ("pubmed6.xml", "( V.O2max ) 67.6 ± 4.1 ml·kg^-1·min^-1]"),
        ("pubmed_37041114.xml", "([ZnCl2 (TMGeech)])"),
    ],
)
def test_markup_of_real_abstracts_reads_as_text(test_data, name, said):
    (record,) = read_records(test_data / "pubmed" / "samples" / name)
    assert said in abstract(record)


def test_cited_articles_of_a_long_list_are_not_records(test_data):
    path = test_data / "pubmed" / "samples" / "pubmed_37041114.xml"
    assert path.read_text().count("<Reference>") > 100
    assert [record["pmid"] for record in read_records(path)] == [37041114]


def test_a_later_file_has_a_second_version_and_a_deletion(test_data):
    first, second = (
        [(record["pmid"], record["version"], record["deleted"]) for record in read_records(path)]
        for path in sorted((test_data / "pubmed" / "samples").glob("pubmed25n000[12].xml"))
    )
    assert first == [(1001, 1, False), (1002, 1, False), (1003, 1, False)]
    assert second == [(1001, 2, False), (1002, 1, True)]


def test_a_real_title_that_is_not_available_is_empty(test_data):
    titles = [record["title"] for record in read_records(test_data / "pubmed" / "samples" / "pubmed25n0004.xml")]
    assert titles == ["Quality: link with effectiveness.", ""]


def test_old_files_have_another_root(test_data):
    records = list(read_records(test_data / "pubmed" / "samples" / "medsamp2014.xml.gz"))
    assert (sum(not record["deleted"] for record in records), records[0]["pmid"]) == (161, 10540283)


def test_deletions_are_records_too():
    records = list(read_records(SAMPLE / "pubmedsample26n0002.xml"))
    assert [(record["pmid"], record["deleted"]) for record in records] == [
        (99000030, False),
        (99000061, False),
        (99000046, True),
        (99000047, True),
        (99000990, True),
    ]
