"""Generated documents and titles, checked with tuples of words, ROUGE by hand, and generation token by token."""

import random

import numpy as np
import pytest
import torch
from tiny_models import byte_model, byte_tokenizer
from transformers import set_seed

from healthslm.evaluation.generation_quality import (
    describe_generation,
    generate_documents,
    generate_titles,
    score_titles,
)
from healthslm.statistics import mean
from healthslm.tokenization.encoding import encode_texts


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return byte_model(max_position_embeddings=256, initializer_range=0.4)


def describe(tokenizer, generated: list[str], human: list[str], training: list[str] = (), max_tokens: int = 10_000):
    return describe_generation(tokenizer, encode_texts(tokenizer, generated), human, iter(training), max_tokens)


def tuples(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def random_texts(count: int, words: int, vocabulary: str, seed: int) -> list[str]:
    choose = random.Random(seed)
    return [" ".join(choose.choices(vocabulary, k=choose.randint(words // 2, words))) for _ in range(count)]


def test_metrics_equal_those_of_tuples_of_words(tokenizer):
    generated, human = random_texts(6, 80, "abc", seed=1), random_texts(8, 60, "abcdefgh", seed=2)
    # Pieces of both sets, so that some n-grams occur in the training text.
    training = [text[20:70] for text in generated[:4] + human[:2]] + random_texts(50, 60, "abcdefgh", seed=3)
    result = describe(tokenizer, generated, human, training)

    assert list(result) == ["generated", "human"]
    for name, texts in (("generated", generated), ("human", human)):
        found = result[name]
        assert found["documents"] == len(texts)
        assert found["words"] == mean(np.array([len(text.split()) for text in texts]))
        assert found["tokens"] == mean(np.array([len(text) for text in texts]))
        repeated = [1 - len(set(tuples(text, 4))) / len(tuples(text, 4)) for text in texts]
        assert found["repeated_4grams"] == mean(np.array(repeated))
        for n in (1, 2, 3):
            both = [[gram for text in texts for gram in tuples(text, n)] for texts in (generated, human)]
            compared = min(map(len, both))
            grams = both[0 if name == "generated" else 1][:compared]
            assert found["distinct"][str(n)] == len(set(grams)) / compared
        for n in (8, 13):
            known = {gram for text in training for gram in tuples(text, n)}
            shares = [np.mean([gram in known for gram in tuples(text, n)]) for text in texts]
            assert 0 < sum(shares) < len(shares)
            assert found["in_training"][str(n)]["mean"] == pytest.approx(np.mean(shares))


def test_repetition_is_counted_within_a_document_and_without_case(tokenizer):
    result = describe(
        tokenizer, ["One two three four, one TWO three four.", "One two."], ["One two three four five."] * 2
    )
    assert result["generated"]["repeated_4grams"]["mean"] == pytest.approx((1 / 5 + 0) / 2)


def test_both_sets_are_cut_to_the_same_length(tokenizer):
    result = describe(tokenizer, ["a b", "a b c d e "], ["a b c d e f g h i", "a b c d e f g"], max_tokens=10)
    assert result["generated"]["tokens"]["mean"] == (3 + 10) / 2 and result["human"]["tokens"]["mean"] == 10
    assert result["generated"]["ended"] == 0.5 and result["human"]["ended"] == 0
    assert result["human"]["words"]["mean"] == 5


def test_documents_are_sampled_with_the_defaults_of_the_script(model, tokenizer):
    documents = generate_documents(model, tokenizer, count=5, max_tokens=30, batch_size=3, seed=7)
    set_seed(7)
    expected = []
    for rows in (3, 2):
        ids = torch.zeros(rows, 1, dtype=torch.long)
        for _ in range(30):
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[:, -1] / 0.8
            logits[logits < logits.topk(50).values[:, -1:]] = -torch.inf
            new = torch.multinomial(logits.softmax(-1), 1)
            new[(ids[:, 1:] == 0).any(1)] = 0  # ended
            ids = torch.cat([ids, new], 1)
        expected += [row[: row.index(0)] if 0 in row else row for row in ids[:, 1:].tolist()]
    assert documents == expected
    assert len(documents) == 5 and len({tuple(document) for document in documents}) == 5


def test_the_seed_decides_the_documents(model, tokenizer):
    first, again, other = (generate_documents(model, tokenizer, 3, max_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


ABSTRACTS = ["We gave aspirin. It helped.", "A.", "Aims: to see whether sleep is good. " * 9]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_titles_are_the_greedy_line_after_the_prompt_for_any_batch_size(model, tokenizer, batch_size):
    expected = []
    for abstract in ABSTRACTS:
        # 256 tokens of context minus 48 for the title, 7 for the prompt and the separator leave 200 for the abstract.
        prompt = [0, *encode_texts(tokenizer, [abstract[:200] + "\nTitle:"])[0]]
        ids = list(prompt)
        for _ in range(48):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            if ids[-1] == 0:
                break
        lines = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip().split("\n")
        expected.append(lines[0].strip())
    assert generate_titles(model, tokenizer, ABSTRACTS, batch_size) == expected
    assert len(set(expected)) == len(expected)


def test_rouge_of_titles_equals_that_counted_by_hand():
    titles = ["Sleep helps the heart", "Aspirin in stroke"]
    generated = ["sleep helps", ""]
    abstracts = ["The heart sleeps. It helps.", "Aspirin in stroke: a trial of 9. Yes."]
    result = score_titles(generated, titles, abstracts)
    assert result["documents"] == 2 and result["prompt"] == "\nTitle:"
    # "sleep helps": precision 1 and recall 2/4 in words, 1 and 1/3 in pairs of words; nothing scores 0.
    of_generated = {name: found["mean"] for name, found in result["generated"].items()}
    assert of_generated == pytest.approx({"rouge1": (2 / 3) / 2, "rouge2": (1 / 2) / 2, "rougeL": (2 / 3) / 2})
    # "the heart sleep(s)": 3 of 3 and of 4 words, 1 of 2 and of 3 pairs, "the heart" in order; then 3 of 7 and of 3.
    first = {name: found["mean"] for name, found in result["first_sentence"].items()}
    assert first == pytest.approx(
        {"rouge1": (6 / 7 + 6 / 10) / 2, "rouge2": (2 / 5 + 4 / 8) / 2, "rougeL": (4 / 7 + 6 / 10) / 2}
    )
