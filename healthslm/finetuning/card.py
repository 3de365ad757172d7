"""The model card of a fine-tuned model or adapter: base, data, results, limits and how to use it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from healthslm import markdown

CARD_FILE = "README.md"

_TEMPLATES = "healthslm.finetuning"
_TAGS = ["biology", "medical"]


@dataclass(frozen=True)
class Result:
    """A metric of a fine-tuned model on held-out data, next to what it is compared with."""

    metric: str
    """With the name of the data if there are several: "macro-F1, BC5CDR test"."""
    value: float
    interval: Sequence[float] | None = None
    """95% interval."""
    baselines: Mapping[str, float] = field(default_factory=dict)
    """The same metric of baselines, by name: {"base model": 1.23}."""
    form: str = ".3f"
    """Format of the numbers, such as ".1%"."""


@dataclass(frozen=True)
class Card:
    """What the card of a fine-tuned model says."""

    title: str
    summary: str
    """What the model does, in one or two sentences."""
    task: str
    """The Hub's name of the task: "text-generation", "text-classification" or "token-classification"."""
    base: str
    """Folder or Hub name of the base model."""
    base_sha256: str
    """Checksum of the base model's weights."""
    is_adapter: bool
    usage: str
    """Python code that runs the model."""
    data: Mapping[str, str]
    """What the model was trained and evaluated on: {"training": "1,000 examples of train.jsonl", …}."""
    results: Sequence[Result]
    settings: Mapping[str, Any]
    """Options and figures of the training run, by name."""
    limits: Sequence[str] = ()
    """Sentences on what the model can't do, in addition to those that hold for all models of this project."""


def write_card(folder: Path, card: Card) -> None:
    """Write `README.md` into the folder of a fine-tuned model or adapter."""
    metadata: dict[str, Any] = {
        "library_name": "peft" if card.is_adapter else "transformers",
        "pipeline_tag": card.task,
        "tags": [*_TAGS, *(["lora"] if card.is_adapter else [])],
    }
    if not Path(card.base).is_absolute():  # the Hub knows no folders
        metadata = {"base_model": card.base, **metadata}
    context = {
        "card": card,
        "metadata": yaml.safe_dump(metadata, sort_keys=False).strip(),
        "table": _table(card.results),
    }
    (folder / CARD_FILE).write_text(markdown.render(_TEMPLATES, "card.md.jinja", context), encoding="utf-8")


def _table(results: Sequence[Result]) -> list[list[str]]:
    """The rows of the table of results, with its head; empty without results."""
    if not results:
        return []
    baselines = list(dict.fromkeys(name for result in results for name in result.baselines))
    head = [["metric", "this model", "95% interval", *baselines], ["---", *["---:"] * (2 + len(baselines))]]
    return head + [
        [
            result.metric,
            format(result.value, result.form),
            " to ".join(format(end, result.form) for end in result.interval) if result.interval else "–",
            *(format(result.baselines[n], result.form) if n in result.baselines else "–" for n in baselines),
        ]
        for result in results
    ]
