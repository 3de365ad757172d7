"""Every record of PubMed's XML is read completely, with its own PMID; damage is reported with file and record."""

import gzip
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from lxml import etree

from healthslm.corpus.markup import inner_text, one_line
from healthslm.corpus.pubmed import MAX_CITATION_BYTES, clean_title, read_records
from healthslm.errors import UserError

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
        ("<b>Bold <u>and <i>nested</i></u></b>\n  text ends", "Bold and nested text ends"),
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


def test_prescripts_of_a_real_formula_come_before_their_symbol(test_data):
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
def test_titles_lose_only_the_brackets_of_a_translation(title, cleaned, is_translation):
    assert clean_title(title) == (cleaned, is_translation)


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


def citation(title: str = "", pmid: str = "7", after: str = "") -> str:
    return (
        f"<PubmedArticle><MedlineCitation><PMID>{pmid}</PMID><Article><ArticleTitle>{title}</ArticleTitle></Article>"
        f"{after}</MedlineCitation></PubmedArticle>"
    )


def file_of(*citations: str, head: str = "") -> str:
    return f"{head}<PubmedArticleSet>{''.join(citations)}</PubmedArticleSet>"


def titles_until_error(path: Path) -> tuple[list[str], str]:
    """The titles of the records before an error, and the error message."""
    titles = []
    with pytest.raises(UserError) as caught:
        titles.extend(record["title"] for record in read_records(path))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return titles, str(caught.value).removeprefix(f"{path}: ")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server
        with pytest.raises(BlockingIOError):  # no connection was made
            server.accept()


@pytest.mark.parametrize(
    "declarations",
    [
        '<!ENTITY e SYSTEM "{file}">',
        '<!ENTITY e SYSTEM "{url}">',
        '<!ENTITY % p SYSTEM "{url}"> %p;',
        '<!ENTITY % p SYSTEM "{file}"> %p;',
        '<!ENTITY e0 "ha">' + "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12)),
        "",
    ],
    ids=["file", "network", "parameter from network", "parameter from file", "billion laughs", "none"],
)
@pytest.mark.parametrize("title", ["no reference", "&e;", "&e11;", '<i x="&e11;">attribute</i>'])
def test_a_file_that_may_declare_entities_is_rejected(tmp_path, listener, declarations, title):
    secret = tmp_path / "secret.txt"
    secret.write_text('<!ENTITY e "secret">')
    names = {"file": secret.as_uri(), "url": f"http://127.0.0.1:{listener.getsockname()[1]}/pubmed.dtd"}
    path = tmp_path / "a.xml"
    path.write_text(file_of(citation(title), head=f"<!DOCTYPE PubmedArticleSet [{declarations.format(**names)}]>"))
    titles, error = titles_until_error(path)
    assert titles == [] and error.startswith("record 1 cannot be reached: the file does not begin with")


@pytest.mark.parametrize("identifier", ['SYSTEM "{}"', 'PUBLIC "-//NLM//DTD PubMedArticle//EN" "{}"'])
def test_the_dtd_of_a_file_is_not_read(tmp_path, listener, identifier):
    dtd = tmp_path / "pubmed.dtd"
    dtd.write_text('<!ENTITY e "secret"><!ATTLIST ArticleTitle Label CDATA "secret">')
    path = tmp_path / "a.xml"
    for address in (dtd.as_uri(), f"http://127.0.0.1:{listener.getsockname()[1]}/pubmed.dtd"):
        head = f'<?xml version="1.0"?><!DOCTYPE PubmedArticleSet {identifier.format(address)}>'
        path.write_text(file_of(citation("plain"), citation("&e;"), citation("more"), head=head))
        assert titles_until_error(path) == (
            ["plain"],
            "damaged XML after record 1: Entity 'e' not defined; download it again",
        )


HALF_GIBIBYTE_OF = {
    "white space before the root": (b"", b" "),
    "white space between citations": (b"<PubmedArticleSet>", b"\n"),
    "comment": (b"<PubmedArticleSet><!--", b"x"),
    "title": (b"<PubmedArticleSet><PubmedArticle><MedlineCitation><PMID>7</PMID><Article><ArticleTitle>", b"x"),
    "elements": (b"<PubmedArticleSet><PubmedArticle>", b"<a/>x"),
    "attribute": (b'<PubmedArticleSet><PubmedArticle x="', b"x"),
    "root element": (b'<PubmedArticleSet x="', b"x"),
    "deletions": (b"<PubmedArticleSet><DeleteCitation>", b"<PMID>7</PMID>"),
    "citations": (b"<PubmedArticleSet>", citation("x").encode()),
}
READ_ALL = """
import resource, sys
from pathlib import Path
from healthslm.errors import UserError
from healthslm.corpus.pubmed import read_records

resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
count = 0
try:
    for record in read_records(Path(sys.argv[1])):
        count += 1
except UserError as error:
    print(error)
print(count)
"""


def read_in_memory_of(mebibytes: int, path: Path) -> tuple[str, int]:
    """The error message, and the number of records before it, in a process with limited memory."""
    command = [sys.executable, "-c", READ_ALL, str(path), str(mebibytes * 2**20)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    *error, count = run.stdout.splitlines()
    return "\n".join(error), int(count)


@pytest.mark.parametrize("name", HALF_GIBIBYTE_OF)
def test_a_decompression_bomb_is_rejected_in_little_memory(tmp_path, name):
    beginning, filling = HALF_GIBIBYTE_OF[name]
    path = tmp_path / "bomb.xml.gz"
    member = gzip.compress(filling * (2**23 // len(filling)), compresslevel=6)
    path.write_bytes(gzip.compress(beginning) + 64 * member)
    error, count = read_in_memory_of(256, path)
    reason = {"citations": "cannot be reached: the file expands to more than 100 times its size"}.get(
        name, "(cannot be reached|is longer than 12,582,912 bytes of XML)"
    )
    assert re.match(rf"{path}: record {count + 1:,} {reason}", error)


@pytest.mark.slow
@pytest.mark.parametrize(
    "filling", ["<a/>x", "<a/>", '<a b=""/>', "<sup/>", "<sup>1</sup>", f"{'<sup>a' * 240}{'</sup>' * 240}"]
)
def test_the_longest_citation_is_read_in_less_than_a_gibibyte(tmp_path, filling):
    path = tmp_path / "a.xml"
    path.write_text(file_of(citation(filling * ((MAX_CITATION_BYTES - 1000) // len(filling)))))
    assert read_in_memory_of(1024, path) == ("", 1)


@pytest.mark.parametrize("kind", ["citation", "comment after the last"])
def test_a_citation_that_is_too_long_is_rejected_by_number(tmp_path, kind):
    too_long = citation("<i>x</i>" * (MAX_CITATION_BYTES // 7)) if kind == "citation" else f"<!--{' ' * 2**24}-->"
    path = tmp_path / "a.xml"
    path.write_text(file_of(citation("one"), citation("two"), too_long))
    titles, error = titles_until_error(path)
    assert titles == ["one", "two"] and error == "record 3 is longer than 12,582,912 bytes of XML"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (citation("<i>" * 300 + "</i>" * 300), "Excessive depth"),
        (citation(f'<i x="{"y" * 10_500_000}"/>'), "limit exceeded"),
        (citation("y" * 10_500_000), "limit exceeded"),
        (citation("\0"), "0x0"),
        (citation("&#0;"), "xmlChar"),
        (citation("\udcff"), "bytes in character encoding"),
        (citation("<i>not closed"), "tag mismatch"),
        (citation("]]>"), "not allowed"),
        (citation("&eacute;"), "Entity 'eacute' not defined"),
        (citation(after="<KeywordList><Keyword></KeywordList>"), "tag mismatch"),
        (citation(after="<KeywordList>"), "tag mismatch"),
        (citation(after="<KeywordList>\udcff</KeywordList>"), "bytes in character encoding"),
        (citation(after="</Keyword>"), "tag mismatch"),
    ],
    ids=lambda value: value if len(value) < 80 else None,
)
def test_damage_is_found_anywhere(tmp_path, damage, reason):
    path = tmp_path / "a.xml"
    path.write_text(file_of(citation("one"), damage, citation("three")), errors="surrogateescape")
    titles, error = titles_until_error(path)
    assert titles == ["one"] and error.startswith("damaged XML after record 1: ") and reason in error


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-32", "cp037"])
def test_other_encodings_than_utf_8_are_rejected(tmp_path, encoding):
    path = tmp_path / "a.xml"
    path.write_bytes(file_of(citation("é"), head=f'<?xml version="1.0" encoding="{encoding}"?>').encode(encoding))
    titles, error = titles_until_error(path)
    assert titles == [] and "XML declaration in UTF-8" in error


def test_a_byte_order_mark_and_comments_are_accepted(tmp_path):
    path = tmp_path / "a.xml"
    head = '\ufeff<?xml version="1.0" encoding="UTF-8"?>\n<!-- a --><!DOCTYPE PubmedArticleSet>\n<!-- b -->\n'
    title = "A <b>bold</b><!-- c --> title &amp; <?pmcsd ?>more <![CDATA[<b>]]> &#233;"
    path.write_text(file_of("<!-- d -->", citation(title), "<?e f?>", head=head))
    assert [record["title"] for record in read_records(path)] == ["A bold title & more <b> é"]


AUTHORS = '<AuthorList CompleteYN="Y"><Author><LastName>x</LastName></Author></AuthorList>'


@pytest.mark.parametrize(
    "after",
    [
        "",
        "<MedlineCitation><PMID>8</PMID></MedlineCitation>",
        f"<Article>{AUTHORS}</Article>",
        AUTHORS.replace("</AuthorList>", "</AuthorList\n>") + "<Article/>" + AUTHORS,
        "<CommentsCorrectionsList><CommentsCorrections><PMID>8</PMID></CommentsCorrections></CommentsCorrectionsList>",
        '<AuthorList CompleteYN="Y"/><Article/>' + AUTHORS,
        "<!-- </MedlineCitation></PubmedArticle> -->",
        '<!-- <AuthorList CompleteYN="Y"> -->' + AUTHORS,
        "<![CDATA[</Article>]]>",
        "</MedlineCitation><PubmedData><Title/></PubmedData\n><MedlineCitation><PMID>8</PMID>",
        "</MedlineCitation><MedlineCitation><PMID>8</PMID>",
        "</MedlineCitation><PubmedData/></PubmedArticle\n><PubmedArticle><MedlineCitation><PMID>8</PMID>",
        "</MedlineCitation\n><PubmedData></PubmedData\n></PubmedArticle\n><PubmedArticle><MedlineCitation><PMID>8</PMID>",
        "</MedlineCitation></PubmedArticle><PubmedBookArticle><BookDocument><PMID>8</PMID></BookDocument>"
        "</PubmedBookArticle><PubmedArticle><MedlineCitation><PMID>9</PMID>",
        "</MedlineCitation></PubmedArticle><DeleteCitation><PMID>8</PMID></DeleteCitation><PubmedArticle>"
        "<MedlineCitation><PMID>9</PMID>",
    ],
)
def test_no_citation_is_lost_in_the_pieces_that_are_skipped(tmp_path, after):
    path = tmp_path / "a.xml"
    data = f"<PubmedData>{AUTHORS}</PubmedData></PubmedArticle>"
    path.write_text(file_of(*[citation(AUTHORS, after=after).replace("</PubmedArticle>", data)] * 3))
    set_of_citations = etree.parse(path).getroot()
    expected = set_of_citations.xpath("*/MedlineCitation/PMID | */BookDocument/PMID | DeleteCitation/PMID")
    try:
        assert [record["pmid"] for record in read_records(path)] == [int(pmid.text) for pmid in expected]
    except UserError as error:
        assert "damaged XML after record " in str(error)


@pytest.mark.parametrize(
    "pmid", ["seven", "", "²", "٣", "-1", "1" * 19, "1" * 5000, '7</PMID><PMID Version="x">8', "<i>7</i>"]
)
def test_a_pmid_that_is_not_a_number_is_rejected(tmp_path, pmid):
    path = tmp_path / "a.xml"
    path.write_text(file_of(citation("one"), citation("two", pmid=pmid)))
    if "Version" in pmid:  # the first PMID counts
        assert [record["pmid"] for record in read_records(path)] == [7, 7]
        return
    titles, error = titles_until_error(path)
    assert titles == ["one"] and error.startswith("record 2 has no PMID")


@pytest.mark.parametrize("version", ["", "x", "²", "1.5", "9" * 10])
@pytest.mark.parametrize("element", ["MedlineCitation", "DeleteCitation"])
def test_a_version_that_is_not_a_number_is_rejected(tmp_path, version, element):
    pmid = f'<PMID Version="{version}">8</PMID>'
    wrong = f"<{element}>{pmid}</{element}>"
    path = tmp_path / "a.xml"
    path.write_text(file_of(citation("one"), wrong))
    titles, error = titles_until_error(path)
    assert titles == ["one"] and error.startswith("record 2 has no PMID and version")


@pytest.mark.parametrize(
    ("date", "year"),
    [
        ("<Year>1999</Year>", 1999),
        ("<MedlineDate>1998 Dec-1999 Jan</MedlineDate>", 1998),
        ("<MedlineDate>Winter</MedlineDate>", None),
        ("<Year>99999999999999999999</Year>", None),
        ("<Year>١٩٩٩</Year>", None),
        ("<Year>19²9</Year>", None),
        ("<Year/>", None),
    ],
)
def test_a_date_without_a_plausible_year_has_none(tmp_path, date, year):
    journal = f"<Journal><JournalIssue><PubDate>{date}</PubDate></JournalIssue></Journal>"
    path = tmp_path / "a.xml"
    path.write_text(file_of(citation().replace("<Article>", f"<Article>{journal}")))
    assert [record["year"] for record in read_records(path)] == [year]


@pytest.mark.parametrize("kind", ["PubmedArticlf", "Reference"])
def test_an_element_that_is_not_a_citation_is_an_error(tmp_path, kind):
    path = tmp_path / "a.xml"
    path.write_text(file_of(citation("one"), citation("two").replace("PubmedArticle", kind), citation("three")))
    titles, error = titles_until_error(path)
    assert titles == ["one"] and error == f"record 2 is not a citation but an element {kind}"


PLAIN = (SAMPLE / "pubmedsample26n0001.xml").read_bytes()
COMPRESSED = gzip.compress(PLAIN, mtime=0)  # its checksum is at [-8:-4]
ONE = file_of(citation("one")).encode()


def test_a_gzip_file_may_have_several_members_and_zeros_after_them(tmp_path):
    path = tmp_path / "a.xml.gz"
    path.write_bytes(
        b"".join(gzip.compress(PLAIN[at : at + 10], mtime=0) for at in range(0, 2000, 10))
        + gzip.compress(PLAIN[2000:], mtime=0)
        + bytes(512)
    )
    assert list(read_records(path)) == list(read_records(SAMPLE / "pubmedsample26n0001.xml"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml.gz", COMPRESSED[: len(COMPRESSED) // 2], "truncated after record [1-9]"),
        ("a.xml.gz", COMPRESSED[:-3], "truncated after record 6"),
        ("a.xml.gz", COMPRESSED[:9_000] + bytes(500) + COMPRESSED[9_500:], "damaged"),
        ("a.xml.gz", COMPRESSED[:-8] + bytes(4) + COMPRESSED[-4:], "damaged gzip file after record .*CRC"),
        ("a.xml.gz", COMPRESSED + b"more", "damaged gzip file after record .*Not a gzipped file"),
        ("a.xml.gz", b"<html>moved</html>", "damaged gzip file after record 0"),
        ("a.xml.gz", b"", "record 1 cannot be reached"),
        ("a.xml.gz", gzip.compress(b"", mtime=0), "record 1 cannot be reached"),
        ("a.xml", b"", "record 1 cannot be reached"),
        ("a.xml", PLAIN[:60_000], "damaged XML after record 2"),
        ("a.xml", b"<PubmedArticleSet><Pubmed", "damaged XML after record 0"),
        ("a.xml", b"<PubmedArticleSet/>", "record 1 cannot be reached"),
        ("a.xml", b"<PubmedArticleSet></PubmedArticleSet>", "record 1 is missing"),
        ("a.xml", ONE + b"<more/>", "damaged XML after record 1"),
        ("a.xml", b"<html>moved</html>", "record 1 is missing: .* root element is html"),
        ("a.xml", ONE.replace(b"<PMID>7</PMID>", b""), "record 1 has no PMID"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_rejected_with_its_name_and_the_record(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert re.search(message, titles_until_error(path)[1])


def test_a_missing_file_is_rejected_by_name(tmp_path):
    assert titles_until_error(tmp_path / "a.xml")[1] == "cannot be read: No such file or directory"


@pytest.mark.parametrize("text", ["", " ", "a b", " a b", "a  b", "a\tb", "a\nb ", "a\rb", "ä\u2009b", "\u00a0a\u3000"])
def test_one_line_has_single_spaces(text):
    assert one_line(text) == " ".join(text.split())
