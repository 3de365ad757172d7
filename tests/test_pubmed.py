"""PubMed's XML gives every record whole, with its own PMID, and says which file is damaged and where."""

import gzip
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from lxml import etree

from healthslm.errors import UserError
from healthslm.markup import inner_text
from healthslm.pubmed import clean_title, read_records

SAMPLE = Path(__file__).resolve().parents[1] / "sample" / "pubmed"
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
    """What another parser reads of a record."""

    pmid: int
    deleted: bool = False
    title: Element | None = None
    sections: list[Element] = field(default_factory=list)


def read_by_the_standard_library(path: Path) -> Iterator[Expected]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag in ("MedlineCitation", "BookDocument"):
                article = element.find("Article") if element.tag == "MedlineCitation" else element
                yield Expected(
                    pmid=int(element.findtext("PMID")),
                    title=article.find("ArticleTitle"),
                    sections=[section for section in article.findall("Abstract/AbstractText") if plain_text(section)],
                )
            elif element.tag == "DeleteCitation":
                yield from (Expected(int(pmid.text), deleted=True) for pmid in element)
            if element.tag in ("MedlineCitation", "PubmedArticle"):
                element.clear()


def plain_text(element: Element | None) -> str:
    return "" if element is None else " ".join("".join(element.itertext()).split())


def assert_says(text: str, element: Element) -> None:
    """The same text; where it has superscripts or formulas, the same letters and digits in any order."""
    expected = plain_text(element)
    if any("sup" in child.tag or "math" in child.tag for child in element.iter()):
        assert letters(text) == letters(expected)
    else:
        assert text == expected


def letters(text: str) -> list[str]:
    return sorted(character for character in text if character.isalnum())


def assert_equal_to_the_standard_library(path: Path) -> None:
    for record, expected in zip(read_records(path), read_by_the_standard_library(path), strict=True):
        assert (record["pmid"], record["deleted"]) == (expected.pmid, expected.deleted)
        if plain_text(expected.title) == "[Not Available].":
            assert record["title"] == ""
        else:
            assert letters(record["title"]) == letters(plain_text(expected.title))
        for section, element in zip(record["sections"], expected.sections, strict=True):
            assert section["label"] == element.get("Label", "").strip()
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
            "import resource, sys; from pathlib import Path; from healthslm.pubmed import read_records\n"
            "for record in read_records(Path(sys.argv[1])): pass\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", code, str(test_data / "pubmed" / name)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    small, large = peaks  # KiB; the large file holds 166,000 KiB of XML
    assert large < small + 32 * 1024


@pytest.mark.parametrize(
    ("xml", "text"),
    [
        ("10<sup>5</sup> cells", "10^5 cells"),
        ("5 × 10<sup>-3</sup> cm<sup>−1</sup>", "5 × 10^-3 cm^−1"),
        ("2<sup>−ΔΔCt</sup>", "2^−ΔΔCt"),
        ("<i>R</i><sup>2</sup> = 0.9, (m/s)<sup>2</sup>", "R^2 = 0.9, (m/s)^2"),
        ("Ca<sup>2+</sup>, CD4<sup>+</sup>, SO<sub>4</sub><sup>2-</sup>", "Ca2+, CD4+, SO4^2-"),
        ("<sup>18</sup>F and [<sup>11</sup>C]", "18F and [11C]"),
        ("<i>Xyz</i><sup>-/-</sup> mice, the 2<sup>nd</sup> test of X<sup>®</sup>", "Xyz-/- mice, the 2nd test of X®"),
        ("H<sub>2</sub>O, VO<sub>2max</sub>", "H2O, VO2max"),
        ("<b>Bold <u>and <i>nested</i></u></b>\n  text<!-- a comment --> ends", "Bold and nested text ends"),
        ("no&#160;break,\u2009thin", "no break, thin"),
    ],
)
def test_inline_markup_keeps_its_meaning(xml, text):
    assert inner_text(etree.fromstring(f"<AbstractText>{xml}</AbstractText>")) == text


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        ("<m:msup><m:mn>10</m:mn> <m:mn>5</m:mn></m:msup>", "10^5"),
        ("<m:msub><m:mi>T</m:mi>\n <m:mn>1</m:mn></m:msub>", "T1"),
        ("<m:msubsup><m:mi>T</m:mi> <m:mn>2</m:mn> <m:mo>∗</m:mo></m:msubsup>", "T2∗"),
        ("<m:mfrac><m:mrow><m:mi>a</m:mi><m:mo>+</m:mo><m:mi>b</m:mi></m:mrow><m:mi>c</m:mi></m:mfrac>", "(a+b)/c"),
        ("<m:semantics><m:mi>x</m:mi><m:annotation>\\mathit{x}</m:annotation></m:semantics>", "x"),
        ("<m:mi>a</m:mi><m:mspace/><m:mtext>\u00a0</m:mtext><m:mi>b</m:mi>", "a b"),
    ],
)
def test_formulas_read_as_text(formula, text):
    xml = f'<AbstractText>at <m:math xmlns:m="http://www.w3.org/1998/Math/MathML">{formula}</m:math> it</AbstractText>'
    assert inner_text(etree.fromstring(xml)) == f"at {text} it"


def test_scripts_in_front_of_a_symbol_of_a_real_formula_stay_there(test_data):
    (record,) = read_records(test_data / "pubmed" / "samples" / "pubmed7.xml")
    assert "(1) inhaled 3He/129Xe MRI ventilation" in abstract(record)
    assert "ultrashort echo-time 1H MRI proton density" in abstract(record)


@pytest.mark.parametrize(
    ("title", "cleaned", "is_translation"),
    [
        ("[Asthma in children].", "Asthma in children.", True),
        ("[Is it asthma?].", "Is it asthma?", True),
        ("[Effect of [3H]thymidine].", "Effect of [3H]thymidine.", True),
        ("[18F]FDG uptake in [cells].", "[18F]FDG uptake in [cells].", False),
        ("[3H]thymidine uptake.", "[3H]thymidine uptake.", False),
        ("[Not Available].", "", False),
        ("", "", False),
    ],
)
def test_titles_lose_the_brackets_of_a_translation_and_no_other(title, cleaned, is_translation):
    assert clean_title(title) == (cleaned, is_translation)


def test_titles_of_the_sample_are_translated_missing_or_begin_with_a_bracket_of_their_own():
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


def test_other_abstracts_and_copyright_are_no_part_of_the_abstract():
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


def test_cited_articles_are_no_records_of_their_own():
    first = list(read_records(SAMPLE / "pubmedsample26n0001.xml"))
    assert [record["pmid"] - 99_000_000 for record in first] == [*range(1, 25), 24, *range(26, 61)]


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


CITATION = (
    "<PubmedArticleSet><PubmedArticle><MedlineCitation><PMID>7</PMID><Article><ArticleTitle>{}</ArticleTitle>"
    "</Article></MedlineCitation></PubmedArticle></PubmedArticleSet>"
)


def test_no_entity_of_a_file_is_resolved(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    path = tmp_path / "a.xml"
    path.write_text(f'<!DOCTYPE x [<!ENTITY e SYSTEM "{secret.as_uri()}">]>' + CITATION.format("a &e; b"))
    (record,) = read_records(path)
    assert record["title"] == "a &e; b"


def test_entities_that_grow_without_end_are_refused(tmp_path):
    entities = '<!ENTITY e0 "ha">' + "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    path = tmp_path / "laughs.xml"
    path.write_text(f"<!DOCTYPE x [{entities}]>" + CITATION.format("&e11;"))
    try:
        (record,) = read_records(path)
        assert record["title"] == "&e11;"
    except UserError as error:
        assert str(path) in str(error)


COMPRESSED = gzip.compress((SAMPLE / "pubmedsample26n0001.xml").read_bytes())  # its checksum stands at [-8:-4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml.gz", COMPRESSED[: len(COMPRESSED) // 2], "cut short, after record [1-9]"),
        ("a.xml.gz", COMPRESSED[:9_000] + bytes(500) + COMPRESSED[9_500:], "damaged"),
        ("a.xml.gz", COMPRESSED[:-8] + bytes(4) + COMPRESSED[-4:], "damaged gzip file, after record .*CRC"),
        ("a.xml.gz", b"<html>moved</html>", "damaged gzip file, after record 0"),
        ("a.xml.gz", b"", "damaged XML, after record 0"),
        ("a.xml", (SAMPLE / "pubmedsample26n0001.xml").read_bytes()[:60_000], "damaged XML, after record 2"),
        ("a.xml", b"<html>moved</html>", "no PubMed citation in it: its root element is html"),
        ("a.xml", CITATION.format("").replace("<PMID>7", "<PMID>seven").encode(), "record 1 has no PMID"),
        ("a.xml", CITATION.format("").replace("<PMID>7</PMID>", "").encode(), "record 1 has no PMID"),
    ],
    ids=["cut", "zeros", "checksum", "no gzip", "empty", "cut XML", "other XML", "odd PMID", "no PMID"],
)
def test_a_damaged_file_is_refused_by_name_and_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        list(read_records(path))
    assert str(refusal.value).startswith(str(path)) and "\n" not in str(refusal.value)
