"""What a document of the corpus is: its columns, its text, its identity and the split it belongs to."""

import hashlib
import re
import unicodedata

import pyarrow as pa

SPLITS = ("train", "validation", "test")

SECTION_TYPE = pa.struct(
    {"label": pa.string(), "category": pa.string(), "start": pa.int32(), "end": pa.int32()},
)
DOCUMENT_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "part": pa.int32(),  # from 1, of a document that is longer than a part may be
        "title": pa.string(),
        "text": pa.string(),
        "source": pa.string(),
        "kind": pa.string(),
        "license": pa.string(),
        "year": pa.int32(),
        "sections": pa.list_(SECTION_TYPE),
    }
)

# Up to U+FFFF, where all punctuation lies: a table for str.translate, which is twice as fast as a regular expression.
_NOT_ALPHANUMERIC = {code: None for code in range(0x10000) if not chr(code).isalnum()}
_PMC_ID = re.compile(r"PMC\d+")


def document_text(title: str, text: str) -> str:
    """The text of a document as models see it: title, newline, text; only the text where there is no title."""
    return f"{title}\n{text}" if title else text


def pmid_id(pmid: int | str) -> str:
    """The id of a PubMed citation: "pmid:123"."""
    return f"pmid:{int(pmid)}"


def document_id(given: str, kind: str, source: str) -> str:
    """Turn the id that a source gives into one that means the same document in every source.

    A number is a PMID only in abstracts: elsewhere it may be anything, so it is qualified by its source, as other ids
    are. "PMC123" becomes "pmc:PMC123", since an article's full text is not its abstract. Ids with a prefix stay.
    """
    if ":" in given:
        return given
    if given.isascii() and given.isdigit() and kind == "abstract":
        return pmid_id(given)
    return f"pmc:{given}" if _PMC_ID.fullmatch(given) else f"{source}:{given}"


def text_hash(text: str) -> str:
    """128 bits in hexadecimal of the text's letters and digits alone, so that copies which differ in case, white space,
    punctuation or Unicode form have the same hash."""
    letters = unicodedata.normalize("NFKC", text).casefold().translate(_NOT_ALPHANUMERIC)
    return hashlib.sha256(letters.encode()).hexdigest()[:32]


def hash_key(text: str) -> int:
    """64 bits of a text's SHA-256, signed as Parquet and SQL have them."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def split_place(identifier: str) -> float:
    """Where a document lies between 0 and 1, by a hash of its id: validation comes first, then test, then training."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big") / 2**64


def split_of(identifier: str, validation_fraction: float, test_fraction: float) -> str:
    """The split of a document: a function of its id alone, so that it never changes sides when data is added."""
    place = split_place(identifier)
    if place < validation_fraction:
        return "validation"
    return "test" if place < validation_fraction + test_fraction else "train"
