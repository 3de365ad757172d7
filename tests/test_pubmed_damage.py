"""Damage in a file of PubMed is reported with the file and the record, and costs no record before it."""

import gzip
import re

import pytest
from lxml import etree
from paths import SAMPLE
from pubmed_xml import citation, file_of, titles_until_error

from healthslm.corpus.pubmed import read_records


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
    assert [record["pmid"] for record in read_records(path)] == [int(pmid.text) for pmid in expected]


def test_a_comment_with_the_end_of_a_citation_is_an_error(tmp_path):
    """The file is well-formed, but a citation is taken to end at its end tag, even in a comment."""
    path = tmp_path / "a.xml"
    damaged = citation(AUTHORS, after="<!-- </MedlineCitation></PubmedArticle> -->")
    path.write_text(file_of(citation("one"), damaged, citation("three")))
    assert len(etree.parse(path).getroot()) == 3
    titles, error = titles_until_error(path)
    assert titles == ["one"] and error.startswith("damaged XML after record 1: ")


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
