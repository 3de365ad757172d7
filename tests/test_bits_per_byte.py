"""Bits per byte: the definition, and what it does not depend on."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from healthslm.bits_per_byte import document_bits, score_documents, token_bits, windows

VOCAB, CONTEXT = 96, 16


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=CONTEXT, initializer_range=0.3,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    numbers = np.random.default_rng(0)
    lengths = [1, 2, 3, 15, 16, 17, 18, 24, 25, 26, 33, 60, 5, 41]
    return [np.r_[0, numbers.integers(1, VOCAB, length - 1)] for length in lengths]


def bits_one_token_at_a_time(model, tokens: np.ndarray) -> float:
    """The definition: token i is predicted in the first window of 0, 8, 16, … that reaches it."""
    bits = 0.0
    for target in range(1, len(tokens)):
        start = 0
        while target - start > CONTEXT:
            start += CONTEXT // 2
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens[None, start:target])).logits[0, -1]
        bits -= torch.log_softmax(logits.double(), -1)[tokens[target]].item() / math.log(2)
    return bits


def test_bits_are_those_of_one_token_at_a_time(model, documents):
    expected = [bits_one_token_at_a_time(model, document) for document in documents]
    np.testing.assert_allclose(document_bits(model, documents), expected, rtol=1e-5)


def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary_per_token(model, documents):
    uniform = type(model)(model.config)
    with torch.no_grad():
        for parameter in uniform.parameters():
            parameter.zero_()
    expected = [(len(document) - 1) * math.log2(VOCAB) for document in documents]
    np.testing.assert_allclose(document_bits(uniform, documents), expected, rtol=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batch_size_and_padding_do_not_change_the_result(model, documents, batch_tokens):
    alone = np.concatenate([document_bits(model, [document]) for document in documents])
    np.testing.assert_allclose(document_bits(model, documents, batch_tokens=batch_tokens), alone, rtol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40])
def test_tokens_before_the_first_one_to_score_have_no_bits_and_change_no_others(model, documents, batch_tokens):
    first = [1 + index * 3 % max(len(document) - 1, 1) for index, document in enumerate(documents)]
    found = token_bits(model, documents, first_tokens=first, batch_tokens=batch_tokens)
    for start, document, bits in zip(first, token_bits(model, documents), found, strict=True):
        assert not bits[: start - 1].any()
        np.testing.assert_allclose(bits[start - 1 :], document[start - 1 :], rtol=1e-4)


def test_order_does_not_change_the_result(model, documents):
    order = np.random.default_rng(1).permutation(len(documents))
    shuffled = document_bits(model, [documents[i] for i in order])
    np.testing.assert_allclose(shuffled, document_bits(model, documents)[order], rtol=1e-5)


@pytest.mark.parametrize("num_processes", [2, 3, 50])
def test_processes_share_the_windows_with_equal_numbers_of_forward_passes(model, documents, num_processes):
    passes: list[int] = []

    def bits(**place: int) -> np.ndarray:
        passes.append(0)
        return document_bits(model, documents, batch_tokens=CONTEXT, **place)

    def count(*_) -> None:
        passes[-1] += 1

    hook = model.register_forward_hook(count)
    alone = bits()
    shares = [bits(process_index=index, num_processes=num_processes) for index in range(num_processes)]
    hook.remove()
    np.testing.assert_allclose(sum(shares), alone, rtol=1e-5)
    assert passes[1:] == [math.ceil(passes[0] / num_processes)] * num_processes


@pytest.mark.parametrize("context", [1, 2, 7, 16])
def test_windows_score_every_token_once_with_at_least_half_a_context(context):
    for length in range(1, 70):
        scored = []
        for window in windows([length], context):
            assert window.end - window.start <= context
            scored += range(window.start + window.first_scored + 1, window.end + 1)
            if window.start > 0:
                assert window.first_scored >= context // 2
        assert scored == list(range(1, length))


def test_the_score_is_bits_over_bytes_and_nats_over_tokens(model, documents):
    sizes = [4 * len(document) for document in documents]
    score = score_documents(model, documents, sizes)
    bits = document_bits(model, documents).sum()
    assert score.bits_per_byte == pytest.approx(bits / sum(sizes))
    assert score.loss == pytest.approx(bits * math.log(2) / sum(len(document) - 1 for document in documents))
    assert score.perplexity == pytest.approx(math.exp(score.loss))


class LargestInFp32(TorchDispatchMode):
    """Records the elements of the largest fp32 tensor that an operation creates."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        return result


def test_logits_in_bf16_are_converted_to_fp32_one_window_at_a_time():
    """Converted all at once, they would need more memory than training does."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=5000, **shape)
    model = LlamaForCausalLM(config).bfloat16()
    documents = [np.arange(CONTEXT + 1)] * 8
    with LargestInFp32() as largest:
        token_bits(model, documents, context=CONTEXT, batch_tokens=8 * CONTEXT)
    assert largest.elements == CONTEXT * 5000


def test_evaluation_leaves_the_model_in_its_mode(model, documents):
    model.train()
    document_bits(model, documents[:2])
    assert model.training
    model.eval()
