"""The GGUF form, for llama.cpp and Ollama: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Two programs read each file back: Transformers computes logits from its weights, and llama.cpp splits text into tokens
and generates.
"""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import gguf
import numpy as np
import torch
import xllamacpp
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

from healthslm.errors import UserError, one_line
from healthslm.export.check import Form, TransformersRuntime
from healthslm.export.source import Source
from healthslm.generation import up_to_separator

LARGEST_DIVERGENCE = {"F16": 1e-4, "Q8_0": 0.01}

_TEMPLATE_MARKS = re.compile(r"{%-? (?:end)?generation %}")
"""They mark what a loss is computed on, and not every program knows them."""


def write_gguf(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, source: Source) -> list[Form]:
    """Write one GGUF file for each precision into a folder, and a Modelfile for Ollama.

    Raises:
        UserError: llama.cpp doesn't support a setting of the model.
    """
    config = llama.config
    if config.hidden_act != "silu" or config.rope_parameters["rope_type"] != "default":
        raise UserError(
            f"{source.base}: can't be exported to GGUF: it needs hidden_act silu and rope_type default, not "
            f"{config.hidden_act} and {config.rope_parameters['rope_type']}"
        )
    paths = {precision: folder / f"{source.name}-{precision}.gguf" for precision in LARGEST_DIVERGENCE}
    for precision, path in paths.items():
        _write(llama, tokenizer, path, gguf.GGMLQuantizationType[precision], source)
    (folder / "Modelfile").write_text(_modelfile(llama, paths["Q8_0"].name), encoding="utf-8")
    return [
        Form(precision, path, partial(LlamaCppRuntime, path, tokenizer), LARGEST_DIVERGENCE[precision])
        for precision, path in paths.items()
    ]


def _write(
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    precision: gguf.GGMLQuantizationType,
    source: Source,
) -> None:
    """Write a file. Vectors stay in fp32, as in llama.cpp's own converter."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{precision.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_description(writer, llama, source)
    _add_architecture(writer, llama.config)
    _add_tokenizer(writer, tokenizer, llama.config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, llama.config.num_hidden_layers)
    for key, weight in llama.state_dict().items():
        if key == "lm_head.weight" and llama.config.tie_word_embeddings:
            continue  # llama.cpp then uses the embedding
        array = _interleaved(key, weight, llama.config).numpy()
        kind = _precision_of(array, precision)
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None  # all weights of a Llama model have one
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _precision_of(array: np.ndarray, precision: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """The type of a tensor: a matrix whose rows are no multiple of a block's length stays in F16."""
    if array.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[precision]
    return precision if array.shape[1] % block == 0 else gguf.GGMLQuantizationType.F16


def _interleaved(key: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Reorder the rows of queries and keys: llama.cpp rotates neighbors, and Transformers row i with row i + half."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_description(writer: gguf.GGUFWriter, llama: LlamaForCausalLM, source: Source) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.name)
    writer.add_size_label(f"{llama.num_parameters() / 1e6:.0f}M")
    if source.license:
        writer.add_license(source.license)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, source.name)
    writer.add_languages(["en"])
    writer.add_tags(["text-generation", "biology", "medical"])
    sampling = llama.generation_config
    if sampling.do_sample and sampling.temperature is not None:
        writer.add_sampling_temp(sampling.temperature)
    if sampling.do_sample and sampling.top_k is not None:
        writer.add_sampling_top_k(sampling.top_k)


def _add_architecture(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """The vocabulary of a byte-level BPE with GPT-2's pre-tokenization. Ids without a token get an unused one."""
    special, added = set(tokenizer.all_special_ids), set(tokenizer.added_tokens_decoder)
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(index, f"[UNUSED{index}]") for index in range(vocab_size)])
    writer.add_token_types(
        [
            kinds.CONTROL
            if index in special
            else kinds.USER_DEFINED
            if index in added
            else kinds.NORMAL
            if index in tokens
            else kinds.UNUSED
            for index in range(vocab_size)
        ]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(tokenizer("")["input_ids"] == [tokenizer.bos_token_id])
    for add, token_id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(_TEMPLATE_MARKS.sub("", tokenizer.chat_template))


def _modelfile(llama: LlamaForCausalLM, weights: str) -> str:
    """Ollama's settings. The template passes the prompt on unchanged: this model continues text."""
    sampling = llama.generation_config
    return (
        f"FROM ./{weights}\n"
        "TEMPLATE {{ .Prompt }}\n"
        f"PARAMETER num_ctx {llama.config.max_position_embeddings}\n"
        f"PARAMETER temperature {sampling.temperature or 1.0}\n"
        f"PARAMETER top_k {sampling.top_k or 50}\n"
    )


class LlamaCppRuntime(TransformersRuntime):
    """A GGUF file: its weights in Transformers, its tokenizer and its generation in llama.cpp's server."""

    rounding = 0.25  # llama.cpp rounds activations and its cache to 16 bits, and activations to 8 bits in Q8_0

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase):
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        super().__init__(model, tokenizer)
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = self.config.max_position_embeddings
        settings.n_parallel = 1
        settings.cpuparams.n_threads = torch.get_num_threads()
        settings.verbosity = -1
        try:
            self.server = xllamacpp.Server(settings)
        except RuntimeError as error:
            raise UserError(f"{path.name}: not exported: llama.cpp can't open it: {one_line(error)}") from error

    def encode(self, text: str) -> list[int]:
        return self._ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        request = {"prompt": list(ids), "n_predict": new_tokens, "temperature": 0, "return_tokens": True}
        return up_to_separator(torch.tensor([self._ask("/completion", **request)["tokens"]]), self.separator)[0]

    def _ask(self, path: str, **request: Any) -> dict[str, Any]:
        address = self.server.listening_address + path
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(address, json.dumps(request).encode(), headers)) as answer:
            return json.load(answer)
