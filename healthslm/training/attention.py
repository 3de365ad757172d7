"""Attention within packed documents, for training.

Attention with a mask over whole sequences computes the score of every pair of tokens and discards most of them. The two
implementations here compute only pairs within a document. They are registered with Transformers, and work for every
model that uses its attention interface: `PACKED_DOCUMENTS` on a CPU, and `VARLEN`, PyTorch's flash attention, on a GPU.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from healthslm.training.precision import computes_in_bf16

PACKED_DOCUMENTS = "packed_documents"
VARLEN = "packed_documents_varlen"

# PyTorch 2.12 and later need an argument to accept fewer key and value heads than query heads.
_GROUPED_QUERIES: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def fit_attention(model: PreTrainedModel, device: torch.device, compiled: bool) -> None:
    """Make a model attend within documents, if that is faster than a mask over whole sequences.

    On a CPU it attends to one document at a time, unless the model is compiled, because every length of a document
    would be compiled. On a GPU it uses flash attention, which needs a 16-bit type, no dropout, and a head size
    that is a multiple of 8 up to 256 (Dao, 2023).
    """
    if device.type == "cpu" and not compiled:
        model.set_attn_implementation(PACKED_DOCUMENTS)
    elif device.type == "cuda" and computes_in_bf16(device) and _suits_flash_attention(model):
        model.set_attn_implementation(VARLEN)


def document_bounds(position_ids: torch.Tensor, implementation: str) -> torch.Tensor | None:
    """The `cu_seq_lens_q` of a batch for an attention implementation, or None if it doesn't use it.

    Args:
        position_ids: (sequences, context), restarting at each document.

    Returns:
        (documents + 1,), the offsets of the documents in the flattened batch. For `VARLEN` they are int32, and the last
        one is repeated up to a multiple of one for every 128 tokens. These empty documents keep a compiled model from
        being recompiled for every number of documents.
    """
    if implementation not in (PACKED_DOCUMENTS, VARLEN):
        return None
    flat = position_ids.flatten()
    bounds = torch.cat([(flat == 0).nonzero().flatten(), flat.new_tensor([len(flat)])])
    if implementation == VARLEN:
        unit = max(len(flat) // 128, 1)
        missing = -(len(bounds) - 1) % unit
        bounds = torch.cat([bounds, bounds[-1].expand(missing)]).int()
    return bounds


def one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    length: int,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Causal attention within each document, one after another.

    Args:
        query: (tokens, heads, head_dim); key and value may have fewer heads, each for a group of queries.
        cu_seq_lens: (documents + 1,), the offsets of the documents.
        length: Length of a sequence, the maximum length of a document.

    Returns:
        (tokens, heads, head_dim).
    """
    lengths = cu_seq_lens.diff().tolist()
    longest = max(lengths)
    with torch.autocast(query.device.type, enabled=False):
        # Added to the scores: -inf for keys after the query.
        ahead = torch.full((longest, longest), -torch.inf, dtype=value.dtype, device=value.device).triu(1)
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        query, key, value = (states.transpose(0, 1) for states in (query, key, value))
        outputs = []
        documents = zip(query.split(lengths, 1), key.split(lengths, 1), value.split(lengths, 1), strict=True)
        for queries, keys, values in documents:
            mask = ahead[: keys.shape[1], : keys.shape[1]].expand(len(keys), -1, -1)
            weights = torch.baddbmm(mask, queries, keys.mT, alpha=scaling).softmax(-1)
            outputs.append(nn.functional.dropout(weights, dropout, training=dropout > 0) @ values)
        return torch.cat(outputs, dim=1).transpose(0, 1)


def all_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    length: int,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Like `one_by_one`, by flash attention over all documents, with offsets in int32 and without dropout."""
    query, key, value = (states.contiguous() for states in (query, key, value))
    output: torch.Tensor = varlen_attn(  # type: ignore[assignment]  # a tuple only if it is asked for more
        query,
        key,
        value,
        cu_seq_lens,
        cu_seq_lens,
        length,
        length,
        scale=scaling,
        window_size=(-1, 0),  # causal
        **_GROUPED_QUERIES,
    )
    return output


def packed_attention(
    attend: Callable[..., torch.Tensor],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: attention within documents, or PyTorch's if no offsets are given.

    Args:
        attend: `one_by_one` or `all_at_once`.
        query: (batch, heads, length, head_dim); key and value may have fewer heads.
        cu_seq_lens_q: (documents + 1,), the offsets of the documents in the flattened batch. No document extends
            beyond its sequence.

    Returns:
        (batch, length, heads, head_dim), and no weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    batch, _, length, head_dim = query.shape
    scaling = head_dim**-0.5 if scaling is None else scaling
    # (batch * length, heads, head_dim) of one dtype: under autocast, queries and keys are fp32 after rotary embedding.
    query, key, value = (states.to(value.dtype).transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    output = attend(query, key, value, cu_seq_lens_q, length, scaling, dropout)
    return output.unflatten(0, (batch, length)), None


def _suits_flash_attention(model: PreTrainedModel) -> bool:
    config, dropouts = model.config, ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim % 8 == 0 and head_dim <= 256 and not any(getattr(config, name, 0.0) for name in dropouts)


AttentionInterface.register(PACKED_DOCUMENTS, partial(packed_attention, one_by_one))
AttentionInterface.register(VARLEN, partial(packed_attention, all_at_once))
