"""Multiple-choice questions, zero-shot, with lm-evaluation-harness: PubMedQA, and MedQA and MedMCQA from the Hub.

The harness appends each option to the question and chooses the option with the highest likelihood. Its prompts are
unchanged, so that results compare with those of other models. The tokenizer decides what precedes the prompt:
HealthSLM's puts one separator there. A prompt that exceeds the context loses its beginning, including the separator.

Each accuracy comes with its majority baseline: the share of the most frequent answer, which a model reaches without
reading the questions.
"""

import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from healthslm.errors import one_line
from healthslm.evaluation.lm_eval_tasks import FOLDER
from healthslm.models import by_device, open_model
from healthslm.options import Device
from healthslm.statistics import macro_f1, macro_f1_interval, share
from healthslm.tokenization.encoding import load_tokenizer

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.manager import TaskDict

logger = logging.getLogger(__name__)

HUB_TASKS = {"medqa_4options": "medqa", "medmcqa": "medmcqa"}
"""The harness's tasks whose questions are on the Hub, and the harness's folders that define them."""


@dataclass
class Answers:
    """A model's answers to the questions of a task."""

    options: list[str]
    correct: np.ndarray
    """(questions,), index of the correct option."""
    log_likelihoods: np.ndarray
    """(questions, options), in nats, of each option after its question."""
    truncated: int
    """Number of questions that exceed the context, so that the model did not see their beginning."""

    @property
    def confusion(self) -> np.ndarray:
        """(options, options): how many questions have the row's option as the correct answer and the column's as the
        chosen one."""
        counts = np.zeros((len(self.options), len(self.options)), dtype=np.int64)
        np.add.at(counts, (self.correct, self.log_likelihoods.argmax(axis=1)), 1)
        return counts


def measure_pubmedqa(model_source: str | Path, file: Path, device: Device = "cpu") -> dict[str, Any]:
    """Evaluate a model on PubMedQA (Jin et al., EMNLP 2019): each question follows its abstract without the conclusion.

    Args:
        model_source: Folder or Hub name of a causal language model, with its tokenizer.
        file: JSON Lines with QUESTION, CONTEXTS and final_decision, such as the 500 questions of the official test
            split.
        device: Where the model runs.

    Returns:
        The result of `summarize`.

    Raises:
        UserError: There is no such model, device or file, or a row of the file is not a question of PubMedQA.
    """
    task = pubmedqa_task(file)
    return summarize(ask(open_for_harness(model_source, device), task))


def measure_hub_tasks(model_source: str | Path, device: Device = "cpu") -> dict[str, dict[str, Any]]:
    """Evaluate a model on MedQA (4 options) and MedMCQA, if their questions are available from the Hub.

    Args:
        model_source: Folder or Hub name of a causal language model, with its tokenizer.
        device: Where the model runs.

    Returns:
        For each task, by the harness's name, the result of `summarize` or `{"not_reached": reason}`.

    Raises:
        UserError: There is no such model or device.
    """
    model = open_for_harness(model_source, device)
    results: dict[str, dict[str, Any]] = {}
    for name in HUB_TASKS:
        try:
            task = hub_task(name)
        except OSError as error:
            logger.info("%s: skipped, its questions are not available", name)
            results[name] = {"not_reached": one_line(error)}
        else:
            results[name] = summarize(ask(model, task))
    return results


def pubmedqa_task(file: Path) -> "TaskDict":
    """The task `pubmedqa_local` with the questions of a file."""
    from lm_eval.tasks import TaskManager  # takes seconds, like the imports below

    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)  # it advertises `--metadata`, which is given here
    manager = TaskManager(include_path=FOLDER, include_defaults=False, metadata={"questions": str(file)})
    return manager.load("pubmedqa_local")


def hub_task(name: str) -> "TaskDict":
    """One of the `HUB_TASKS` with its questions.

    Raises:
        OSError: The questions are neither available from the Hub nor in the local cache.
    """
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / HUB_TASKS[name]
    return lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False).load(name)


def open_for_harness(model_source: str | Path, device: Device = "cpu") -> "HFLM":
    """Open a model in fp32, wrapped for the harness.

    Raises:
        UserError: There is no such model or device.
    """
    from lm_eval.models.huggingface import HFLM

    # It warns that the model is already opened, and once per option of a truncated prompt, which `ask` counts.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    tokenizer, model = load_tokenizer(str(model_source)), open_model(model_source, device)
    # Small batches: the logits over 32,000 tokens, held twice, take up to 250 MB per prompt.
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=by_device(model, cpu=4, gpu=16))


def ask(model: "HFLM", task: "TaskDict") -> Answers:
    """Ask a model the questions of a task."""
    from lm_eval import evaluate

    (samples,) = evaluate(lm=model, task_dict=task, bootstrap_iters=0)["samples"].values()
    samples.sort(key=lambda sample: sample["doc_id"])
    options = [continuation.strip() for _, continuation in samples[0]["arguments"]]
    targets = [sample["target"] for sample in samples]
    return Answers(
        options=options,
        correct=np.array([options.index(target) if isinstance(target, str) else target for target in targets]),
        log_likelihoods=np.array([[score for score, _ in sample["filtered_resps"]] for sample in samples]),
        truncated=sum(
            # The last token of an option is predicted but never read.
            max(len(model.tok_encode(prompt + option)) for prompt, option in sample["arguments"]) - 1 > model.max_length
            for sample in samples
        ),
    )


def summarize(answers: Answers) -> dict[str, Any]:
    """The metrics of a task, ready for JSON.

    Intervals are 95% intervals: Wilson's for accuracy, a bootstrap over questions for macro-F1.
    """
    confusion = answers.confusion
    questions, occurrences = int(confusion.sum()), confusion.sum(axis=1)
    always_majority = np.zeros_like(confusion)
    always_majority[:, occurrences.argmax()] = occurrences
    accuracy = share(int(confusion.trace()), questions)
    return {
        "questions": questions,
        "truncated": answers.truncated,
        "accuracy": accuracy,
        "macro_f1": {"mean": float(macro_f1(confusion)), "interval": macro_f1_interval(confusion)},
        "majority_option": answers.options[occurrences.argmax()],
        "majority_share": float(occurrences.max() / questions),
        "majority_macro_f1": float(macro_f1(always_majority)),
        "options": answers.options,
        "confusion": confusion.tolist(),
        "harness": f"lm_eval {version('lm_eval')}",
    }


def verdict(task: str, result: dict[str, Any]) -> str:
    """Say in words how a model compares with the majority baseline, by the interval of its accuracy.

    Args:
        task: Display name of the task.
        result: The result of `summarize`.
    """
    majority, questions = result["majority_option"], result["questions"]
    lower, upper = result["accuracy"]["interval"]
    compared = (
        f"Accuracy is {result['accuracy']['share']:.1%}; always answering *{majority}* gives "
        f"{result['majority_share']:.1%}."
    )
    if lower > result["majority_share"]:
        return f"Zero-shot, the model is better at {task} than always answering *{majority}*. {compared}"
    chosen = np.sum(result["confusion"], axis=0)
    answers = f"it answers *{result['options'][chosen.argmax()]}* to {chosen.max()} of {questions} questions"
    if upper < result["majority_share"]:
        return f"Zero-shot, the model can't do {task}: {answers}. {compared}"
    return f"Zero-shot, the model is no better at {task} than always answering *{majority}*: {answers}. {compared}"
