"""Chunks have whole paragraphs where possible, fit the limit, and lose nothing but the white space between them."""

import random
import re
import unicodedata

import pyarrow.parquet as pq
import pytest
from growth import assert_time_is_not_quadratic

from healthslm.corpus.chunks import split_into_chunks

ALPHABET = [
    "a",
    "b",
    "Word",
    ". ",
    "! ",
    "? ",
    ' said." ',
    "\n",
    "\n\n",
    " \n ",
    " ",
    "\t",
    "é",
    "e\u0301",
    "肝",
    "🧬",
    "\u0301",
]


def letters(text: str) -> str:
    return "".join(text.split())


def size(text: str) -> int:
    return len(text.encode())


@pytest.fixture(scope="module")
def full_texts(test_data) -> list[str]:
    with pq.ParquetFile(test_data / "corpus/train-fulltext-00.parquet") as file:
        return next(file.iter_batches(200, columns=["text"]))["text"].to_pylist()


def assert_splits(chunks: list[str], text: str, max_bytes: int) -> None:
    """The chunks are pieces of the text in order, with only white space before, between and after them."""
    position = 0
    for chunk in chunks:
        assert 0 < size(chunk) <= max_bytes
        start = text.index(chunk, position)
        assert not text[position:start].strip()
        position = start + len(chunk)
    assert not text[position:].strip()


def test_a_text_that_fits_is_unchanged():
    assert split_into_chunks(" Short.\n", 8) == [" Short.\n"]
    assert split_into_chunks("", 4) == [""]


@pytest.mark.parametrize("max_bytes", [4, 7, 30, 100])
def test_random_texts_lose_nothing(max_bytes):
    generator = random.Random(max_bytes)
    for _ in range(300):
        text = "".join(generator.choices(ALPHABET, k=generator.randrange(200)))
        chunks = split_into_chunks(text, max_bytes)
        if size(text) > max_bytes:
            assert_splits(chunks, text, max_bytes)
        assert letters("".join(chunks)) == letters(text)


@pytest.mark.parametrize("max_bytes", [500, 4000])
def test_full_texts_lose_nothing(full_texts, max_bytes):
    for text in full_texts:
        assert_splits(split_into_chunks(text, max_bytes), text, max_bytes)


def test_full_texts_are_split_only_between_paragraphs_if_all_paragraphs_fit(full_texts):
    fitting = [text for text in full_texts if all(size(paragraph) <= 4000 for paragraph in text.split("\n"))]
    assert len(fitting) > 50
    for text in fitting:
        paragraphs = {paragraph.strip() for paragraph in text.split("\n")}
        for chunk in split_into_chunks(text, 4000):
            assert {paragraph.strip() for paragraph in chunk.split("\n")} <= paragraphs


def test_there_are_no_more_chunks_than_by_filling_one_after_the_other(full_texts):
    compared = 0
    for text in full_texts:
        paragraphs = [paragraph.strip() for paragraph in text.split("\n") if paragraph.strip()]
        if size(text) <= 4000 or max(map(size, paragraphs)) > 4000 or "\n".join(paragraphs) != text:
            continue
        compared += 1
        filled = [""]
        for paragraph in paragraphs:
            joined = f"{filled[-1]}\n{paragraph}" if filled[-1] else paragraph
            if size(joined) <= 4000:
                filled[-1] = joined
            else:
                filled.append(paragraph)
        chunks = split_into_chunks(text, 4000)
        assert len(chunks) == len(filled)
        assert max(map(size, chunks)) <= max(map(size, filled))
    assert compared > 150


def test_chunks_are_evenly_filled():
    text = "\n".join(f"Paragraph {number}." for number in range(10, 22))
    assert [chunk.count("\n") + 1 for chunk in split_into_chunks(text, size("\n".join(["Paragraph 10."] * 11)))] == [
        6,
        6,
    ]


def test_long_paragraphs_are_split_into_sentences_then_words_then_characters():
    assert split_into_chunks("Heading\nOne is one. Two is two.", 20) == ["Heading\nOne is one.", "Two is two."]
    assert split_into_chunks("It was e.g. small here (p. 2). It grew.", 31) == [
        "It was e.g. small here (p. 2).",
        "It grew.",
    ]
    assert split_into_chunks("one two three four", 13) == ["one two", "three four"]
    assert split_into_chunks("ACGTACGTACGT", 5) == ["ACGTA", "CGTAC", "GT"]


def test_a_letter_and_its_combining_mark_stay_together():
    word = "e\u0301" * 50  # three bytes each
    chunks = split_into_chunks(word, 8)
    assert "".join(chunks) == word
    assert not any(unicodedata.combining(chunk[0]) for chunk in chunks)


def test_a_limit_below_one_character_is_rejected():
    with pytest.raises(ValueError, match="at least 4, not 3"):
        split_into_chunks("text", 3)


@pytest.mark.parametrize("piece", ["a", " ", "\n", ". ", "\u0301", ".\n", '."'])
def test_splitting_any_long_text_terminates(piece):
    def split(text: str) -> None:
        assert letters("".join(split_into_chunks(text, 1000))) == letters(text)

    assert_time_is_not_quadratic(split, lambda size: ". " + piece * (size // len(piece)) + "a")


def test_real_texts_separate_paragraphs_with_line_breaks(full_texts):
    assert sum(bool(re.search(r"[.?!]\n[A-Z]", text)) for text in full_texts) > 0.9 * len(full_texts)
