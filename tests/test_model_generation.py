"""`generate` returns the same tokens as for Llama with the same weights, with every decoding method."""

import pytest
import torch
from tiny_models import FAMILIES, HEADS, PAD, random_ids, tiny_model, twins
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
    """The NEW_TOKENS new tokens, with the same random seed in every call."""
    set_seed(0)
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(input_ids, **{"do_sample": False, **lengths, **arguments})[:, input_ids.shape[1] :]


GREEDY = {  # all return the same tokens
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
LOOKUP = {"prompt lookup": {"prompt_lookup_num_tokens": 3}}  # for a single prompt only


def each(methods: dict[str, dict]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", methods.values(), ids=methods)


@each(GREEDY | SEARCHED | SAMPLED)
@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_generated_tokens_match_llama(method, attention):
    ours, llama = twins(attention=attention)
    prompt = random_ids(2, 7)
    new = generate(ours, prompt, **method)
    assert new.shape[1] == NEW_TOKENS
    assert torch.equal(new, generate(llama, prompt, **method))


@each(GREEDY | LOOKUP)
def test_greedy_decoding_matches_a_loop_without_a_cache(method):
    model = tiny_model("healthslm")
    tokens = prompt = random_ids(1, 7)
    for _ in range(NEW_TOKENS):
        logits = model(tokens, use_cache=False).logits[:, -1].clone()
        logits[:, model.config.eos_token_id] = -torch.inf
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generate(model, prompt, **method), tokens[:, 7:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("do_sample", (False, True))
def test_an_assistant_model_does_not_change_greedy_tokens(family, do_sample):
    model = tiny_model("healthslm")
    assistant = tiny_model(family, num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 3
    prompt = random_ids(1, 7)
    new = generate(model, prompt, assistant_model=assistant, do_sample=do_sample)
    assert new.shape == (1, NEW_TOKENS)
    if not do_sample:
        assert torch.equal(new, generate(model, prompt))


@pytest.mark.parametrize("family", FAMILIES)
def test_early_exit_drafts_with_the_first_layers_only(family):
    model, prompt = tiny_model(family, num_hidden_layers=3), random_ids(1, 7)
    expected = generate(model, prompt)
    calls = [0, 0, 0]
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    assert torch.equal(generate(model, prompt, assistant_early_exit=1), expected)
    assert calls[0] > calls[1] == calls[2]


@each(GREEDY | SEARCHED)
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_prompts_generate_the_same_tokens_as_alone(family, method):
    model = tiny_model(family)
    prompts = [random_ids(1, length, seed=length) for length in (7, 3, 5)]
    batch = torch.full((3, 7), PAD)
    for index, prompt in enumerate(prompts):
        batch[index, 7 - prompt.shape[1] :] = prompt
    together = generate(model, batch, attention_mask=(batch != PAD).long(), **method)
    assert torch.equal(together, torch.cat([generate(model, prompt, **method) for prompt in prompts]))


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.received, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.received.append(value.flatten())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("method", ({}, {"do_sample": True}, {"cache_implementation": "static"}), ids=str)
def test_tokens_are_streamed_one_by_one(method):
    model, prompt, streamer = tiny_model("healthslm"), random_ids(1, 7), Collector()
    new = generate(model, prompt, streamer=streamer, **method)
    assert [len(tokens) for tokens in streamer.received] == [7] + [1] * NEW_TOKENS
    assert torch.equal(torch.cat(streamer.received[1:]), new[0])
    assert streamer.ended


@pytest.mark.parametrize("num_beams", (1, 2))
def test_inputs_embeds_generate_the_same_tokens_as_input_ids(num_beams):
    model, prompt = tiny_model("healthslm"), random_ids(2, 7)
    arguments = {"num_beams": num_beams, "do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    new = model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **arguments)
    assert torch.equal(new, generate(model, prompt, num_beams=num_beams))


@pytest.mark.parametrize("cache", (DynamicCache, StaticCache))
def test_generation_continues_from_a_cache(cache):
    model, prompt = tiny_model("healthslm"), random_ids(2, 7)
    arguments = {"max_cache_len": 30} if cache is StaticCache else {}
    past = cache(config=model.config, **arguments)
    set_seed(0)
    start = model.generate(prompt, past_key_values=past, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    rest = generate(model, start, past_key_values=past, max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(torch.cat((start[:, 7:], rest), dim=1), generate(model, prompt))


# Transformers 5.24 renamed `past_key_values` to `cache`, and accepts the old name.
NAMES = {"past_key_values", *({"cache"} & CausalLMOutputWithPast.__dataclass_fields__.keys())}


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("head", HEADS)
def test_a_cache_is_accepted_under_each_name_in_transformers(name, head):
    model, ids = tiny_model("healthslm", head), random_ids(1, 9)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False)[0]
        parts = [model(part, **{name: past})[0] for part in (ids[:, :6], ids[:, 6:])]
    assert past.get_seq_length() == 9
    if head == "ForSequenceClassification":  # logits of the last token only
        torch.testing.assert_close(parts[1], whole)
    else:
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("use_cache", (True, False))
@pytest.mark.parametrize("num_beams", (1, 2))
def test_all_outputs_match_llama(use_cache, num_beams):
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
def test_decoding_compiles_without_graph_breaks(family):
    torch.compiler.reset()
    model, prompt = tiny_model(family, num_hidden_layers=1), random_ids(2, 7)
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


def test_generation_stops_at_the_separator_and_pads(repository):
    """With the released generation_config.json, and a vocabulary so small that the separator is likely."""
    model = tiny_model("healthslm", vocab_size=4)
    model.generation_config = GenerationConfig.from_pretrained(repository)
    set_seed(0)
    new = model.generate(torch.full((16, 1), 2), max_new_tokens=12)[:, 1:]
    lengths = [tokens.tolist().index(0) for tokens in new if 0 in tokens]
    assert len(set(lengths)) > 1
    for tokens in new:
        if 0 in tokens:
            assert (tokens[tokens.tolist().index(0) + 1 :] == PAD).all()
