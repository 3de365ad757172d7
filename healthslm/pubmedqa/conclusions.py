"""Dividing an abstract into its context and its conclusion."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_CONCLUSION = re.compile(r"conclu|interpretation|implication|significance", re.IGNORECASE)
# Labels in the text of an abstract: "METHODS: ", "Results and discussion: ".
_LABEL = re.compile(r"([A-Z][A-Za-z/&,() ]{2,50}): ")
_LABEL_WORD = re.compile(
    r"backgr|introd|object|aim|purpose|context|method|design|setting|patients|participants|material|interv|measure|"
    r"result|finding|discussion|concl|interpret|implic|significance",
    re.IGNORECASE,
)
# Unlike in `healthslm.sentences`, a sentence may begin with a digit, since some abstracts number theirs.
_SENTENCE = re.compile(r"""(?=\S).*?(?:[.!?][)\]"'”’]*(?=\s+["'“‘(\[]?[A-Z0-9])|\Z)""", re.DOTALL)
_CUE = re.compile(
    r"(?:in conclusion|in summary|we conclude|it is concluded|it was concluded|our (?:data|results|findings|study)|"
    r"th(?:ese|is|e) (?:data|results?|findings|study|observations?|work)\b.*\b"
    r"(?:suggest|indicate|show|demonstrate|support)|"
    r"thus\b|therefore\b|hence\b|taken together|collectively|altogether|overall,)",
    re.IGNORECASE,
)
_MOST_SENTENCES = 3


class Abstract(NamedTuple):
    """An abstract without its conclusion, and the conclusion."""

    contexts: list[str]
    labels: list[str]
    """The label of each context; empty for unlabeled text."""
    conclusion: list[str]
    """Its sentences."""


def divide(text: str, sections: Sequence[Mapping[str, Any]] = ()) -> Abstract | None:
    """Divide an abstract, by its sections, by the labels in its text, or by its last sentences.

    A labeled abstract loses its conclusion and what follows it. Text without labels loses its last sentence, and those
    just before it from one that announces a conclusion ("In conclusion, ...", "These results suggest ...").

    Returns:
        None if there is no conclusion or nothing before it.
    """
    if len(sections or ()) > 1:
        pieces = [
            (_is_conclusion(section), section["label"] or "", text[section["start"] : section["end"]])
            for section in sections
        ]
    else:
        pieces = [(bool(_CONCLUSION.search(label)), label, piece) for label, piece in _labeled(text)]
    first = next((place for place, piece in enumerate(pieces) if piece[0]), None)
    if first is not None:
        contexts = [(label, piece.strip()) for _, label, piece in pieces[:first] if piece.strip()]
        conclusion = pieces[first][2].strip()
        # A label that is repeated as "Results and conclusions" holds both.
        return _abstract(contexts, sentences(conclusion)) if "result" not in pieces[first][1].lower() else None
    if len(pieces) > 1:
        return None  # labeled, but nothing says which part is the conclusion
    all_sentences = sentences(text)
    cut = len(all_sentences) - 1
    for place in range(max(cut - _MOST_SENTENCES + 1, 1), cut):
        if _CUE.match(all_sentences[place]):
            cut = place
            break
    return _abstract([("", " ".join(all_sentences[:cut]))] if cut > 0 else [], all_sentences[max(cut, 0) :])


def _abstract(contexts: list[tuple[str, str]], conclusion: list[str]) -> Abstract | None:
    if not contexts or not conclusion:
        return None
    return Abstract([text for _, text in contexts], [label for label, _ in contexts], conclusion)


def _is_conclusion(section: Mapping[str, Any]) -> bool:
    if section["category"] in (None, "", "UNASSIGNED"):
        return bool(_CONCLUSION.search(section["label"] or ""))
    return section["category"] == "CONCLUSIONS"


def _labeled(text: str) -> list[tuple[str, str]]:
    """The pieces of a text that labels divide; one piece if it has fewer than two labels."""
    found = [
        label
        for label in _LABEL.finditer(text)
        if (label.start() == 0 or text[: label.start()].endswith((". ", "? ", "! ", ") ", "] ", "\n")))
        and (label[1].isupper() or _LABEL_WORD.match(label[1]))
    ]
    if len(found) < 2 and not (found and found[0].start() and _CONCLUSION.search(found[0][1])):
        return [("", text)]
    starts = [0, *(label.start() for label in found)]
    names = ["", *(label[1] for label in found)]
    texts = [
        text[: found[0].start()],
        *(text[a.end() : b] for a, b in zip(found, [*starts[2:], len(text)], strict=True)),
    ]
    return [(name, piece) for name, piece in zip(names, texts, strict=True) if name or piece.strip()]


def sentences(text: str) -> list[str]:
    """The sentences of a text. A full stop before a capital or a digit ends one."""
    return _SENTENCE.findall(text.strip())
