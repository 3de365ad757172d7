"""With `is_causal=False` each token attends to its whole document: as in Llama with a mask that hides only padding."""

import pytest
import torch
from tiny_models import HEADS, PAD, random_ids, tiny_model, twins
from torch.testing import assert_close
from transformers import AutoModelForTokenClassification

LENGTH = 12


def documents_of(lengths: tuple[int, ...]) -> torch.Tensor:
    """(1, LENGTH), the number of the document of each token."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0)


def positions_of(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("head", [head for head in HEADS if head != "ForSequenceClassification"])
@pytest.mark.parametrize("lengths", ((12,), (5, 1, 6)), ids=str)
def test_a_bidirectional_model_matches_llama_with_a_full_mask(lengths, head, attention):
    causal, llama = twins(head, attention)
    ours = tiny_model("healthslm", head, attention, is_causal=False)
    ours.load_state_dict(causal.state_dict())
    input_ids, documents, position_ids = random_ids(1, LENGTH), documents_of(lengths), positions_of(lengths)
    same_document = (documents.unsqueeze(1) == documents.unsqueeze(2)).unsqueeze(1)
    mask = torch.zeros(same_document.shape).masked_fill(~same_document, torch.finfo(torch.float).min)
    expected = llama(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
    output = ours(input_ids, position_ids=position_ids, use_cache=False)
    assert_close(output[0], expected[0])


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("side", ("left", "right"))
def test_padding_does_not_change_the_outputs_of_a_bidirectional_model(side, attention):
    model = tiny_model("healthslm", "ForTokenClassification", attention, is_causal=False)
    input_ids, padding = random_ids(1, 7), torch.full((1, 5), PAD)
    ids = torch.cat((padding, input_ids) if side == "left" else (input_ids, padding), dim=1)
    mask = (ids != PAD).long()
    padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    assert_close(padded[mask.bool()], model(input_ids).logits[0])


def test_a_bidirectional_classifier_uses_the_last_token_that_is_not_padding():
    model = tiny_model("healthslm", "ForSequenceClassification", is_causal=False)
    input_ids = random_ids(1, 7)
    padded = torch.cat((input_ids, torch.full((1, 3), PAD)), dim=1)
    assert_close(model(padded, attention_mask=(padded != PAD).long()).logits, model(input_ids).logits)
    changed = input_ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 99
    assert not torch.allclose(model(changed).logits, model(input_ids).logits)


def test_a_bidirectional_model_stays_bidirectional_when_saved(tmp_path):
    model = tiny_model("healthslm", "ForTokenClassification", is_causal=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path, trust_remote_code=True)
    input_ids = random_ids(2, 9)
    assert_close(loaded(input_ids).logits, model(input_ids).logits, rtol=0, atol=0)
    last_changed = input_ids.clone()
    last_changed[:, -1] = 5
    assert not torch.allclose(loaded(last_changed).logits[:, 0], loaded(input_ids).logits[:, 0])


def test_a_bidirectional_model_refuses_to_generate():
    model = tiny_model("healthslm", is_causal=False)
    with pytest.raises(ValueError, match="is_causal=False can't generate"):
        model.generate(random_ids(1, 4), max_new_tokens=2)
