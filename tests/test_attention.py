"""Attention within documents computes what a mask over whole sequences computes, for every model."""

from functools import partial

import pytest
import torch
import varlen_on_cpu  # noqa: F401
from tiny_models import random_ids, tiny_model
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from healthslm.training import attention
from healthslm.training.attention import (
    PACKED_DOCUMENTS,
    VARLEN,
    document_bounds,
    fit_attention,
    one_by_one,
)

SEQUENCES, LENGTH = 2, 20
# The documents of a sequence end at its end, and one of them is a single token.
POSITIONS = torch.tensor([[*range(7), 0, *range(12)], [*range(20)]])
BOUNDS = {
    PACKED_DOCUMENTS: torch.tensor([0, 7, 8, 20, 40]),
    VARLEN: torch.tensor([0, 7, 8, 20, 40, 40, 40], dtype=torch.int32),
}


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


MODELS = {"healthslm": lambda: tiny_model("healthslm"), "llama": lambda: tiny_model("llama"), "gpt2": gpt2}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request) -> PreTrainedModel:
    return request.param()


@pytest.fixture(params=BOUNDS)
def implementation(request) -> str:
    return request.param


def logits_and_gradients(model: PreTrainedModel, **arguments) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    logits = model(random_ids(SEQUENCES, LENGTH), use_cache=False, **arguments).logits
    logits.square().mean().backward()
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def test_attention_equals_that_with_a_mask_over_the_sequence(model, implementation):
    masked = logits_and_gradients(model, position_ids=POSITIONS)
    model.set_attn_implementation(implementation)
    bounds = BOUNDS[implementation]
    assert_close(logits_and_gradients(model, position_ids=POSITIONS, cu_seq_lens_q=bounds), masked)


def test_each_document_has_the_same_logits_as_alone(model, implementation):
    model.set_attn_implementation(implementation)
    ids, bounds = random_ids(SEQUENCES, LENGTH), BOUNDS[implementation]
    packed = model(ids, position_ids=POSITIONS, cu_seq_lens_q=bounds, use_cache=False).logits.flatten(0, 1)
    model.set_attn_implementation("eager")
    bounds = bounds.unique()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        assert_close(packed[start:end], model(ids.flatten()[None, start:end]).logits[0])


def test_without_bounds_attention_is_that_of_pytorch(model, implementation):
    plain = model(random_ids(SEQUENCES, LENGTH)).logits
    model.set_attn_implementation(implementation)
    assert_close(model(random_ids(SEQUENCES, LENGTH)).logits, plain)


def test_under_autocast_products_have_its_dtype(model, implementation):
    model.set_attn_implementation(implementation)
    arguments = {"position_ids": POSITIONS, "cu_seq_lens_q": BOUNDS[implementation], "use_cache": False}
    exact = model(random_ids(SEQUENCES, LENGTH), **arguments).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(random_ids(SEQUENCES, LENGTH), **arguments).logits
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.03


def test_documents_start_where_positions_are_zero():
    positions = torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2]])
    assert document_bounds(positions, "sdpa") is None
    assert document_bounds(positions, PACKED_DOCUMENTS).tolist() == [0, 3, 4, 5, 8]
    assert document_bounds(positions, VARLEN).tolist() == [0, 3, 4, 5, 8]


def test_for_a_gpu_the_number_of_bounds_is_padded():
    positions = (torch.arange(512) % 100)[None].expand(2, -1)  # 12 documents in 1,024 tokens
    bounds = document_bounds(positions, VARLEN)
    assert bounds.dtype == torch.int32 and len(bounds) - 1 == 16
    assert bounds[:13].tolist() == [*range(0, 512, 100), *range(512, 1024, 100), 1024]
    assert bounds[13:].tolist() == [1024] * 4


def test_batches_with_other_documents_do_not_recompile():
    model = tiny_model("healthslm", num_hidden_layers=1)
    model.set_attn_implementation(VARLEN)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
    for length in (20, 7, 50):
        positions = (torch.arange(256) % length)[None]
        bounds = document_bounds(positions, VARLEN)
        bounds = torch.cat([bounds, bounds[-1:].expand(40 - len(bounds))])
        compiled(random_ids(1, 256), position_ids=positions, cu_seq_lens_q=bounds, use_cache=False)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("compiled", "expected"), [(False, PACKED_DOCUMENTS), (True, "sdpa")])
def test_on_a_cpu_attention_runs_one_document_at_a_time_unless_compiled(compiled, expected):
    model = tiny_model("healthslm")
    fit_attention(model, torch.device("cpu"), compiled)
    assert model.config._attn_implementation == expected


@pytest.mark.parametrize(
    ("make", "has_bf16", "expected"),
    [
        (MODELS["healthslm"], True, VARLEN),
        (MODELS["healthslm"], False, "sdpa"),
        (gpt2, True, "sdpa"),
        (partial(tiny_model, "healthslm", head_dim=12), True, "sdpa"),
    ],
    ids=["a GPU with bf16", "one without", "a model with attention dropout", "a model with heads of 12"],
)
def test_on_a_gpu_attention_is_flash_attention_if_it_computes_the_same(monkeypatch, make, has_bf16, expected):
    monkeypatch.setattr(attention, "computes_in_bf16", lambda device: has_bf16)
    model = make()
    fit_attention(model, torch.device("cuda"), compiled=True)
    assert model.config._attn_implementation == expected


def test_dropout_applies_to_the_attention_weights():
    """With values of one throughout, what is left is the sum of the weights that were kept."""
    query = torch.randn(2000, 4, 8, generator=torch.Generator().manual_seed(0))
    ones, bounds = torch.ones_like(query), torch.tensor([0, 1000, 2000])
    kept = one_by_one(query, query, ones, bounds, 2000, 1.0, dropout=0.0)
    dropped = one_by_one(query, query, ones, bounds, 2000, 1.0, dropout=0.1)
    assert_close(kept, ones)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02) and dropped.std() > 0.01
