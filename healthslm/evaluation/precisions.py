"""What a precision costs and saves: size on disk and in memory, bits per byte, and speed of generation.

Each precision is measured on the model that `from_pretrained` opens after `healthslm.quantization.save_in_precision`.
All precisions score the same documents, so the **difference** of a precision to fp32 is paired: its interval is that of
the sum over documents of the additional bits, divided by the sum of their bytes. It is much narrower than the
difference of the two intervals, because documents that are hard for one precision are hard for the other.
"""

import logging
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from healthslm.bits_per_byte import document_bits
from healthslm.evaluation.held_out import compare_costs
from healthslm.generation import GREEDY, continue_prompts
from healthslm.options import Precision
from healthslm.quantization import open_in_precision, save_in_precision
from healthslm.training.hardware import describe_hardware

logger = logging.getLogger(__name__)

NEW_TOKENS = 64
RUNS = 3


def compare_precisions(
    model: str | Path,
    precisions: Sequence[Precision],
    documents: Sequence[np.ndarray],
    document_bytes: Sequence[int],
    device: torch.device,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure a model in fp32 and in other precisions.

    Args:
        model: Folder or Hub name of a causal language model.
        documents: Token ids of each document, starting with the separator.
        document_bytes: UTF-8 bytes of each document.

    Returns:
        `parameters`, counting shared ones once; `documents` and `bytes`; `new_tokens` and `machine` of the speed test;
        and `precisions`, which starts with "fp32". Each has

        - `file_bytes`: the size of the safetensors files,
        - `memory_bytes`: Transformers' `get_memory_footprint`, which counts parameters and buffers, but neither the
          scales of bitsandbytes nor activations,
        - `tokens_per_second` of `generate` for one sequence and greedy decoding: the median of three runs of 64 new
          tokens, after a warm-up,
        - `bits_per_byte` with its 95% `interval`,
        - `difference`: its additional `bits_per_byte` compared with fp32, with their paired 95% `interval`.

        Intervals are None for few documents, see `healthslm.evaluation.held_out`.

    Raises:
        ModuleNotFoundError: The library for a precision is not installed.
        UserError: There is no such model, or it can't be quantized.
    """
    sizes = np.array(document_bytes)
    separator = int(documents[0][0])
    found: dict[str, Any] = {}
    for precision in dict.fromkeys(["fp32", *precisions]):
        logger.info("measuring %s", precision)
        with tempfile.TemporaryDirectory(prefix="healthslm-") as folder:
            save_in_precision(model, precision, Path(folder), device)
            opened = open_in_precision(Path(folder), device)
            file_bytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        bits = document_bits(opened, documents, progress=progress)
        if precision == "fp32":
            parameters, baseline = opened.num_parameters(), bits
        found[precision] = {
            "file_bytes": file_bytes,
            "memory_bytes": opened.get_memory_footprint(),
            "tokens_per_second": _tokens_per_second(opened, separator),
            **compare_costs(bits, baseline, sizes),
        }
    return {
        "parameters": parameters,
        "documents": len(documents),
        "bytes": int(sizes.sum()),
        "new_tokens": NEW_TOKENS,
        "machine": _describe_machine(device),
        "precisions": found,
    }


def _tokens_per_second(model: PreTrainedModel, separator: int) -> float:
    prompt = torch.tensor([[separator]])
    seconds = []
    for _ in range(1 + RUNS):
        start = perf_counter()
        continue_prompts(model, prompt, separator, NEW_TOKENS, min_new_tokens=NEW_TOKENS, **GREEDY)  # no early end
        seconds.append(perf_counter() - start)
    return NEW_TOKENS / statistics.median(seconds[1:])


def _describe_machine(device: torch.device) -> str:
    hardware = describe_hardware(device)
    if device.type != "cpu":
        return hardware
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {hardware}"
