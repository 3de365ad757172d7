"""Minimal pairs: does a model prefer the biomedical term of an abstract to another term of the same kind?

A pair consists of the beginning of a held-out document, up to the end of the sentence that contains a term, and the
same text with another term of the same kind (drugs, diseases, genes and their proteins, anatomy). The lists in
`term_lists/` define the terms and their synonyms. A mention of a term makes a pair if

- it is in the text (not in the title), is a whole word (not part of "aspirin-treated" or of a longer name), and some
  text precedes it;
- it is the first mention of the term by any of its names, and its sentence has no second one: so the model can't copy
  the term from the title or an earlier sentence;
- it follows neither an article "a" or "an" nor an opening bracket, and no opening bracket follows it: grammar, or an
  abbreviation next to its full form, would reveal the term.

Each document gives at most one pair per kind. The other term is chosen among the five nearest terms that are not
mentioned anywhere in the document by any name and that are not a longer or shorter form of the original term
("hypertension", "portal hypertension"). The distance of two terms is the difference of their lengths in tokens plus the
absolute binary logarithm of the ratio of their counts in the training text, each plus one. Choices depend on hashes of
a seed and the document: neither the order nor the number of the other documents changes a pair.

In the **harder set**, the other term also fits the topic of the sentence: it is the term whose neighbors in the
training text are most similar to those of the original term, whatever its length and frequency. Documents, mentions and
rules are the same. The neighbors of a term are the words within `REACH` whitespace-separated pieces before and after
its mentions. The similarity of two terms is the cosine of their positive pointwise mutual information with each word
(Bullinaria and Levy 2007, "Extracting semantic representations from word co-occurrence statistics: A computational
study").

The model wins a pair if it assigns the higher probability to the original text: the sum of the log-probabilities of all
tokens after the separator, of which those before the term are the same for both texts. A tie counts as half. The win
rate has two baselines: `without_context`, the same comparison of the two terms alone, capitalized as at the beginning
of a document, and `more_frequent`, how often the original term is the more frequent one in the training text. Chance is
50%. 100% is out of reach, since some replacements make correct sentences too.

The method follows Warstadt et al. 2020, "BLiMP: The Benchmark of Linguistic Minimal Pairs for English".
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
from healthslm.sentences import sentence_end
from healthslm.statistics import share
from healthslm.tokenization.encoding import encode_documents, encode_texts

KINDS = ("drugs", "diseases", "genes", "anatomy")
NEAREST = 5
"""Number of candidates for the other term."""
REACH = 8
"""Pieces of text before and after a term that count as its neighborhood."""
VOCABULARY = 10_000
"""Number of words, the most frequent neighbors, by which terms are compared."""

_LISTS = Path(__file__).parent / "term_lists"
_WORD = re.compile(r"[^\W_]+")
_ARTICLE_OR_BRACKET = re.compile(r"(?:\b[Aa]n?\s+|[(\[])\Z")
_BRACKET = re.compile(r"\s*[(\[]")


@dataclass(frozen=True)
class Term:
    """A term and its synonyms."""

    kind: str
    name: str
    """The name that is searched for and that replaces other terms."""
    other_names: tuple[str, ...]

    @cached_property
    def mentions(self) -> re.Pattern[str]:
        """Matches all names, also in the plural and as part of a longer or hyphenated name. Abbreviations are
        case-sensitive."""
        names = sorted((self.name, *self.other_names), key=len, reverse=True)
        patterns = [re.escape(name) if name == name.upper() else f"(?i:{re.escape(name)})" for name in names]
        return re.compile(rf"(?<![^\W_])(?:{'|'.join(patterns)})(?:e?s)?(?![^\W_])")

    @cached_property
    def words(self) -> frozenset[str]:
        return frozenset(self.name.split())


class Mention(NamedTuple):
    """The place of a term in a text, by its main name, which may be capitalized."""

    term: Term
    start: int
    end: int


@dataclass(frozen=True)
class Pair:
    """A held-out text with its original term `true` and the replacement `other`."""

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
    """Counts of the terms in the training text."""

    @property
    def texts(self) -> tuple[str, str]:
        return self.before + self.true + self.after, self.before + self.other + self.after

    @property
    def terms_alone(self) -> tuple[str, str]:
        return _with_capital(self.true), _with_capital(self.other)

    def to_dict(self) -> dict[str, str | int]:
        """All that is needed to recreate the pair from its document, without the document's text. Places are character
        offsets."""
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
    """Read the terms of all kinds from `term_lists/`, one per line: NAME; SYNONYM; SYNONYM."""
    terms = []
    for kind in KINDS:
        for line in (_LISTS / f"{kind}.txt").read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                name, *other_names = line.split("; ")
                terms.append(Term(kind, name, tuple(other_names)))
    return terms


class TermFinder:
    """Finds terms in texts, in one pass over the words."""

    def __init__(self, terms: Iterable[Term]):
        self._names = defaultdict(list)  # by their first words
        for term in terms:
            for name in (term.name, *term.other_names):
                # Synonyms yield no mention, but longer ones, such as "heart attack", hide shorter terms.
                found = term if name == term.name else None
                for form in dict.fromkeys((name, _with_capital(name))):
                    self._names[_WORD.findall(form)[0]].append((form, found))
        for names in self._names.values():
            names.sort(key=lambda entry: -len(entry[0]))

    def find(self, text: str) -> Iterator[Mention]:
        """Yield the mentions in a text in order. None overlaps another mention or a longer name of a term."""
        last_end = 0
        for word in _WORD.finditer(text):
            if word[0] not in self._names or word.start() < last_end:
                continue
            for name, term in self._names[word[0]]:
                end = word.start() + len(name)
                if text.startswith(name, word.start()) and not _is_part_of_word(text, word.start(), end):
                    last_end = end
                    if term is not None:
                        yield Mention(term, word.start(), end)
                    break


class TermUse(NamedTuple):
    """Statistics of the terms in the training text, by their names."""

    counts: Counter[str]
    neighbors: dict[str, Counter[str]]
    """How often each word occurs near a term."""


def count_terms(texts: Iterable[str], terms: list[Term]) -> TermUse:
    """Count the mentions of each term in the training text and the words, in lower case, next to them."""
    finder = TermFinder(terms)
    use = TermUse(Counter(), defaultdict(Counter))
    for text in texts:
        for mention in finder.find(text):
            before = text[: mention.start].rsplit(maxsplit=REACH)[-REACH:]
            after = text[mention.end :].split(maxsplit=REACH)[:REACH]
            use.counts[mention.term.name] += 1
            use.neighbors[mention.term.name].update(_WORD.findall(" ".join(before + after).lower()))
    return use


def similarities(terms: list[Term], neighbors: dict[str, Counter[str]]) -> np.ndarray:
    """Similarity of the neighbors of terms, from 0 to 1, as defined above.

    Args:
        neighbors: From the result of `count_terms`.

    Returns:
        (terms, terms), float64; 0 for a term that does not occur in the training text.
    """
    total: Counter[str] = Counter()
    for words in neighbors.values():
        total.update(words)
    vocabulary = sorted(total, key=lambda word: (-total[word], word))[:VOCABULARY]
    columns = {word: column for column, word in enumerate(vocabulary)}
    counts = np.zeros((len(terms), len(columns)))
    for row, term in enumerate(terms):
        for word, count in neighbors.get(term.name, {}).items():
            if word in columns:
                counts[row, columns[word]] = count
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / max(counts.sum(), 1)
    # Information is 0 if a word occurs near a term less often than by chance, or never.
    information = np.log2(np.divide(counts, expected, out=np.ones_like(counts), where=counts > expected))
    lengths = np.linalg.norm(information, axis=1, keepdims=True)
    directions = information / np.where(lengths > 0, lengths, 1)
    # Rounded so that equal similarities stay equal whatever the order of summation.
    return (directions @ directions.T).round(6)


def build_pairs(
    documents: Iterable[dict[str, Any]],
    terms: list[Term],
    counts: Counter[str],
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    similarity: np.ndarray | None = None,
) -> list[Pair]:
    """Build the pairs of held-out documents, as defined above.

    Args:
        documents: Documents with `text` and, optionally, `title`.
        counts: From the result of `count_terms`.
        tokenizer: Defines the lengths of terms. Models with any tokenizer can be compared on the same pairs.
        similarity: (terms, terms), the result of `similarities`, for the harder set.
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
        """Candidates to replace a term, ordered by similarity, then by distance."""
        candidates = [other for other in terms if other.kind == term.kind and not _includes(term, other)]
        return sorted(candidates, key=lambda other: (-likeness(term, other), distance(term, other), other.name))

    pairs = []
    for row in documents:
        text = document_text(row.get("title") or "", row["text"])
        document = hashlib.sha256(text.encode()).hexdigest()
        usable = defaultdict(list)
        for mention in finder.find(text):
            if mention.start >= len(text) - len(row["text"]) and _makes_a_pair(text, mention):
                usable[mention.term.kind].append(mention)
        for kind in KINDS:
            key = f"{seed} {document} {kind}"
            if not usable[kind]:
                continue
            mention = min(usable[kind], key=lambda mention: hash_key(f"{key} {mention.start}"))
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
    """How often a model prefers the original term, as defined above.

    Args:
        batch_tokens: Tokens of a forward pass, see `healthslm.bits_per_byte.token_bits`.

    Returns:
        For "all" and each kind that has pairs: `pairs`, their number; `same_tokens`, the share of pairs whose terms
        have the same number of tokens; and `win_rate`, `without_context` and `more_frequent`, each {"share": …,
        "interval": [lower, upper]} with its 95% interval. The intervals of "all" take pairs as independent,
        although a document can have one of each kind.
    """

    def bits(texts: list[tuple[str, str]]) -> np.ndarray:
        """(pairs, 2): the bits of the original text and of the other one."""
        flat = [text for both in texts for text in both]
        documents = encode_documents(tokenizer, flat)
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
    """(pairs,): 1 if the first of two values is higher, 0.5 if they are equal, else 0."""
    return (np.sign(values[:, 0] - values[:, 1]) + 1) / 2


def _with_capital(name: str) -> str:
    """Capitalize a name as at the beginning of a sentence, except names with capitals or digits ("mTOR", "p53")."""
    is_plain = name == name.lower() and not any(map(str.isdigit, name))
    return name[0].upper() + name[1:] if is_plain else name


def _is_part_of_word(text: str, start: int, end: int) -> bool:
    """Whether a word character or hyphen is adjacent to text[start:end]."""
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
