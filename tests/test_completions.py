"""The metrics of completions equal those of other implementations."""

import math
import random
import string

import pytest
import torch
from finetuning_runs import ROWS, nats_by_hand, read
from rouge_score.rouge_scorer import RougeScorer
from tiny_models import byte_model, byte_tokenizer, chat_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from healthslm.finetuning.completions import measure_completions, score_completions
from healthslm.finetuning.examples import Example
from healthslm.text_overlap import score_token_f1


@torch.no_grad()
def test_bits_per_byte_of_completions_equal_those_counted_by_hand(tmp_path):
    model, tokenizer = byte_model(), chat_tokenizer()
    examples = read(ROWS, tokenizer, tmp_path)
    nats, size = 0.0, 0
    for row in ROWS:
        ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        nats += nats_by_hand(model, tokenizer(row["prompt"])["input_ids"], [*ids, 0]).sum().item()
        size += len(row["completion"].encode())
    found = measure_completions(model, examples)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["interval"][0] < found["bits_per_byte"] < found["interval"][1]


@torch.no_grad()
def test_bits_per_byte_of_plain_text_count_its_first_token_after_a_separator(tmp_path):
    tokenizer = type(byte_tokenizer())(add_bos_token=False)  # which puts nothing before a text, as GPT-2's
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).eval()
    texts = ["One.", "Two of them."]
    examples = read([{"text": text} for text in texts], tokenizer, tmp_path)
    nats = sum(nats_by_hand(model, [0], [*tokenizer(text)["input_ids"], 0]).sum().item() for text in texts)
    size = sum(map(len, texts))
    assert measure_completions(model, examples)["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert read(ROWS[:1], tokenizer, tmp_path)[0].input_ids[0] != 0  # a prompt has its tokens at inference


def test_completions_of_one_line_are_compared_by_their_first_line():
    examples = [Example([0], [0], "One two. Three.", " one two", " one two", 1)] * 2
    found = score_completions(examples, {"before": ["one two\nthree four", "x"], "after": [" one two", " one"]})
    assert found["before"]["rouge1"]["mean"] == pytest.approx(0.5)
    assert found["after"]["rouge1"]["mean"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["first_sentence"]["rouge1"]["mean"] == 1
    assert found["after"]["token_f1"]["mean"] == pytest.approx((1 + 2 / 3) / 2)


def test_token_f1_equals_rouge_1_of_words_without_punctuation_and_articles():
    class Words:
        def tokenize(self, text: str) -> list[str]:
            kept = "".join(character for character in text.lower() if character not in string.punctuation)
            return [word for word in kept.split() if word not in ("a", "an", "the")]

    words = ["The", "a", "an", "asthma,", "Asthma", "of", "theory", "drug-induced", "drug", "(heart)"]
    choose = random.Random(0)
    texts = [" ".join(choose.choices(words, k=choose.randint(1, 8))) for _ in range(200)]
    answered = [pair for pair in zip(texts[:100], texts[100:], strict=True) if all(map(Words().tokenize, pair))]
    scorer = RougeScorer(["rouge1"], tokenizer=Words())
    for found, expected in answered:
        f1 = scorer.score(expected, found)["rouge1"].fmeasure
        assert score_token_f1([found], [expected])["mean"] == pytest.approx(f1)
    assert len(answered) > 50
    # SQuAD's rule for texts without words
    assert score_token_f1(["The", "The", "asthma"], ["a", "asthma", "a"])["mean"] == pytest.approx(1 / 3)
