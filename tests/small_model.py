"""A small HealthSLM model for the untrained tokenizer, whose tokens are the special ones and the 256 bytes."""

from networks import REPOSITORY, network
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def byte_tokenizer() -> PreTrainedTokenizerBase:
    return get_class_from_dynamic_module("tokenization_healthslm.HealthSLMTokenizer", str(REPOSITORY))()


def small_model(head: str = "ForCausalLM", **options) -> PreTrainedModel:
    """A model in evaluation mode, with the same random weights in every call."""
    return network("healthslm", head, vocab_size=len(byte_tokenizer()), **options)
