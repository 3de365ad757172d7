"""Sequence packing: several documents in one sequence, none of which attends to another.

As in Transformers, `position_ids` that restart within a sequence mark where its documents start. Transformers separates
such documents only without a cache and without an attention mask. Here they are always separated.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask, packed_sequence_mask_function
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_tracing


def create_packed_causal_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor | BlockMask | None, dict[str, Any]]:
    """Create a causal mask that also separates packed documents. With `config.is_causal=False` it is bidirectional.

    Args:
        position_ids: (batch, length), or None if each sequence holds a single document.
        kwargs: Keyword arguments for the attention function.

    Returns:
        The mask for the attention function, and its keyword arguments. Flash attention takes offsets of the documents
        instead of a mask.
    """
    batch, length, _ = inputs_embeds.shape
    may_be_packed = (
        position_ids is not None
        and length > 1
        and not separates_documents(config, past_key_values, kwargs)
        and not has_past(past_key_values)
    )
    documents = find_documents(position_ids.expand(batch, -1), attention_mask) if may_be_packed else None
    if documents is None:
        return create_causal_mask(config, inputs_embeds, attention_mask, past_key_values), kwargs

    # A static cache also has slots for tokens to come, which belong to no document.
    kv_length = past_key_values.get_mask_sizes(length, 0)[0] if past_key_values is not None else length
    if is_flash_attention_requested(config):
        # Padding needs no mask: it is a document of its own or comes after the tokens of one.
        return None, {**kwargs, **flash_attention_kwargs(documents, kv_length)}
    documents = nn.functional.pad(documents, (0, kv_length - length), value=-1)
    same_document = packed_sequence_mask_function(documents)
    mask = create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, and_mask_function=same_document)
    return mask, kwargs


def separates_documents(config: PreTrainedConfig, past_key_values: Cache | None, kwargs: dict[str, Any]) -> bool:
    """Whether the attention function separates documents, or requests, without a mask."""
    has_no_mask = config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS  # as those of vLLM and SGLang
    is_paged = past_key_values is not None and not isinstance(past_key_values, Cache)  # in continuous batching
    has_offsets = is_flash_attention_requested(config) and "cu_seq_lens_q" in kwargs
    return has_no_mask or is_paged or has_offsets


def has_past(past_key_values: Cache | None) -> bool:
    """Whether the cache already holds tokens."""
    if past_key_values is None:
        return False
    length = past_key_values.get_seq_length()
    # A static cache counts in a tensor, whose value is unknown while a graph is traced: assume that it is not empty.
    return (isinstance(length, torch.Tensor) and is_tracing(length)) or bool(length > 0)


def find_documents(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Number the documents of each sequence. A document starts where the position is not the last one plus one.

    Args:
        position_ids: (batch, length). Positions of padding are ignored.
        attention_mask: (batch, length) or longer, 0 for padding, which may be anywhere: padding within a document may
            or may not count as positions. A 4D mask is complete and is not changed.

    Returns:
        Document numbers (batch, length), or None if each sequence holds a single document or the mask is 4D. While a
        graph is traced, values are unknown and the numbers are always returned.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        return None
    length = position_ids.shape[1]
    token = torch.ones_like(position_ids) if attention_mask is None else attention_mask[:, :length]
    token = token.to(position_ids.device, torch.bool)
    index = torch.arange(length, device=position_ids.device)
    last = torch.where(token, index, -1).cummax(dim=-1).values[:, :-1]  # index of the token before each but the first
    step = position_ids[:, 1:] - position_ids.gather(1, last.clamp(min=0))
    restarts = token[:, 1:] & (last >= 0) & ((step < 1) | (step > index[1:] - last))
    if not is_tracing(position_ids) and not restarts.any():
        return None
    first = token[:, 1:] & (last < 0)  # separates padding at the start of the sequence
    return nn.functional.pad(restarts | first, (1, 0)).cumsum(dim=-1)


def flash_attention_kwargs(documents: torch.Tensor, kv_length: int) -> dict[str, torch.Tensor | int]:
    """The offsets of documents (batch, length) in the flattened batch, as flash attention takes them.

    Keys from `length` to `kv_length` are slots of a static cache without tokens. They become documents without queries.
    """
    batch, length = documents.shape
    first_number = torch.arange(batch, device=documents.device).unsqueeze(1) * (length + 1)  # unique in the batch
    numbers = nn.functional.pad(documents, (0, kv_length - length), value=length) + first_number
    numbers, key_lengths = numbers.flatten().unique_consecutive(return_counts=True)
    query_lengths = key_lengths.where(numbers % (length + 1) != length, 0)
    return {
        "cu_seq_lens_q": nn.functional.pad(query_lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        "cu_seq_lens_k": nn.functional.pad(key_lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        "max_length_q": int(query_lengths.max()),
        "max_length_k": int(key_lengths.max()),
    }
