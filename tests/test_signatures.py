"""Signatures agree with sets of word n-grams of real abstracts, and are the same in every process."""

import itertools
import os
import random
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from healthslm.corpus.signatures import BANDS, ROWS, minhash_bands, ngram_hashes

TEXT = "Vitamin D3 (25-OH) and the risk of falls: a meta-analysis. Straße, ﬁbre and naïve β-cells; IL-6 > 5 µg/mL." * 2


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    all_words = words(text)
    return [tuple(all_words[start : start + n]) for start in range(len(all_words) - n + 1)]


def jaccard(first: str, second: str) -> float:
    a, b = set(ngrams(first, 5)), set(ngrams(second, 5))
    return len(a & b) / len(a | b)


def match(first: str, second: str) -> bool:
    return any(a == b for a, b in zip(minhash_bands(first), minhash_bands(second), strict=True))


def edited(text: str, edits: int, generator: random.Random) -> str:
    """The text with this many of its words replaced."""
    all_words = text.split()
    for number, position in enumerate(generator.sample(range(len(all_words)), edits)):
        all_words[position] = f"replacement{number}"
    return " ".join(all_words)


@pytest.fixture(scope="module")
def abstracts(test_data) -> list[str]:
    texts = pq.read_table(test_data / "corpus/validation.parquet", columns=["text"])["text"].to_pylist()
    return [text for text in texts if text.isascii() and len(text.split()) >= 100]


def test_pairs_match_as_often_as_their_jaccard_similarity_predicts(abstracts):
    generator = random.Random(0)
    expected, found = [], []
    for abstract in abstracts:
        copy = edited(abstract, generator.randrange(1, 13), generator)
        expected.append(1 - (1 - jaccard(abstract, copy) ** ROWS) ** BANDS)
        found.append(match(abstract, copy))
    expected = np.array(expected)
    assert len(found) > 1000 and expected.min() < 0.2 and expected.max() > 0.99
    # The number of matches is a sum of independent events, so it is within four standard deviations of its mean.
    for low, high in itertools.pairwise((0, 0.25, 0.5, 0.75, 0.95, 1)):
        group = (low <= expected) & (expected <= high)
        deviation = np.sqrt((expected[group] * (1 - expected[group])).sum())
        assert abs(np.array(found)[group].sum() - expected[group].sum()) < 4 * deviation + 1


def test_near_duplicates_nearly_always_match(abstracts):
    generator = random.Random(1)
    pairs = [(abstract, edited(abstract, 2, generator)) for abstract in abstracts]
    near = [pair for pair in pairs if jaccard(*pair) >= 0.9]
    assert len(near) > 400
    assert np.mean([match(*pair) for pair in near]) > 0.99


def test_unrelated_abstracts_never_match(abstracts):
    seen: dict[tuple[int, int], str] = {}
    for abstract in abstracts:
        for band in enumerate(minhash_bands(abstract)):
            assert band not in seen or jaccard(seen[band], abstract) > 0.4
            seen[band] = abstract


def test_a_signature_is_fourteen_signed_64_bit_numbers():
    signature = minhash_bands(TEXT)
    assert len(signature) == len(set(signature)) == 14
    assert all(type(number) is int and -(2**63) <= number < 2**63 for number in signature)


def test_short_texts_are_one_shingle_and_empty_texts_have_none():
    assert minhash_bands("") == minhash_bands(" .-!\n") == []
    assert minhash_bands("Two words") == minhash_bands("two, WORDS!") != minhash_bands("words two")
    assert len(minhash_bands("word")) == 14
    assert not set(minhash_bands("one two three four")) & set(minhash_bands("one two three"))


@pytest.mark.parametrize("n", [1, 5, 13])
def test_hashes_are_equal_if_and_only_if_the_n_grams_are(abstracts, n):
    number_of: dict[tuple[str, ...], int] = {}
    hash_of: dict[tuple[str, ...], int] = {}
    for abstract in abstracts[:300]:
        expected = ngrams(abstract.replace("_", " "), n)
        found = ngram_hashes(abstract, n)
        assert found.dtype == np.int64 and len(found) == len(expected)
        for ngram, value in zip(expected, found.tolist(), strict=True):
            assert hash_of.setdefault(ngram, value) == value
            number_of.setdefault(ngram, len(number_of))
    assert len(set(hash_of.values())) == len(number_of) > 5000


def test_the_order_of_words_matters():
    assert ngram_hashes("a b c", 3) != ngram_hashes("b a c", 3)
    assert len(set(ngram_hashes("a b a b a b", 2).tolist())) == 2
    assert len({int(ngram_hashes(" ".join(order), 5)[0]) for order in itertools.permutations("abcde")}) == 120


def test_a_text_of_fewer_than_n_words_has_no_hashes():
    assert ngram_hashes("one two three").tolist() == ngram_hashes("").tolist() == []
    assert len(ngram_hashes(" ".join("abcdefghijklm"))) == 1


@pytest.mark.parametrize("signature", [minhash_bands, ngram_hashes])
def test_case_punctuation_white_space_and_unicode_form_do_not_matter(signature):
    variant = TEXT.upper().replace(" ", " \n— ").replace("Ï", "I\u0308").replace("Β", "β").replace("-", "\u2011")
    assert list(signature(variant)) == list(signature(TEXT)) != []


def test_signatures_are_the_same_in_every_process():
    program = (
        f"from healthslm.corpus.signatures import *; print(minhash_bands({TEXT!r}), ngram_hashes({TEXT!r}).tolist())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert printed == {f"{minhash_bands(TEXT)} {ngram_hashes(TEXT).tolist()}\n"}
