"""Options of the tokenizer's stages. They import nothing heavy, so that `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path

from healthslm.options import CheckedOptions, ExecutorOptions, PositiveInt


@dataclass
class TokenizerOptions(CheckedOptions):
    """Options of `train_tokenizer`."""

    corpus: Path
    """Corpus folder, written by scripts/build_corpus.py."""
    output: Path
    """Folder to write the tokenizer to."""
    vocab_size: PositiveInt = 32_000
    """Number of tokens, including the special tokens and the 256 bytes."""
    max_documents: PositiveInt = 1_000_000
    """Most documents to train on; a larger corpus is sampled evenly. More text hardly changes the vocabulary."""


@dataclass
class TokenizeOptions(ExecutorOptions):
    """Options of `tokenize_corpus`."""

    corpus: Path = field(kw_only=True)
    """Corpus folder, written by scripts/build_corpus.py."""
    tokenizer: str = field(kw_only=True)
    """Folder or Hub name of a fast tokenizer."""
    output: Path = field(kw_only=True)
    """Folder to write the tokens to."""


@dataclass
class TokenizerReportOptions:
    """Options of `report_tokenizers`."""

    tokenizers: list[str]
    """Folders or Hub names of fast tokenizers."""
    data: list[str]
    """Held-out text: Parquet, JSON Lines or text files, folders or patterns of them."""
    output: Path | None = None
    """JSON file to write the metrics to."""
