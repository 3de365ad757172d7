"""Training the tokenizer: the architecture is `HealthSLMTokenizer`, the vocabulary comes from a training split."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from healthslm.corpus.reader import count_documents, read_texts, split_files
from healthslm.errors import UserError
from healthslm.files import check_output_folder, file_sha256, replacing, write_json
from healthslm.options import OptionError
from healthslm.repository import model_repository
from healthslm.tokenization.encoding import encode_texts
from healthslm.tokenization.options import TokenizerOptions

logger = logging.getLogger(__name__)

REPORT_FILE = "training_report.json"


def train_tokenizer(options: TokenizerOptions) -> None:
    """Train a tokenizer on a corpus's training split and save it with a report. The same files give the same bytes.

    Raises:
        UserError: The training split is missing, damaged or too small for the vocabulary size, or the output folder
            holds other files than a tokenizer.
    """
    check_output_folder(options.output, "a tokenizer", lambda folder: (folder / REPORT_FILE).exists())
    architecture = get_class_from_dynamic_module("tokenization_healthslm.HealthSLMTokenizer", str(model_repository()))()
    if options.vocab_size < len(architecture):
        problem = f"must be at least {len(architecture)} (the special tokens and bytes), not {options.vocab_size}"
        raise OptionError("vocab_size", problem)
    files = split_files(options.corpus, "train")
    if not files:
        raise UserError(f"{options.corpus / 'train'}: no Parquet files; build a corpus with scripts/build_corpus.py")

    tokenizer = architecture.train_new_from_iterator(
        _training_texts(files, options.max_documents), options.vocab_size, show_progress=False
    )
    if len(tokenizer) < options.vocab_size:
        raise UserError(
            f"{options.corpus / 'train'}: too little text for vocab_size {options.vocab_size}, only for "
            f"{len(tokenizer)}; add text or lower --vocab-size"
        )

    validation = count_tokens(tokenizer, split_files(options.corpus, "validation"))
    report = {
        "vocab_size": len(tokenizer),
        "train_files": {path.name: file_sha256(path) for path in files},
        "validation": validation,
    }
    with replacing(options.output) as folder:
        tokenizer.save_pretrained(folder)
        write_json(folder / REPORT_FILE, report)
    logger.info(
        "%s: %s tokens; %.3f bytes per token on the validation split",
        *(options.output, f"{len(tokenizer):,}", validation["bytes_per_token"]),
    )


def _training_texts(files: list[Path], max_documents: int) -> Iterator[list[str]]:
    documents = sum(map(count_documents, files))
    stride = math.ceil(documents / max_documents)
    seen = 0
    with tqdm(total=documents, desc="read", unit="document") as progress:
        for path in files:
            for texts in read_texts(path):
                yield texts[-seen % stride :: stride]
                seen += len(texts)
                progress.update(len(texts))
    logger.info("training the tokenizer")


def count_tokens(tokenizer: PreTrainedTokenizerBase, files: list[Path]) -> dict[str, int | float]:
    """Count documents, tokens without special tokens, UTF-8 bytes, and bytes per token in corpus files."""
    documents = tokens = text_bytes = 0
    for path in files:
        for texts in read_texts(path):
            documents += len(texts)
            tokens += sum(map(len, encode_texts(tokenizer, texts)))
            text_bytes += sum(len(text.encode()) for text in texts)
    bytes_per_token = round(text_bytes / max(tokens, 1), 4)
    return {"documents": documents, "tokens": tokens, "bytes": text_bytes, "bytes_per_token": bytes_per_token}
