"""Attention document by document: what a mask over the whole row computes, whatever the model."""

import pytest
import torch
from networks import network, random_ids
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from healthslm.training.attention import PACKED_DOCUMENTS, packed_documents_attention

ROWS, LENGTH = 2, 20
# Documents of one row: they end at the row's end, one of them is a single token.
POSITIONS = torch.tensor([[*range(7), 0, *range(12)], [*range(20)]])
BOUNDS = torch.tensor([0, 7, 8, 20, 40], dtype=torch.int32)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


MODELS = {"healthslm": lambda: network("healthslm"), "llama": lambda: network("llama"), "gpt2": gpt2}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request) -> PreTrainedModel:
    return request.param()


def logits_and_gradients(model: PreTrainedModel, **arguments) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    logits = model(random_ids(ROWS, LENGTH), use_cache=False, **arguments).logits
    logits.square().mean().backward()
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def test_documents_are_attended_to_as_a_mask_over_the_row_has_it(model):
    masked = logits_and_gradients(model, position_ids=POSITIONS)
    model.set_attn_implementation(PACKED_DOCUMENTS)
    assert_close(logits_and_gradients(model, position_ids=POSITIONS, cu_seq_lens_q=BOUNDS), masked)


def test_each_document_has_the_logits_that_it_has_alone(model):
    model.set_attn_implementation(PACKED_DOCUMENTS)
    ids = random_ids(ROWS, LENGTH)
    packed = model(ids, position_ids=POSITIONS, cu_seq_lens_q=BOUNDS, use_cache=False).logits.flatten(0, 1)
    model.set_attn_implementation("eager")
    for start, end in zip(BOUNDS[:-1], BOUNDS[1:], strict=True):
        assert_close(packed[start:end], model(ids.flatten()[None, start:end]).logits[0])


def test_without_bounds_rows_are_attended_to_as_by_pytorch(model):
    plain = model(random_ids(ROWS, LENGTH)).logits
    model.set_attn_implementation(PACKED_DOCUMENTS)
    assert_close(model(random_ids(ROWS, LENGTH)).logits, plain)


def test_under_autocast_products_are_of_its_type(model):
    model.set_attn_implementation(PACKED_DOCUMENTS)
    arguments = {"position_ids": POSITIONS, "cu_seq_lens_q": BOUNDS, "use_cache": False}
    exact = model(random_ids(ROWS, LENGTH), **arguments).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(random_ids(ROWS, LENGTH), **arguments).logits
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.03


def test_dropout_falls_on_the_weights_in_training_alone():
    """GPT-2 drops a tenth of its attention weights: with values of one throughout, what is left is their sum."""
    query = torch.randn(1, 4, 2000, 8, generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(query)
    attend = gpt2().transformer.h[0].attn
    bounds = torch.tensor([0, 1000, 2000])
    kept, _ = packed_documents_attention(attend, query, query, ones, None, dropout=0.0, cu_seq_lens_q=bounds)
    dropped, _ = packed_documents_attention(attend, query, query, ones, None, dropout=0.1, cu_seq_lens_q=bounds)
    assert_close(kept, torch.ones_like(kept))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02) and dropped.std() > 0.01
