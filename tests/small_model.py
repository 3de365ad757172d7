"""A small HealthSLM and the tokenizer that it fits: the untrained one, of special tokens and the 256 bytes."""

from networks import REPOSITORY, network
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def byte_tokenizer() -> PreTrainedTokenizerBase:
    return get_class_from_dynamic_module("tokenization_healthslm.HealthSLMTokenizer", str(REPOSITORY))()


def small_model(head: str = "ForCausalLM", **options) -> PreTrainedModel:
    """The same random weights at every call, in evaluation mode."""
    return network("healthslm", head, vocab_size=len(byte_tokenizer()), **options)
