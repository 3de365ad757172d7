"""The pages of a release, from templates: the model card's section and metadata in README.md, and docs/evaluation.md.

Every figure comes from the results of the evaluation, the run's folder, the corpus's report or the file of weights.
"""

import importlib.metadata
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard

import healthslm
from healthslm.errors import UserError
from healthslm.evaluation import figures
from healthslm.evaluation.figures import Results
from healthslm.evaluation.generation_quality import MAX_DOCUMENT_TOKENS
from healthslm.evaluation.measures import PUBMED_IDS
from healthslm.evaluation.question_answering import macro_f1
from healthslm.files import file_sha256
from healthslm.release.training_data import CORPUS_CARD, TrainingData
from healthslm.training.hardware import describe_hardware
from healthslm.training.run_folder import TrainingReport

NAME = "HealthSLM"
README = "README.md"
EVALUATION_PAGE = Path("docs/evaluation.md")
FIGURES_FOLDER = Path("docs/evaluation")
BEGIN, END = "<!-- release: written by scripts/release.py -->", "<!-- /release -->"
SOFTWARE = ("torch", "transformers", "lm_eval")


@dataclass(frozen=True)
class Release:
    """All that the pages of a release tell of."""

    weights: Path
    parameters: int
    results: Results
    training: TrainingReport
    data: TrainingData


def write_pages(release: Release, repository: Path, folder: Path) -> None:
    """Write the repository's README.md with the section of this release, and docs/evaluation.md, into a folder.

    Raises:
        UserError: The README has no place for the section.
    """
    context = _context(release)
    page = _fill("evaluation.md.jinja", context)
    (folder / EVALUATION_PAGE).parent.mkdir(parents=True, exist_ok=True)
    (folder / EVALUATION_PAGE).write_text(page, encoding="utf-8")
    readme = (repository / README).read_text(encoding="utf-8")
    card = insert_section(readme, _fill("model_card.md.jinja", context), evaluation_results(release.results))
    (folder / README).write_text(card, encoding="utf-8")


def insert_section(readme: str, section: str, results: list[EvalResult]) -> str:
    """A model card with this section between the marks and these results as model-index; all else stays.

    Raises:
        UserError: The marks are not there, once each.
    """
    before, begin, rest = readme.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end or BEGIN in old + after or END in before + after:
        raise UserError(f"{README}: expected one line {BEGIN} and, below it, one line {END}")
    card = ModelCard(f"{before}{BEGIN}\n\n{section.strip()}\n\n{END}{after}")
    card.data.model_name, card.data.eval_results = NAME, results
    return str(card)


def evaluation_results(results: Results) -> list[EvalResult]:
    """The main figures as the Hub's model-index has them, with their intervals of 95%."""
    held_out, pubmed = results["held_out"], results["pubmed"]
    pairs, harder = (found["scores"]["all"] for found in (results["minimal_pairs"], results["minimal_pairs"]["harder"]))
    pubmedqa = results["pubmedqa"]["pubmedqa"]
    bits, accuracy = ("bits_per_byte", "bits per byte"), ("accuracy", "accuracy")
    rows = [
        ("text-generation", f"held-out abstracts ({held_out['data']})", bits, held_out["model"]),
        ("text-generation", "held-out PubMed citations", bits, pubmed),
        ("text-generation", "minimal pairs of biomedical terms", ("accuracy", "win rate"), pairs["win_rate"]),
        ("text-generation", "harder minimal pairs", ("accuracy", "win rate"), harder["win_rate"]),
        ("question-answering", "PubMedQA", accuracy, pubmedqa["accuracy"]),
        ("question-answering", "PubMedQA", ("f1", "macro-F1"), pubmedqa["macro_f1"]),
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
    """What the templates read."""
    results, training = release.results, release.training
    return results | {
        "name": NAME,
        "figures": figures,
        "figures_folder": FIGURES_FOLDER,
        "evaluation_page": EVALUATION_PAGE,
        "corpus_card": CORPUS_CARD,
        "pubmed_ids": PUBMED_IDS,
        "weights": release.weights,
        "weights_sha256": file_sha256(release.weights),
        "parameters": release.parameters,
        "training": training,
        "recipe": yaml.safe_dump(training.recipe, sort_keys=False).strip(),
        "passes": training.tokens / release.data.train_tokens,
        "data": release.data,
        "not_measured": [name for name, found in results["beside"]["models"].items() if "not_measured" in found],
        "majority_macro_f1": _majority_macro_f1(results["pubmedqa"]["pubmedqa"]["confusion"]),
        "max_document_tokens": MAX_DOCUMENT_TOKENS,
        "samples": [_wrapped(sample) for sample in results["generation"]["samples"]],
        "software": {"healthslm": healthslm.__version__}
        | {package: importlib.metadata.version(package) for package in SOFTWARE},
        "machine": describe_hardware(torch.device("cpu")),
    }


def _fill(template: str, context: dict[str, Any]) -> str:
    return templates().get_template(template).render(context)


def templates() -> jinja2.Environment:
    """The templates of the pages and tables, with the filters that they use."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("healthslm.release"),
        undefined=jinja2.StrictUndefined,  # a figure that is missing is an error, not a gap
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    environment.filters |= {
        "count": "{:,}".format,
        "percent": "{:.1%}".format,
        "interval": _interval,
    }
    return environment


def _interval(ends: list[float] | None, form: str) -> str:
    """An interval with its ends in this format, such as ".1%"."""
    return "too few documents" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


def _majority_macro_f1(confusion: list[list[int]]) -> float:
    """Macro-F1 of who always gives the commonest answer."""
    occurrences = np.sum(confusion, axis=1)
    always = np.zeros_like(confusion)
    always[:, occurrences.argmax()] = occurrences
    return float(macro_f1(always))


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.fill(line, 100) for line in text.splitlines())
