"""What a model takes: parameters, bytes on disk and in memory by precision, and its speed on the CPU."""

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
    """Parameters, and for each precision the bytes of the saved safetensors files and those in memory.

    int8 and nf4 (four bits, with double quantisation) are bitsandbytes' and left out where it is not installed. Their
    embedding, and with it a tied head, stays in bf16.

    Args:
        model: Folder or Hub name of a causal language model.

    Returns:
        `parameters`, shared ones counted once; `precisions`: for "fp32", "bf16", "int8" and "nf4" `file_bytes` and
        `memory_bytes` (`get_memory_footprint`: parameters and buffers, without quantisation's scales, which the file
        has, and without what a forward pass adds).
    """
    sizes = {}
    for name, settings in _precisions().items():
        opened = _open(model, **settings)
        if name == "fp32":
            parameters = opened.num_parameters()
        sizes[name] = {"file_bytes": _file_bytes(opened), "memory_bytes": opened.get_memory_footprint()}
    return {"parameters": parameters, "precisions": sizes}


def measure_speed(model: str | Path, separator: int) -> dict[str, Any]:
    """Tokens a second of `generate` on the CPU: greedy, one sequence, with the cache, in fp32 and bf16.

    128 tokens are written behind the separator; the median of three runs counts, after one that does not.

    Args:
        model: Folder or Hub name of a causal language model.
        separator: The token in front of every document.

    Returns:
        `new_tokens`, `threads` (of one operation, as PyTorch has them), and `tokens_per_second` in "fp32" and "bf16".
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
        # No early end.
        continue_prompts(model, prompt, separator, NEW_TOKENS, min_new_tokens=NEW_TOKENS, **GREEDY)
        seconds.append(perf_counter() - start)
    return NEW_TOKENS / statistics.median(seconds[1:])
