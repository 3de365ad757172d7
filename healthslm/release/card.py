"""The documents of a release: the results table and the metadata of README.md, docs/evaluation.md and
docs/training-data.md.

All numbers come from the results of the evaluation, the run folder, the report of the corpus or the file of weights.
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard

from healthslm import markdown, plots
from healthslm.corpus.sources import UNSTATED
from healthslm.errors import UserError
from healthslm.evaluation.generation_quality import MAX_DOCUMENT_TOKENS
from healthslm.evaluation.memorization import PREFIX_TOKENS
from healthslm.evaluation.metrics import PUBMED_IDS
from healthslm.evaluation.question_answering import verdict
from healthslm.files import file_sha256
from healthslm.plots import Results
from healthslm.release.training_data import CORPUS_CARD, TrainingData
from healthslm.training.run_folder import TrainingReport

NAME = "HealthSLM"
README = "README.md"
EVALUATION_PAGE = Path("docs/evaluation.md")
TRAINING_PAGE = Path("docs/training-data.md")
FIGURES_FOLDER = Path("docs/evaluation")
TRAINING_CURVE = "training.png"
BEGIN, END = "<!-- release: written by scripts/release.py -->", "<!-- /release -->"

_TEMPLATES = "healthslm.release"


@dataclass(frozen=True)
class Release:
    """Everything that the documents of a release describe."""

    weights: Path
    parameters: int
    results: Results
    software: dict[str, list[str]]
    """Versions of the libraries that computed the results."""
    training: TrainingReport
    data: TrainingData


def write_pages(release: Release, repository: Path, folder: Path) -> None:
    """Write the documents of a release into a folder: the repository's README.md with the new results, and two pages.

    Raises:
        UserError: The README has no marks for the results.
    """
    context = _context(release)
    for page, template in ((EVALUATION_PAGE, "evaluation.md.jinja"), (TRAINING_PAGE, "training_data.md.jinja")):
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text(markdown.render(_TEMPLATES, template, context), encoding="utf-8")
    readme = (repository / README).read_text(encoding="utf-8")
    table = markdown.render(_TEMPLATES, "results_table.md.jinja", context)
    (folder / README).write_text(insert_results(readme, table, evaluation_results(release.results)), encoding="utf-8")


def insert_results(readme: str, table: str, results: list[EvalResult]) -> str:
    """Replace the text between the marks of a model card and its `model-index`. Everything else stays unchanged.

    Raises:
        UserError: The marks are missing or occur more than once.
    """
    before, begin, rest = readme.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end or BEGIN in old + after or END in before + after:
        raise UserError(f"{README}: expected one line {BEGIN} and, below it, one line {END}")
    card = ModelCard(f"{before}{BEGIN}\n\n{table.strip()}\n\n{END}{after}")
    card.data.model_name, card.data.eval_results = NAME, results  # type: ignore[attr-defined]
    return str(card)


def evaluation_results(results: Results) -> list[EvalResult]:
    """The main results in the form of the Hub's `model-index`, with their 95% intervals."""
    held_out, pubmedqa = results["held_out"], results["pubmedqa"]["pubmedqa"]
    harder = results["minimal_pairs"]["harder"]["scores"]["all"]
    bits, accuracy = ("bits_per_byte", "bits per byte"), ("accuracy", "accuracy")
    rows = [
        ("text-generation", f"held-out abstracts ({held_out['data']})", bits, held_out["model"]),
        ("text-generation", "harder minimal pairs", ("accuracy", "win rate"), harder["win_rate"]),
        ("question-answering", "PubMedQA", accuracy, pubmedqa["accuracy"]),
    ]
    return [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"\W+", "-", dataset.partition(" (")[0]).lower(),
            dataset_name=dataset,
            metric_type=metric,
            metric_name=name,
            metric_value=round(_value(found), 4),
            metric_args={"interval": [round(end, 4) for end in found["interval"]]} if found["interval"] else None,
        )
        for task, dataset, (metric, name), found in rows
    ]


def _value(found: dict[str, Any]) -> float:
    return next(found[key] for key in ("bits_per_byte", "share", "mean") if key in found)


def _context(release: Release) -> dict[str, Any]:
    """The variables of the templates."""
    results, training = release.results, release.training
    documents = {license: count for license, count, _ in release.data.licenses}
    return results | {
        "name": NAME,
        "plots": plots,
        "training_curve": TRAINING_CURVE,
        "evaluation_page": EVALUATION_PAGE,
        "training_page": TRAINING_PAGE,
        "corpus_card": CORPUS_CARD,
        "pubmed_ids": PUBMED_IDS,
        "weights": release.weights,
        "weights_sha256": file_sha256(release.weights),
        "parameters": release.parameters,
        "training": training,
        "recipe": yaml.safe_dump(training.recipe, sort_keys=False).strip(),
        "passes": training.tokens / release.data.train_tokens,
        "data": release.data,
        "unstated": documents.get(UNSTATED, 0) / sum(documents.values()),
        "not_measured": [n for n, found in results["baselines"]["models"].items() if "not_measured" in found],
        "max_document_tokens": MAX_DOCUMENT_TOKENS,
        "prefix_tokens": PREFIX_TOKENS,
        "verdict": verdict,
        "samples": [_wrap(sample) for sample in results["generation"]["samples"]],
        "software": ", ".join(f"{name} {' and '.join(found)}" for name, found in release.software.items()),
    }


def _wrap(text: str) -> str:
    return "\n".join(textwrap.fill(line, 100) for line in text.splitlines())
