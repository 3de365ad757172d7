"""Attention over packed documents, one document at a time, which is how training attends on a CPU.

A mask over whole rows computes the score of every pair of positions and throws most of them away; here only those
within a document are computed. Registered with Transformers as `PACKED_DOCUMENTS`, it serves every model that takes its
attention from there.
"""

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED_DOCUMENTS = "packed_documents"


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
    """Causal attention within each document; without bounds, PyTorch's within each row.

    Args:
        query: (batch, heads, length, head_dim); key and value may have fewer heads, each for a group of queries.
        cu_seq_lens_q: (documents + 1,), the bounds of the documents in the flattened batch, as flash attention takes
            them. None reaches beyond its row.

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


AttentionInterface.register(PACKED_DOCUMENTS, packed_documents_attention)
