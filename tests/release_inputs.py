"""Inputs of tests of evaluation and release: a small model, abstracts with biomedical terms, and questions."""

import itertools
from pathlib import Path
from typing import Any

from row_files import write_lines

MODEL_CONFIG = {
    "model_type": "healthslm",
    "vocab_size": 512,
    "hidden_size": 64,  # a multiple of 64, the block size of 4-bit quantization
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
DRUGS = ("aspirin", "metformin", "warfarin", "ibuprofen", "insulin", "morphine")
DISEASES = ("asthma", "stroke", "pneumonia", "depression")
DECISIONS = ("yes", "no", "maybe", "yes")


def held_out_rows() -> list[dict[str, str]]:
    return [
        {
            "title": f"A trial in {20 + number} patients",
            "text": f"We treated patients for {disease} with {drug} and measured their serum albumin. "
            f"Group {number} improved within {number + 2} weeks, and their liver was not affected.",
        }
        for number, (drug, disease) in enumerate(itertools.product(DRUGS, DISEASES))
    ]


def question_rows() -> list[dict[str, Any]]:
    contexts = "We gave {} to patients.", "Most did well."
    return [
        {
            "QUESTION": f"Does {drug} help?",
            "CONTEXTS": [context.format(drug) for context in contexts],
            "final_decision": decision,
        }
        for drug, decision in zip(DRUGS, DECISIONS, strict=False)
    ]


def write_inputs(folder: Path) -> dict[str, Path]:
    """Write the files for the options `held_out` and `pubmedqa`."""
    files = {"held_out": folder / "abstracts.jsonl", "pubmedqa": folder / "questions.jsonl"}
    for path, rows in zip(files.values(), (held_out_rows(), question_rows()), strict=True):
        write_lines(path, rows)
    return files
