"""A file of PubMed cannot read other files, connect to a server or fill the memory."""

import gzip
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pubmed_xml import citation, file_of, titles_until_error

from healthslm.corpus.pubmed import MAX_CITATION_BYTES


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
