"""CPU kernels for PyTorch's variable-length flash attention, which has kernels for GPUs only.

Importing this gives its two operators kernels for the CPU. They compute what flash attention computes, document by
document, and take and return the same tensors, so that all but the kernel is the code of a GPU: how arguments are laid
out, autograd and torch.compile.
"""

import itertools
from collections.abc import Iterator

import torch
from torch.nn.attention.varlen import _varlen_attn, _varlen_attn_backward


def check(query, key, cu_seq_q, cu_seq_k, max_q, is_causal) -> list[int]:
    """Check what the GPU kernel requires; returns the bounds."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.is_contiguous() and key.is_contiguous() and query.dtype == key.dtype
    bounds = cu_seq_q.tolist()
    assert cu_seq_k.tolist() == bounds and is_causal and cu_seq_q.diff().max() <= max_q
    assert bounds[0] == 0 and bounds[-1] == len(query)
    return bounds


def weights_of(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention weights (heads, tokens, tokens) of one document, whose states are (heads, tokens, head_dim)."""
    ahead = torch.full((query.shape[1], query.shape[1]), -torch.inf).triu(1)
    return (query @ key.mT * scale + ahead).softmax(-1)


def documents(bounds: list[int], groups: int, *states: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The states (tokens, heads, head_dim) of each document as (heads, tokens, head_dim) in fp32, of as many heads."""
    heads = max(tensor.shape[1] for tensor in states)
    for start, end in itertools.pairwise(bounds):
        parts = (tensor[start:end].float().transpose(0, 1) for tensor in states)
        yield [part.repeat_interleave(groups, dim=0) if len(part) < heads else part for part in parts]


@_varlen_attn.register_kernel("cpu")
def forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, *_, **__):
    bounds, groups = check(query, key, cu_seq_q, cu_seq_k, max_q, is_causal), query.shape[1] // key.shape[1]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    outputs = [weights_of(q, k, scale) @ v for q, k, v in documents(bounds, groups, query, key, value)]
    output = torch.cat(outputs, dim=1).transpose(0, 1).to(query.dtype).contiguous()
    return output, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


@_varlen_attn_backward.register_kernel("cpu")
def backward(grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng_state, scale, *_):
    bounds, groups = check(query, key, cu_seq_q, cu_seq_k, max_q, is_causal), query.shape[1] // key.shape[1]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    gradients = []
    for q, k, v, grad in documents(bounds, groups, query, key, value, grad_out):
        weights = weights_of(q, k, scale)
        grad_weights = grad @ v.mT
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * scale
        gradients.append((grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad))
    of_query, *of_others = (torch.cat(parts, dim=1).transpose(0, 1) for parts in zip(*gradients, strict=True))
    of_others = (gradient.unflatten(1, (-1, groups)).sum(2) for gradient in of_others)
    return tuple(gradient.to(query.dtype).contiguous() for gradient in (of_query, *of_others))
