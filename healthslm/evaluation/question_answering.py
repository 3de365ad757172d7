"""Multiple-choice questions, zero-shot, through lm-evaluation-harness: PubMedQA from a file, others from the Hub.

The harness puts each option behind the question and takes the one to which the model gives the highest likelihood. Its
prompts stay as they are, so that the figures compare with others'. The tokenizer decides what stands in front: with
HealthSLM's that is the separator, once. A prompt longer than the context loses its beginning, the separator included.

Every accuracy is reported beside the majority line, the share of the commonest answer, which is what a model reaches
that answers without reading.
"""

import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from healthslm.corpus.sources import read_rows
from healthslm.errors import UserError
from healthslm.evaluation.intervals import share
from healthslm.models import REPOSITORY, Device, by_device, open_model
from healthslm.tokenization.encoding import load_tokenizer

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.manager import TaskDict

logger = logging.getLogger(__name__)

PUBMEDQA_DECISIONS = ("yes", "no", "maybe")
HUB_TASKS = {"medqa_4options": "medqa", "medmcqa": "medmcqa"}
"""The harness's tasks whose questions come from the Hub, and its folders that define them."""

RESAMPLES = 10_000


@dataclass
class Answers:
    """What a model made of the questions of a task."""

    options: list[str]
    right: np.ndarray
    """(questions,), index of the right option."""
    log_likelihoods: np.ndarray
    """(questions, options), in nats, of each option behind its question."""
    truncated: int
    """Questions that the model saw without their beginning, since they are longer than its context."""

    @property
    def confusion(self) -> np.ndarray:
        """(options, options), how many questions have the row's option as right and the column's as chosen one."""
        counts = np.zeros((len(self.options), len(self.options)), dtype=np.int64)
        np.add.at(counts, (self.right, self.log_likelihoods.argmax(axis=1)), 1)
        return counts


def measure_pubmedqa(
    model_source: str | Path, file: Path, limit: int | None = None, device: Device = "cpu"
) -> dict[str, Any]:
    """Ask a model the questions of PubMedQA (Jin et al., EMNLP 2019), each behind its abstract without conclusion.

    Args:
        model_source: Folder or Hub name of a causal language model, with its tokenizer.
        file: JSON Lines with QUESTION, CONTEXTS and final_decision, such as the 500 of the official test split.
        limit: Ask the first so many questions; by default all.
        device: Where the model computes.

    Returns:
        What `summarise` gives.

    Raises:
        UserError: There is no such model, device or file, or a row of the file is no question of PubMedQA.
    """
    _check_pubmedqa(file)
    return summarise(ask(open_for_harness(model_source, device), pubmedqa_task(file), limit))


def measure_hub_tasks(
    model_source: str | Path, limit: int | None = None, device: Device = "cpu"
) -> dict[str, dict[str, Any]]:
    """Ask a model the questions of MedQA (4 options) and MedMCQA, where a hub is reached that has them.

    Args:
        model_source: Folder or Hub name of a causal language model, with its tokenizer.
        limit: Ask the first so many questions of each; by default all.
        device: Where the model computes.

    Returns:
        By the harness's name of the task, what `summarise` gives, or `{"not_reached": reason}`.

    Raises:
        UserError: There is no such model or device.
    """
    model = open_for_harness(model_source, device)
    results: dict[str, dict[str, Any]] = {}
    for name in HUB_TASKS:
        try:
            task = hub_task(name)
        except OSError as error:
            logger.info("%s: not reached", name)
            results[name] = {"not_reached": " ".join(str(error).split())}
        else:
            results[name] = summarise(ask(model, task, limit))
    return results


def pubmedqa_task(file: Path) -> "TaskDict":
    """The task of configs/lm_eval/, on the questions of a file."""
    from lm_eval.tasks import TaskManager  # takes seconds, here and below

    manager = TaskManager(include_path=REPOSITORY / "configs" / "lm_eval", include_defaults=False)
    on_file = {"task": "pubmedqa_local", "dataset_kwargs": {"data_files": {"test": str(Path(file).absolute())}}}
    # The harness merges such a dictionary with the task of that name only inside a group.
    return {"tasks": manager.load({"group": "pubmedqa", "task": [on_file]})["tasks"]}


def hub_task(name: str) -> "TaskDict":
    """One of the `HUB_TASKS` with its questions.

    Raises:
        OSError: No hub is reached, or it does not give them, and they are not in the local cache either.
    """
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / HUB_TASKS[name]
    return lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False).load(name)


def open_for_harness(model_source: str | Path, device: Device = "cpu") -> "HFLM":
    """Open a model, in fp32, as the harness wants it.

    Raises:
        UserError: There is no such model or device.
    """
    from lm_eval.models.huggingface import HFLM

    # It warns that the model comes opened, and once for each option of a truncated prompt, which `ask` counts.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    tokenizer, model = load_tokenizer(str(model_source)), open_model(model_source, device)
    # Logits over 32,000 tokens, held twice, are up to a quarter of a gigabyte a prompt.
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=by_device(model, cpu=4, gpu=16))


def ask(model: "HFLM", task: "TaskDict", limit: int | None = None) -> Answers:
    """Ask a model the questions of one task: by default all, else the first so many."""
    from lm_eval import evaluate

    (samples,) = evaluate(lm=model, task_dict=task, limit=limit, bootstrap_iters=0)["samples"].values()
    samples.sort(key=lambda sample: sample["doc_id"])
    options = [continuation.strip() for _, continuation in samples[0]["arguments"]]
    targets = [sample["target"] for sample in samples]
    return Answers(
        options=options,
        right=np.array([options.index(target) if isinstance(target, str) else target for target in targets]),
        log_likelihoods=np.array([[score for score, _ in sample["filtered_resps"]] for sample in samples]),
        truncated=sum(
            # The last token of an option is predicted and never read.
            max(len(model.tok_encode(prompt + option)) for prompt, option in sample["arguments"]) - 1 > model.max_length
            for sample in samples
        ),
    )


def summarise(answers: Answers) -> dict[str, Any]:
    """The figures of a task, ready for JSON.

    Intervals are of 95%: Wilson's of the accuracy, and percentiles of a seeded bootstrap by question of macro-F1.
    The model is `at_chance` where the accuracy's interval does not lie above the majority line as a whole.
    """
    confusion = answers.confusion
    questions, occurrences = int(confusion.sum()), confusion.sum(axis=1)
    accuracy = share(int(confusion.trace()), questions)
    majority, majority_share = answers.options[occurrences.argmax()], float(occurrences.max() / questions)
    lower, upper = accuracy["interval"]
    at_chance = lower <= majority_share
    measured = f"accuracy {accuracy['share']:.1%} (95% interval {lower:.1%} to {upper:.1%})"
    line = f"above the {majority_share:.1%} of always answering {majority!r}"
    return {
        "questions": questions,
        "truncated": answers.truncated,
        "accuracy": accuracy,
        "macro_f1": {"mean": float(macro_f1(confusion)), "interval": macro_f1_interval(confusion)},
        "majority_option": majority,
        "majority_share": majority_share,
        "at_chance": at_chance,
        "verdict": f"at chance: {measured} is not {line}" if at_chance else f"{measured} is {line}",
        "options": answers.options,
        "confusion": confusion.tolist(),
        "harness": f"lm_eval {version('lm_eval')}",
    }


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """The mean over the options of F1; an option that is neither right nor chosen anywhere counts as 0.

    Args:
        confusion: (..., options, options), as in `Answers`.

    Returns:
        (...), float64.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    right_or_chosen = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    return (2 * hits / np.maximum(right_or_chosen, 1)).mean(axis=-1)


def macro_f1_interval(confusion: np.ndarray, seed: int = 0) -> list[float]:
    """Bootstrap interval of macro-F1: drawing questions with replacement is drawing cells of their confusion matrix."""
    questions = confusion.sum()
    draws = np.random.default_rng(seed).multinomial(questions, confusion.ravel() / questions, size=RESAMPLES)
    return np.quantile(macro_f1(draws.reshape(RESAMPLES, *confusion.shape)), [0.025, 0.975]).tolist()


def _check_pubmedqa(file: Path) -> None:
    """Raise a UserError where a file is missing, or its rows are not all questions of PubMedQA."""
    if not Path(file).is_file() or not str(file).endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{file}: no such file of questions in JSON Lines (.jsonl)")
    rows = list(read_rows(str(file)))
    if not rows:
        raise UserError(f"{file}: no question in this file")
    for number, row in enumerate(rows, start=1):
        if missing := {"QUESTION", "CONTEXTS", "final_decision"} - row.keys():
            raise UserError(f"{file}: row {number:,}: no question of PubMedQA: without {', '.join(sorted(missing))}")
        if row["final_decision"] not in PUBMEDQA_DECISIONS:
            expected = ", ".join(PUBMEDQA_DECISIONS)
            raise UserError(f"{file}: row {number:,}: final_decision {row['final_decision']!r} is none of {expected}")
