"""skip_logits=True computes the same loss and gradients with a fraction of the memory."""

import itertools
import sys

import pytest
import torch
from tiny_models import model_class, random_ids, tiny_model
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

CHUNK_TOKENS = 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    module = sys.modules[model_class("healthslm").__module__.replace("modeling_", "loss_")]
    monkeypatch.setattr(module, "LOSS_CHUNK_TOKENS", CHUNK_TOKENS)


def loss_and_gradients(model: PreTrainedModel, **arguments) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**arguments).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


LABELS = random_ids(3, 13)  # 39 tokens: four full chunks and one of 7
PARTLY_IGNORED = LABELS.masked_fill(torch.rand(3, 13, generator=torch.Generator().manual_seed(0)) < 0.5, -100)
CASES = {
    "labels": {"labels": LABELS},
    "ignored labels": {"labels": PARTLY_IGNORED},
    "a full chunk ignored": {"labels": LABELS.clone().index_fill_(0, torch.tensor(1), -100)},
    "another ignore_index": {"labels": LABELS, "ignore_index": int(LABELS[0, 5])},
    "num_items_in_batch as an int": {"labels": PARTLY_IGNORED, "num_items_in_batch": 77},
    "num_items_in_batch as a tensor": {"labels": PARTLY_IGNORED, "num_items_in_batch": torch.tensor(77)},
    "shifted labels": {"labels": LABELS, "shift_labels": PARTLY_IGNORED},
    "shifted labels and num_items_in_batch": {
        "labels": LABELS,
        "shift_labels": PARTLY_IGNORED,
        "num_items_in_batch": torch.tensor(77),
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("tied", (True, False))
def test_loss_and_gradients_match_those_with_logits(case, tied):
    model = tiny_model("healthslm", tie_word_embeddings=tied).train()
    plain = loss_and_gradients(model, input_ids=LABELS, **case)
    chunked = loss_and_gradients(model, input_ids=LABELS, skip_logits=True, **case)
    assert_close(chunked, plain, atol=1e-6, rtol=1e-5)


def test_loss_and_gradients_match_llama():
    ours, llama = tiny_model("healthslm").train(), tiny_model("llama").train()
    llama.load_state_dict(ours.state_dict())
    arguments = {"input_ids": LABELS, "labels": PARTLY_IGNORED, "num_items_in_batch": torch.tensor(77)}
    llamas = loss_and_gradients(llama, **arguments)
    assert_close(loss_and_gradients(ours, skip_logits=True, **arguments), llamas, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("autocast", (True, False), ids=("autocast", "weights"))
def test_bf16_loss_and_gradients_are_as_exact_as_those_with_logits(autocast):
    model = tiny_model("healthslm").train()
    model.load_state_dict({name: weight.bfloat16() for name, weight in model.state_dict().items()})  # exact in bf16
    exact = loss_and_gradients(model, input_ids=LABELS, labels=PARTLY_IGNORED)
    model = model.to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = loss_and_gradients(model, input_ids=LABELS, labels=PARTLY_IGNORED)
        chunked = loss_and_gradients(model, input_ids=LABELS, labels=PARTLY_IGNORED, skip_logits=True)
    assert chunked[0].dtype == plain[0].dtype == torch.float32
    assert_close(chunked[0], plain[0])
    for name, gradient in exact[1].items():
        error, plain_error = ((found[1][name] - gradient).norm() / gradient.norm() for found in (chunked, plain))
        assert 0 < error < max(1.2 * plain_error, 0.01), name


def test_another_kind_of_lm_head_raises():
    model = tiny_model("healthslm")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="needs an nn.Linear as lm_head, not Sequential"):
        model(LABELS, labels=LABELS, skip_logits=True)


@pytest.mark.parametrize(
    ("backend", "checkpointing", "autocast"),
    [
        *itertools.product(("eager", "aot_eager"), (False, True), (False, True)),
        ("inductor", False, False),
        pytest.param("inductor", True, True, marks=pytest.mark.slow),
    ],
)
def test_compiled_gradients_match_eager_ones(backend, checkpointing, autocast):
    """PyTorch 2.11 returns zero gradients for buffers that are written in place."""
    model = tiny_model("healthslm", num_hidden_layers=1).train()
    arguments = {"input_ids": LABELS, "labels": PARTLY_IGNORED, "skip_logits": True, "use_cache": False}
    plain = loss_and_gradients(model, **arguments)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=not checkpointing)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = compiled(**arguments).loss
    loss.backward()
    assert_close(loss.detach(), plain[0], rtol=1e-2 if autocast else 1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - plain[1][name]).norm() / plain[1][name].norm()
        assert error < (0.05 if autocast else 1e-5), name


def test_lm_head_has_gradients_when_the_decoder_is_frozen():
    model = tiny_model("healthslm", tie_word_embeddings=False).train()
    model.model.requires_grad_(False)
    model(LABELS, labels=LABELS, skip_logits=True).loss.backward()
    chunked = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model(LABELS, labels=LABELS).loss.backward()
    assert_close(chunked, model.lm_head.weight.grad)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns, in the backward pass too."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("skip_logits", (True, False))
def test_all_logits_are_never_in_memory(skip_logits):
    model = tiny_model("healthslm", vocab_size=500).train()
    input_ids = random_ids(4, 60)
    with LargestTensor() as largest:
        model(input_ids, labels=input_ids, skip_logits=skip_logits).loss.backward()
    all_logits = input_ids.numel() * 500
    parameters = max(parameter.numel() for parameter in model.parameters())
    assert CHUNK_TOKENS * 500 < parameters < all_logits // 4  # or the next check could not tell them apart
    assert largest.elements <= parameters if skip_logits else largest.elements >= all_logits


def test_no_logits_are_returned():
    output = tiny_model("healthslm")(LABELS, labels=LABELS, skip_logits=True)
    assert output.logits is None
    assert output.loss.ndim == 0


def test_missing_labels_raise():
    with pytest.raises(ValueError, match="pass `labels` too"):
        tiny_model("healthslm")(LABELS, skip_logits=True)


def test_packed_documents_have_the_loss_of_the_plain_computation():
    model = tiny_model("healthslm").train()
    batch = {
        "input_ids": LABELS,
        "labels": LABELS,
        "position_ids": torch.arange(13).expand(3, -1) % 5,
        "attention_mask": torch.ones_like(LABELS),
    }
    assert_close(loss_and_gradients(model, **batch, skip_logits=True), loss_and_gradients(model, **batch))
