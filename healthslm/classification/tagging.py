"""From labeled words to labeled tokens and back, and the mentions that BIO tags describe."""

import re
from collections.abc import Sequence

from seqeval.scheme import IOB2, Entities
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import Sequence as ProcessorSequence
from transformers import PreTrainedTokenizerBase

from healthslm.classification.options import LabeledTokens

IGNORED = -100
"""Label of a token that the loss leaves out."""

_CLOSING = re.compile(r"[.,;:!?)\]}%'’/-]")
_OPENING = re.compile(r"[(\[{'’/-]")


def running_text(words: Sequence[str]) -> list[str]:
    """The words with the space before them that running text has, so that they join to a text.

    Data sets of mentions split words at punctuation and lose the spaces: "L - dopa ( 3 . 5 mg )" was "L-dopa (3.5
    mg)". This restores the usual spaces: none before closing punctuation, after opening punctuation and within numbers.
    """
    pieces = []
    for index, word in enumerate(words):
        before = words[index - 1] if index else ""
        within_number = before in (".", ",") and word[0].isdigit() and index > 1 and words[index - 2][-1].isdigit()
        attached = not before or within_number or _CLOSING.fullmatch(word) or _OPENING.fullmatch(before)
        pieces.append(word if attached else f" {word}")
    return pieces


def label_tokens(
    owners: Sequence[int | None], labels: Sequence[int], inside: Sequence[int], labeled_tokens: LabeledTokens
) -> tuple[list[int], list[int]]:
    """The labels of tokens, and the token at which each unit's label is read.

    Args:
        owners: (tokens,) The word or sentence of each token, None for special tokens, as a tokenizer's `word_ids`.
        labels: (units,) The label id of each unit.
        inside: For each label id the one of a token within a word: that of I-TYPE for B-TYPE, so that pipelines, which
            know tokens but not words, find one mention.
        labeled_tokens: Which tokens of a unit have its label. It is read at the first of them.

    Returns:
        (tokens,) labels, with IGNORED for the other tokens, and (units,) places. Units without tokens, which truncation
        has cut off at the end, have no place.
    """
    token_labels = [IGNORED] * len(owners)
    places: list[int] = []
    for place, owner in enumerate(owners):
        if owner is None:
            continue
        begins = place == 0 or owners[place - 1] != owner
        ends = place + 1 == len(owners) or owners[place + 1] != owner
        if begins if labeled_tokens == "all" else ends:
            token_labels[place] = labels[owner]
            places.append(place)
        elif labeled_tokens == "all":
            token_labels[place] = inside[labels[owner]]
    return token_labels, places


def trim_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Leave the space before a word out of its token's offsets, so that pipelines return mentions without it."""
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, ByteLevel):
        trim = ByteLevelProcessor(trim_offsets=True)
        backend.post_processor = ProcessorSequence([trim, backend.post_processor]) if backend.post_processor else trim


def mentions(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The mentions in the BIO tags of a sentence: (first word, word after the last, type).

    Strict, as IOB2 is defined: a mention begins with B-, and an I- that continues none is not part of any.
    """
    (found,) = Entities([list(tags)], IOB2).entities
    return {(mention.start, mention.end, mention.tag) for mention in found}
