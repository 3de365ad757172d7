"""The footprint of a model: parameters, size on disk and in memory by precision, and generation speed on the CPU."""

import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from healthslm.generation import GREEDY, continue_prompts

NEW_TOKENS = 128
RUNS = 3


def measure_sizes(model: str | Path) -> dict[str, Any]:
    """Count parameters and, for each precision, the bytes of the saved safetensors files and in memory.

    int8 and nf4 (4 bits with double quantization) need bitsandbytes and are left out if it is not installed. The
    embedding and a tied head stay in bf16 there.

    Args:
        model: Folder or Hub name of a causal language model.

    Returns:
        `parameters`, counting shared ones once, and `precisions`: for "fp32", "bf16", "int8" and "nf4" `file_bytes`
        and `memory_bytes`. The latter is `get_memory_footprint`: parameters and buffers, but neither the scales of
        quantization, which the file contains, nor activations.
    """
    sizes = {}
    for name, settings in _precisions().items():
        opened = _open(model, **settings)
        if name == "fp32":
            parameters = opened.num_parameters()
        sizes[name] = {"file_bytes": _file_bytes(opened), "memory_bytes": opened.get_memory_footprint()}
    return {"parameters": parameters, "precisions": sizes}


def measure_speed(model: str | Path, separator: int) -> dict[str, Any]:
    """Measure the tokens per second of `generate` on the CPU in fp32 and bf16, for one sequence and greedy decoding.

    Each run generates 128 tokens after the separator. The result is the median of three runs after a warm-up.

    Args:
        model: Folder or Hub name of a causal language model.
        separator: Token id that precedes each document.

    Returns:
        `new_tokens`, `threads` (PyTorch's intra-op threads), and `tokens_per_second` for "fp32" and "bf16".
    """
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    speeds = {name: _tokens_per_second(_open(model, dtype=dtype), separator) for name, dtype in dtypes.items()}
    return {"new_tokens": NEW_TOKENS, "threads": torch.get_num_threads(), "tokens_per_second": speeds}


def _precisions() -> dict[str, dict[str, Any]]:
    precisions: dict[str, dict[str, Any]] = {"fp32": {"dtype": torch.float32}, "bf16": {"dtype": torch.bfloat16}}
    if is_bitsandbytes_available():
        int8 = BitsAndBytesConfig(load_in_8bit=True)
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        precisions["int8"] = {"dtype": torch.bfloat16, "quantization_config": int8}
        precisions["nf4"] = {"dtype": torch.bfloat16, "quantization_config": nf4}
    return precisions


def _open(model: str | Path, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True, **settings)


def _file_bytes(model: PreTrainedModel) -> int:
    with tempfile.TemporaryDirectory(prefix="healthslm-") as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _tokens_per_second(model: PreTrainedModel, separator: int) -> float:
    prompt = torch.tensor([[separator]])
    seconds = []
    for _ in range(1 + RUNS):
        start = perf_counter()
        continue_prompts(model, prompt, separator, NEW_TOKENS, min_new_tokens=NEW_TOKENS, **GREEDY)  # no early end
        seconds.append(perf_counter() - start)
    return NEW_TOKENS / statistics.median(seconds[1:])
