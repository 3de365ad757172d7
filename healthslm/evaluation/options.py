"""Options of the evaluations, which import nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from healthslm.options import CheckedOptions, Device, PositiveInt, Range


@dataclass
class EvaluationOptions(CheckedOptions):
    """Options of `evaluate`."""

    model: str
    """Folder or Hub name of a causal language model, with its tokenizer."""
    data: list[str]
    """Files with columns title and text (Parquet or JSON Lines), folders or patterns of them."""
    output: Path | None = None
    """JSON file to write the figures to."""
    documents: Annotated[int | None, Range(at_least=1)] = None
    """Evaluate on the first so many documents; by default on all."""
    context: Annotated[int | None, Range(at_least=1)] = None
    """Window in tokens; by default the model's context."""
    batch_tokens: Annotated[int | None, Range(at_least=1)] = field(default=None, metadata={"memory": True})
    """Tokens of a forward pass: changes memory and speed, not the result. By default 1,024 on a CPU, 8,192 on a GPU."""
    device: Device = "auto"
    """Where to compute: auto takes a GPU if there is one."""


@dataclass
class FetchOptions:
    """Options of `fetch_evaluation_set`."""

    ids: Path
    """The published set: JSON Lines with id (pmid:123), part and sha256."""
    output: Path
    """Folder for documents.parquet, which scripts/evaluate.py reads, report.json, and NCBI's answers in xml/."""
    email: str | None = None
    """Your address, which NCBI asks for so as to write to you before it blocks anybody."""
    base_url: str = "https://eutils.ncbi.nlm.nih.gov/entrez/eutils/"
    """Address of the E-utilities."""


@dataclass(kw_only=True)
class EvaluationData(CheckedOptions):
    """What a model is measured on, and beside which others."""

    corpus: Path
    """Folder of the corpus that it was trained on: its training text, and its held-out PubMed citations."""
    tokens: Path
    """Folder of the same corpus as tokens."""
    held_out: Path
    """File of held-out abstracts, with columns title and text."""
    pubmedqa: Path
    """PubMedQA's test questions, as JSON Lines."""
    beside: dict[str, str] = field(default_factory=dict)
    """Other models, whose bits per byte on the same abstracts stand beside: their folders or Hub names, by the names to
    show."""
    documents: PositiveInt = 500
    """Documents to generate, titles to ask for, and half of the documents to look for memorised text in."""
    device: Device = "auto"
    """Where to compute all but the speed of generation: auto takes a GPU if there is one."""


@dataclass(kw_only=True)
class ReleaseEvaluationOptions(EvaluationData):
    """Options of `evaluate_release`."""

    model: str
    """Folder or Hub name of the model, with its tokenizer."""
    output: Path
    """Folder of the results."""
    training: Path | None = None
    """Folder of the run that made it, with its config.yaml and metrics.jsonl: memorised text is then looked for in the
    part of the training text that it has read, and not in all of it."""
    only: list[str] = field(default_factory=list)
    """Measures to take, by the names of their files; by default all."""
    keep: bool = False
    """Keep what the folder of the results has of this model and this data, rather than measure it again."""
