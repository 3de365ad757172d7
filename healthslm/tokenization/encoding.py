"""Opening a tokenizer and encoding text with it, the same way in every stage."""

import hashlib
import json
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from healthslm.errors import UserError


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Open a fast tokenizer from a folder or the Hub.

    Raises:
        UserError: There is none, it is damaged, or it is not a fast one.
    """
    folder = Path(name)
    if folder.is_dir() and not any((*folder.glob("tokenizer*"), *folder.glob("vocab*"))):
        raise UserError(f"{name}: no tokenizer in this folder; scripts/train_tokenizer.py trains one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    except Exception as error:  # for a damaged file the tokenizers library raises nothing narrower
        reason = str(error).strip().partition("\n")[0]
        where = "cannot open the tokenizer" if folder.is_dir() else "no such folder or tokenizer on the Hub"
        raise UserError(f"{name}: {where}: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{name}: not a fast tokenizer, which would turn text such as <pad> into special tokens")
    return tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Open a fast tokenizer with a separator token, see `open_tokenizer` and `separator_id`."""
    tokenizer = open_tokenizer(name)
    separator_id(tokenizer)
    return tokenizer


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Checksum of a fast tokenizer, without its settings for padding and truncation."""
    content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token before every document: eos_token, or bos_token if there is none.

    Raises:
        UserError: There is neither.
    """
    for token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token_id is not None:
            return token_id
    name = tokenizer.name_or_path
    raise UserError(f"{name}: the tokenizer has no token to separate documents; set its eos_token")


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], **more: bool) -> BatchEncoding:
    """Encode texts without special tokens, even where the text spells one out."""
    return tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False, **more
    )


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, see `encode`."""
    return encode(tokenizer, texts)["input_ids"]


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """The separator and the token ids of each text, see `encode`."""
    separator = separator_id(tokenizer)
    return [np.array([separator, *ids]) for ids in encode_texts(tokenizer, texts)]
