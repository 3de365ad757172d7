"""Passages hold whole paragraphs where they can, fit the limit, and lose nothing but the white space between them."""

import random
import re
import unicodedata

import pyarrow.parquet as pq
import pytest

from healthslm.corpus.passages import split_passages

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


def assert_is_a_split_of(passages: list[str], text: str, max_bytes: int) -> None:
    """Each passage stands in the text behind the one before, and only white space lies between them and around them."""
    place = 0
    for passage in passages:
        assert 0 < size(passage) <= max_bytes
        start = text.index(passage, place)
        assert not text[place:start].strip()
        place = start + len(passage)
    assert not text[place:].strip()


def test_a_text_that_fits_stays_as_it_is():
    assert split_passages(" Short.\n", 8) == [" Short.\n"]
    assert split_passages("", 4) == [""]


@pytest.mark.parametrize("max_bytes", [4, 7, 30, 100])
def test_random_texts_lose_nothing(max_bytes):
    generator = random.Random(max_bytes)
    for _ in range(300):
        text = "".join(generator.choices(ALPHABET, k=generator.randrange(200)))
        passages = split_passages(text, max_bytes)
        if size(text) > max_bytes:
            assert_is_a_split_of(passages, text, max_bytes)
        assert letters("".join(passages)) == letters(text)


@pytest.mark.parametrize("max_bytes", [500, 4000])
def test_full_texts_lose_nothing(full_texts, max_bytes):
    for text in full_texts:
        assert_is_a_split_of(split_passages(text, max_bytes), text, max_bytes)


def test_full_texts_are_cut_between_paragraphs_alone_where_all_of_them_fit(full_texts):
    fitting = [text for text in full_texts if all(size(paragraph) <= 4000 for paragraph in text.split("\n"))]
    assert len(fitting) > 50
    for text in fitting:
        paragraphs = {paragraph.strip() for paragraph in text.split("\n")}
        for passage in split_passages(text, 4000):
            assert {paragraph.strip() for paragraph in passage.split("\n")} <= paragraphs


def test_there_are_as_few_passages_as_filling_them_one_after_the_other_gives(full_texts):
    for text in full_texts:
        paragraphs = [paragraph.strip() for paragraph in text.split("\n") if paragraph.strip()]
        if size(text) <= 4000 or max(map(size, paragraphs)) > 4000 or "\n".join(paragraphs) != text:
            continue
        filled = [""]
        for paragraph in paragraphs:
            joined = f"{filled[-1]}\n{paragraph}" if filled[-1] else paragraph
            if size(joined) <= 4000:
                filled[-1] = joined
            else:
                filled.append(paragraph)
        passages = split_passages(text, 4000)
        assert len(passages) == len(filled)
        assert max(map(size, passages)) <= max(map(size, filled))


def test_passages_are_evenly_filled():
    text = "\n".join(f"Paragraph {number}." for number in range(10, 22))
    assert [passage.count("\n") + 1 for passage in split_passages(text, size("\n".join(["Paragraph 10."] * 11)))] == [
        6,
        6,
    ]


def test_a_long_paragraph_is_cut_at_sentences_a_long_sentence_at_words_and_a_long_word_at_characters():
    assert split_passages("Heading\nOne is one. Two is two.", 20) == ["Heading\nOne is one.", "Two is two."]
    assert split_passages("It was e.g. small here (p. 2). It grew.", 31) == [
        "It was e.g. small here (p. 2).",
        "It grew.",
    ]
    assert split_passages("one two three four", 13) == ["one two", "three four"]
    assert split_passages("ACGTACGTACGT", 5) == ["ACGTA", "CGTAC", "GT"]


def test_a_letter_and_its_combining_mark_stay_together():
    word = "e\u0301" * 50  # three bytes each
    passages = split_passages(word, 8)
    assert "".join(passages) == word
    assert not any(unicodedata.combining(passage[0]) for passage in passages)


def test_a_limit_below_one_character_is_refused():
    with pytest.raises(ValueError, match="at least 4, not 3"):
        split_passages("text", 3)


@pytest.mark.parametrize("piece", ["a", " ", "\n", ". ", "\u0301", ".\n", '."'])
def test_a_long_text_of_anything_comes_to_an_end(piece):
    text = ". " + piece * (250_000 // len(piece)) + "a"
    assert letters("".join(split_passages(text, 1000))) == letters(text)


def test_the_real_texts_mark_their_paragraphs_by_line_breaks(full_texts):
    assert sum(bool(re.search(r"[.?!]\n[A-Z]", text)) for text in full_texts) > 0.9 * len(full_texts)
