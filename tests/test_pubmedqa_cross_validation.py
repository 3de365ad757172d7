"""PubMedQA by cross-validation: hidden states, folds, scores and baselines."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RunScript
from row_files import write_lines
from sklearn.metrics import accuracy_score, f1_score
from tiny_models import byte_model, byte_tokenizer

from healthslm.errors import UserError
from healthslm.pubmedqa.artificial import ANSWERS
from healthslm.pubmedqa.cross_validation import (
    answer_weights,
    cross_validate,
    cross_validate_pubmedqa,
    last_hidden_states,
    majority_result,
    mean_scores,
    scores,
    word_counts,
    word_counts_in_two_phases,
)
from healthslm.pubmedqa.options import CrossValidationOptions

SIGNS = {"yes": "fewer deaths", "no": "equal deaths", "maybe": "few data"}
OPTIONS = CrossValidationOptions(train=Path(), test=Path(), output=Path(), model=".", folds=5)


def questions(count: int, start: int = 0) -> list[dict]:
    """Questions whose context tells the answer."""
    return [
        {
            "pmid": str(number),
            "QUESTION": f"Does drug {number} help?",
            "CONTEXTS": [f"We gave drug {number}.", f"There were {SIGNS[answer]}."],
            "final_decision": answer,
        }
        for number in range(start, start + count)
        for answer in [ANSWERS[number % 3]]
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pubmedqa")
    for name, rows in {"train": questions(30), "test": questions(12, 30), "artificial": questions(9, 100)}.items():
        write_lines(folder / f"{name}.jsonl", rows)
    model = byte_model("ForSequenceClassification", num_labels=2, max_position_embeddings=128)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_hidden_states_are_those_that_the_models_own_head_classifies(is_causal: bool) -> None:
    tokenizer = byte_tokenizer()
    model = byte_model("ForSequenceClassification", max_position_embeddings=128, is_causal=is_causal)
    texts = ["Does it help?", "No.", "A longer text, so that the others are padded", "It"]
    states = last_hidden_states(model, tokenizer, texts)
    for text, state in zip(texts, states, strict=True):
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(model.score(torch.tensor(state)), logits)


def test_a_text_longer_than_the_context_keeps_its_end() -> None:
    tokenizer, model = byte_tokenizer(), byte_model("ForSequenceClassification", max_position_embeddings=16)
    end = "the end of it, 16"
    ids = tokenizer(end)["input_ids"][-16:]
    expected = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    assert torch.allclose(
        torch.tensor(last_hidden_states(model, tokenizer, ["start " * 9 + end])[0]), expected, atol=1e-5
    )


def test_heads_learn_what_the_features_tell_and_nothing_from_noise() -> None:
    answers = np.arange(150) % 3
    features = np.eye(3)[answers] + np.random.default_rng(0).normal(0, 0.1, (150, 3))
    result = cross_validate(features, features, answers, answers, OPTIONS)
    assert result["validation"]["accuracy"]["share"] == result["ensemble"]["accuracy"]["share"] == 1
    noise = np.random.default_rng(1).normal(size=(150, 300))  # enough to learn the training answers by heart
    result = cross_validate(noise, noise, answers, answers, OPTIONS)
    assert result["ensemble"]["accuracy"]["share"] > 0.95
    assert result["validation"]["accuracy"]["interval"][0] < 1 / 3 < 0.5 > result["validation"]["accuracy"]["share"]


def test_scores_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    answers, *chosen = random.integers(0, 3, (4, 200))
    for one in chosen:
        result = scores(answers, one)
        assert result["accuracy"]["share"] == accuracy_score(answers, one)
        assert result["macro_f1"]["value"] == pytest.approx(f1_score(answers, one, average="macro"))
        assert result["macro_f1"]["interval"][0] < result["macro_f1"]["value"] < result["macro_f1"]["interval"][1]
    result = mean_scores(answers, chosen)
    assert result["accuracy"]["mean"] == pytest.approx(np.mean([accuracy_score(answers, one) for one in chosen]))
    assert result["macro_f1"]["each"] == pytest.approx([f1_score(answers, one, average="macro") for one in chosen])


def test_balance_1_gives_all_answers_the_same_weight_in_total() -> None:
    answers = np.array([0] * 6 + [1] * 3 + [2])
    assert np.bincount(answers, answer_weights(answers, 1.0)) == pytest.approx(np.full(3, 10 / 3))
    assert (answer_weights(answers, 0.0) == 1).all()


def test_the_majority_is_that_of_the_training_questions() -> None:
    result = majority_result(np.array([0, 1, 1]), np.array([0, 0, 0, 1]))
    assert result["ensemble"]["accuracy"]["share"] == 0.25


def test_words_of_artificial_questions_tell_the_answers_of_expert_ones() -> None:
    train, test = (
        [row for row in questions(*range_) if row["final_decision"] != "maybe"] for range_ in ((60,), (30, 60))
    )
    artificial = [row for row in questions(60, 100) if row["final_decision"] != "maybe"]
    assert word_counts_in_two_phases(train, test, artificial, OPTIONS)["ensemble"]["accuracy"]["share"] == 1
    assert word_counts(train, test, OPTIONS)["ensemble"]["accuracy"]["share"] == 1


def test_the_command_writes_the_results_of_the_model_and_the_baselines(
    folder: Path, tmp_path: Path, run_script_here: RunScript
) -> None:
    model = folder / "model"
    files = [("train", folder / "train.jsonl"), ("test", folder / "test.jsonl"), ("output", tmp_path / "out.json")]
    more = [("model", model), ("base", model), ("artificial", folder / "artificial.jsonl"), ("folds", 3)]
    done = run_script_here(
        "cross_validate_pubmedqa", *(part for name, value in files + more for part in (f"--{name}", value))
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    names = ["majority", "word_counts", "word_counts_two_phases", "two_phases", "expert_questions_alone", "untrained"]
    assert list(written["models"]) == names
    assert written["models"]["two_phases"] == written["models"]["expert_questions_alone"]  # the same weights
    assert len(written["models"]["untrained"]["test"]["accuracy"]["each"]) == 3
    assert written["data"] == {
        name: hashlib.sha256((folder / f"{name}.jsonl").read_bytes()).hexdigest()
        for name in ("train", "test", "artificial")
    }


@pytest.mark.parametrize(("left_out", "folds", "count"), [("no", 2, 0), (None, 11, 10)])
def test_every_fold_has_training_questions_of_every_answer(
    left_out: str | None, folds: int, count: int, folder: Path, tmp_path: Path
) -> None:
    train = write_lines(tmp_path / "few.jsonl", (row for row in questions(30) if row["final_decision"] != left_out))
    options = replace(OPTIONS, train=train, test=folder / "test.jsonl", folds=folds, model=str(folder / "model"))
    answer = left_out or "yes"
    with pytest.raises(UserError, match=f"few.jsonl: {count} questions with the answer {answer}, but each of the"):
        cross_validate_pubmedqa(options)


def test_training_and_test_questions_must_not_overlap(folder: Path, tmp_path: Path) -> None:
    same = CrossValidationOptions(
        train=folder / "train.jsonl",
        test=folder / "train.jsonl",
        output=tmp_path / "out.json",
        model=str(folder / "model"),
    )
    with pytest.raises(UserError, match="30 questions are also in"):
        cross_validate_pubmedqa(same)
