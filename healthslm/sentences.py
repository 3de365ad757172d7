"""Sentence ends in biomedical English."""

import re

# A full stop before a capital letter, a bracket or a quotation mark. It ignores "0.05", "e.g. mice" and
# "et al. (2020)" and finds the end of "E. coli was grown.", but it also splits "Dr. Smith".
_SENTENCE_END = re.compile(r"""[.!?][)\]"'”’]*(?=\s+["'“‘\[]?[^\W\d_a-z]|\s*\Z)""")


def sentence_end(text: str, place: int = 0) -> int:
    """The offset after the sentence that contains `place`, or the length of the text if no sentence ends there."""
    end = _SENTENCE_END.search(text, place)
    return end.end() if end else len(text)


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the spaces around them."""
    found = []
    start = 0
    while start < len(text):
        end = sentence_end(text, start)
        found.append(text[start:end].strip())
        start = end
    return [sentence for sentence in found if sentence]
