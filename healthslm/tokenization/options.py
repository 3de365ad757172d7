"""Options of the tokenizer's stages, which import nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass, field
from pathlib import Path

from healthslm.options import CheckedOptions, ExecutorOptions, PositiveInt


@dataclass
class TokenizerOptions(CheckedOptions):
    """Options of `train_tokenizer`."""

    corpus: Path
    """Corpus folder: train/*.parquet is trained on, validation/*.parquet measured."""
    output: Path
    """Folder to write the tokenizer to."""
    vocab_size: PositiveInt = 32_000
    """Number of tokens, the special tokens and the 256 bytes among them."""
    max_documents: PositiveInt = 1_000_000
    """Documents to train on; of more, every second, third and so on is taken. More text hardly changes the tokens."""


@dataclass
class TokenizeOptions(ExecutorOptions):
    """Options of `tokenize_corpus`."""

    corpus: Path = field(kw_only=True)
    """Corpus folder: Parquet files in train/, validation/ and test/."""
    tokenizer: str = field(kw_only=True)
    """Folder or Hub name of a tokenizer, any that Transformers opens as a fast one."""
    output: Path = field(kw_only=True)
    """Folder to write the arrays to."""


@dataclass
class TokenizerReportOptions:
    """Options of `report_tokenizers`."""

    tokenizers: list[str]
    """Folders or Hub names of fast tokenizers."""
    data: list[str]
    """Files of documents (Parquet, JSON Lines or text), folders or patterns of them: held-out text."""
    output: Path | None = None
    """JSON file to write the figures to."""
