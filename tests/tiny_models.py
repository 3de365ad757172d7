"""Tiny HealthSLM and Llama models with random weights, which are the same in every call."""

import torch
import transformers
from paths import REPOSITORY
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module

FAMILIES = ("healthslm", "llama")
HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
PAD = 1

# A large initializer_range, so that logits differ clearly. The numbers of heads are those of the released model.
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


def model_class(family: str, head: str = "ForCausalLM") -> type[PreTrainedModel]:
    """The class `HealthSLMForCausalLM` or `LlamaForCausalLM`, or one with another head."""
    if family == "llama":
        return getattr(transformers, f"Llama{head}")
    return get_class_from_dynamic_module(f"modeling_healthslm.HealthSLM{head}", str(REPOSITORY))


def model_config(family: str, **overrides) -> PreTrainedConfig:
    return (LlamaConfig if family == "llama" else HealthSLMConfig)(**{**SHAPE, **overrides})


def tiny_model(family: str, head: str = "ForCausalLM", attention: str = "sdpa", **overrides) -> PreTrainedModel:
    """A model in evaluation mode."""
    torch.manual_seed(0)
    model = model_class(family, head)(model_config(family, **overrides))
    model.config._attn_implementation = attention  # unchecked, because tests register their own
    return model.eval()


def twins(head: str = "ForCausalLM", attention: str = "sdpa", **overrides) -> tuple[PreTrainedModel, PreTrainedModel]:
    """HealthSLM and Llama with the same weights."""
    ours, llama = (tiny_model(family, head, attention, **overrides) for family in FAMILIES)
    copy_weights(ours, llama)
    return ours, llama


def llama_twin(ours: PreTrainedModel) -> LlamaForCausalLM:
    """Llama with the settings and weights of a HealthSLM model."""
    settings = (*SHAPE, "head_dim", "rms_norm_eps", "rope_parameters", "attention_dropout")
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(ours.config, name) for name in settings}))
    copy_weights(ours, llama)
    return llama.train(ours.training)


def copy_weights(ours: PreTrainedModel, llama: PreTrainedModel) -> None:
    prefix, llama_prefix = (f"{model.base_model_prefix}." for model in (ours, llama))
    weights = {name.replace(prefix, llama_prefix, 1): weight for name, weight in ours.state_dict().items()}
    llama.load_state_dict(weights)


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """The same token ids in every call, without those of the separator and padding."""
    return torch.randint(2, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """The untrained tokenizer, whose tokens are the special ones and the 256 bytes."""
    return get_class_from_dynamic_module("tokenization_healthslm.HealthSLMTokenizer", str(REPOSITORY))()


def chat_tokenizer() -> PreTrainedTokenizerBase:
    """The untrained tokenizer with the chat template of the repository."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (REPOSITORY / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def byte_model(head: str = "ForCausalLM", **options) -> PreTrainedModel:
    """A HealthSLM model for the untrained tokenizer, in evaluation mode."""
    return tiny_model("healthslm", head, vocab_size=len(byte_tokenizer()), **options)
