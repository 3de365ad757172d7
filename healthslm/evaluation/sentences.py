"""Where sentences end in biomedical English."""

import re

# A full stop before a capital, a bracket or a quotation mark: so not in "0.05", "e.g. mice" or "et al. (2020)" but
# after "E. coli was grown." and, wrongly, within "Dr. Smith".
_SENTENCE_END = re.compile(r"""[.!?][)\]"'”’]*(?=\s+["'“‘\[]?[^\W\d_a-z]|\s*\Z)""")


def sentence_end(text: str, place: int = 0) -> int:
    """The place in `text` behind the end of the sentence in which `place` lies; that of the text where none ends."""
    end = _SENTENCE_END.search(text, place)
    return end.end() if end else len(text)
