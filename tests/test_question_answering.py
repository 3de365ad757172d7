"""Multiple-choice questions: likelihoods, metrics, and files or tasks that are not available."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager
from row_files import write_lines
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import f1_score
from tiny_models import byte_model, byte_tokenizer
from transformers import PreTrainedModel

from healthslm.errors import UserError
from healthslm.evaluation.question_answering import (
    Answers,
    ask,
    hub_task,
    measure_hub_tasks,
    measure_pubmedqa,
    open_for_harness,
    pubmedqa_task,
    summarize,
    verdict,
)
from healthslm.models import zero_residual_projections
from healthslm.statistics import macro_f1

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
    """A model that always predicts the bytes of " yes", whatever it has read."""
    model = byte_model(max_position_embeddings=context)
    zero_residual_projections(model)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight.zero_()
        embedding[:, 0] = 1
        embedding[byte_tokenizer().encode(" yes", add_special_tokens=False), 0] = 2
    return model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save(byte_model(max_position_embeddings=256), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory) -> Path:
    return write_lines(tmp_path_factory.mktemp("questions") / "test.jsonl", QUESTIONS)


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, ids: list[int], option: list[int]) -> float:
    """The log-likelihood of an option after `ids`, one token at a time."""
    total = 0.0
    for token in option:
        total += torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)[token].item()
        ids = [*ids, token]
    return total


def test_options_are_scored_after_one_separator_and_their_question(model_folder, questions_file):
    """One by one here, in batches of different lengths there."""
    answers = ask(open_for_harness(model_folder), pubmedqa_task(questions_file))
    model, expected = byte_model(max_position_embeddings=256), []
    for question in QUESTIONS:
        prompt = byte_tokenizer().encode(prompt_of(question), add_special_tokens=False)
        options = [byte_tokenizer().encode(f" {option}", add_special_tokens=False) for option in DECISIONS]
        assert SEPARATOR not in prompt
        expected.append([log_likelihood(model, [SEPARATOR, *prompt], option) for option in options])
    assert answers.options == DECISIONS
    assert answers.correct.tolist() == [0, 1, 2, 0]
    assert answers.truncated == 0
    np.testing.assert_allclose(answers.log_likelihoods, expected, rtol=1e-5)


def test_a_prompt_that_exceeds_the_context_loses_its_beginning_and_is_counted(tmp_path, questions_file):
    """The third question just fits, since the last token of its longest option is predicted but never read."""
    prompts = [byte_tokenizer().encode(prompt_of(question)) for question in QUESTIONS]
    context = len(prompts[2]) + len(" maybe") - 1
    assert [len(prompt) > len(prompts[2]) for prompt in prompts] == [True, True, False, True]
    model = byte_model(max_position_embeddings=context)
    answers = ask(open_for_harness(save(model, tmp_path / "model")), pubmedqa_task(questions_file))
    assert answers.truncated == 3
    for prompt, measured in zip(prompts, answers.log_likelihoods, strict=True):
        for option, likelihood in zip(DECISIONS, measured, strict=True):
            tokens = byte_tokenizer().encode(f" {option}", add_special_tokens=False)
            kept = prompt[max(len(prompt) + len(tokens) - 1 - context, 0) :]
            assert likelihood == pytest.approx(log_likelihood(model, kept, tokens), rel=1e-5)


@pytest.mark.parametrize("context, truncated", [(1000, 0), (20, 4)])
def test_a_model_that_always_answers_yes_reaches_the_majority_baseline(tmp_path, questions_file, context, truncated):
    result = measure_pubmedqa(save(always_yes(context), tmp_path / "model"), questions_file)
    assert result["accuracy"]["share"] == result["majority_share"] == 2 / 4
    assert result["confusion"] == [[2, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert result["macro_f1"]["mean"] == pytest.approx((2 * 2 / (4 + 2) + 0 + 0) / 3)
    assert "is no better at it than always answering *yes*: it answers *yes* to 4 of 4" in verdict("it", result)
    assert result["truncated"] == truncated


def test_always_yes_reaches_the_published_majority_baseline_on_the_real_questions(tmp_path, test_data):
    """Accuracy 55.20%, macro-F1 23.71% in the table of results of Jin et al. (EMNLP 2019)."""
    result = measure_pubmedqa(save(always_yes(context=20), tmp_path / "model"), test_data / "pubmedqa" / "test.jsonl")
    assert result["questions"] == result["truncated"] == 500
    assert result["majority_option"] == "yes"
    assert result["accuracy"]["share"] == result["majority_share"] == 0.552
    assert result["macro_f1"]["mean"] == pytest.approx(0.2371, abs=5e-5)


def answers_with(confusion: list[list[int]]) -> Answers:
    """Answers with this confusion matrix, in random order."""
    pairs = [(i, j) for i, row in enumerate(confusion) for j, count in enumerate(row) for _ in range(count)]
    random.Random(0).shuffle(pairs)
    correct, chosen = np.array(pairs).T
    return Answers(DECISIONS, correct, np.eye(len(DECISIONS))[chosen] - 5, truncated=0)


CONFUSION = [[200, 60, 16], [40, 120, 9], [30, 20, 5]]


def test_macro_f1_equals_that_of_scikit_learn_for_labels_and_the_definition():
    answers = answers_with(CONFUSION)
    expected = f1_score(answers.correct, answers.log_likelihoods.argmax(1), average="macro")
    assert summarize(answers)["macro_f1"]["mean"] == pytest.approx(expected)
    several = np.array([[[3, 1, 0], [2, 4, 0], [0, 0, 0]], [[0, 0, 10], [0, 0, 0], [0, 0, 0]]])
    assert macro_f1(several) == pytest.approx([(6 / 9 + 8 / 11) / 3, 0])
    assert macro_f1(several[0]) == pytest.approx((6 / 9 + 8 / 11) / 3)
    assert summarize(answers)["majority_macro_f1"] == pytest.approx(2 * 276 / (276 + 500) / 3)


def test_the_interval_of_macro_f1_equals_a_bootstrap_over_questions():
    answers = answers_with(CONFUSION)
    drawn = bootstrap(
        (answers.correct, answers.log_likelihoods.argmax(1)),
        lambda correct, chosen: f1_score(correct, chosen, average="macro"),
        paired=True, vectorized=False, method="percentile", n_resamples=500, rng=0,
    )  # fmt: skip
    low, high = summarize(answers)["macro_f1"]["interval"]
    assert (low, high) == pytest.approx(tuple(drawn.confidence_interval), abs=0.008)


def test_the_interval_of_accuracy_is_a_wilson_interval():
    expected = binomtest(200 + 120 + 5, 500).proportion_ci(0.95, method="wilson")
    assert summarize(answers_with(CONFUSION))["accuracy"]["interval"] == pytest.approx([expected.low, expected.high])


@pytest.mark.parametrize(
    ("hits", "beginning"),
    [
        (500, "is better at PubMedQA than always answering *yes*. Accuracy is 100.0%"),
        (299, "is better at PubMedQA than always answering *yes*. Accuracy is 59.8%"),
        (297, "is no better at PubMedQA than always answering *yes*: it answers *yes* to 331 of 500 questions."),
        (276, "is no better at PubMedQA than always answering *yes*: it answers *yes* to 331 of 500 questions."),
        (255, "is no better at PubMedQA than always answering *yes*: it answers *yes* to 310 of 500 questions."),
        (253, "can't do PubMedQA: it answers *yes* to 308 of 500 questions. Accuracy is 50.6%"),
    ],
)
def test_the_verdict_compares_the_interval_of_the_accuracy_with_the_majority_baseline(hits, beginning):
    """Of 500, Wilson's interval begins at 55.4% for 299 correct answers and at 55.0% for 297. It ends at 55.4% for 255
    and at 55.0% for 253."""
    correct = np.repeat([0, 1, 2], [276, 169, 55])
    chosen = np.where(np.arange(500) < hits, correct, (correct + 1) % 3)
    result = summarize(Answers(DECISIONS, correct, np.eye(3)[chosen], truncated=0))
    assert result["accuracy"]["share"] == hits / 500
    assert json.loads(json.dumps(result)) == result
    assert verdict("PubMedQA", result).startswith(f"Zero-shot, the model {beginning}")
    assert verdict("PubMedQA", result).endswith("; always answering *yes* gives 55.2%.")


def test_hub_tasks_are_reported_as_not_reached_without_a_network(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = measure_hub_tasks(model_folder)
    assert list(results) == ["medqa_4options", "medmcqa"]
    for result in results.values():
        assert list(result) == ["not_reached"] and "Hub" in result["not_reached"]


def test_hub_tasks_are_evaluated_if_their_data_are_available(model_folder, tmp_path, monkeypatch):
    """`datasets` loads a local folder that has the name of the dataset."""
    medqa = [
        {"sent1": f"Which is {i}?", "label": i % 4} | {f"ending{j}": f"{i + j}" for j in range(4)} for i in range(4)
    ]
    medmcqa = [{"question": f"What of {i}?", "cop": 3} | {f"op{j}": f"{j}{i}" for j in "abcd"} for i in range(3)]
    for split in ("train", "validation", "test"):
        write_lines(tmp_path / "GBaker" / "MedQA-USMLE-4-options-hf" / f"{split}.jsonl", medqa)
        write_lines(tmp_path / "openlifescienceai" / "medmcqa" / f"{split}.jsonl", medmcqa)
    monkeypatch.chdir(tmp_path)

    results = measure_hub_tasks(model_folder)
    assert {name: result["questions"] for name, result in results.items()} == {"medqa_4options": 4, "medmcqa": 3}
    assert np.sum(results["medqa_4options"]["confusion"], axis=1).tolist() == [1, 1, 1, 1]
    assert np.sum(results["medmcqa"]["confusion"], axis=1).tolist() == [0, 0, 0, 3]
    assert results["medmcqa"]["majority_share"] == 1

    answers = ask(open_for_harness(model_folder), hub_task("medqa_4options"))
    prompt = "Question: Which is 0?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:"
    model = byte_model(max_position_embeddings=256)
    ids = byte_tokenizer().encode(prompt)
    expected = [log_likelihood(model, ids, byte_tokenizer().encode(f" {letter}")[1:]) for letter in "ABCD"]
    np.testing.assert_allclose(answers.log_likelihoods[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "this file contains no questions"),
        (
            [QUESTIONS[0], {"QUESTION": "Why?", "CONTEXTS": []}],
            "row 2 is not a question of PubMedQA: no final_decision",
        ),
        ([QUESTIONS[0] | {"final_decision": "Yes"}], "row 1: final_decision must be one of yes, no, maybe, not 'Yes'"),
    ],
)
def test_a_file_with_other_content_is_refused_naming_the_row(model_folder, tmp_path, rows, message):
    file = write_lines(tmp_path / "questions.jsonl", rows)
    with pytest.raises(UserError, match=f"questions.jsonl: {message}"):
        measure_pubmedqa(model_folder, file)


@pytest.mark.parametrize("name", ["missing.jsonl", "questions.csv"])
def test_a_missing_file_or_another_format_is_refused(model_folder, tmp_path, name):
    (tmp_path / "questions.csv").touch()
    with pytest.raises(UserError, match=f"{name}: expected a JSON Lines file"):
        measure_pubmedqa(model_folder, tmp_path / name)


def test_a_missing_model_is_refused(questions_file, tmp_path):
    with pytest.raises(UserError, match="missing: no such folder or tokenizer on the Hub"):
        measure_pubmedqa(tmp_path / "missing", questions_file)


def test_the_task_is_found_in_the_folder_that_the_package_prints(questions_file, tmp_path, monkeypatch):
    """With a path relative to the current folder, as on the command line."""
    command = [sys.executable, "-m", "healthslm.evaluation.lm_eval_tasks"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.chdir(questions_file.parent)
    metadata = {"questions": questions_file.name, "pretrained": "some model"}
    task = TaskManager(include_path=printed, include_defaults=False, metadata=metadata).load("pubmedqa_local")
    (found,) = task["tasks"].values()
    assert [found.doc_to_text(row) for row in found.test_docs()] == [prompt_of(question) for question in QUESTIONS]
    with pytest.raises(UserError, match="--metadata questions=FILE.jsonl"):
        TaskManager(include_path=printed, include_defaults=False).load("pubmedqa_local")


@pytest.mark.slow
def test_the_harness_alone_gives_the_same_result(model_folder, tmp_path):
    """With the command of docs/evaluation.md, from another folder."""
    file = write_lines(tmp_path / "pubmedqa" / "test.jsonl", QUESTIONS)
    folder = subprocess.check_output([sys.executable, "-m", "healthslm.evaluation.lm_eval_tasks"], text=True).strip()
    arguments = {
        "--model": "hf",
        "--model_args": f"pretrained={model_folder},trust_remote_code=True,dtype=float32",
        "--include_path": folder,
        "--tasks": "pubmedqa_local",
        "--metadata": f"questions={file}",
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
