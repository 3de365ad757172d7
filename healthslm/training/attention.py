"""Attention within packed documents, which is how training attends.

A mask over whole sequences computes the score of every pair of positions and throws most of them away; here only pairs
within a document are computed. Two functions are registered with Transformers, and serve every model that takes its
attention from there: `PACKED_DOCUMENTS` on a CPU, and `VARLEN`, the flash attention of PyTorch, on a GPU.
"""

import inspect

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from healthslm.training.precision import computes_in_bf16

PACKED_DOCUMENTS = "packed_documents"
VARLEN = "packed_documents_varlen"

# From PyTorch 2.12 on, fewer key and value heads than query heads are asked for; before, they are simply taken.
_GROUPED_QUERIES = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def fit_attention(model: PreTrainedModel, device: torch.device, compiled: bool) -> None:
    """Have a model attend within documents, where that is possible and faster than a mask over whole sequences.

    On a CPU that is one document at a time, unless the model is compiled: documents have all lengths. On a GPU it is
    flash attention, which takes 16-bit types alone and, in PyTorch's variable-length form, no dropout.
    """
    if device.type == "cpu" and not compiled:
        model.set_attn_implementation(PACKED_DOCUMENTS)
    elif device.type == "cuda" and computes_in_bf16(device) and not _has_attention_dropout(model):
        model.set_attn_implementation(VARLEN)


def document_bounds(position_ids: torch.Tensor, implementation: str) -> torch.Tensor | None:
    """The `cu_seq_lens_q` that an attention implementation takes, or None if it takes none.

    Args:
        position_ids: (sequences, context), which restart at each document.

    Returns:
        (documents + 1,), the bounds of the documents in the batch laid out as one line. For `VARLEN` they are int32,
        with the last repeated up to a multiple of one for every 128 tokens: empty documents that keep a compiled model
        from being compiled again for each number of documents.
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


def packed_documents_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document, one after another; without bounds, PyTorch's within each sequence.

    Args:
        query: (batch, heads, length, head_dim); key and value may have fewer heads, each for a group of queries.
        cu_seq_lens_q: (documents + 1,), the bounds of the documents in the flattened batch, as flash attention takes
            them. No document reaches beyond its sequence.

    Returns:
        (batch, length, heads, head_dim), and no weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    batch, heads, length, head_dim = query.shape
    scaling = head_dim**-0.5 if scaling is None else scaling
    lengths = cu_seq_lens_q.diff().tolist()
    longest = max(lengths)
    with torch.autocast(query.device.type, enabled=False):
        # Positions that lie ahead, added to the scores.
        ahead = torch.full((longest, longest), -torch.inf, dtype=value.dtype, device=value.device).triu(1)
        # (heads, batch * length, head_dim) of one type: rotary positions come in fp32, values in that of the products.
        query, key, value = (
            states.to(value.dtype).repeat_interleave(heads // states.shape[1], dim=1).transpose(0, 1).flatten(1, 2)
            for states in (query, key, value)
        )
        outputs = []
        documents = zip(query.split(lengths, 1), key.split(lengths, 1), value.split(lengths, 1), strict=True)
        for queries, keys, values in documents:
            mask = ahead[: keys.shape[1], : keys.shape[1]].expand(heads, -1, -1)
            weights = torch.baddbmm(mask, queries, keys.mT, alpha=scaling).softmax(-1)
            outputs.append(nn.functional.dropout(weights, dropout, training=dropout > 0) @ values)
        return torch.cat(outputs, dim=1).unflatten(1, (batch, length)).permute(1, 2, 0, 3), None


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """As `packed_documents_attention`, by flash attention over all documents at once, with bounds in int32."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    batch, _, length, _ = query.shape
    # (batch * length, heads, head_dim) of one type: rotary positions come in fp32, values in that of the products.
    query, key, value = (
        states.to(value.dtype).transpose(1, 2).flatten(0, 1).contiguous() for states in (query, key, value)
    )
    output = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        length,
        length,
        scale=scaling,
        window_size=(-1, 0),  # nothing ahead
        **_GROUPED_QUERIES,
    )
    return output.unflatten(0, (batch, length)), None


def _has_attention_dropout(model: PreTrainedModel) -> bool:
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return any(getattr(model.config, name, 0.0) for name in names)


AttentionInterface.register(PACKED_DOCUMENTS, packed_documents_attention)
AttentionInterface.register(VARLEN, varlen_attention)
