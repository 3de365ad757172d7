"""Precisions: sizes follow from the bits of the weights, which stay close to the original ones and tied."""

import importlib.metadata
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import peft
import pytest
import torch
from packaging.version import Version
from row_files import write_lines
from safetensors.torch import load_file
from tiny_models import byte_tokenizer, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationMixin, PreTrainedModel

from healthslm.bits_per_byte import document_bits
from healthslm.errors import UserError
from healthslm.evaluation import precisions
from healthslm.evaluation.precisions import compare_precisions
from healthslm.models import open_model
from healthslm.options import Precision
from healthslm.quantization import (
    GROUP,
    OLDEST_TRANSFORMERS,
    available_precisions,
    open_in_precision,
    save_in_precision,
)

TOO_OLD = Version(importlib.metadata.version("transformers")) < OLDEST_TRANSFORMERS
PRECISIONS = [name for name in get_args(Precision) if not (name == "int4" and TOO_OLD)]
needs_int4 = pytest.mark.skipif(TOO_OLD, reason="Transformers is too old for int4")

# Matrices whose rows are multiples of 64 weights, the block size of nf4.
SHAPE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
EMBEDDING = 512 * 64
NORMS = 64 * 5  # two in each of two layers and a final one
MATRICES = 2 * (2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * 128)  # fourteen
BUFFERS = 2 * 16  # the rotary embedding's frequencies, current and original
CPU = torch.device("cpu")
IDS = torch.randint(2, 500, (2, 24), generator=torch.Generator().manual_seed(0))


def write_model(folder: Path, family: str = "healthslm", **shape) -> Path:
    tiny_model(family, **{**SHAPE, **shape}).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory) -> dict[str, Path]:
    """The folder of the model in each precision."""
    folder = tmp_path_factory.mktemp("saved")
    for precision in PRECISIONS:
        save_in_precision(source, precision, folder / precision, CPU)
    return {precision: folder / precision for precision in PRECISIONS}


@pytest.fixture(scope="module")
def opened(saved) -> dict[str, PreTrainedModel]:
    """The models as users open them."""
    return {
        precision: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        for precision, folder in saved.items()
    }


def file_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def matrices(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.detach().float()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_size_of_the_file_follows_from_the_bits_of_the_weights(precision, saved):
    size, tensors = file_of(saved[precision]).stat().st_size, load_file(file_of(saved[precision]))
    everything = EMBEDDING + MATRICES + NORMS
    bits = {"fp32": 32 * everything, "bf16": 16 * everything}
    bits |= {name: 16 * (EMBEDDING + NORMS) + kept * MATRICES for name, kept in (("int8", 8), ("nf4", 4))}
    # A group has a scale of 16 bits and a zero point of 4. Each of fifteen matrices also has a shape, two int64.
    bits["int4"] = 16 * NORMS + (4 + 20 / 32) * (EMBEDDING + MATRICES) + 15 * 128
    least, stored = bits[precision] / 8, sum(tensor.nbytes for tensor in tensors.values())
    if precision in ("int8", "nf4"):  # and tables and scales of fourteen matrices
        assert least < stored < least + 14 * 2000
    else:
        assert stored == least
    assert stored < size < stored + 16384  # a header with names and offsets


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_files_are_safetensors_code_and_json_with_the_tokenizer(precision, saved):
    assert {path.suffix for path in saved[precision].iterdir()} == {".safetensors", ".py", ".json"}
    assert (saved[precision] / "tokenizer.json").is_file()


def test_memory_follows_from_the_bits_of_the_weights_in_memory(opened):
    everything, sixteen = EMBEDDING + MATRICES + NORMS, 2 * (EMBEDDING + NORMS)
    expected = {"fp32": 4 * everything, "bf16": 2 * everything, "int8": sixteen + MATRICES}
    expected |= {"nf4": sixteen + MATRICES / 2, "int4": 4 * everything}  # int4 is dequantized
    for precision, model in opened.items():
        assert expected[precision] <= model.get_memory_footprint() <= expected[precision] + 4 * BUFFERS


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_differ_from_the_original_ones_by_half_a_step_at_most(precision, source, saved):
    model = AutoModelForCausalLM.from_pretrained(saved[precision], trust_remote_code=True)
    if precision in ("int8", "nf4"):
        model = model.dequantize()
    found, original = matrices(model), matrices(open_model(source))
    assert found.keys() == original.keys()
    for name, weights in original.items():
        difference = (found[name] - weights).abs()
        if precision == "fp32":
            allowed = torch.zeros_like(weights)
        elif precision == "int4":
            groups = weights.unflatten(-1, (-1, GROUP))
            step = (groups.amax(-1) - groups.amin(-1)) / 15
            # Half a step for the weight. A smallest weight that is no multiple of the step costs as much again.
            allowed = step.repeat_interleave(GROUP, -1) * 1.1
            assert all(len(group.unique()) <= 16 for group in found[name].unflatten(-1, (-1, GROUP))[:8].flatten(0, 1))
        elif precision == "int8" and "proj" in name:
            allowed = weights.abs().amax(-1, keepdim=True) / 127 * 0.6  # half a step, and rounding to fp16
        elif precision == "nf4" and "proj" in name:
            # The widest gap between two of nf4's levels is 0.304 of the largest weight of a block of 64.
            largest = weights.unflatten(-1, (-1, 64)).abs().amax(-1)
            allowed = largest.repeat_interleave(64, -1) * 0.304 * 0.55
        else:
            allowed = weights.abs() * 2**-8
        assert (difference <= allowed + 1e-6).all(), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tied_matrix_is_stored_once_and_stays_tied(precision, saved, opened):
    stored = [name for name in load_file(file_of(saved[precision])) if "embed" in name or "head" in name]
    assert {name.rpartition(".")[0] for name in stored} == {"model.embed_tokens"}
    model = opened[precision]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@needs_int4
def test_an_untied_head_is_quantized_too(tmp_path):
    source = write_model(tmp_path / "untied", tie_word_embeddings=False)
    save_in_precision(source, "int4", tmp_path / "int4", CPU)
    stored = load_file(file_of(tmp_path / "int4"))
    assert stored["lm_head.weight_packed"].shape == stored["model.embed_tokens.weight_packed"].shape == (512, 64 // 8)
    original, found = (matrices(open_model(folder)) for folder in (source, tmp_path / "int4"))
    torch.testing.assert_close(found["lm_head"], original["lm_head"], rtol=0, atol=0.1)
    assert not torch.allclose(found["lm_head"], found["model.embed_tokens"])


@needs_int4
def test_int4_gives_the_logits_of_the_numbers_in_its_file(source, saved, opened):
    def unpack(packed: np.ndarray) -> np.ndarray:
        """Eight numbers of four bits from each of 32 bits, the lowest bits first."""
        return ((packed[..., None].view(np.uint32) >> np.arange(0, 32, 4, dtype=np.uint32)) & 15).reshape(
            *packed.shape[:-1], -1
        )

    stored = load_file(file_of(saved["int4"]))
    model = open_model(source)
    for name, module in model.named_modules():
        if f"{name}.weight_packed" in stored:
            levels, scales = unpack(stored[f"{name}.weight_packed"].numpy()), stored[f"{name}.weight_scale"].float()
            zeros = unpack(stored[f"{name}.weight_zero_point"].numpy().T.copy()).T.astype(float)
            groups = levels.reshape(*scales.shape, GROUP) - zeros[..., None]
            module.weight.data = torch.tensor(groups).float().mul(scales[..., None]).bfloat16().float().flatten(-2)
        elif f"{name}.weight" in stored:
            module.weight.data = stored[f"{name}.weight"].float()
    model.tie_weights()
    torch.testing.assert_close(logits(opened["int4"]), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), logits(open_model(source)))


def test_reloaded_nf4_gives_the_logits_of_the_model_that_was_saved(source, opened):
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model = AutoModelForCausalLM.from_pretrained(
        source,
        trust_remote_code=True,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.bfloat16),
    )
    torch.testing.assert_close(logits(opened["nf4"]), logits(model), rtol=0, atol=0)


@needs_int4
def test_an_int4_model_is_saved_again_as_a_plain_one(opened, tmp_path):
    opened["int4"].save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    torch.testing.assert_close(logits(open_model(tmp_path)), logits(opened["int4"]), rtol=0, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_saved_model_generates_what_its_logits_say(precision, opened):
    prompt, model = IDS[:1, :4], opened[precision]
    generated = model.generate(prompt, max_new_tokens=1, min_new_tokens=1, do_sample=False, suppress_tokens=[0])
    with torch.no_grad():
        following = model(input_ids=prompt).logits[0, -1]
    assert generated[0, 4] == following.index_fill(0, torch.tensor([0]), -torch.inf).argmax()


@pytest.mark.parametrize("precision", [name for name in ("nf4", "int4") if name in PRECISIONS])
def test_an_adapter_learns_on_a_saved_4_bit_model(precision, saved):
    base = AutoModelForCausalLM.from_pretrained(saved[precision], trust_remote_code=True)
    if precision == "nf4":
        base = peft.prepare_model_for_kbit_training(base)
    before = logits(base)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_int8_logs_nothing_unlike_in_bf16(source, saved, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "level", logging.NOTSET)

    def lines(model: PreTrainedModel) -> int:
        caplog.clear()
        logits(model)
        return sum("MatMul8bitLt" in record.message for record in caplog.records)

    assert lines(open_in_precision(saved["int8"], CPU)) == 0
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, trust_remote_code=True, dtype=torch.bfloat16, quantization_config=int8
    )
    assert lines(model) == 14


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    numbers = np.random.default_rng(0)
    return [np.array([0, *numbers.integers(2, 500, size=length)]) for length in range(3, 43)]


@pytest.fixture(scope="module")
def compared(source, documents):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precisions, "NEW_TOKENS", 4)
        return compare_precisions(source, ["nf4"], documents, [2 * len(ids) for ids in documents], CPU)


def test_a_comparison_starts_with_the_baseline_fp32(compared, source, saved):
    assert list(compared["precisions"]) == ["fp32", "nf4"]
    assert compared["parameters"] == EMBEDDING + MATRICES + NORMS
    for precision, found in compared["precisions"].items():
        assert found["file_bytes"] == file_of(saved[precision]).stat().st_size
    assert compared["precisions"]["fp32"]["difference"] == {"bits_per_byte": 0, "interval": [0, 0]}


def test_bits_per_byte_and_their_paired_difference_are_those_of_the_documents(compared, opened, documents):
    sizes = sum(2 * len(ids) for ids in documents)
    bits = {precision: document_bits(opened[precision], documents) for precision in ("fp32", "nf4")}
    for precision, found in compared["precisions"].items():
        assert found["bits_per_byte"] == pytest.approx(bits[precision].sum() / sizes, rel=1e-6)
    nf4 = compared["precisions"]["nf4"]
    more = nf4["difference"]
    assert more["bits_per_byte"] == pytest.approx((bits["nf4"] - bits["fp32"]).sum() / sizes, abs=1e-7)
    assert more["interval"][0] < more["bits_per_byte"] < more["interval"][1]
    assert more["interval"][1] - more["interval"][0] < nf4["interval"][1] - nf4["interval"][0]


def test_speed_is_the_median_of_three_runs_of_full_length(source, documents, monkeypatch):
    monkeypatch.setattr(precisions, "NEW_TOKENS", 12)
    runs = [100, 1, 4, 2] * 2  # seconds; the first run of each precision is the warm-up
    clock = iter([moment for run in range(8) for moment in (sum(runs[:run]), sum(runs[: run + 1]))])
    monkeypatch.setattr(precisions, "perf_counter", lambda: next(clock))
    generate, written = GenerationMixin.generate, []

    def generate_and_count(self, inputs, **settings):
        result = generate(self, inputs, **settings)
        written.append((self.dtype, result.shape[1] - inputs.shape[1]))
        return result

    monkeypatch.setattr(GenerationMixin, "generate", generate_and_count)
    result = compare_precisions(source, ["bf16"], documents[:1], [8], CPU)
    assert [found["tokens_per_second"] for found in result["precisions"].values()] == [12 / 2, 12 / 2]
    assert result["new_tokens"] == 12 and result["machine"].startswith(f"{torch.get_num_threads()} thread")
    assert written == [(torch.float32, 12)] * 4 + [(torch.bfloat16, 12)] * 4


def test_precisions_whose_library_is_missing_are_known(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else object())
    assert available_precisions() == [name for name in ("fp32", "bf16", "int4") if name in PRECISIONS]


def write_texts(folder: Path, rows: list[dict[str, str]]) -> Path:
    return write_lines(folder / "texts.jsonl", rows)


def test_the_command_saves_a_precision_and_compares_it(source, tmp_path, run_script_here, monkeypatch):
    monkeypatch.setattr(precisions, "NEW_TOKENS", 2)
    data = write_texts(
        tmp_path, [{"title": "A trial", "text": "It helped."}, {"text": ""}, {"text": "Two"}, {"text": "Three"}]
    )
    done = run_script_here(
        *("quantize", "--model", source, "--precisions", "nf4", "--save", tmp_path / "nf4"),
        *("--data", data, "--documents", 2, "--output", tmp_path / "found" / "comparison.json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "found/comparison.json").read_text(encoding="utf-8"))
    assert (result["documents"], result["bytes"]) == (2, len("A trial\nIt helped.Two"))
    assert result["precisions"]["nf4"]["file_bytes"] == file_of(tmp_path / "nf4").stat().st_size
    table = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in table[2:]] == ["fp32", "nf4"]
    assert f"{result['precisions']['nf4']['bits_per_byte']:.4f}" in table[3]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("narrow"), hidden_size=48, intermediate_size=48)


MISTAKES: dict[str, Callable[[Path, Path, Path], tuple[list[object], str]]] = {
    "unknown precision": lambda source, narrow, tmp: (
        ["--model", source, "--precisions", "int2", "--save", tmp / "new"],
        "--precisions: ",
    ),
    "two to save": lambda source, narrow, tmp: (
        ["--model", source, "--precisions", "nf4", "int4", "--save", tmp / "new"],
        "--save: needs one precision, such as --precisions nf4",
    ),
    "nothing to do": lambda source, narrow, tmp: (
        ["--model", source],
        "--data: is needed to compare precisions; or save one with --save",
    ),
    "no GPU": lambda source, narrow, tmp: (
        ["--model", source, "--precisions", "bf16", "--save", tmp / "new", "--device", "cuda"],
        "finds no GPU here; use --device cpu",
    ),
    "width": lambda source, narrow, tmp: (
        ["--model", narrow, "--precisions", "int4", "--save", tmp / "new"],
        f"{narrow}: int4 quantizes 32 columns together, but model.embed_tokens has 48; use int8 or bf16",
    ),
    "no text": lambda source, narrow, tmp: (
        ["--model", source, "--precisions", "bf16", "--data", write_texts(tmp, [{"title": "A trial"}])],
        "texts.jsonl: row 1: no column text or abstract or CONTEXTS; the columns are title",
    ),
    "empty text": lambda source, narrow, tmp: (
        ["--model", source, "--precisions", "bf16", "--data", write_texts(tmp, [{"title": "A trial", "text": ""}])],
        "texts.jsonl: no document has any text",
    ),
    "output without a comparison": lambda source, narrow, tmp: (
        ["--model", source, "--precisions", "bf16", "--save", tmp / "new", "--output", tmp / "comparison.json"],
        "--output: needs --data",
    ),
    "documents without a comparison": lambda source, narrow, tmp: (
        ["--model", source, "--precisions", "bf16", "--save", tmp / "new", "--documents", 3],
        "--documents: needs --data",
    ),
    "folder in use": lambda source, narrow, tmp: (
        ["--model", source, "--precisions", "nf4", "--save", source],
        f"{source}: holds other files than a quantized model, which would be lost; choose another folder",
    ),
    "output is a folder": lambda source, narrow, tmp: (
        ["--model", source, "--precisions", "bf16", "--data", write_texts(tmp, [{"text": "A trial"}]), "--output", tmp],
        f"{tmp}: is a folder, but the comparison is a JSON file; choose another path",
    ),
}


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if not (TOO_OLD and name == "width")])
def test_a_mistake_is_one_line(mistake, source, narrow, tmp_path, run_script_here):
    if mistake == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments, expected = MISTAKES[mistake](source, narrow, tmp_path)
    done = run_script_here("quantize", *arguments)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and expected in line
    assert not (tmp_path / "new").exists()


def test_a_missing_library_is_named_with_its_extra(source, tmp_path, run_script_here, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    done = run_script_here("quantize", "--model", source, "--precisions", "int8", "--save", tmp_path / "new")
    assert done.returncode == 1 and not (tmp_path / "new").exists()
    assert done.stderr.startswith("error: bitsandbytes is not installed")


def test_a_quantized_model_is_not_quantized_again(saved, tmp_path):
    with pytest.raises(UserError, match="nf4: is already quantized; give the model that it was made from"):
        save_in_precision(saved["nf4"], "int8", tmp_path / "new", CPU)
