"""Minimal pairs: does a model prefer the biomedical term that an abstract has to another of its kind in its place?

A pair is the beginning of a held-out document, up to the end of the sentence in which a term of a kind stands (drugs,
diseases, genes and their proteins, anatomy), and the same text with another term of that kind. The lists in
`term_lists/` say what the terms are and by which other names they go. A mention of a term makes a pair where

- it stands in the text, not in the title, as a word of its own (no part of "aspirin-treated") and of no longer name,
  and something stands in front of it;
- it is the first mention of the term by any of its names, and no second one follows in its sentence: so the true
  term cannot be copied from the title or an earlier sentence;
- neither an article "a" or "an" nor an opening bracket stands right in front, and no opening bracket follows: grammar
  or an abbreviation and what it stands for would tell the other term without knowing either.

Of a document and kind, one mention is taken. The other term is chosen among the five nearest to the true one that are
not mentioned anywhere in the document, by any name, and neither of which words hold all those of the other
("hypertension", "portal hypertension"). Distance is the difference of their lengths in tokens plus the absolute binary
logarithm of the ratio of their counts in the training text, each plus one. Choices follow from hashes of a seed and the
document: neither the order nor the number of the other documents changes a pair.

In the **harder set** the other term also fits the subject of the sentence: whatever its length and frequency, it is the
one whose neighbours in the training text are most like those of the true term. All else is the same: the documents,
the mentions and the rules. The neighbours of a term are the words within `REACH` stretches between white space on
either side of its mentions. Two terms are compared by the cosine of their positive pointwise mutual information with
each word (Bullinaria and Levy 2007, "Extracting semantic representations from word co-occurrence statistics: A
computational study").

The model wins a pair where it gives the true text the higher probability: the sum of the log-probabilities of all
tokens behind the separator, of which those in front of the term are the same for both. A tie counts half. Two figures
stand beside this win rate: `without_context`, the same comparison of the two terms alone behind the separator, with
a capital as a document begins; and `more_frequent`, how often the true term has the higher count in the training text.
Some other terms make true sentences too, so that 100% is not to be had; chance is 50%.

Pairs in the manner of Warstadt et al. 2020, "BLiMP: The Benchmark of Linguistic Minimal Pairs for English".
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from healthslm.bits_per_byte import document_bits
from healthslm.documents import document_text, hash_key
from healthslm.evaluation.intervals import share
from healthslm.evaluation.sentences import sentence_end
from healthslm.tokenization.encoding import encode_texts, separator_id

KINDS = ("drugs", "diseases", "genes", "anatomy")
NEAREST = 5
"""Other terms among which one is chosen."""
REACH = 8
VOCABULARY = 10_000
"""The commonest neighbours, by which terms are compared."""

_LISTS = Path(__file__).parent / "term_lists"
_WORD = re.compile(r"[^\W_]+")
_ARTICLE_OR_BRACKET = re.compile(r"(?:\b[Aa]n?\s+|[(\[])\Z")
_BRACKET = re.compile(r"\s*[(\[]")


@dataclass(frozen=True)
class Term:
    """A term and all that it is called."""

    kind: str
    name: str
    """The one that is looked for and put in another's place."""
    other_names: tuple[str, ...]

    @cached_property
    def mentions(self) -> re.Pattern[str]:
        """Matches each of the names, also in the plural and as part of a longer or hyphenated name. Abbreviations are
        matched as written, other names in small letters and capitals."""
        names = sorted((self.name, *self.other_names), key=len, reverse=True)
        patterns = [re.escape(name) if name == name.upper() else f"(?i:{re.escape(name)})" for name in names]
        return re.compile(rf"(?<![^\W_])(?:{'|'.join(patterns)})(?:e?s)?(?![^\W_])")

    @cached_property
    def words(self) -> frozenset[str]:
        return frozenset(self.name.split())


class Mention(NamedTuple):
    """Where a term stands in a text by the name that is looked for, perhaps with a capital in front."""

    term: Term
    start: int
    end: int


@dataclass(frozen=True)
class Pair:
    """A held-out text in which `true` stands, and `other` in its place."""

    document: str
    """SHA-256 of the whole document, as in the published evaluation set."""
    kind: str
    before: str
    true: str
    other: str
    after: str
    """The rest of the sentence."""
    true_count: int
    other_count: int
    """How often the terms stand in the training text."""

    @property
    def texts(self) -> tuple[str, str]:
        return self.before + self.true + self.after, self.before + self.other + self.after

    @property
    def terms_alone(self) -> tuple[str, str]:
        return _with_capital(self.true), _with_capital(self.other)

    def to_dict(self) -> dict[str, str | int]:
        """What recreates the pair from its document, without the document's text: places are characters."""
        return {
            "document": self.document,
            "kind": self.kind,
            "start": len(self.before),
            "true": self.true,
            "other": self.other,
            "end": len(self.before) + len(self.true) + len(self.after),
            "true_count": self.true_count,
            "other_count": self.other_count,
        }


def read_terms() -> list[Term]:
    """The terms of all kinds, from the lists in `term_lists/`: NAME; OTHER NAME; OTHER NAME a line."""
    terms = []
    for kind in KINDS:
        for line in (_LISTS / f"{kind}.txt").read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                name, *other_names = line.split("; ")
                terms.append(Term(kind, name, tuple(other_names)))
    return terms


class TermFinder:
    """Finds terms in text, in one pass over its words."""

    def __init__(self, terms: Iterable[Term]):
        self._names = defaultdict(list)  # by their first words
        for term in terms:
            for name in (term.name, *term.other_names):
                # What is longer, such as "heart attack", hides what is shorter, by whichever name.
                found = term if name == term.name else None
                for form in dict.fromkeys((name, _with_capital(name))):
                    self._names[_WORD.search(form)[0]].append((form, found))
        for names in self._names.values():
            names.sort(key=lambda entry: -len(entry[0]))

    def find(self, text: str) -> Iterator[Mention]:
        """Yield the mentions in a text in their order. None overlaps another, or a longer name of a term."""
        behind = 0
        for word in _WORD.finditer(text):
            if word[0] not in self._names or word.start() < behind:
                continue
            for name, term in self._names[word[0]]:
                end = word.start() + len(name)
                if text.startswith(name, word.start()) and not _goes_on(text, word.start(), end):
                    behind = end
                    if term is not None:
                        yield Mention(term, word.start(), end)
                    break


class TermUse(NamedTuple):
    """How the training text uses the terms, by their names."""

    counts: Counter[str]
    neighbours: dict[str, Counter[str]]
    """How often each word stands near a term."""


def count_terms(texts: Iterable[str], terms: list[Term]) -> TermUse:
    """Count how often each term's name stands in the training text, and next to which words, in lower case."""
    finder = TermFinder(terms)
    use = TermUse(Counter(), defaultdict(Counter))
    for text in texts:
        for mention in finder.find(text):
            before = text[: mention.start].rsplit(maxsplit=REACH)[-REACH:]
            after = text[mention.end :].split(maxsplit=REACH)[:REACH]
            use.counts[mention.term.name] += 1
            use.neighbours[mention.term.name].update(_WORD.findall(" ".join(before + after).lower()))
    return use


def similarities(terms: list[Term], neighbours: dict[str, Counter[str]]) -> np.ndarray:
    """How similar the neighbours of terms are, from 0 to 1, see the module's docstring.

    Args:
        neighbours: As `count_terms` returned them.

    Returns:
        (terms, terms), float64; 0 for a term that does not stand in the training text.
    """
    total: Counter[str] = Counter()
    for words in neighbours.values():
        total.update(words)
    commonest = sorted(total, key=lambda word: (-total[word], word))[:VOCABULARY]
    columns = {word: column for column, word in enumerate(commonest)}
    counts = np.zeros((len(terms), len(columns)))
    for row, term in enumerate(terms):
        for word, count in neighbours.get(term.name, {}).items():
            if word in columns:
                counts[row, columns[word]] = count
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / max(counts.sum(), 1)
    # Where a word stands near a term less often than by chance, or never, the information counts as 0.
    information = np.log2(np.divide(counts, expected, out=np.ones_like(counts), where=counts > expected))
    lengths = np.linalg.norm(information, axis=1, keepdims=True)
    directions = information / np.where(lengths > 0, lengths, 1)
    # Rounded, so that equal ones are equal whatever the order of the sums.
    return (directions @ directions.T).round(6)


def build_pairs(
    documents: Iterable[dict[str, Any]],
    terms: list[Term],
    counts: Counter[str],
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    similarity: np.ndarray | None = None,
) -> list[Pair]:
    """Build the pairs of held-out documents, see the module's docstring.

    Args:
        documents: Rows of a corpus, of which `title` and `text` are read.
        counts: What `count_terms` returned.
        tokenizer: Measures the lengths of terms. Models of any tokenizer may be compared on the same pairs.
        similarity: (terms, terms), as `similarities` returned it, for the harder set.
    """
    finder = TermFinder(terms)
    tokens = {
        term.name: len(ids)
        for term, ids in zip(terms, encode_texts(tokenizer, [f" {term.name}" for term in terms]), strict=True)
    }
    places = {term.name: place for place, term in enumerate(terms)}

    def likeness(one: Term, other: Term) -> float:
        return 0 if similarity is None else similarity[places[one.name], places[other.name]]

    def distance(one: Term, other: Term) -> float:
        ratio = (counts[one.name] + 1) / (counts[other.name] + 1)
        return abs(tokens[one.name] - tokens[other.name]) + abs(log2(ratio))

    @cache
    def others(term: Term) -> list[Term]:
        """Those that may stand in its place, the most similar first, and of equally similar ones the nearest."""
        candidates = [other for other in terms if other.kind == term.kind and not _includes(term, other)]
        return sorted(candidates, key=lambda other: (-likeness(term, other), distance(term, other), other.name))

    pairs = []
    for row in documents:
        text = document_text(row["title"] or "", row["text"])
        document = hashlib.sha256(text.encode()).hexdigest()
        usable = defaultdict(list)
        for mention in finder.find(text):
            if mention.start >= len(text) - len(row["text"]) and _makes_a_pair(text, mention):
                usable[mention.term.kind].append(mention)
        for kind in KINDS:
            key = f"{seed} {document} {kind}"
            mention = min(usable[kind], key=lambda mention: hash_key(f"{key} {mention.start}"), default=None)
            if mention is None:
                continue
            absent = (other for other in others(mention.term) if not other.mentions.search(text))
            nearest = list(islice(absent, NEAREST if similarity is None else 1))
            if nearest:
                pairs.append(_pair(document, text, mention, nearest[hash_key(key) % len(nearest)], counts))
    return pairs


def _pair(document: str, text: str, mention: Mention, other: Term, counts: Counter[str]) -> Pair:
    true = text[mention.start : mention.end]
    return Pair(
        document=document,
        kind=mention.term.kind,
        before=text[: mention.start],
        true=true,
        other=other.name if true == mention.term.name else _with_capital(other.name),
        after=text[mention.end : sentence_end(text, mention.end)],
        true_count=counts[mention.term.name],
        other_count=counts[other.name],
    )


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    batch_tokens: int | None = None,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """How often a model prefers the true term, see the module's docstring.

    Args:
        batch_tokens: Tokens of a forward pass, as `document_bits` takes them.

    Returns:
        For "all" and each kind of which there are pairs: their number, `same_tokens`, the share of them whose terms
        have as many tokens for this tokenizer, and `win_rate`, `without_context` and `more_frequent`, each
        {"share": …, "interval": [lower, upper]} with Wilson's 95% interval.
    """

    def bits(texts: list[tuple[str, str]]) -> np.ndarray:
        """(pairs, 2): of the true and of the other text."""
        flat = [text for both in texts for text in both]
        documents = [np.array([separator_id(tokenizer), *ids]) for ids in encode_texts(tokenizer, flat)]
        return document_bits(model, documents, batch_tokens=batch_tokens, progress=progress).reshape(-1, 2)

    wins = {
        "win_rate": _wins(-bits([pair.texts for pair in pairs])),
        "without_context": _wins(-bits([pair.terms_alone for pair in pairs])),
        "more_frequent": _wins(np.array([[pair.true_count, pair.other_count] for pair in pairs])),
    }
    true_lengths, other_lengths = (
        [len(ids) for ids in encode_texts(tokenizer, [f" {term}" for term in names])]
        for names in ([pair.true for pair in pairs], [pair.other for pair in pairs])
    )
    same_tokens = np.equal(true_lengths, other_lengths)

    kinds = np.array([pair.kind for pair in pairs])
    result = {}
    for kind in ("all", *KINDS):
        chosen = (kinds == kind) | (kind == "all")
        if number := int(chosen.sum()):
            result[kind] = {"pairs": number, "same_tokens": float(same_tokens[chosen].mean())} | {
                name: share(float(won[chosen].sum()), number) for name, won in wins.items()
            }
    return result


def _wins(values: np.ndarray) -> np.ndarray:
    """(pairs,): 1 where the first of two values is the higher, half where they are equal."""
    return (np.sign(values[:, 0] - values[:, 1]) + 1) / 2


def _with_capital(name: str) -> str:
    """The name as a sentence begins; one with a capital or figure in it, "mTOR" or "p53", stays as it is."""
    is_plain = name == name.lower() and not any(map(str.isdigit, name))
    return name[0].upper() + name[1:] if is_plain else name


def _goes_on(text: str, start: int, end: int) -> bool:
    """Whether a word or hyphen stands right before or behind a place."""
    return any(
        character.isalnum() or character in "-_‐‑"
        for character in text[max(start - 1, 0) : start] + text[end : end + 1]
    )


def _includes(one: Term, other: Term) -> bool:
    return one.words <= other.words or other.words <= one.words


def _makes_a_pair(text: str, mention: Mention) -> bool:
    beginning = text[: sentence_end(text, mention.end)]
    return (
        mention.start > 0
        and len(mention.term.mentions.findall(beginning)) == 1
        and not _ARTICLE_OR_BRACKET.search(beginning[max(mention.start - 8, 0) : mention.start])
        and not _BRACKET.match(beginning, mention.end)
    )
