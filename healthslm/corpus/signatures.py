"""Signatures of a text: what finds near-duplicates and text shared with evaluation data without comparing all pairs.

Both work on the words of the text in lower case, without punctuation, and give the same numbers on every machine.
"""

import re
import unicodedata

import numpy as np
from rensa import RMinHash
from xxhash import xxh3_64_intdigest

OVERLAP_WORDS = 13
SHINGLE_WORDS = 5
BANDS = 14
ROWS = 8
SEED = 1

_NON_ASCII_PUNCTUATION = re.compile(r"[^\w\x00-\x7f]")
_ASCII_PUNCTUATION_TO_SPACE = bytes(code if code > 127 or chr(code).isalnum() else ord(" ") for code in range(256))


def minhash_bands(text: str) -> list[int]:
    """The MinHash signature of the text's word 5-grams, as one signed 64-bit number for each of 14 bands of 8 rows.

    Two texts are candidates for near-duplicates where any number is equal at the same place, which happens with a
    probability of 1 - (1 - J^8)^14 for a Jaccard similarity J of their sets of 5-grams: 0.05 at J = 0.5, 0.5 at 0.68,
    0.92 at 0.8 and 0.9996 at 0.9. A text of fewer than five words is one shingle; one without words has no signature.

    Source: Broder 1997, "On the resemblance and containment of documents"; bands: Leskovec, Rajaraman and Ullman,
    "Mining of Massive Datasets", section 3.4.
    """
    words = _words(text)
    if not words:
        return []
    shingles = _ngram_hashes(words, min(SHINGLE_WORDS, len(words)))
    digests = RMinHash.digest_matrix_from_flat_token_hashes(shingles, [0, len(shingles)], BANDS * ROWS, SEED)
    rows = np.array(digests.to_rows()[0], dtype="<u4").reshape(BANDS, ROWS)
    return np.array([xxh3_64_intdigest(band.tobytes()) for band in rows], dtype=np.uint64).view(np.int64).tolist()


def ngram_hashes(text: str, n: int = OVERLAP_WORDS) -> np.ndarray:
    """The 64-bit hashes (int64) of all runs of `n` words, in their order; none where the text is shorter.

    Thirteen words are what Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C, look for in common
    between training and evaluation data.
    """
    return _ngram_hashes(_words(text), n).view(np.int64)


def _words(text: str) -> list[bytes]:
    """The text's runs of letters and digits in UTF-8, with Unicode form and case folded away."""
    text = unicodedata.normalize("NFKC", text).casefold()
    if not text.isascii():
        text = _NON_ASCII_PUNCTUATION.sub(" ", text)
    return text.encode().translate(_ASCII_PUNCTUATION_TO_SPACE).split()


def _ngram_hashes(words: list[bytes], n: int) -> np.ndarray:
    """Sums of the hashes of the words, each times an odd number that stands for its place, modulo 2^64 (uint64)."""
    count = max(len(words) - n + 1, 0)
    hashes = np.fromiter(map(xxh3_64_intdigest, words), dtype=np.uint64, count=len(words))
    sums = np.zeros(count, dtype=np.uint64)
    for place in range(n):
        multiplier = np.uint64(xxh3_64_intdigest(str(place).encode()) | 1)
        sums += hashes[place : place + count] * multiplier
    return sums
