"""Packed documents never attend to each other, with any cache, mask and attention implementation."""

import pytest
import torch
from tiny_models import PAD, llama_twin, random_ids, tiny_model
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.testing import assert_close
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    masking_utils,
)

# Lengths of the documents in sequences of 16 tokens. Negative lengths are padding: before, between or after them.
LAYOUTS = {
    "packed": ((5, 1, 1, 9), (16,), (3, 13)),
    "padded": ((-3, 5, 1, 7), (4, -5, 7), (6, 6, -4)),
}
CACHES = {
    "without cache": lambda config: {"use_cache": False},
    "dynamic cache": lambda config: {"use_cache": True},
    "given cache": lambda config: {"past_key_values": DynamicCache(config=config)},
    "static cache": lambda config: {"past_key_values": StaticCache(config=config, max_cache_len=24)},
}


def flash_stand_in(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, cu_seq_lens_k, **kwargs):
    """Variable-length flash attention in plain PyTorch: attention within segments of the flattened batch."""
    assert attention_mask is None
    assert kwargs["max_length_q"] == cu_seq_lens_q.diff().max()
    assert kwargs["max_length_k"] == cu_seq_lens_k.diff().max()
    assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
    shape = query.transpose(1, 2).shape
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    output = torch.full_like(query, torch.nan)  # shows queries that no segment covers
    segments = zip(cu_seq_lens_q[:-1], cu_seq_lens_q[1:], cu_seq_lens_k[:-1], cu_seq_lens_k[1:], strict=True)
    for query_start, query_end, key_start, key_end in segments:
        if query_start < query_end:
            queries, keys, values = query[query_start:query_end], key[key_start:key_end], value[key_start:key_end]
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * scaling
            future = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + len(keys) - len(queries))
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            output[query_start:query_end] = torch.einsum("hqk,khd->qhd", weights, values)
    return output.view(shape), None


def flex_stand_in(module, query, key, value, attention_mask, scaling, **kwargs):
    """Flex attention without compilation. It takes a block mask only."""
    assert isinstance(attention_mask, BlockMask)
    output = flex_attention(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


@pytest.fixture(scope="module", autouse=True)
def stand_ins():
    AttentionInterface.register("flash_stand_in", flash_stand_in)
    AttentionMaskInterface.register("flash_stand_in", masking_utils.flash_attention_mask)
    AttentionInterface.register("flex_stand_in", flex_stand_in)

    def flex_mask(**kwargs):
        with pytest.MonkeyPatch.context() as patch:  # compiling the mask takes longer than these tests
            create = masking_utils.create_block_mask
            patch.setattr(masking_utils, "create_block_mask", lambda **k: create(**{**k, "_compile": False}))
            return masking_utils.flex_attention_mask(**kwargs)

    AttentionMaskInterface.register("flex_stand_in", flex_mask)


ATTENTIONS = ("sdpa", "eager", "flash_stand_in", "flex_stand_in")


def make_batch(layout: tuple[tuple[int, ...], ...]) -> tuple[dict[str, torch.Tensor], list[tuple[int, slice]]]:
    """A batch with this layout, and for each document its index in the batch and the slice of its tokens."""
    input_ids = random_ids(len(layout), 16)
    position_ids, attention_mask = torch.zeros_like(input_ids), torch.ones_like(input_ids)
    documents = []
    for index, lengths in enumerate(layout):
        start = 0
        for length in lengths:
            tokens = slice(start, start + abs(length))
            start = tokens.stop
            if length < 0:
                input_ids[index, tokens], attention_mask[index, tokens] = PAD, 0
            else:
                position_ids[index, tokens] = torch.arange(length)
                documents.append((index, tokens))
        assert start == 16
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}, documents


def logits_of_each_document_alone(
    model: PreTrainedModel, batch: dict, documents: list[tuple[int, slice]]
) -> torch.Tensor:
    """The logits of Llama with the same weights for each document alone, concatenated."""
    llama = llama_twin(model)
    return torch.cat([llama(batch["input_ids"][index : index + 1, tokens]).logits[0] for index, tokens in documents])


def select(documents: list[tuple[int, slice]], values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values[index, tokens] for index, tokens in documents])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("layout", ("packed", "packed with a mask of ones", "padded"))
def test_each_document_has_the_same_logits_as_alone(layout, cache, attention):
    model = tiny_model("healthslm", attention=attention)
    batch, documents = make_batch(LAYOUTS[layout.split()[0]])
    alone = logits_of_each_document_alone(model, batch, documents)
    if layout == "packed":
        del batch["attention_mask"]
    with torch.no_grad():
        logits = model(**batch, **cache(model.config)).logits
    assert_close(select(documents, logits), alone)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_do_not_depend_on_the_other_documents(layout, attention):
    model = tiny_model("healthslm", attention=attention)
    batch, documents = make_batch(LAYOUTS[layout])
    with torch.no_grad():
        logits = model(**batch).logits
        for index, tokens in documents:
            others = batch["input_ids"].clone().fill_(7)
            others[index, tokens] = batch["input_ids"][index, tokens]
            changed = model(**{**batch, "input_ids": others}).logits
            assert torch.equal(changed[index, tokens], logits[index, tokens])


def test_packing_matches_llama_where_llama_separates_documents():
    model = tiny_model("healthslm").train()
    llama = llama_twin(model).train()
    batch, _ = make_batch(LAYOUTS["packed"])
    del batch["attention_mask"]
    ours, llamas = (m(**batch, labels=batch["input_ids"], use_cache=False) for m in (model, llama))
    assert_close(ours.logits, llamas.logits)
    ours.loss.backward(), llamas.loss.backward()
    for parameter, llama_parameter in zip(model.parameters(), llama.parameters(), strict=True):
        assert_close(parameter.grad, llama_parameter.grad)


def test_no_gradient_reaches_another_document():
    model = tiny_model("healthslm").train()
    batch, documents = make_batch(LAYOUTS["padded"])
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, **batch).logits
    for index, tokens in documents:
        (gradient,) = torch.autograd.grad(logits[index, tokens].sum(), embeddings, retain_graph=True)
        gradient[index, tokens] = 0
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_attention_with_a_mask_separates_documents_when_offsets_are_passed_too(attention):
    model = tiny_model("healthslm", attention=attention)
    batch, documents = make_batch(LAYOUTS["packed"])
    offsets = torch.tensor([0, 48], dtype=torch.int32)
    logits = model(**batch, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=48, max_length_k=48).logits
    assert_close(select(documents, logits), logits_of_each_document_alone(model, batch, documents))


def test_offsets_from_the_caller_reach_flash_attention_unchanged():
    model = tiny_model("healthslm", attention="flash_stand_in")
    batch, documents = make_batch(((5, 1, 1, 9),))
    offsets = torch.tensor([0, 5, 6, 7, 16], dtype=torch.int32)
    del batch["attention_mask"]
    logits = model(**batch, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=9, max_length_k=9).logits
    assert_close(select(documents, logits), logits_of_each_document_alone(model, batch, documents))


@pytest.mark.parametrize("padding", ("left", "right"))
def test_position_ids_of_a_padded_prompt_do_not_change_the_mask(padding):
    batch, _ = make_batch(((-4, 12), (16,)) if padding == "left" else ((12, -4), (16,)))
    model = tiny_model("healthslm")
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**batch)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(*seen)


def test_padding_within_a_document_does_not_split_it():
    model = tiny_model("healthslm", attention="eager")
    llama = llama_twin(model)
    input_ids = random_ids(1, 8)
    attention_mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    for positions in (torch.arange(8), torch.tensor([0, 1, 2, 2, 2, 3, 4, 5])):
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions.unsqueeze(0)}
        tokens = attention_mask.bool()
        assert_close(model(**batch).logits[tokens], llama(**batch).logits[tokens])


def test_positions_that_restart_after_a_past_do_not_start_documents():
    """Several candidates for the next token can share one past and one position."""
    model = tiny_model("healthslm")
    llama = llama_twin(model)
    prompt, candidates = random_ids(1, 6), random_ids(1, 3, seed=2)
    position_ids = torch.tensor([[6, 6, 6]])
    logits = []
    for m in (model, llama):
        cache = m(prompt, use_cache=True).past_key_values
        logits.append(m(candidates, position_ids=position_ids, past_key_values=cache).logits)
    assert_close(*logits)
