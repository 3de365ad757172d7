"""HealthSLM's tokenizer: byte-level BPE with GPT-2's pre-tokenization. Its special tokens have the first ids.

The class defines the architecture, and `train_new_from_iterator` trains a vocabulary for it. A trained tokenizer is
saved as a plain `TokenizersBackend`, which AutoTokenizer loads without this file.
"""

import copy
from os import PathLike
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import TokenizersBackend

SEPARATOR_TOKEN = "<|endoftext|>"  # id 0: precedes every document, so it begins one and ends the previous one
PAD_TOKEN = "<|pad|>"  # id 1
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")  # ids 2 to 5: reserved for a chat template


class HealthSLMTokenizer(TokenizersBackend):
    """Byte-level BPE, lossless for any Unicode text: no normalizer, no unknown token, no added space.

    The untrained vocabulary is the special tokens and the 256 bytes. Encoding puts the separator in front of a text, as
    in training; `add_special_tokens=False` leaves it out. Text that spells a special token becomes that token, as chat
    templates need, unless you pass `split_special_tokens=True`.

    Args:
        vocab: Ids by token, including the special tokens.
        merges: Pairs of tokens in the order in which they are merged.
    """

    model = BPE
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab: dict[str, int] | None = None,
        merges: list[tuple[str, str]] | None = None,
        bos_token: str = SEPARATOR_TOKEN,
        eos_token: str = SEPARATOR_TOKEN,
        pad_token: str = PAD_TOKEN,
        extra_special_tokens: list[str] | tuple[str, ...] = CHAT_TOKENS,
        add_bos_token: bool = True,
        padding_side: str = "left",
        model_max_length: int = 1024,
        **kwargs: Any,
    ):
        if vocab is None:
            byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
            tokens = [SEPARATOR_TOKEN, PAD_TOKEN, *CHAT_TOKENS, *byte_tokens]
            vocab = {token: index for index, token in enumerate(tokens)}
        self._tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges or []))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        self._tokenizer.decoder = decoders.ByteLevel()
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            extra_special_tokens=list(extra_special_tokens),
            add_bos_token=add_bos_token,
            padding_side=padding_side,
            model_max_length=model_max_length,
            **kwargs,
        )

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> tuple[str, ...]:
        """Save as a plain `TokenizersBackend` without an `auto_map`, which loads without running remote code."""
        plain = copy.copy(self)
        plain.__class__ = TokenizersBackend
        return plain.save_pretrained(save_directory, **kwargs)


__all__ = ["HealthSLMTokenizer"]
