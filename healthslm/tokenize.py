"""Writing a tokenised corpus: each corpus file becomes arrays of tokens, document ends and byte counts."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from healthslm.corpus_reader import count_documents, read_texts, split_files
from healthslm.documents import SPLITS
from healthslm.errors import UserError
from healthslm.files import replacing, write_json
from healthslm.tokens import INFO_FILE, TOKENIZER_FOLDER, tokenizer_sha256

logger = logging.getLogger(__name__)


@dataclass
class TokenizeOptions:
    """Options of `tokenize_corpus`."""

    corpus: Path
    """Corpus folder: Parquet files in train/, validation/ and test/."""
    tokenizer: str
    """Folder or Hub name of a tokenizer, any that Transformers opens as a fast one."""
    output: Path
    """Folder to write the arrays to."""


def tokenize_corpus(options: TokenizeOptions) -> None:
    """Turn every split of a corpus into memory-mapped arrays; healthslm/tokens.py describes and reads their folder.

    Memory holds the tokens of one corpus file at a time.

    Raises:
        UserError: where the corpus is missing or empty, or the tokenizer missing, slow or without a separator.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    files = {split: paths for split in SPLITS if (paths := split_files(options.corpus, split))}
    if not files:
        raise UserError(
            f"{options.corpus}: no Parquet files in {', '.join(SPLITS)}; scripts/build_corpus.py writes them"
        )

    documents = sum(count_documents(path) for paths in files.values() for path in paths)
    with replacing(options.output) as folder, tqdm(total=documents, desc="tokenising", unit="document") as progress:
        tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        splits = {}
        for split, paths in files.items():
            (folder / split).mkdir()
            counts = []
            for path in paths:
                counts.append(write_token_file(path, folder / split, tokenizer))
                progress.update(counts[-1]["documents"])
            splits[split] = {key: sum(count[key] for count in counts) for key in ("documents", "tokens", "bytes")}
            splits[split]["files"] = counts
        write_json(
            folder / INFO_FILE,
            {
                "tokenizer_sha256": tokenizer_sha256(folder / TOKENIZER_FOLDER),
                "vocab_size": len(tokenizer),
                "separator_id": separator_id(tokenizer),
                "dtype": token_dtype(tokenizer).name,
                "splits": splits,
            },
        )
    for split, count in splits.items():
        logger.info(
            "%s: %d documents, %d tokens, %.3f bytes per token",
            *(split, count["documents"], count["tokens"]),
            count["bytes"] / max(count["tokens"] - count["documents"], 1),
        )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Open a fast tokenizer that can separate documents.

    Raises:
        UserError: where there is none, or not such a one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no tokenizer to be opened here: {' '.join(str(error).split())}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{name}: not a fast tokenizer, so text that spells a special token would become one")
    if separator_id(tokenizer) is None:
        raise UserError(f"{name}: the tokenizer has no end-of-text token to separate documents with; set its eos_token")
    return tokenizer


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token between documents: what a model is to write at a document's end, else what it begins with."""
    return tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    """The smallest type for the tokenizer's ids: uint16 up to 65,536 of them, else uint32."""
    return np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Encode texts as nothing but text: no special token is added, and none comes of text that spells one."""
    encoding = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return encoding["input_ids"]


def write_token_file(path: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, str | int]:
    """Write the three arrays of one corpus file into a folder; return their name and counts."""
    separator, dtype = separator_id(tokenizer), token_dtype(tokenizer)
    tokens, lengths, text_bytes = [], [], []
    for texts in read_texts(path):
        documents = [[separator, *ids] for ids in encode_texts(tokenizer, texts)]
        tokens.append(np.concatenate([np.array(ids, dtype) for ids in documents]))
        lengths += [len(ids) for ids in documents]
        text_bytes += [len(text.encode()) for text in texts]
    name = path.stem
    np.save(folder / f"{name}.tokens.npy", np.concatenate([np.zeros(0, dtype), *tokens]))
    np.save(folder / f"{name}.ends.npy", np.cumsum(lengths, dtype=np.int64))
    np.save(folder / f"{name}.bytes.npy", np.array(text_bytes, np.int64))
    return {"name": name, "documents": len(lengths), "tokens": sum(lengths), "bytes": sum(text_bytes)}
