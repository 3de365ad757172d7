"""Hashes of a text that find near-duplicates, and text shared with evaluation data, without comparing all pairs.

They are computed from the lower-case words of the text, without punctuation, and are the same on every machine.
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
    """MinHash signature of the text's word 5-grams: one signed 64-bit number for each of 14 bands of 8 rows.

    Two texts count as near-duplicates if any band is equal. The probability is 1 - (1 - J^8)^14 for a Jaccard
    similarity J of their sets of 5-grams: 0.05 at J = 0.5, 0.5 at 0.68, 0.92 at 0.8 and 0.9996 at 0.9. A text of fewer
    than five words is a single shingle. A text without words has no signature: the list is empty.

    Source: Broder, "On the resemblance and containment of documents", 1997; bands: Leskovec, Rajaraman and Ullman,
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
    """Hash all runs of `n` words in order: shape (max(words - n + 1, 0),), int64.

    The default of 13 words is that of Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C, for text
    shared between training and evaluation data.
    """
    return _ngram_hashes(_words(text), n).view(np.int64)


def _words(text: str) -> list[bytes]:
    """The runs of letters and digits of a text, as UTF-8, after Unicode normalization and case folding."""
    text = unicodedata.normalize("NFKC", text).casefold()
    if not text.isascii():
        text = _NON_ASCII_PUNCTUATION.sub(" ", text)
    return text.encode().translate(_ASCII_PUNCTUATION_TO_SPACE).split()


def _ngram_hashes(words: list[bytes], n: int) -> np.ndarray:
    """Hash runs of words: the sum of their hashes modulo 2^64 (uint64), each times an odd number for its position."""
    count = max(len(words) - n + 1, 0)
    hashes = np.fromiter(map(xxh3_64_intdigest, words), dtype=np.uint64, count=len(words))
    sums = np.zeros(count, dtype=np.uint64)
    for position in range(n):
        multiplier = np.uint64(xxh3_64_intdigest(str(position).encode()) | 1)
        sums += hashes[position : position + count] * multiplier
    return sums
