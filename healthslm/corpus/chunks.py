"""Splitting documents that are longer than a context into chunks of whole paragraphs."""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise

# Where to split, from best to worst. Each break is white space, which is dropped at the end of a chunk.
_BREAKS = (
    re.compile(r"\n\s*"),  # between paragraphs
    re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)\]]))\s+(?=["'“‘(\[]?[^\W\d_a-z])"""),  # between sentences
    re.compile(r"\s+"),  # between words
)
_MAX_CHARACTER_BYTES = 4


def split_into_chunks(text: str, max_bytes: int) -> list[str]:
    """Split `text` into chunks of at most `max_bytes` bytes of UTF-8: as few as whole paragraphs allow, evenly filled.

    Every line is a paragraph. A paragraph that is too long by itself is split into sentences, a sentence into words, a
    word into characters; a letter and its combining marks stay together. Only white space between chunks is lost. A
    text that fits is returned unchanged.

    Raises:
        ValueError: `max_bytes` is less than the four bytes that a character may take.
    """
    if max_bytes < _MAX_CHARACTER_BYTES:
        raise ValueError(f"max_bytes must be at least {_MAX_CHARACTER_BYTES}, not {max_bytes}")
    if _size(text) <= max_bytes:
        return [text]
    pieces = list(_split_pieces(text, 0, len(text), max_bytes, level=0))
    # Byte offsets of each piece's start and end: the size of a chunk includes the white space between its pieces.
    bounds = [bound for piece in pieces for bound in piece]
    offsets = list(accumulate((_size(text[start:end]) for start, end in pairwise([0, *bounds])), initial=0))[1:]
    starts, ends = offsets[::2], offsets[1::2]
    fewest = len(_pack(starts, ends, max_bytes))
    # The smallest capacity that gives no more chunks fills them evenly.
    capacity = bisect_left(range(max_bytes), True, key=lambda size: len(_pack(starts, ends, size)) <= fewest)
    cuts = [0, *_pack(starts, ends, capacity)]
    return [text[pieces[first][0] : pieces[end - 1][1]] for first, end in pairwise(cuts)]


def _size(text: str) -> int:
    return len(text.encode())


def _split_pieces(text: str, start: int, end: int, max_bytes: int, level: int) -> Iterator[tuple[int, int]]:
    """Yield the start and end of the pieces that are kept whole, each of at most `max_bytes`."""
    if level == len(_BREAKS):
        yield from _split_characters(text, start, end, max_bytes)
        return
    breaks = [bound for match in _BREAKS[level].finditer(text, start, end) for bound in match.span()]
    for piece_start, piece_end in zip([start, *breaks[1::2]], [*breaks[::2], end], strict=True):
        if _size(text[piece_start:piece_end]) > max_bytes:
            yield from _split_pieces(text, piece_start, piece_end, max_bytes, level + 1)
        elif piece_start < piece_end:
            yield piece_start, piece_end


def _split_characters(text: str, start: int, end: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the longest runs of characters that fit and, if possible, do not separate a letter from its marks."""
    while start < end:
        stop = start + len(text[start : min(end, start + max_bytes)].encode()[:max_bytes].decode(errors="ignore"))
        before_marks = stop
        while start < before_marks < end and unicodedata.combining(text[before_marks]):
            before_marks -= 1
        stop = before_marks if before_marks > start else stop
        yield start, stop
        start = stop


def _pack(starts: list[int], ends: list[int], capacity: int) -> list[int]:
    """Fill chunks one after the other; return for each the number of the piece that follows it."""
    cuts, first = [], 0
    while first < len(starts):
        first = max(bisect_right(ends, starts[first] + capacity), first + 1)
        cuts.append(first)
    return cuts
