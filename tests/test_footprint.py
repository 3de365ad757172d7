"""The footprint of a model: sizes that follow from its parameters, and the median of timed runs."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import GenerationMixin

from healthslm.evaluation import footprint
from healthslm.evaluation.footprint import measure_sizes, measure_speed

# Matrices whose rows are multiples of 64 weights, the block size of 4-bit quantization.
SHAPE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
EMBEDDING = 512 * 64
NORMS = 64 * 5  # two in each of two layers and a final one
QUERIES, KEYS_AND_VALUES = 64 * 64, 2 * 64 * 64
MATRICES = 2 * (2 * QUERIES + KEYS_AND_VALUES + 3 * 64 * 128)  # fourteen
BUFFERS = 2 * 16  # the rotary embedding's frequencies, current and original


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("healthslm", **SHAPE).save_pretrained(folder)
    return folder


def test_sizes_follow_from_the_parameters_and_their_bytes(folder):
    result = measure_sizes(folder)
    assert result["parameters"] == EMBEDDING + MATRICES + NORMS
    for name, bytes_each in (("fp32", 4), ("bf16", 2)):
        sizes = result["precisions"][name]
        weights = bytes_each * result["parameters"]
        assert weights < sizes["file_bytes"] < weights + 8192  # plus a header with names and offsets
        assert weights <= sizes["memory_bytes"] <= weights + 4 * BUFFERS


def test_quantized_sizes_follow_from_the_bits_of_the_matrices(folder):
    pytest.importorskip("bitsandbytes")
    precisions = measure_sizes(folder)["precisions"]
    unquantised = 2 * (EMBEDDING + NORMS)
    for name, bits in (("int8", 8), ("nf4", 4)):
        least = unquantised + MATRICES * bits / 8
        # The file also contains names, tables and scales of fourteen matrices.
        assert least < precisions[name]["file_bytes"] < least + 14 * 2200
        assert least <= precisions[name]["memory_bytes"] <= least + 4 * BUFFERS
    assert list(precisions) == ["fp32", "bf16", "int8", "nf4"]


def test_without_bitsandbytes_only_two_precisions_are_measured(folder, monkeypatch):
    monkeypatch.setattr(footprint, "is_bitsandbytes_available", lambda: False)
    assert list(measure_sizes(folder)["precisions"]) == ["fp32", "bf16"]


def test_speed_is_the_median_of_three_runs_of_full_length(folder, monkeypatch):
    monkeypatch.setattr(footprint, "NEW_TOKENS", 12)
    runs = [100, 1, 4, 2] * 2  # seconds; the first run of each precision is the warm-up
    clock = iter([moment for run in range(8) for moment in (sum(runs[:run]), sum(runs[: run + 1]))])
    monkeypatch.setattr(footprint, "perf_counter", lambda: next(clock))
    generate, written = GenerationMixin.generate, []

    def generate_and_count(self, inputs, **settings):
        result = generate(self, inputs, **settings)
        written.append((self.dtype, result.shape[1] - inputs.shape[1]))
        return result

    monkeypatch.setattr(GenerationMixin, "generate", generate_and_count)
    result = measure_speed(folder, separator=0)
    assert result["tokens_per_second"] == {"fp32": 12 / 2, "bf16": 12 / 2}
    assert result["new_tokens"] == 12 and result["threads"] == torch.get_num_threads()
    assert written == [(torch.float32, 12)] * 4 + [(torch.bfloat16, 12)] * 4
