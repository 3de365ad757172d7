"""HealthSLM and Llama with the same weights return the same outputs, losses and gradients."""

import pytest
import torch
from tiny_models import HEADS, PAD, llama_twin, random_ids, tiny_model, twins
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel

ATTENTIONS = ("sdpa", "eager")


def left_padded(length: int = 12, padding: tuple[int, ...] = (0, 5, 9)) -> dict[str, torch.Tensor]:
    """Sequences with this much padding on the left, and with position_ids as in `generate`."""
    input_ids, attention_mask = random_ids(len(padding), length), torch.ones(len(padding), length, dtype=torch.long)
    for index, padded in enumerate(padding):
        input_ids[index, :padded], attention_mask[index, :padded] = PAD, 0
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


def right_padded() -> dict[str, torch.Tensor]:
    batch = {name: tensor.flip(-1) for name, tensor in left_padded().items() if name != "position_ids"}
    position_ids = batch["attention_mask"].cumsum(-1) - 1
    return {**batch, "position_ids": position_ids.masked_fill(batch["attention_mask"] == 0, 0)}


def without_position_ids(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "position_ids"}


BATCHES = {
    "plain": {"input_ids": random_ids(3, 12)},
    "left padding": left_padded(),
    "left padding without position_ids": without_position_ids(left_padded()),
    "right padding": right_padded(),
    "right padding without position_ids": without_position_ids(right_padded()),
}


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("use_cache", (True, False))
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_logits_loss_and_gradients_match_llama(batch, use_cache, attention):
    ours, llama = twins(attention=attention)
    tokens = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    batch = {**batch, "labels": batch["input_ids"].masked_fill(~tokens, -100), "use_cache": use_cache}
    our_output, llama_output = ours(**batch), llama(**batch)
    assert_close(our_output.logits[tokens], llama_output.logits[tokens])
    assert_close(our_output.loss, llama_output.loss)
    assert_close(gradients(ours, our_output.loss), gradients(llama, llama_output.loss), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_logits_match_llama_in_half_precision(dtype):
    ours, llama = (model.to(dtype) for model in twins())
    input_ids = random_ids(2, 12)
    assert_close(ours(input_ids).logits, llama(input_ids).logits, atol=0, rtol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("lengths", ((12,), (1,) * 12, (5, 1, 1, 3, 2)), ids=str)
def test_calls_with_a_cache_return_the_logits_of_one_call(lengths, attention):
    ours, llama = twins(attention=attention)
    input_ids = random_ids(2, 12)
    cache, logits = DynamicCache(), []
    for ids in input_ids.split(lengths, dim=1):
        logits.append(ours(ids, past_key_values=cache).logits)
    assert_close(torch.cat(logits, dim=1), llama(input_ids).logits)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_calls_with_a_cache_after_left_padding_match_llama(attention):
    ours, llama = twins(attention=attention)
    batch = left_padded()
    llama_logits = llama(**batch).logits[:, -1]
    prompt = {name: tensor[:, :-1] for name, tensor in batch.items()}
    last = {name: tensor[:, -1:] for name, tensor in batch.items()}
    cache = ours(**prompt, use_cache=True).past_key_values
    output = ours(**{**last, "attention_mask": batch["attention_mask"]}, past_key_values=cache)
    assert_close(output.logits[:, -1], llama_logits)


def test_a_4d_mask_is_used_unchanged():
    ours, llama = twins()
    input_ids = random_ids(2, 6)
    visible = torch.ones(6, 6, dtype=torch.bool).tril() & (torch.rand(2, 1, 6, 6) > 0.3) | torch.eye(
        6, dtype=torch.bool
    )
    batch = {"input_ids": input_ids, "attention_mask": visible, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    assert_close(ours(**batch).logits, llama(**batch).logits)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("use_cache", (True, False))
def test_attentions_and_hidden_states_match_llama(head, use_cache):
    ours, llama = twins(head, attention="eager")
    arguments = {"output_attentions": True, "output_hidden_states": True, "use_cache": use_cache}
    our_output, llama_output = (model(random_ids(2, 7), **arguments) for model in (ours, llama))
    assert [weights.shape for weights in our_output.attentions] == [(2, 4, 7, 7)] * 2
    assert [states.shape for states in our_output.hidden_states] == [(2, 7, 32)] * 3
    assert_close(our_output.attentions, llama_output.attentions)
    assert_close(our_output.hidden_states, llama_output.hidden_states)


@pytest.mark.parametrize(
    ("head", "labels"),
    (
        ("ForSequenceClassification", {"labels": torch.tensor([1, 0, 2])}),
        ("ForTokenClassification", {"labels": random_ids(3, 12) % 3}),
        (
            "ForQuestionAnswering",
            {"start_positions": torch.tensor([1, 5, 9]), "end_positions": torch.tensor([4, 5, 11])},
        ),
    ),
)
def test_the_other_heads_match_llama(head, labels):
    ours, llama = twins(head, num_labels=3)
    batch = {**left_padded(), **labels}
    our_output, llama_output = ours(**batch), llama(**batch)
    assert our_output.keys() == llama_output.keys()
    for name in our_output.keys() & {"logits", "start_logits", "end_logits"}:
        assert_close(our_output[name], llama_output[name])
    assert_close(our_output.loss, llama_output.loss)


def test_return_dict_false_returns_a_tuple():
    ours, llama = twins()
    input_ids = random_ids(2, 7)
    our_tuple, llama_tuple = (m(input_ids, labels=input_ids, use_cache=False, return_dict=False) for m in (ours, llama))
    assert len(our_tuple) == len(llama_tuple) == 2
    assert_close(our_tuple, llama_tuple)


@pytest.mark.parametrize(
    "rope_parameters",
    (
        {"rope_type": "default", "rope_theta": 500_000.0},
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    ids=lambda parameters: parameters["rope_type"],
)
def test_every_type_of_rotary_embeddings_matches_llama(rope_parameters):
    ours, llama = twins(rope_parameters=rope_parameters)
    for length in (12, 96, 12):  # within the context of 64, beyond it, and back
        input_ids = random_ids(1, length)
        assert_close(ours(input_ids).logits, llama(input_ids).logits)


def test_inputs_embeds_replace_input_ids_and_receive_gradients():
    ours, llama = twins()
    input_ids = random_ids(2, 7)
    embeddings = ours.get_input_embeddings()(input_ids).detach()
    assert_close(ours(inputs_embeds=embeddings).logits, ours(input_ids).logits)
    received = []
    for model in (ours, llama):
        leaf = embeddings.clone().requires_grad_()
        model(inputs_embeds=leaf, labels=input_ids).loss.backward()
        received.append(leaf.grad)
    assert received[0][:, :-1].abs().min() > 0  # the last token predicts nothing
    assert_close(*received)


@pytest.mark.parametrize("arguments", ({}, {"input_ids": random_ids(1, 2), "inputs_embeds": torch.zeros(1, 2, 32)}))
def test_both_or_neither_of_input_ids_and_inputs_embeds_raise(arguments):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model("healthslm")(**arguments)


@pytest.mark.parametrize(
    ("logits_to_keep", "kept"),
    (
        (0, lambda logits: logits),
        (3, lambda logits: logits[:, -3:]),
        (torch.tensor([1, 4]), lambda logits: logits[:, [1, 4]]),
        (torch.tensor([[1, 4], [0, 6]]), lambda logits: torch.stack((logits[0, [1, 4]], logits[1, [0, 6]]))),
        (torch.arange(14).view(2, 7) % 3 == 0, lambda logits: logits.flatten(0, 1)[::3]),
    ),
    ids=("all", "the last", "indices", "indices per sequence", "a mask"),
)
def test_logits_to_keep_selects_positions(logits_to_keep, kept):
    ours = tiny_model("healthslm")
    llama_logits = llama_twin(ours)(random_ids(2, 7)).logits
    assert_close(ours(random_ids(2, 7), logits_to_keep=logits_to_keep).logits, kept(llama_logits))


def test_attention_dropout_matches_llama():
    ours, llama = twins(attention="eager", attention_dropout=0.5)
    input_ids, logits = random_ids(2, 7), []
    for model in (ours.train(), llama.train()):
        torch.manual_seed(3)
        logits.append(model(input_ids).logits)
    assert_close(*logits)
    assert not torch.equal(logits[0], ours.eval()(input_ids).logits)
