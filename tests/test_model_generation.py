"""Every way of `generate`: the tokens that Llama generates with the same weights."""

import pytest
import torch
from networks import FAMILIES, HEADS, PAD, network, random_ids, twins
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

NEW_TOKENS = 8


def generate(model: PreTrainedModel, input_ids: torch.Tensor, **arguments) -> torch.Tensor:
    """The new tokens alone, always so many of them, from the same random numbers at every call."""
    set_seed(0)
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(input_ids, **{"do_sample": False, **lengths, **arguments})[:, input_ids.shape[1] :]


LIKELIEST = {  # ways to the same tokens: always the likeliest one
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "all logits": {"logits_to_keep": 0},
    "prompt in chunks": {"prefill_chunk_size": 3},
}
SEARCHED = {
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
    "repetition penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[5, 6]]},
    "guidance": {"guidance_scale": 1.5},
}
SAMPLED = {
    "sampling": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 0.5},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.5, "top_k": 0},
    "min-p": {"do_sample": True, "min_p": 0.1},
    "typical": {"do_sample": True, "typical_p": 0.5},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
}
LOOKUP = {"prompt lookup": {"prompt_lookup_num_tokens": 3}}  # takes one prompt at a time


def over(ways: dict[str, dict]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("way", ways.values(), ids=ways)


@over(LIKELIEST | SEARCHED | SAMPLED)
@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_it_generates_what_llama_generates(way, attention):
    ours, llama = twins(attention=attention)
    prompt = random_ids(2, 7)
    new = generate(ours, prompt, **way)
    assert new.shape[1] == NEW_TOKENS
    assert torch.equal(new, generate(llama, prompt, **way))


@over(LIKELIEST | LOOKUP)
def test_greedy_search_takes_the_likeliest_token_whatever_the_way_there(way):
    """Held against a loop that knows nothing of caches."""
    model = network("healthslm")
    tokens = prompt = random_ids(1, 7)
    for _ in range(NEW_TOKENS):
        logits = model(tokens, use_cache=False).logits[:, -1].clone()
        logits[:, model.config.eos_token_id] = -torch.inf
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generate(model, prompt, **way), tokens[:, 7:])


@pytest.mark.parametrize("assistant", FAMILIES)
@pytest.mark.parametrize("do_sample", (False, True))
def test_an_assistant_changes_nothing_but_the_speed(assistant, do_sample):
    model = network("healthslm")
    guess = network(assistant, num_hidden_layers=1)
    guess.generation_config.num_assistant_tokens = 3
    prompt = random_ids(1, 7)
    new = generate(model, prompt, assistant_model=guess, do_sample=do_sample)
    assert new.shape == (1, NEW_TOKENS)
    if not do_sample:
        assert torch.equal(new, generate(model, prompt))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_alone_draft_what_all_of_them_check(family):
    model, prompt = network(family, num_hidden_layers=3), random_ids(1, 7)
    expected = generate(model, prompt)
    calls = [0, 0, 0]
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    assert torch.equal(generate(model, prompt, assistant_early_exit=1), expected)
    assert calls[0] > calls[1] == calls[2]


@over(LIKELIEST | SEARCHED)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_padded_on_the_left_give_what_each_gives_alone(family, way):
    model = network(family)
    prompts = [random_ids(1, length, seed=length) for length in (7, 3, 5)]
    batch = torch.full((3, 7), PAD)
    for row, prompt in enumerate(prompts):
        batch[row, 7 - prompt.shape[1] :] = prompt
    together = generate(model, batch, attention_mask=(batch != PAD).long(), **way)
    assert torch.equal(together, torch.cat([generate(model, prompt, **way) for prompt in prompts]))


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.pieces, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("way", ({}, {"do_sample": True}, {"cache_implementation": "static"}), ids=str)
def test_tokens_are_streamed_as_they_come(way):
    model, prompt, streamer = network("healthslm"), random_ids(1, 7), Collector()
    new = generate(model, prompt, streamer=streamer, **way)
    assert [len(piece) for piece in streamer.pieces] == [7] + [1] * NEW_TOKENS
    assert torch.equal(torch.cat(streamer.pieces[1:]), new[0])
    assert streamer.ended


@pytest.mark.parametrize("num_beams", (1, 2))
def test_embeddings_stand_for_the_prompt(num_beams):
    model, prompt = network("healthslm"), random_ids(2, 7)
    arguments = {"num_beams": num_beams, "do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    new = model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **arguments)
    assert torch.equal(new, generate(model, prompt, num_beams=num_beams))


@pytest.mark.parametrize("cache", (DynamicCache, StaticCache))
def test_generation_goes_on_from_a_cache(cache):
    model, prompt = network("healthslm"), random_ids(2, 7)
    arguments = {"max_cache_len": 30} if cache is StaticCache else {}
    past = cache(config=model.config, **arguments)
    set_seed(0)
    begun = model.generate(prompt, past_key_values=past, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    finished = generate(model, begun, past_key_values=past, max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(torch.cat((begun[:, 7:], finished), dim=1), generate(model, prompt))


# Transformers 5.24 renamed `past_key_values` to `cache`, and accepts the old name.
NAMES = {"past_key_values", *({"cache"} & CausalLMOutputWithPast.__dataclass_fields__.keys())}


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("head", HEADS)
def test_a_cache_is_taken_by_every_name_that_transformers_has_for_it(name, head):
    model, ids = network("healthslm", head), random_ids(1, 9)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False)[0]
        parts = [model(part, **{name: past})[0] for part in (ids[:, :6], ids[:, 6:])]
    assert past.get_seq_length() == 9
    if head == "ForSequenceClassification":  # which has the last token's alone
        torch.testing.assert_close(parts[1], whole)
    else:
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("use_cache", (True, False))
@pytest.mark.parametrize("num_beams", (1, 2))
def test_all_outputs_are_returned(use_cache, num_beams):
    ours, llama = twins(attention="eager")
    outputs = [
        model.generate(
            random_ids(2, 7),
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=3,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            output_attentions=True,
            output_hidden_states=True,
        )
        for model in (ours, llama)
    ]
    our_output, llama_output = outputs
    assert our_output.keys() == llama_output.keys()
    for name in our_output.keys() - {"past_key_values", "cache"}:
        torch.testing.assert_close(our_output[name], llama_output[name])
    if use_cache:
        for ours_layer, llamas_layer in zip(our_output.past_key_values, llama_output.past_key_values, strict=True):
            torch.testing.assert_close(ours_layer[:2], llamas_layer[:2])


@pytest.mark.parametrize("family", ("healthslm", pytest.param("llama", marks=pytest.mark.slow)))
def test_decoding_compiles_without_a_break(family):
    torch.compiler.reset()
    model, prompt = network(family, num_hidden_layers=1), random_ids(2, 7)
    prompt[1, :3] = PAD
    arguments = {"attention_mask": (prompt != PAD).long()}
    eager = generate(model, prompt, **arguments)
    compile_config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True  # by default only on accelerators
    compiled = generate(
        model, prompt, cache_implementation="static", compile_config=compile_config, disable_compile=False, **arguments
    )
    assert hasattr(model, "_compiled_call")
    assert torch.equal(compiled, eager)


def test_a_sequence_ends_at_the_separator_and_is_padded(repository):
    """With the settings that come with the model, and weights that make the separator likely."""
    model = network("healthslm", vocab_size=4)
    model.generation_config = GenerationConfig.from_pretrained(repository)
    set_seed(0)
    new = model.generate(torch.full((16, 1), 2), max_new_tokens=12)[:, 1:]
    lengths = [row.tolist().index(0) for row in new if 0 in row]
    assert len(set(lengths)) > 1
    for row in new:
        if 0 in row:
            assert (row[row.tolist().index(0) + 1 :] == PAD).all()
