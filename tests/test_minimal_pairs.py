"""Minimal pairs: which mentions make a pair, which term replaces the original, and which of them wins."""

import hashlib
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_models import byte_model, byte_tokenizer

from healthslm.corpus.sources import read_rows
from healthslm.evaluation.minimal_pairs import (
    KINDS,
    Term,
    TermFinder,
    build_pairs,
    count_terms,
    read_terms,
    score_pairs,
    similarities,
)
from healthslm.statistics import share
from healthslm.tokenization.encoding import encode_texts
from healthslm.tokenization.terms import TERM_CLASSES

TERMS = [
    Term("drugs", "aspirin", ("acetylsalicylic acid", "ASA")),
    Term("drugs", "warfarin", ("coumadin",)),
    Term("drugs", "heparin", ()),
    Term("diseases", "stroke", ()),
    Term("diseases", "sepsis", ("septic shock",)),
    Term("diseases", "hypertension", ()),
    Term("diseases", "portal hypertension", ()),
    Term("anatomy", "heart", ("cardiac",)),
    Term("anatomy", "liver", ("hepatic",)),
    Term("diseases", "myocardial infarction", ("heart attack",)),
]
EQUALLY_FREQUENT = Counter({term.name: 7 for term in TERMS})


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return byte_model(max_position_embeddings=256)


def row(text: str, title: str = "A trial.") -> dict[str, str]:
    return {"title": title, "text": text}


def build(rows, tokenizer, terms=TERMS, counts=EQUALLY_FREQUENT, **settings):
    return build_pairs(rows, terms, counts, tokenizer, **settings)


def test_the_lists_have_many_terms_and_no_name_twice():
    terms = read_terms()
    names = Counter(name for term in terms for name in (term.name, *term.other_names))
    assert [name for name, times in names.items() if times > 1] == []
    assert all(name == name.strip() and name for name in names)
    assert all(sum(term.kind == kind for term in terms) >= 150 for kind in KINDS)


@pytest.mark.parametrize("kind", ["drugs", "diseases", "genes"])
def test_names_with_the_pattern_of_a_kind_are_listed_under_no_other_kind(kind):
    taken = {term.name: term.kind for term in read_terms() if TERM_CLASSES[kind].fullmatch(term.name)}
    assert len(taken) >= 50
    assert {name: listed for name, listed in taken.items() if listed != kind} == {}


def test_the_finder_equals_trying_every_name_at_every_place():
    def try_all(text: str) -> list[tuple[str, int]]:
        found, place = [], 0
        names = {
            form: (term, name == term.name)
            for term in TERMS
            for name in (term.name, *term.other_names)
            for form in (name, name[0].upper() + name[1:])
        }
        while place < len(text):
            here = [n for n in names if re.match(rf"(?<![\w-]){re.escape(n)}(?![\w-])", text[place:])]
            if place and re.match(r"[\w-]", text[place - 1]):
                here = []
            if not here:
                place += 1
                continue
            longest = max(here, key=len)
            if names[longest][1]:
                found.append((names[longest][0].name, place))
            place += len(longest)
        return found

    choose = random.Random(0)
    names = [name for term in TERMS for name in (term.name, *term.other_names)]
    pieces = [*names, *map(str.capitalize, names), "of", "attack", "portal", "s", "non", "acid"]
    finder, mentions = TermFinder(TERMS), 0
    for _ in range(100):
        text = "".join(choose.choice(pieces) + choose.choice([" ", " ", ", ", "-", "", ". ", "("]) for _ in range(12))
        found = [(mention.term.name, mention.start) for mention in finder.find(text)]
        assert found == try_all(text)
        mentions += len(found)
    assert mentions > 200


def test_only_main_names_are_counted():
    texts = ["Aspirin and aspirin, not aspirin-treated.", "Acetylsalicylic acid, a heart attack and a heart."]
    assert count_terms(texts, TERMS).counts == {"aspirin": 2, "heart": 1}


@pytest.mark.parametrize(
    "text",
    [
        "We gave aspirin daily. It helped.",
        "Aspirin helped. ASA is cheap.",  # a later sentence may mention it again
        "Results: (1) aspirin helped.",
    ],
)
def test_a_first_mention_makes_a_pair(text, tokenizer):
    (pair,) = build([row(text)], tokenizer)
    document = f"A trial.\n{text}"
    start = document.lower().index("aspirin")
    assert pair.before == document[:start] and pair.true == document[start : start + 7]
    assert pair.texts[0] == document[: document.index(".", start) + 1]
    assert pair.other.lower() in ("warfarin", "heparin") and pair.other.istitle() == pair.true.istitle()
    assert pair.texts[1] == pair.texts[0].replace(pair.true, pair.other)


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("We gave aspirin daily.", "Aspirin in children."),  # the title reveals it
        ("We gave aspirin daily.", "Acetylsalicylic acid in children."),
        ("It was an ASA trial. We gave aspirin daily.", "A trial."),
        ("We gave aspirin, and aspirin again.", "A trial."),  # twice in the sentence
        ("We gave aspirins.", "A trial."),
        ("We gave non-aspirin drugs to aspirin-treated patients.", "A trial."),
        ("We gave an aspirin tablet.", "A trial."),  # grammar reveals it
        ("We gave aspirin (an old drug) daily.", "A trial."),  # an abbreviation may reveal it
        ("We gave an old drug (aspirin) daily.", "A trial."),
        ("No such drug.", "The aspirin trial."),  # in the title only
        ("aspirin helped.", ""),  # no text precedes it
    ],
)
def test_a_mention_that_can_be_guessed_makes_no_pair(text, title, tokenizer):
    assert build([row(text, title)], tokenizer) == []


def test_the_other_term_is_not_mentioned_in_the_document_by_any_name(tokenizer):
    rows = [
        row(f"We gave aspirin daily. {word} was worse.", f"Trial {i}.")
        for i, word in enumerate(["Coumadin", "COUMADIN", "A warfarin-like drug", "Warfarin"] * 10)
    ]
    assert {pair.other.lower() for pair in build(rows, tokenizer)} == {"heparin"}


def test_the_other_term_is_no_longer_or_shorter_form_of_the_original(tokenizer):
    rows = [row("We treated hypertension.", f"Trial {i}.") for i in range(40)]
    assert {pair.other for pair in build(rows, tokenizer)} == {"stroke", "sepsis", "myocardial infarction"}


def test_the_other_term_is_among_the_five_nearest_in_tokens_and_frequency(tokenizer):
    # One letter is one token. Twice the count is a distance of one, and so is one more letter.
    terms = [Term("drugs", f"drug{'a' * n}x{m}", ()) for n in range(3) for m in range(6)]
    counts = Counter({term.name: 2 ** int(term.name[-1]) * 64 - 1 for term in terms})
    true = terms[0]
    distances = {
        term.name: abs(len(term.name) - len(true.name)) + abs(math.log2((counts[term.name] + 1) / 64))
        for term in terms[1:]
    }
    nearest = sorted(distances, key=lambda name: (distances[name], name))[:5]
    rows = [row(f"We gave {true.name} daily.", f"Trial {i}.") for i in range(100)]
    assert {pair.other for pair in build(rows, tokenizer, terms, counts)} == set(nearest)


def random_texts(count: int = 60) -> list[str]:
    choose = random.Random(1)
    words = [*(term.name for term in TERMS), "the", "of", "dose", "cohort,", "(acute", "chronic)", "Clot", "bleeding"]
    return [" ".join(choose.choices(words, k=30)) + "." for _ in range(count)]


def test_neighbors_are_the_lower_case_words_of_eight_pieces_on_either_side():
    text = "One two three four five six (seven eight-nine) Ten aspirin, A b c. D e f g h i"
    expected = "two three four five six seven eight nine ten a b c d e f g"  # the comma is a piece too
    assert count_terms([text], TERMS).neighbors == {"aspirin": Counter(expected.split())}


def test_similarity_is_the_cosine_of_positive_pointwise_mutual_information():
    """Computed from the definition, one pair of terms and one word at a time."""
    neighbors = count_terms(random_texts(), TERMS).neighbors
    together = sum(count for words in neighbors.values() for count in words.values())

    def information(term: Term) -> dict[str, float]:
        words = neighbors[term.name]
        of_word = {word: sum(others[word] for others in neighbors.values()) for word in words}
        ratios = {w: (n / together) / (words.total() / together * of_word[w] / together) for w, n in words.items()}
        return {word: max(math.log2(ratio), 0) for word, ratio in ratios.items()}

    vectors = [information(term) for term in TERMS]
    found = similarities(TERMS, neighbors)
    for one, row in zip(vectors, found, strict=True):
        for other, value in zip(vectors, row, strict=True):
            product = sum(one[word] * other.get(word, 0) for word in one)
            length = math.hypot(*one.values()) * math.hypot(*other.values())
            assert value == pytest.approx(product / length, abs=1e-6)
    np.testing.assert_allclose(found.diagonal(), 1)


def test_a_term_that_is_missing_from_the_training_text_is_similar_to_no_other():
    neighbors = count_terms([text for text in random_texts() if "heparin" not in text], TERMS).neighbors
    found = similarities(TERMS, neighbors)
    assert "heparin" not in neighbors and not found[[term.name for term in TERMS].index("heparin")].any()


def test_the_other_term_of_the_harder_set_occurs_with_the_same_words(tokenizer):
    terms = [Term("drugs", name, ()) for name in ("aspirin", "warfarin", "timolol", "latanoprost")]
    training = ["Clots dissolved when {} thinned the blood."] * 3 + ["Glaucoma patients took {} for their eyes."] * 3
    names = ["aspirin", "warfarin", "aspirin", "timolol", "latanoprost", "timolol"]
    counts, neighbors = count_terms([text.format(name) for text, name in zip(training, names, strict=True)], terms)
    rows = [row(f"We gave {term.name} daily.", f"Trial {i}.") for i, term in enumerate(terms * 10)]
    pairs = build_pairs(rows, terms, counts, tokenizer, similarity=similarities(terms, neighbors))
    assert {(pair.true, pair.other) for pair in pairs} == {
        ("aspirin", "warfarin"), ("warfarin", "aspirin"), ("timolol", "latanoprost"), ("latanoprost", "timolol")
    }  # fmt: skip
    assert {(pair.document, pair.before) for pair in pairs} == {
        (pair.document, pair.before) for pair in build_pairs(rows, terms, counts, tokenizer)
    }
    both = [row(f"We gave aspirin daily. {name} was worse.") for name in ("Warfarin", "Nothing")]
    others = [p.other for p in build_pairs(both, terms, counts, tokenizer, similarity=similarities(terms, neighbors))]
    assert others[0] != "warfarin" == others[1]


def test_a_document_gives_one_pair_per_kind_whatever_the_other_documents(tokenizer):
    text = "After {}, {} and {} the heart was well. Then came {} and the liver."
    words = [("aspirin", "stroke", "heparin", "sepsis"), ("sepsis", "warfarin", "aspirin", "stroke")]
    rows = [row(text.format(*words[i % 2]), f"Trial {i}.") for i in range(20)]
    pairs = build(rows, tokenizer)
    # Each document has several drugs and diseases, and of both kinds some term is in no document.
    assert Counter((pair.document, pair.kind) for pair in pairs) == {
        (pair.document, kind): 1 for pair in pairs for kind in ("drugs", "diseases")
    }
    assert len(pairs) == 40
    shuffled = build(random.Random(0).sample(rows, 12), tokenizer)
    assert set(shuffled) < set(pairs)
    assert build(rows, tokenizer, seed=1) != pairs


def test_a_pair_can_be_recreated_from_its_document_and_its_published_form(tokenizer):
    document = row("We gave aspirin daily. It helped.")
    (pair,) = build([document], tokenizer)
    published = pair.to_dict()
    text = f"{document['title']}\n{document['text']}"
    assert published["document"] == hashlib.sha256(text.encode()).hexdigest()
    start, end = published["start"], published["end"]
    assert text[start:].startswith(published["true"])
    rest = text[start + len(published["true"]) : end]
    assert (text[:end], text[:start] + published["other"] + rest) == pair.texts


def log_probability(model, tokenizer, prefix: str, text: str) -> float:
    """The log-probability of `text` after the separator and `prefix`, one byte at a time."""
    ids = [tokenizer.eos_token_id, *encode_texts(tokenizer, [prefix])[0]] if prefix else [tokenizer.eos_token_id]
    total = 0.0
    for token in encode_texts(tokenizer, [text])[0]:
        with torch.no_grad():
            total += torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)[token].item()
        ids.append(token)
    return total


@pytest.fixture(scope="module")
def pairs(tokenizer):
    texts = ["We gave {0} to the sick. It helped.", "After {0}, {1} was rare.", "{1} was treated by {0}."]
    rows = [
        row(text.format(drug, disease))
        for text in texts
        for drug in ("aspirin", "warfarin", "heparin")
        for disease in ("stroke", "sepsis")
    ]
    return build(rows, tokenizer, counts=Counter(aspirin=9, warfarin=9, heparin=8, stroke=3, sepsis=1))


def test_win_rates_compare_the_probabilities_of_sentences_given_the_text_before(model, tokenizer, pairs):
    wins, alone = [], []
    for pair in pairs:
        true, other = (log_probability(model, tokenizer, pair.before, t + pair.after) for t in (pair.true, pair.other))
        wins.append(true > other)
        true, other = (log_probability(model, tokenizer, "", term) for term in pair.terms_alone)
        alone.append(true > other)
    result = score_pairs(model, tokenizer, pairs)
    assert 0 < sum(wins) < len(wins) and wins != alone
    assert result["all"]["win_rate"] == share(sum(wins), len(pairs))
    assert result["all"]["without_context"] == share(sum(alone), len(pairs))
    assert list(result) == ["all", "drugs", "diseases"]
    for kind in ("drugs", "diseases"):
        of_kind = [won for won, pair in zip(wins, pairs, strict=True) if pair.kind == kind]
        assert result[kind]["pairs"] == len(of_kind)
        assert result[kind]["win_rate"] == share(sum(of_kind), len(of_kind))


def test_terms_alone_are_capitalized(pairs):
    assert {text[0].isupper() for pair in pairs for text in pair.terms_alone} == {True}


def test_ties_count_as_half(model, tokenizer, pairs):
    uniform = type(model)(model.config)
    with torch.no_grad():
        for parameter in uniform.parameters():
            parameter.zero_()
    # For a uniform model longer texts are less probable, and texts of the same length are ties.
    difference = np.array([len(pair.other) - len(pair.true) for pair in pairs])
    result = score_pairs(uniform, tokenizer, pairs)["all"]
    expected = ((np.sign(difference) + 1) / 2).mean()
    assert (difference == 0).any() and result["same_tokens"] == (difference == 0).mean()
    assert result["win_rate"]["share"] == result["without_context"]["share"] == pytest.approx(expected)
    counts = np.array([np.sign(pair.true_count - pair.other_count) for pair in pairs])
    assert (counts == 0).any() and result["more_frequent"]["share"] == pytest.approx(((counts + 1) / 2).mean())


@pytest.mark.parametrize("batch_tokens", [1, 300])
def test_batch_size_and_order_do_not_change_the_rates(model, tokenizer, pairs, batch_tokens):
    shuffled = random.Random(0).sample(pairs, len(pairs))
    assert score_pairs(model, tokenizer, shuffled, batch_tokens) == score_pairs(model, tokenizer, pairs)


def test_real_abstracts_give_a_thousand_pairs(test_data, tokenizer):
    rows = list(read_rows(str(test_data / "corpus" / "validation.parquet")))
    texts = [f"{row['title']}\n{row['text']}" if row["title"] else row["text"] for row in rows]
    by_hash = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts}
    pairs = build(rows, tokenizer, read_terms(), Counter())
    assert len(pairs) >= 1000
    assert min(Counter(pair.kind for pair in pairs)[kind] for kind in KINDS) >= 100
    for pair in pairs:
        text = by_hash[pair.document]
        assert text.startswith(pair.texts[0]) and pair.true.lower() != pair.other.lower()
        assert not re.search(rf"\b{re.escape(pair.other)}\b", text)
        assert pair.texts[1] == pair.before + pair.other + pair.after
