"""The documents of a corpus: their columns, ids, text and split."""

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
        "part": pa.int32(),  # number of the chunk in its document, from 1
        "title": pa.string(),
        "text": pa.string(),
        "source": pa.string(),
        "kind": pa.string(),
        "license": pa.string(),
        "year": pa.int32(),
        "sections": pa.list_(SECTION_TYPE),
    }
)

# All punctuation is below U+10000. str.translate with a table is twice as fast as a regular expression.
_NOT_ALPHANUMERIC = {code: None for code in range(0x10000) if not chr(code).isalnum()}
_PMC_ID = re.compile(r"PMC\d+")


def document_text(title: str, text: str) -> str:
    """The text that a model reads: title, newline, text; without a title, only the text."""
    return f"{title}\n{text}" if title else text


def pmid_id(pmid: int | str) -> str:
    """The id of a PubMed citation: "pmid:123"."""
    return f"pmid:{int(pmid)}"


def document_id(given: str, kind: str, source: str) -> str:
    """Turn the id that a source gives into an id that means the same document in every source.

    A number is a PMID only if the document is an abstract; other numbers and ids are prefixed with their source.
    "PMC123" becomes "pmc:PMC123", not the article's PMID: a full text is not its abstract. Ids with a prefix are kept.
    """
    if ":" in given:
        return given
    if given.isascii() and given.isdigit() and kind == "abstract":
        return pmid_id(given)
    return f"pmc:{given}" if _PMC_ID.fullmatch(given) else f"{source}:{given}"


def text_hash(text: str) -> str:
    """128-bit hexadecimal hash of the text's letters and digits.

    Copies that differ only in case, white space, punctuation or Unicode normalization have the same hash.
    """
    letters = unicodedata.normalize("NFKC", text).casefold().translate(_NOT_ALPHANUMERIC)
    return hashlib.sha256(letters.encode()).hexdigest()[:32]


def hash_key(text: str) -> int:
    """The first 64 bits of a text's SHA-256, as a signed integer for Parquet and SQL."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def split_position(identifier: str) -> float:
    """Hash an id to a number from 0 to 1: the lowest are validation documents, then test, then training."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big") / 2**64


def split_of(identifier: str, validation_fraction: float, test_fraction: float) -> str:
    """The split of a document. It depends on the id alone, so documents keep their split when others are added."""
    position = split_position(identifier)
    if position < validation_fraction:
        return "validation"
    return "test" if position < validation_fraction + test_fraction else "train"
