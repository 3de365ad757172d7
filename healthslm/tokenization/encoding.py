"""Opening a tokenizer and encoding text with it, in one way for every stage."""

import hashlib
import json

from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from healthslm.errors import UserError


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Open a fast tokenizer, from a folder or the Hub.

    Raises:
        UserError: There is none, or it is not a fast one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    except Exception as error:  # for a damaged file the tokenizers library raises nothing narrower
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name}: no tokenizer in this folder, or on the Hub by this name: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{name}: not a fast tokenizer, so text that spells a special token would become one")
    return tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Open a fast tokenizer that can separate documents, see `open_tokenizer`."""
    tokenizer = open_tokenizer(name)
    if separator_id(tokenizer) is None:
        raise UserError(f"{name}: the tokenizer has no token to separate documents with: set its eos_token")
    return tokenizer


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Checksum of a fast tokenizer, whatever files it was opened from; how it pads and truncates does not count."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token in front of every document: the one that ends a text, else the one that begins it."""
    return tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], **more: bool) -> BatchEncoding:
    """Encode texts as nothing but text: no special token is added, and none comes of text that spells one."""
    return tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False, **more
    )


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, as `encode` gives them."""
    return encode(tokenizer, texts)["input_ids"]
