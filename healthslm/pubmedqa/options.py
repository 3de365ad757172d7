"""Options of PubMedQA's artificial questions and of its cross-validation. They import nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from healthslm.options import (
    CheckedOptions,
    Device,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Range,
    Seed,
    UnitInterval,
)

MAX_WORDS = 90
Statement = Literal["title", "conclusion"]


@dataclass(kw_only=True)
class ArtificialQuestionsOptions(CheckedOptions):
    """Options of `build_pubmedqa_artificial`."""

    corpus: Path
    """Folder of a corpus, as written by `build_corpus.py`. The abstracts of its training split are used."""
    held_out: list[Path]
    """PubMedQA's expert questions, training and test (JSON Lines). Abstracts that share a PMID, a title or question, or
    13 words in a row with them are dropped."""
    output: Path
    """Folder to write to: questions.jsonl and report.json."""
    statements: list[Statement] = field(default_factory=lambda: ["title", "conclusion"])
    """Where the statements come from: the title, as in PubMedQA's paper, or the first statement of the conclusion. Each
    abstract gives one question, from the first of these that has a statement."""
    yes_per_no: NonNegativeFloat = 2.0
    """Keep at most this many questions with the answer yes per question with the answer no, among questions with
    similar words. Statements are rarely negated: without a limit 93% of the answers are yes. 0 keeps all."""
    min_context_words: NonNegativeInt = 50
    """Drop abstracts with fewer words left without their conclusion."""
    max_words: PositiveInt = MAX_WORDS
    """Words of the context in the field `text`, from its end, where the results are."""


@dataclass(kw_only=True)
class CrossValidationOptions(CheckedOptions):
    """Options of `cross_validate_pubmedqa`."""

    train: Path
    """PubMedQA's 500 expert questions for training and validation (JSON Lines)."""
    test: Path
    """PubMedQA's 500 expert questions of the test split."""
    output: Path
    """JSON file to write the results to."""
    model: str
    """Folder of the model that was fine-tuned on the artificial questions, with its tokenizer."""
    base: str | None = None
    """Folder or Hub name of the model before that, as a baseline; also untrained, with new weights."""
    artificial: Path | None = None
    """The artificial questions (questions.jsonl), for the baseline of word counts."""
    folds: Annotated[int, Range(at_least=2)] = 10
    """Number of folds of the training questions. One model is trained without each fold."""
    max_words: PositiveInt = MAX_WORDS
    """Words of the context to read, from its end, where the results are."""
    penalty: Annotated[float, Range(above=0)] = 1.0
    """Strength of the head's L2 penalty."""
    balance: UnitInterval = 0.0
    """How far the answers are weighted against their frequency: 0 not at all, 1 so that all count the same. More lets
    the head answer maybe more often."""
    seed: Seed = 0
    """Seed of the folds and of the untrained model."""
    device: Device = "auto"
    """Device to run on. `auto` uses a GPU if there is one."""
