"""The ONNX form, for transformers.js and ONNX Runtime, with the files and names that transformers.js expects.

Inputs are `input_ids`, `attention_mask`, `position_ids` and the keys and values of the tokens before, as
`past_key_values.0.key` and so on. Outputs are `logits` and the keys and values of all tokens, as `present.0.key` and so
on. `onnx/model.onnx` is in fp32. `onnx/model_quantized.onnx` has its matrices in 8 bits.
"""

import logging
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from healthslm.export.check import Form, Runtime
from healthslm.export.llama import save_tokenizer
from healthslm.export.source import Source
from healthslm.tokenization.encoding import separator_id

_LARGEST_DIVERGENCE = {"fp32": 1e-6, "q8": 0.01}


class _Cache:
    """Keys and values as plain tensors, which a graph can take and return."""

    def __init__(self, past: Sequence[torch.Tensor]):
        self.past, self.present = past, list[torch.Tensor]()

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Called by each attention layer in turn."""
        past = self.past[2 * layer_idx : 2 * layer_idx + 2]
        found = [torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True)]
        self.present += found
        return found


class _Graph(nn.Module):
    """The function to export."""

    def __init__(self, llama: LlamaForCausalLM):
        super().__init__()
        self.llama = llama

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Shapes: (batch, length), (batch, total), (batch, length), and (batch, heads, total - length, head_dim)."""
        total, length = attention_mask.shape[1], input_ids.shape[1]
        places = torch.arange(total)
        seen = (places <= places[total - length :, None]) & (attention_mask[:, None, None, :] == 1)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        cache = _Cache(past)
        # The fourth argument is `past_key_values`, which Transformers 5.24 renamed to `cache`.
        logits = self.llama(input_ids, mask, position_ids, cache, use_cache=True).logits
        return logits, *cache.present


def write_onnx(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, source: Source) -> list[Form]:
    """Write both ONNX files, the configuration, the tokenizer and the chat template into a folder."""
    (folder / "onnx").mkdir()
    files = {"fp32": folder / "onnx/model.onnx", "q8": folder / "onnx/model_quantized.onnx"}
    _write_fp32(llama, files["fp32"])
    onnx.save(_in_8_bits(onnx.load(files["fp32"])), files["q8"])
    llama.config.save_pretrained(folder)
    llama.generation_config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return [
        Form(precision, path, partial(OnnxRuntime, path, llama.config, tokenizer), _LARGEST_DIVERGENCE[precision])
        for precision, path in files.items()
    ]


def _write_fp32(llama: LlamaForCausalLM, path: Path) -> None:
    config = llama.config
    llama.set_attn_implementation("eager")
    # No size is 0, 1 or the same as another, which the exporter would take as fixed.
    batch, past, length = 2, 3, 5
    state = torch.zeros(batch, config.num_key_value_heads, past, config.head_dim)
    inputs = (
        torch.zeros(batch, length, dtype=torch.long),
        torch.ones(batch, past + length, dtype=torch.long),
        torch.arange(past, past + length).repeat(batch, 1),
        [state.clone() for _ in range(2 * config.num_hidden_layers)],
    )
    # transformers.js makes an empty cache whose sizes are 0 except for this name of the first one.
    batch_size, past_length = "batch_size", "past_sequence_length"
    shapes = (
        {0: batch_size, 1: "sequence_length"},
        {0: batch_size, 1: "total_sequence_length"},
        {0: batch_size, 1: "sequence_length"},
        [{0: batch_size, 2: past_length}] * len(inputs[3]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of names within itself
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names packages that it does without
        torch.onnx.export(
            _Graph(llama).eval(),
            inputs,
            path,
            input_names=["input_ids", "attention_mask", "position_ids", *state_names("past_key_values", config)],
            output_names=["logits", *state_names("present", config)],
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _in_8_bits(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store each matrix as whole numbers from -127 to 127, with a factor for each output or embedded token.

    Only the file is smaller: programs multiply the two when they open it, and then compute in fp32. To multiply whole
    numbers, hidden states are rounded as well, which lost 80 times as many bits per token of the released model, and
    was slower in ONNX Runtime. `DequantizeLinear` would say the same, but ONNX Runtime repeats it in every call.
    """
    graph = model.graph
    embeddings = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    nodes = list[onnx.NodeProto]()
    for tensor in [t for t in graph.initializer if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT]:
        matrix, name = numpy_helper.to_array(tensor), tensor.name
        largest = np.abs(matrix).max(axis=int(name in embeddings), keepdims=True)
        factors = np.maximum(largest, np.finfo(np.float32).tiny) / np.float32(127)
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(np.rint(matrix / factors).astype(np.int8), f"{name}.int8"))
        graph.initializer.append(numpy_helper.from_array(factors, f"{name}.factors"))
        nodes.append(helper.make_node("Cast", [f"{name}.int8"], [f"{name}.float"], to=onnx.TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"{name}.float", f"{name}.factors"], [name]))
    nodes.extend(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def state_names(prefix: str, config: Any) -> list[str]:
    """The names of keys and values, layer by layer."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]


class OnnxRuntime(Runtime):
    """An ONNX file in ONNX Runtime."""

    def __init__(self, path: Path, config: Any, tokenizer: PreTrainedTokenizerBase):
        super().__init__(config, separator_id(tokenizer))
        self.tokenizer = tokenizer
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self._run(ids, self._no_states())[0][0])

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        written: list[int] = []
        logits, *states = self._run(ids, self._no_states())
        while (following := int(logits[0, -1].argmax())) != self.separator and len(written) < new_tokens:
            written.append(following)
            logits, *states = self._run([following], states)
        return written

    def _no_states(self) -> list[np.ndarray]:
        shape = (1, self.config.num_key_value_heads, 0, self.config.head_dim)
        return [np.zeros(shape, np.float32)] * (2 * self.config.num_hidden_layers)

    def _run(self, ids: Sequence[int], states: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The logits (1, length, vocab_size), then the keys and values of all tokens."""
        past = states[0].shape[2]
        inputs = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, past + len(ids)), np.int64),
            "position_ids": np.arange(past, past + len(ids))[None],
            **dict(zip(state_names("past_key_values", self.config), states, strict=True)),
        }
        return self.session.run(None, inputs)
