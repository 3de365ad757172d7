"""A small HealthSLM and its tokenizer, made as users make them: through the Auto classes on the root."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module

REPOSITORY = Path(__file__).resolve().parents[1]


def small_config(**overrides):
    """Two layers and the vocabulary of the untrained tokenizer; weights wide enough for logits to differ."""
    shape = {
        "vocab_size": 262,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True, **{**shape, **overrides})


def small_model(auto_class: type = AutoModelForCausalLM, **overrides) -> PreTrainedModel:
    """The same random weights at every call, in evaluation mode."""
    torch.manual_seed(0)
    return auto_class.from_config(small_config(**overrides), trust_remote_code=True).eval()


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """HealthSLM's tokenizer before training: its special tokens and the 256 bytes."""
    return get_class_from_dynamic_module("tokenization_healthslm.HealthSLMTokenizer", str(REPOSITORY))()


def random_ids(*shape: int) -> torch.Tensor:
    """Token ids of the bytes, which no special token is among; the same at every call."""
    return torch.randint(6, 262, shape, generator=torch.Generator().manual_seed(1))
