"""Multiple-choice questions: the likelihoods behind the answers, the figures made of them, and what cannot be had."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import f1_score
from small_model import byte_tokenizer, small_model
from transformers import PreTrainedModel

from healthslm.errors import UserError
from healthslm.evaluation.question_answering import (
    Answers,
    ask,
    hub_task,
    macro_f1,
    measure_hub_tasks,
    measure_pubmedqa,
    open_for_harness,
    pubmedqa_task,
    summarise,
)
from healthslm.models import zero_residual_projections

SEPARATOR = 0
DECISIONS = ["yes", "no", "maybe"]
QUESTIONS = [
    {
        "QUESTION": "Does it help?",
        "CONTEXTS": ["We gave it to 40 patients.", "Most did well."],
        "final_decision": "yes",
    },
    {"QUESTION": "Is it safe in the very old, then?", "CONTEXTS": ["Two of 31 fell ill."], "final_decision": "no"},
    {"QUESTION": "Who knows?", "CONTEXTS": ["Results were mixed (p = 0.05)."], "final_decision": "maybe"},
    {"QUESTION": "Is β-blockade of use?", "CONTEXTS": ["Mortality fell from 9% to 5%."], "final_decision": "yes"},
]


def prompt_of(question: dict) -> str:
    abstract = "\n".join(question["CONTEXTS"])
    return f"Abstract: {abstract}\nQuestion: {question['QUESTION']}\nAnswer:"


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def always_yes(context: int) -> PreTrainedModel:
    """A network of which each prediction is the same, whatever it has read: the bytes of " yes" before all others."""
    model = small_model(max_position_embeddings=context)
    zero_residual_projections(model)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight.zero_()
        embedding[:, 0] = 1
        embedding[byte_tokenizer().encode(" yes", add_special_tokens=False), 0] = 2
    return model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save(small_model(max_position_embeddings=256), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("questions") / "test.jsonl", QUESTIONS)


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, ids: list[int], option: list[int]) -> float:
    """Of an option behind `ids`, one token at a time."""
    total = 0.0
    for token in option:
        total += torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)[token].item()
        ids = [*ids, token]
    return total


def test_an_option_is_scored_behind_its_question_with_the_separator_in_front_once(model_folder, questions_file):
    """Alone here, among others of other lengths there."""
    answers = ask(open_for_harness(model_folder), pubmedqa_task(questions_file))
    model, expected = small_model(max_position_embeddings=256), []
    for question in QUESTIONS:
        prompt = byte_tokenizer().encode(prompt_of(question), add_special_tokens=False)
        options = [byte_tokenizer().encode(f" {option}", add_special_tokens=False) for option in DECISIONS]
        assert SEPARATOR not in prompt
        expected.append([log_likelihood(model, [SEPARATOR, *prompt], option) for option in options])
    assert answers.options == DECISIONS
    assert answers.right.tolist() == [0, 1, 2, 0]
    assert answers.truncated == 0
    np.testing.assert_allclose(answers.log_likelihoods, expected, rtol=1e-5)


def test_a_prompt_longer_than_the_context_loses_its_beginning_and_is_counted(tmp_path, questions_file):
    """The third question just fits: the last token of its longest option is predicted, and needs no position."""
    prompts = [byte_tokenizer().encode(prompt_of(question)) for question in QUESTIONS]
    context = len(prompts[2]) + len(" maybe") - 1
    assert [len(prompt) > len(prompts[2]) for prompt in prompts] == [True, True, False, True]
    model = small_model(max_position_embeddings=context)
    answers = ask(open_for_harness(save(model, tmp_path / "model")), pubmedqa_task(questions_file))
    assert answers.truncated == 3
    for prompt, measured in zip(prompts, answers.log_likelihoods, strict=True):
        for option, likelihood in zip(DECISIONS, measured, strict=True):
            tokens = byte_tokenizer().encode(f" {option}", add_special_tokens=False)
            kept = prompt[max(len(prompt) + len(tokens) - 1 - context, 0) :]
            assert likelihood == pytest.approx(log_likelihood(model, kept, tokens), rel=1e-5)


@pytest.mark.parametrize("context, truncated", [(1000, 0), (20, 4)])
def test_who_always_says_yes_is_right_as_often_as_yes_is(tmp_path, questions_file, context, truncated):
    result = measure_pubmedqa(save(always_yes(context), tmp_path / "model"), questions_file)
    assert result["accuracy"]["share"] == result["majority_share"] == 2 / 4
    assert result["confusion"] == [[2, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert result["macro_f1"]["mean"] == pytest.approx((2 * 2 / (4 + 2) + 0 + 0) / 3)
    assert result["at_chance"] and result["verdict"].startswith("at chance: accuracy 50.0%")
    assert result["truncated"] == truncated


def test_on_the_real_test_questions_always_yes_reaches_the_published_majority_line(tmp_path, test_data):
    """Accuracy 55.20%, macro-F1 23.71%: Jin et al. (EMNLP 2019), table of results."""
    result = measure_pubmedqa(save(always_yes(context=20), tmp_path / "model"), test_data / "pubmedqa" / "test.jsonl")
    assert result["questions"] == result["truncated"] == 500
    assert result["majority_option"] == "yes"
    assert result["accuracy"]["share"] == result["majority_share"] == 0.552
    assert result["macro_f1"]["mean"] == pytest.approx(0.2371, abs=5e-5)
    assert result["at_chance"]


def test_a_limit_asks_the_first_questions(model_folder, questions_file, tmp_path):
    first = write_rows(tmp_path / "first.jsonl", QUESTIONS[:3])
    assert measure_pubmedqa(model_folder, questions_file, limit=3) == measure_pubmedqa(model_folder, first)


def answers_with(confusion: list[list[int]]) -> Answers:
    """Answers of which so many have each pair of right and chosen option, in some order."""
    pairs = [(i, j) for i, row in enumerate(confusion) for j, count in enumerate(row) for _ in range(count)]
    random.Random(0).shuffle(pairs)
    right, chosen = np.array(pairs).T
    return Answers(DECISIONS, right, np.eye(len(DECISIONS))[chosen] - 5, truncated=0)


CONFUSION = [[200, 60, 16], [40, 120, 9], [30, 20, 5]]


def test_macro_f1_is_that_of_scikit_learn():
    answers = answers_with(CONFUSION)
    expected = f1_score(answers.right, answers.log_likelihoods.argmax(1), average="macro")
    assert summarise(answers)["macro_f1"]["mean"] == pytest.approx(expected)
    assert macro_f1(np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])) == pytest.approx((6 / 9 + 8 / 11) / 3)


def test_the_interval_of_macro_f1_is_that_of_questions_drawn_with_replacement():
    answers = answers_with(CONFUSION)
    drawn = bootstrap(
        (answers.right, answers.log_likelihoods.argmax(1)),
        lambda right, chosen: f1_score(right, chosen, average="macro"),
        paired=True, vectorized=False, method="percentile", n_resamples=500, rng=0,
    )  # fmt: skip
    low, high = summarise(answers)["macro_f1"]["interval"]
    assert (low, high) == pytest.approx(tuple(drawn.confidence_interval), abs=0.008)


def test_the_interval_of_the_accuracy_is_wilsons():
    expected = binomtest(200 + 120 + 5, 500).proportion_ci(0.95, method="wilson")
    assert summarise(answers_with(CONFUSION))["accuracy"]["interval"] == pytest.approx([expected.low, expected.high])


@pytest.mark.parametrize("hits, at_chance", [(500, False), (299, False), (297, True), (276, True), (100, True)])
def test_at_chance_is_what_does_not_lie_above_the_majority_line_with_its_whole_interval(hits, at_chance):
    """Wilson's interval begins at 55.4% for 299 hits in 500, and at 55.0% for 297."""
    right = np.repeat([0, 1, 2], [276, 169, 55])
    chosen = np.where(np.arange(500) < hits, right, (right + 1) % 3)
    result = summarise(Answers(DECISIONS, right, np.eye(3)[chosen], truncated=0))
    assert result["accuracy"]["share"] == hits / 500
    assert result["majority_share"] == 0.552
    assert result["at_chance"] == at_chance
    assert result["verdict"].startswith("at chance: ") == at_chance
    assert json.loads(json.dumps(result)) == result


def test_tasks_of_the_hub_are_not_reached_where_there_is_none(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = measure_hub_tasks(model_folder)
    assert list(results) == ["medqa_4options", "medmcqa"]
    for result in results.values():
        assert list(result) == ["not_reached"] and "Hub" in result["not_reached"]


def test_tasks_of_the_hub_are_measured_where_their_data_are(model_folder, tmp_path, monkeypatch):
    """The data sets library takes a folder of a data set's name for it."""
    medqa = [
        {"sent1": f"Which is {i}?", "label": i % 4} | {f"ending{j}": f"{i + j}" for j in range(4)} for i in range(5)
    ]
    medmcqa = [{"question": f"What of {i}?", "cop": 3} | {f"op{j}": f"{j}{i}" for j in "abcd"} for i in range(3)]
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "GBaker" / "MedQA-USMLE-4-options-hf" / f"{split}.jsonl", medqa)
        write_rows(tmp_path / "openlifescienceai" / "medmcqa" / f"{split}.jsonl", medmcqa)
    monkeypatch.chdir(tmp_path)

    results = measure_hub_tasks(model_folder, limit=4)
    assert {name: result["questions"] for name, result in results.items()} == {"medqa_4options": 4, "medmcqa": 3}
    assert np.sum(results["medqa_4options"]["confusion"], axis=1).tolist() == [1, 1, 1, 1]
    assert np.sum(results["medmcqa"]["confusion"], axis=1).tolist() == [0, 0, 0, 3]
    assert results["medmcqa"]["majority_share"] == 1

    answers = ask(open_for_harness(model_folder), hub_task("medqa_4options"))
    prompt = "Question: Which is 0?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:"
    model = small_model(max_position_embeddings=256)
    ids = byte_tokenizer().encode(prompt)
    expected = [log_likelihood(model, ids, byte_tokenizer().encode(f" {letter}")[1:]) for letter in "ABCD"]
    np.testing.assert_allclose(answers.log_likelihoods[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no question in this file"),
        (
            [QUESTIONS[0], {"QUESTION": "Why?", "CONTEXTS": []}],
            "row 2: no question of PubMedQA: without final_decision",
        ),
        ([QUESTIONS[0] | {"final_decision": "Yes"}], "row 1: final_decision 'Yes' is none of yes, no, maybe"),
    ],
)
def test_a_file_of_something_else_is_refused_with_its_row(model_folder, tmp_path, rows, message):
    file = write_rows(tmp_path / "questions.jsonl", rows)
    with pytest.raises(UserError, match=f"questions.jsonl: {message}"):
        measure_pubmedqa(model_folder, file)


@pytest.mark.parametrize("name", ["missing.jsonl", "questions.csv"])
def test_a_file_that_is_missing_or_of_another_format_is_refused(model_folder, tmp_path, name):
    (tmp_path / "questions.csv").touch()
    with pytest.raises(UserError, match=f"{name}: no such file of questions"):
        measure_pubmedqa(model_folder, tmp_path / name)


def test_a_model_that_is_missing_is_refused(questions_file, tmp_path):
    with pytest.raises(UserError, match="missing: no such folder or tokenizer on the Hub"):
        measure_pubmedqa(tmp_path / "missing", questions_file)


@pytest.mark.slow
def test_the_harness_runs_the_task_by_itself_and_finds_the_same(repository, model_folder, tmp_path):
    """By the command of configs/lm_eval/pubmedqa_local.yaml."""
    file = write_rows(tmp_path / "pubmedqa" / "test.jsonl", QUESTIONS)
    arguments = {
        "--model": "hf",
        "--model_args": f"pretrained={model_folder},trust_remote_code=True,dtype=float32",
        "--include_path": repository / "configs" / "lm_eval",
        "--tasks": "pubmedqa_local",
        "--output_path": tmp_path / "results",
    }
    options = [str(part) for pair in arguments.items() for part in pair]
    command = [sys.executable, "-m", "lm_eval", *options, "--log_samples"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    (figures,), (samples,) = ((tmp_path / "results").rglob(f"{kind}_*.json*") for kind in ("results", "samples"))
    theirs = json.loads(figures.read_text())["results"]["pubmedqa_local"]
    ours = measure_pubmedqa(model_folder, file)
    assert (theirs["acc,none"], theirs["f1,none"]) == pytest.approx(
        (ours["accuracy"]["share"], ours["macro_f1"]["mean"])
    )
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    likelihoods = [[float(score) for score, _ in row["filtered_resps"]] for row in rows]
    expected = ask(open_for_harness(model_folder), pubmedqa_task(file)).log_likelihoods
    np.testing.assert_allclose(likelihoods, expected, rtol=1e-5)
