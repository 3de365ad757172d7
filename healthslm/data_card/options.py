"""Options of the data card. They import nothing heavy, so that `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from healthslm.options import CheckedOptions, Range

BINS_PER_CONTEXT = 32
"""Bins of the histogram of chunks by tokens."""


@dataclass
class DataCardOptions(CheckedOptions):
    """Options of `describe_corpus`."""

    corpus: Path
    """Corpus folder, written by scripts/build_corpus.py."""
    output: Path
    """Folder to write the card to: README.md and its figures."""
    tokens: Path | None = None
    """Tokenized corpus, written by scripts/tokenize_corpus.py; without it, the card leaves tokens out."""
    context: Annotated[int, Range(at_least=BINS_PER_CONTEXT)] = 1024
    """Context length in tokens, marked in the figure of tokens."""
    title: str = "HealthSLM corpus"
    """Heading of the card."""
    names: dict[str, str] = field(default_factory=dict)
    """Names to show for input and held-out files: {pubmed26n0001: pubmed20n0014.xml.gz}."""
