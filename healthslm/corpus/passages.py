"""Splitting documents that are too long for one context into passages of whole paragraphs."""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise

# From the break that is best for a reader to the worst. Each is white space, which goes where a passage ends.
_BREAKS = (
    re.compile(r"\n\s*"),  # of paragraphs
    re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)\]]))\s+(?=["'“‘(\[]?[^\W\d_a-z])"""),  # of sentences
    re.compile(r"\s+"),  # of words
)
_LONGEST_CHARACTER = 4  # bytes


def split_passages(text: str, max_bytes: int) -> list[str]:
    """Split `text` into as few passages of at most `max_bytes` bytes of UTF-8 as whole paragraphs allow, evenly filled.

    Paragraphs are lines. One that alone is longer is taken as its sentences, a sentence that alone is longer as its
    words, and a word as its characters, of which a letter and its combining marks are one. Only white space is lost,
    and only where a passage ends. A text that is short enough stays as it is.

    Raises:
        ValueError: `max_bytes` is less than the four bytes that a character may have.
    """
    if max_bytes < _LONGEST_CHARACTER:
        raise ValueError(f"max_bytes must be at least {_LONGEST_CHARACTER}, not {max_bytes}")
    if _size(text) <= max_bytes:
        return [text]
    pieces = list(_pieces(text, 0, len(text), max_bytes, level=0))
    # Bytes in front of each piece's beginning and end: a passage's size counts the white space between its pieces.
    places = [place for piece in pieces for place in piece]
    sizes = list(accumulate((_size(text[start:end]) for start, end in pairwise([0, *places])), initial=0))[1:]
    starts, ends = sizes[::2], sizes[1::2]
    fewest = len(_pack(starts, ends, max_bytes))
    # The least capacity that needs no more passages fills them evenly.
    capacity = bisect_left(range(max_bytes), True, key=lambda size: len(_pack(starts, ends, size)) <= fewest)
    cuts = [0, *_pack(starts, ends, capacity)]
    return [text[pieces[first][0] : pieces[end - 1][1]] for first, end in pairwise(cuts)]


def _size(text: str) -> int:
    return len(text.encode())


def _pieces(text: str, start: int, end: int, max_bytes: int, level: int) -> Iterator[tuple[int, int]]:
    """Yield the beginnings and ends of the parts that stay whole, each of at most `max_bytes`."""
    if level == len(_BREAKS):
        yield from _characters(text, start, end, max_bytes)
        return
    breaks = [place for match in _BREAKS[level].finditer(text, start, end) for place in match.span()]
    for piece_start, piece_end in zip([start, *breaks[1::2]], [*breaks[::2], end], strict=True):
        if _size(text[piece_start:piece_end]) > max_bytes:
            yield from _pieces(text, piece_start, piece_end, max_bytes, level + 1)
        elif piece_start < piece_end:
            yield piece_start, piece_end


def _characters(text: str, start: int, end: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the longest runs of characters that fit and, if possible, do not end between a letter and its marks."""
    while start < end:
        stop = start + len(text[start : min(end, start + max_bytes)].encode()[:max_bytes].decode(errors="ignore"))
        before_marks = stop
        while start < before_marks < end and unicodedata.combining(text[before_marks]):
            before_marks -= 1
        stop = before_marks if before_marks > start else stop
        yield start, stop
        start = stop


def _pack(starts: list[int], ends: list[int], capacity: int) -> list[int]:
    """Fill passages one after the other; return the number of the piece behind each of them."""
    cuts, first = [], 0
    while first < len(starts):
        first = max(bisect_right(ends, starts[first] + capacity), first + 1)
        cuts.append(first)
    return cuts
