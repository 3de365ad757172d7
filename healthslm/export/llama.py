"""The Llama form: the same weights in Transformers' own `LlamaForCausalLM`, which opens without remote code.

The GGUF and ONNX forms are made from it.
"""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from healthslm.errors import UserError, one_line
from healthslm.export.check import Form, Runtime, TransformersRuntime
from healthslm.export.source import Source
from healthslm.files import read_json, write_json

SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "use_cache", "attention_dropout", "rope_parameters", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""The settings that HealthSLM and Llama share. They are all that define a causal HealthSLM model."""

_LARGEST_DIVERGENCE = 1e-6
_LOCAL = ("backend", "is_local", "local_files_only")
"""What Transformers saves about where and how a tokenizer was opened."""


def to_llama(model: PreTrainedModel) -> LlamaForCausalLM:
    """A Llama model in fp32 with the weights of a model.

    Raises:
        UserError: It is not a causal HealthSLM or Llama model with its own, unquantized weights.
    """
    config, name = model.config, model.config.name_or_path
    if config.model_type not in ("healthslm", "llama"):
        raise UserError(
            f"{name}: a model of type {config.model_type} has no Llama form, which needs RMSNorm, rotary position "
            "embeddings, a gated feed-forward network and no biases; export a HealthSLM model"
        )
    if not getattr(config, "is_causal", True):
        raise UserError(f"{name}: is_causal is false, but Llama is causal; export a model that generates text")
    try:
        llama = LlamaForCausalLM(LlamaConfig(**{setting: getattr(config, setting) for setting in SETTINGS}))
    except StrictDataclassError as error:
        raise UserError(f"{name}: has no Llama form: {one_line(error)}") from error
    weights = model.state_dict()
    if different := sorted(weights.keys() ^ llama.state_dict().keys()):
        raise UserError(
            f"{name}: has no Llama form because of {different[0]}; merge an adapter, and export the weights before "
            "quantization"
        )
    llama.load_state_dict(weights)
    llama.generation_config = model.generation_config
    return llama.train(model.training)


def write_llama(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, source: Source
) -> list[Form]:
    """Write the Llama form into a folder: weights, configuration, tokenizer and chat template.

    The weights are stored in bf16 if that loses nothing. As in the released model, they open in fp32 by default.
    """
    weights = {key: weight for key, weight in llama.state_dict().items() if not _is_tied_head(llama, key)}
    halves = {key: weight.bfloat16() for key, weight in weights.items()}
    lossless = all(torch.equal(weight, halves[key].float()) for key, weight in weights.items())
    llama.save_pretrained(folder, state_dict=halves if lossless else weights)
    save_tokenizer(tokenizer, folder)
    return [
        Form("bf16" if lossless else "fp32", folder / "model.safetensors", lambda: _open(folder), _LARGEST_DIVERGENCE)
    ]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer under the class name that every version of Transformers and transformers.js knows."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = {key: value for key, value in read_json(path).items() if key not in _LOCAL}
    write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _is_tied_head(llama: LlamaForCausalLM, key: str) -> bool:
    return key == "lm_head.weight" and llama.config.tie_word_embeddings


def _open(folder: Path) -> Runtime:
    return TransformersRuntime(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
