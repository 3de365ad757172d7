"""Options of the commands that train classifiers and that build data for them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from healthslm.options import CheckedOptions, Device, OptionError, PositiveInt, Range, Seed, UnitInterval
from healthslm.training.options import Tracker

_FREE = {"affects_result": False}

Task = Literal["mentions", "sentences", "text"]
LabeledTokens = Literal["all", "last"]

CONLL_SUFFIXES = (".tsv", ".conll", ".bio", ".txt")


@dataclass
class ClassifierOptions(CheckedOptions):
    """Fine-tuning of a classifier of tokens or of texts."""

    train: list[Path]
    """Training data: CoNLL files (.tsv, .conll, .bio or .txt), JSON Lines or Parquet, see docs/classification.md."""
    output: Path = field(metadata=_FREE)
    """Folder for the classifier: the model, its tokenizer, a model card and metrics.json."""
    model: str = "."
    """Folder or Hub name of the model to fine-tune."""
    task: Task = "mentions"
    """What to label: mentions in text (BIO tags of words), the sentences of a document, or whole texts."""
    validation: Path | None = None
    """Validation data, to keep the best epoch. Without it, the last epoch is kept."""
    test: Path | None = None
    """Test data, evaluated once at the end."""
    text_field: str | None = None
    """Field of the words, sentences or text in JSON Lines and Parquet; by default `tokens`, `sentences` or `text`."""
    label_field: str | None = None
    """Field of the labels; by default `labels`, or `label` for whole texts."""
    bidirectional: bool = False
    """Let each token attend to the whole sequence, not only to the tokens before it (is_causal=False)."""
    labeled_tokens: LabeledTokens | None = None
    """Which tokens of a word or sentence are trained with its label: all, as pipelines need, or only the last, which is
    the only one that sees the whole word in a causal model. By default all, and last in a causal model or for
    sentences."""
    join: Annotated[int, Range(at_least=0)] = 0
    """Join consecutive sentences of mention data to sequences of up to this many tokens; 0 keeps them apart."""
    context: Annotated[int | None, Range(at_least=1)] = None
    """Longest sequence in tokens; by default the model's maximum."""
    truncate: bool = False
    """Cut longer sequences. Otherwise they are an error."""
    method: Literal["full", "lora"] = "full"
    """Train all weights, or LoRA adapters and the head; the adapters are merged into the saved model."""
    rank: PositiveInt = 16
    """Rank of the adapters."""
    from_scratch: bool = False
    """Start from new random weights, as a baseline."""
    epochs: PositiveInt = 10
    """Epochs at most; the learning rate decays to 0 over them."""
    patience: Annotated[int | None, Range(at_least=1)] = None
    """Stop after this many epochs without a better validation result."""
    learning_rate: Annotated[float, Range(above=0)] = 5e-4
    """Peak learning rate."""
    batch_size: PositiveInt = field(default=16, metadata={"memory": True})
    """Sequences per step."""
    seed: Seed = 0
    """Seed of the head's weights, the order of the data and dropout."""
    resume: bool = field(default=False, metadata=_FREE)
    """Continue a run that was stopped, from its last epoch."""
    report_to: Tracker = field(default="none", metadata=_FREE)
    """Tracker to log to."""
    device: Device = field(default="auto", metadata=_FREE)
    """Where to train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train:
            raise OptionError("train", "name at least one file")
        if self.join and self.task != "mentions":
            raise OptionError("join", f"only mention data has sentences to join, not --task {self.task}")
        if self.labeled_tokens and self.task == "text":
            raise OptionError("labeled_tokens", "a whole text has one label, without tokens to choose from")
        if self.patience and not self.validation:
            raise OptionError("patience", "needs --validation")
        if self.method != "lora" and self.rank != ClassifierOptions.rank:  # its default
            raise OptionError("rank", "needs --method lora")
        files = [path for path in (*self.train, self.validation, self.test) if path]
        for name in ("text_field", "label_field"):
            if getattr(self, name) and all(path.suffix in CONLL_SUFFIXES for path in files):
                raise OptionError(name, f"CoNLL files ({', '.join(CONLL_SUFFIXES)}) have columns, not fields")

    @property
    def tokens_with_labels(self) -> LabeledTokens:
        """`labeled_tokens` or its default."""
        return self.labeled_tokens or ("all" if self.bidirectional and self.task == "mentions" else "last")


@dataclass
class SentenceRolesOptions(CheckedOptions):
    """Data set of sentences with their roles."""

    corpus: Path
    """Folder of the corpus, with abstracts from PubMed."""
    output: Path
    """Folder for train.jsonl, validation.jsonl and test.jsonl."""
    validation_fraction: UnitInterval = 0.1
    """Share of the abstracts in the validation split, chosen by their ids."""
    test_fraction: UnitInterval = 0.15
    """Share of the abstracts in the test split."""
