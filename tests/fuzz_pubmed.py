"""Damage PubMed XML files at random, and check that no record is lost silently.

    python tests/fuzz_pubmed.py --files 20000

Each file is small and has up to three mutations. It passes if `read_records` rejects it with its name and the right
record, or returns the same records as the standard library's parser, which shares no code with ours. Files are read in
separate processes with limits on time and memory, so a crash or a hang is a finding too. Findings are saved, and the
exit status is then 1. The same seed gives the same files.

The files are made from the citations of `sample/pubmed` and of the small PubMed files in HEALTHSLM_TEST_DATA, if set.
"""

import argparse
import gzip
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element
from xml.parsers import expat

from lxml import etree
from paths import REPOSITORY
from tqdm import tqdm

from healthslm.corpus.pubmed import NO_TITLE, read_records
from healthslm.errors import UserError

MAX_SECONDS = 20
MAX_MEMORY_BYTES = 2**30
SLICE_BYTES = 12_000

KEPT = "every record kept"
DAMAGED = "rejected, and the standard library rejects it too"
STRICT = "rejected, though well-formed"
FINDING = "FINDING"

# The files that are mutated


def read_seeds() -> list[bytes]:
    """Complete files of one or a few citations."""
    paths = sorted((REPOSITORY / "sample" / "pubmed").glob("*.xml"))
    if folder := os.environ.get("HEALTHSLM_TEST_DATA"):
        paths += sorted(path for path in Path(folder).glob("pubmed/*/*") if re.search(r"\.xml(\.gz)?$", path.name))
    return [seed for path in paths if path.stat().st_size < 2**20 for seed in slices(path)]


def slices(path: Path) -> Iterator[bytes]:
    xml = path.read_bytes()
    xml = gzip.decompress(xml) if path.suffix == ".gz" else xml
    head, name, rest, end = re.fullmatch(rb"(.*?<(\w+Set)>)(.*)(</\2>\s*)", xml, re.DOTALL).groups()
    citation_end = b"</MedlineCitation>" if name == b"MedlineCitationSet" else b"</PubmedArticle>"
    batch = b""
    for piece in re.split(b"(?<=%b)" % citation_end, rest):
        if batch and len(batch) + len(piece) > SLICE_BYTES:
            yield head + batch + end
            batch = b""
        batch += piece
    yield head + batch + end


# Mutations of XML

SNIPPETS = [
    b"&amp;", b"&e;", b"&#0;", b"&#xD800;", b"&#60;", b"&#x41;", b"&", b"<", b">", b"</", b"/>", b'"', b"]]>", b"\0",
    b"<!-- a -->", b"<!--", b"-->", b"<![CDATA[ <b> ]]>", b"<![CDATA[", b"<?pmcsd ?>", b"<?", b"?>", b"\xef\xbb\xbf",
    b"<!DOCTYPE PubmedArticleSet>", b'<!DOCTYPE x [<!ENTITY e "ha">]>', b'<!ENTITY e SYSTEM "file:///etc/passwd">',
    b"<PubmedArticle>", b"</PubmedArticle>", b"</PubmedArticle >", b"<PubmedArticle/>", b"</PubmedArticleSet>",
    b"<MedlineCitation>", b"</MedlineCitation>", b"</MedlineCitation\n>", b"</Article>", b"<Article/>",
    b"<MedlineCitation><PMID>9</PMID></MedlineCitation>", b"<PubmedData>", b"</PubmedData>", b"<PubmedData/>",
    b'<AuthorList CompleteYN="Y">', b"</AuthorList>", b'<AuthorList CompleteYN="Y"/>', b"<CommentsCorrectionsList/>",
    b"<DeleteCitation><PMID>9</PMID></DeleteCitation>", b"<DeleteCitation/>", b"<PMID>9</PMID>", b"<PMID/>",
    b"<sup>2</sup>", b"<sup/>", b"<sup>" * 300, b"<i>" * 100 + b"</i>" * 100, b"x" * 5000, b" " * 5000, b"\xff",
    "\u0663\u00b2".encode(), "\U0001f9ec".encode(), "\ufffe".encode(), b"\xed\xa0\x80", b"-1", b"9" * 30,
]  # fmt: skip


def span(rng: random.Random, xml: bytes) -> slice:
    """A piece of one to a few thousand bytes."""
    start = rng.randrange(len(xml) + 1)
    return slice(start, start + int(2 ** rng.uniform(0, 12)))


def element(rng: random.Random, xml: bytes) -> slice:
    """An element, or text that looks like one."""
    start = rng.choice(list(re.finditer(rb"<(\w[\w:]*)", xml)) or [re.match(b"", xml)])
    end = re.compile(b"</%b>" % start[1]).search(xml, start.end()) if start.lastindex else None
    return slice(start.start(), end.end() if end else start.end())


def position(rng: random.Random, xml: bytes) -> int:
    """Any position, or one next to a tag."""
    next_to_tags = [match.start() for match in re.finditer(rb"(?=<)|(?<=>)", xml)]
    return rng.choice(next_to_tags) if next_to_tags and rng.random() < 0.7 else rng.randrange(len(xml) + 1)


def put(xml: bytes, at: int, new: bytes, length: int = 0) -> bytes:
    return xml[:at] + new + xml[at + length :]


def flip_bytes(rng: random.Random, xml: bytes) -> bytes:
    for _ in range(rng.randint(1, 5)):
        xml = put(xml, rng.randrange(len(xml) + 1), bytes([rng.randrange(256)]), 1)
    return xml


def flip_bit(rng: random.Random, xml: bytes) -> bytes:
    at = rng.randrange(len(xml))
    return put(xml, at, bytes([xml[at] ^ 1 << rng.randrange(8)]), 1)


def cut(rng: random.Random, xml: bytes) -> bytes:
    at = rng.randrange(len(xml) + 1)
    return xml[:at] if rng.random() < 0.8 else xml[at:]


def delete(rng: random.Random, xml: bytes) -> bytes:
    piece = rng.choice([span, element, element])(rng, xml)
    return xml[: piece.start] + xml[piece.stop :]


def duplicate(rng: random.Random, xml: bytes) -> bytes:
    piece = rng.choice([span, element, element])(rng, xml)
    return put(xml, piece.stop, xml[piece] * rng.choice([1, 1, 3]))


def copy(rng: random.Random, xml: bytes) -> bytes:
    return put(xml, position(rng, xml), xml[rng.choice([span, element, element])(rng, xml)])


def swap(rng: random.Random, xml: bytes) -> bytes:
    kind = rng.choice([span, element, element])
    first, second = sorted([kind(rng, xml), kind(rng, xml)], key=lambda piece: piece.start)
    if first.stop > second.start:
        return xml
    return b"".join([xml[: first.start], xml[second], xml[first.stop : second.start], xml[first], xml[second.stop :]])


def rename(rng: random.Random, xml: bytes) -> bytes:
    """Rename one tag, or all tags of a name: mostly to a name that occurs elsewhere in the file."""
    names = re.findall(rb"</?(\w[\w:]*)", xml)
    if not names:
        return xml
    old = rng.choice(sorted(set(names)) if rng.random() < 0.5 else names)
    new = rng.choice([rng.choice(sorted(set(names))), old + b"X", old[:-1], b"x:" + old, old.lower(), old + b" "])
    tags = list(re.finditer(rb"(?<=[</])%b(?=[\s/>])" % old, xml))
    if not tags or rng.random() < 0.6:
        return re.sub(rb"(?<=[</])%b(?=[\s/>])" % old, lambda _: new, xml)
    tag = rng.choice(tags)
    return put(xml, tag.start(), new, len(old))


def damage_attribute(rng: random.Random, xml: bytes) -> bytes:
    attributes = list(re.finditer(rb'\s(\w+)="([^"<>]*)"', xml))
    if not attributes:
        return xml
    attribute = rng.choice(attributes)
    name, value = attribute[1], attribute[2]
    values = [b"", b"<", b"&e;", b">", b"-1", b"9" * 20, "²".encode(), b"x" * 3000, b"a\tb", b"RetractionIn"]
    new = rng.choice(
        [b"", b' %b="%b"' % (name, rng.choice(values)), attribute[0] * 2, b" %b=%b" % (name, value), b' %b="' % name]
        + [b" %b='%b'" % (name, value), b' x:y="z"' + attribute[0], b" " * 50 + attribute[0]]
    )
    return put(xml, attribute.start(), new, len(attribute[0]))


def insert(rng: random.Random, xml: bytes) -> bytes:
    return put(xml, position(rng, xml), rng.choice(SNIPPETS))


def hide(rng: random.Random, xml: bytes) -> bytes:
    """Put a piece into a comment, a CDATA section, a processing instruction or an element."""
    piece = rng.choice([span, element, element])(rng, xml)
    before, after = rng.choice([(b"<!--", b"-->"), (b"<![CDATA[", b"]]>"), (b"<?x ", b"?>"), (b"<i>", b"</i>")])
    return b"".join([xml[: piece.start], before, xml[piece], after, xml[piece.stop :]])


def space_tags(rng: random.Random, xml: bytes) -> bytes:
    """Add white space at the end of some tags, where XML allows it."""
    chance = rng.choice([0.02, 0.3, 1])
    return re.sub(rb"(</\w+)>", lambda tag: tag[1] + (b"\n>" if rng.random() < chance else b">"), xml)


def change_encoding(rng: random.Random, xml: bytes) -> bytes:
    encoding = rng.choice(["latin-1", "utf-16", "utf-16-le", "utf-32", "cp037", "utf-8-sig", "ascii", "shift_jis"])
    declared = re.sub(rb'encoding="[^"]*"', b'encoding="%b"' % encoding.encode(), xml)
    if rng.random() < 0.3:
        return declared
    return rng.choice([xml, declared]).decode(errors="replace").encode(encoding, errors="ignore")


XML_MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [
    flip_bytes, flip_bit, cut, delete, duplicate, copy, swap, rename, damage_attribute, insert, insert, hide,
    space_tags, change_encoding,
]  # fmt: skip


def compress(rng: random.Random, xml: bytes) -> bytes:
    """Compress the file, usually in one member and without damage."""
    at = rng.randrange(len(xml) + 1)
    members = rng.choice([[xml], [xml[:at], xml[at:]], [b"", xml], [xml, b""]])
    packed = b"".join(gzip.compress(member, mtime=0) for member in members)
    damages = [flip_bytes, flip_bit, cut, delete, duplicate, swap]
    tails = [b"", b"", bytes(100), b"more", b"\x1f\x8b", packed[:20]]
    return rng.choice(damages)(rng, packed) if rng.random() < 0.4 else packed + rng.choice(tails)


def make_file(seed: int, index: int, seeds: list[bytes]) -> tuple[str, bytes]:
    """The name and the content of a file."""
    rng = random.Random(f"{seed} {index}")
    content = rng.choice(seeds)
    is_packed = rng.random() < 0.25
    for _ in range(rng.choice([0 if is_packed else 1, 1, 2, 3])):
        content = rng.choice(XML_MUTATIONS)(rng, content) or b" "
    return (f"{index}.xml.gz", compress(rng, content)) if is_packed else (f"{index}.xml", content)


# Expected records


class Rejected(Exception):
    """Not a PubMed file, or one with an element that is neither a citation nor a deletion."""


def expected_records(name: str, content: bytes) -> list[tuple]:
    """The records that the standard library finds. Raises Rejected or the library's own errors."""
    root = whole_document(gzip.decompress(content) if name.endswith(".gz") else content)
    return [record for child in root for record in expected_of_child(child)] or reject("no citations")


def whole_document(xml: bytes) -> Element:
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()  # without namespaces
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(xml, True)
        return builder.close()
    except expat.ExpatError:
        # Expat allows the names of XML 1.0's fourth edition, lxml the many more of the fifth.
        return etree.fromstring(xml, etree.XMLParser(resolve_entities=False, remove_comments=True, remove_pis=True))


def expected_of_child(child: Element) -> list[tuple]:
    if child.tag in ("DeleteCitation", "DeleteDocument"):
        return [(*pmid_and_version(pmid), True, "", []) for pmid in child]
    citations = child if child.tag in ("PubmedArticle", "PubmedBookArticle") else [child]
    records = [expected(element) for element in citations if element.tag in ("MedlineCitation", "BookDocument")]
    return records or reject("no citation")


def expected(citation: Element) -> tuple:
    article = citation.find("Article") if citation.tag == "MedlineCitation" else citation
    article = Element("Article") if article is None else article
    sections = [(section, letters(section)) for section in article.findall("Abstract[1]/AbstractText")]
    title = article.find("ArticleTitle")
    return (
        *pmid_and_version(citation.find("PMID")),
        False,
        "" if title is None or " ".join("".join(title.itertext()).split()) in NO_TITLE else letters(title),
        [text for section, text in sections if text is None or "".join(section.itertext()).strip()],
    )


def pmid_and_version(pmid: Element | None) -> tuple[int, int]:
    digits, version = ("", "") if pmid is None else ((pmid.text or "").strip(), pmid.get("Version", "1"))
    if re.fullmatch("[0-9]{1,18}", digits) and re.fullmatch("[0-9]{1,9}", version):
        return int(digits), int(version)
    return reject("no PMID")


def reject(reason: str):
    raise Rejected(reason)


def letters(text: Element | str) -> str | None:
    """Letters and digits only, because converting formulas adds signs. None for MathML, which has other text too."""
    if not isinstance(text, str):
        if any("math" in str(element.tag) for element in text.iter()):
            return None
        text = "".join(text.itertext())
    return "".join(character for character in text if character.isalnum())


def is_as_expected(record: dict, expected: tuple) -> bool:
    pmid, version, deleted, title, sections = expected
    return (
        (record["pmid"], record["version"], record["deleted"]) == (pmid, version, deleted)
        and (title is None or letters(record["title"]) == title)
        and len(record["sections"]) == len(sections)
        and all(
            text is None or letters(section["text"]) == text
            for section, text in zip(record["sections"], sections, strict=True)
        )
    )


# Reading one file


def examine(path: Path, content: bytes) -> tuple[str, str]:
    """Read a file; return the outcome, and the message of the error or the finding."""
    path.write_bytes(content)
    records, message = [], None
    try:
        records.extend(read_records(path))
    except UserError as error:
        message = str(error)
    except Exception as error:
        return FINDING, f"{type(error).__name__}: {error}"
    try:
        expected, reason = expected_records(path.name, content), None
    except (SyntaxError, ValueError, LookupError, Rejected, EOFError, OSError, zlib.error) as error:
        expected, reason = [], str(error) or type(error).__name__
    if message is not None:
        found = re.fullmatch(rf"{re.escape(str(path))}: .*?\b(after )?record ([\d,]+)\b.*", message)
        if not found or int(found[2].replace(",", "")) != len(records) + (not found[1]):
            return FINDING, f"rejected without the file's name or with the wrong record: {message}"
        return (DAMAGED if reason else STRICT), message.removeprefix(f"{path}: ")
    if reason:
        return FINDING, f"the standard library rejects it: {reason}"
    if len(records) != len(expected) or not all(map(is_as_expected, records, expected)):
        return FINDING, f"{len(records)} records, where the standard library finds {len(expected)}, or other text"
    return KEPT, ""


def work(seed: int, indices: range, results: Connection) -> None:
    """Examine files until one ends the process; `alarm` ends it if a file takes too long."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    seeds = read_seeds()
    with tempfile.TemporaryDirectory() as folder:
        for index in indices:
            name, content = make_file(seed, index, seeds)
            signal.alarm(MAX_SECONDS)
            outcome = examine(Path(folder) / name, content)
            signal.alarm(0)
            (Path(folder) / name).unlink()
            results.send((index, *outcome))


# All files


def examine_all(seed: int, indices: range, workers: int) -> Iterator[tuple[int, str, str]]:
    """Yield index, outcome and message of each file in any order; a file that ends its process is a finding."""
    running = dict(start(seed, indices[worker::workers]) for worker in range(workers))
    while running:
        for results in wait(list(running)):
            process, left = running.pop(results)
            try:
                result = results.recv()
                left = left[1:]
                running[results] = process, left
            except EOFError:  # the process has ended
                process.join()
                if left:
                    result = left[0], FINDING, f"the process ended with exit code {process.exitcode}"
                    running |= [start(seed, left[1:])]
                else:
                    continue
            yield result


def start(seed: int, indices: range) -> tuple[Connection, tuple[multiprocessing.Process, range]]:
    results, end = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=work, args=(seed, indices, end), daemon=True)
    process.start()
    end.close()
    return results, (process, indices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="index of the first file, to repeat a finding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "fuzz", help="folder for findings")
    options = parser.parse_args()

    seeds, outcomes, rejections = read_seeds(), Counter(), Counter()
    indices = range(options.first, options.first + options.files)
    results = examine_all(options.seed, indices, options.workers)
    for index, outcome, message in tqdm(results, total=options.files, unit="file", mininterval=1):
        outcomes[outcome] += 1
        if outcome == FINDING:
            name, content = make_file(options.seed, index, seeds)
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / name).write_bytes(content)
            tqdm.write(f"{options.output / name}: {message}")
        elif outcome == STRICT:
            rejections[re.sub(r"\d[\d,]*| on \w+", "…", re.split(" line |'", message)[0])] += 1
    for message, count in rejections.most_common():
        print(f"{count:,} {STRICT}: {message}")
    print(
        f"{sum(outcomes.values()):,} files: " + ", ".join(f"{n:,} {outcome}" for outcome, n in outcomes.most_common())
    )
    sys.exit(1 if outcomes[FINDING] else 0)


if __name__ == "__main__":
    main()
