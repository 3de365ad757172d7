"""Training the tokenizer: `HealthSLMTokenizer` is the architecture, the corpus's training split gives the vocabulary."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from healthslm.corpus_reader import count_documents, read_texts, split_files
from healthslm.errors import UserError
from healthslm.files import replacing, write_json
from healthslm.tokenize import encode_texts

logger = logging.getLogger(__name__)
REPOSITORY = Path(__file__).resolve().parents[1]
REPORT_FILE = "training_report.json"


@dataclass
class TokenizerOptions:
    """Options of `train_tokenizer`."""

    corpus: Path
    """Corpus folder: train/*.parquet is trained on, validation/*.parquet measured."""
    output: Path
    """Folder to write the tokenizer to."""
    vocab_size: int = 32_000
    """Number of tokens, the special tokens and the 256 bytes among them."""


def train_tokenizer(options: TokenizerOptions) -> None:
    """Train a tokenizer on a corpus's training split and save it beside a report; the same corpus gives the same bytes.

    Raises:
        UserError: where the training split is missing or too small for so many tokens.
    """
    files = split_files(options.corpus, "train")
    if not files:
        raise UserError(
            f"{options.corpus / 'train'}: no Parquet files to train on; scripts/build_corpus.py writes them"
        )
    architecture = get_class_from_dynamic_module("tokenization_healthslm.HealthSLMTokenizer", str(REPOSITORY))()
    if options.vocab_size < len(architecture):
        raise UserError(
            f"vocab_size {options.vocab_size} is too small: the special tokens and the bytes alone are {len(architecture)}"
        )

    tokenizer = architecture.train_new_from_iterator(_training_texts(files), options.vocab_size, show_progress=False)
    if len(tokenizer) < options.vocab_size:
        raise UserError(
            f"{options.corpus / 'train'}: too little text for vocab_size {options.vocab_size}: it gives only "
            f"{len(tokenizer)} tokens; add text or lower vocab_size"
        )

    report = {
        "vocab_size": len(tokenizer),
        "train_files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "validation": measure(tokenizer, split_files(options.corpus, "validation")),
    }
    with replacing(options.output) as folder:
        tokenizer.save_pretrained(folder)
        write_json(folder / REPORT_FILE, report)
    logger.info("%s: %d tokens; on validation %s", options.output, len(tokenizer), report["validation"])


def _training_texts(files: list[Path]) -> Iterator[list[str]]:
    with tqdm(total=sum(map(count_documents, files)), desc="counting words", unit="document") as progress:
        for path in files:
            for texts in read_texts(path):
                yield texts
                progress.update(len(texts))
    logger.info("merging; minutes on a large corpus")


def measure(tokenizer: PreTrainedTokenizerBase, files: list[Path]) -> dict[str, int | float]:
    """Documents, tokens (without separators), UTF-8 bytes and bytes per token of corpus files."""
    documents = tokens = text_bytes = 0
    for path in files:
        for texts in read_texts(path):
            documents += len(texts)
            tokens += sum(map(len, encode_texts(tokenizer, texts)))
            text_bytes += sum(len(text.encode()) for text in texts)
    return {
        "documents": documents,
        "tokens": tokens,
        "bytes": text_bytes,
        "bytes_per_token": round(text_bytes / max(tokens, 1), 4),
    }
