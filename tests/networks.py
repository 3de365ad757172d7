"""HealthSLM beside Llama, the network that it must equal: of one small shape and, where wanted, of the same weights."""

from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

REPOSITORY = Path(__file__).resolve().parents[1]
FAMILIES = ("healthslm", "llama")
HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
PAD = 1

# Weights wide enough for logits to differ, four query heads to two key/value heads, as in the released model.
SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": PAD,
}

HealthSLMConfig = get_class_from_dynamic_module("configuration_healthslm.HealthSLMConfig", str(REPOSITORY))


def network_class(family: str, head: str = "ForCausalLM") -> type[PreTrainedModel]:
    """`LlamaForCausalLM` or `HealthSLMForCausalLM`, or the same with another head."""
    if family == "llama":
        return getattr(transformers, f"Llama{head}")
    return get_class_from_dynamic_module(f"modeling_healthslm.HealthSLM{head}", str(REPOSITORY))


def network_config(family: str, **overrides) -> PreTrainedConfig:
    return (LlamaConfig if family == "llama" else HealthSLMConfig)(**{**SHAPE, **overrides})


def network(family: str, head: str = "ForCausalLM", attention: str = "sdpa", **overrides) -> PreTrainedModel:
    """A network in evaluation mode, with the same random weights at every call."""
    torch.manual_seed(0)
    model = network_class(family, head)(network_config(family, **overrides))
    model.config._attn_implementation = attention  # as given: the name may be a stand-in's
    return model.eval()


def twins(head: str = "ForCausalLM", attention: str = "sdpa", **overrides) -> tuple[PreTrainedModel, PreTrainedModel]:
    """HealthSLM and Llama with the same weights."""
    ours, llama = (network(family, head, attention, **overrides) for family in FAMILIES)
    prefix, llamas = (f"{model.base_model_prefix}." for model in (ours, llama))
    llama.load_state_dict({name.replace(prefix, llamas, 1): tensor for name, tensor in ours.state_dict().items()})
    return ours, llama


def llama_twin(ours: PreTrainedModel) -> LlamaForCausalLM:
    sizes = {name: getattr(ours.config, name) for name in SHAPE}
    llama = network("llama", **sizes)
    llama.load_state_dict(ours.state_dict())
    return llama


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Token ids, none of them special; the same at every call."""
    return torch.randint(2, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))
