"""Exported forms: they open in the programs that they are for, compute the same, and are refused if they don't."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from exported_models import TEXTS, exported, tokenizer, write_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_models import byte_tokenizer, random_ids
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)

from healthslm.bits_per_byte import score_documents
from healthslm.errors import UserError
from healthslm.export import check, llama
from healthslm.export.check import PROMPTS, Runtime, TransformersRuntime, compare
from healthslm.models import open_model


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def original(source) -> PreTrainedModel:
    return open_model(source)


@pytest.fixture(scope="module")
def llama_folder(source, tmp_path_factory) -> Path:
    return exported(source, "llama", tmp_path_factory.mktemp("exports") / "llama", base="someone/tiny")


@pytest.fixture(scope="module")
def gguf_folder(source, tmp_path_factory) -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    return exported(source, "gguf", tmp_path_factory.mktemp("exports") / "gguf", base="someone/tiny")


@pytest.fixture(scope="module")
def onnx_folder(source, tmp_path_factory) -> Path:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return exported(source, "onnx", tmp_path_factory.mktemp("exports") / "onnx", base="someone/tiny")


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**(inputs or {"input_ids": random_ids(3, 20)})).logits


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


# Llama


def test_the_llama_form_is_a_stock_model_with_the_same_logits(llama_folder, original):
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    assert type(model) is LlamaForCausalLM
    assert_close(logits(model), logits(original), rtol=0, atol=0)
    assert not list(llama_folder.glob("*.py"))
    assert "auto_map" not in (llama_folder / "config.json").read_text()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.to_diff_dict() == original.generation_config.to_diff_dict()


def test_its_tokenizer_is_stock_and_gives_the_same_tokens(llama_folder):
    saved = json.loads((llama_folder / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"auto_map", "is_local", "local_files_only"} & saved.keys()
    found, expected = AutoTokenizer.from_pretrained(llama_folder), tokenizer()
    assert found(TEXTS)["input_ids"] == expected(TEXTS)["input_ids"]
    assert found.pad_token_id == expected.pad_token_id
    assert found.padding_side == expected.padding_side


def test_weights_that_fit_bf16_are_stored_in_it_and_open_in_fp32(source, llama_folder, tmp_path):
    folder = exported(write_model(tmp_path / "half", torch.bfloat16), "llama", tmp_path / "llama")
    for path, dtype in ((folder, torch.bfloat16), (llama_folder, torch.float32)):
        weights = load_file(path / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {dtype}
        assert "lm_head.weight" not in weights
        assert AutoModelForCausalLM.from_pretrained(path).dtype == torch.float32


@pytest.mark.parametrize("overrides", [{"tie_word_embeddings": False}, {"head_dim": 16, "num_key_value_heads": 1}])
def test_other_shapes_have_a_llama_form(overrides, tmp_path):
    source = write_model(tmp_path / "model", **overrides)
    model = AutoModelForCausalLM.from_pretrained(exported(source, "llama", tmp_path / "llama"))
    assert_close(logits(model), logits(open_model(source)), rtol=0, atol=0)


def test_a_llama_model_is_exported_again_as_itself(llama_folder, tmp_path):
    again = exported(llama_folder, "llama", tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (llama_folder / "model.safetensors").read_bytes()
    assert (again / "config.json").read_bytes() == (llama_folder / "config.json").read_bytes()


def test_models_without_a_llama_form_are_named_before_anything_is_written(source, tmp_path):
    config = {"vocab_size": 262, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **config)).save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    write_model(tmp_path / "both", is_causal=False)
    for name, problem in (("gpt2", "a model of type gpt2 has no Llama form"), ("both", "is_causal is false")):
        with pytest.raises(UserError, match=problem):
            exported(tmp_path / name, "llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_has_to_be_merged_first(source, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(open_model(source), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="merge an adapter"):
        exported(tmp_path / "adapter", "llama", tmp_path / "out")


# Comparison


class Forgetful(TransformersRuntime):
    """It generates from the last token alone, as if its cache were empty."""

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        written: list[int] = []
        for _ in range(new_tokens):
            written.append(int(super().logits([*ids, *written][-1:])[-1].argmax()))
        return written


class Misspelling(TransformersRuntime):
    """It reads every digit as another one."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text.translate(str.maketrans("0123456789", "1234567890")))


@pytest.mark.parametrize(
    ("runtime", "problem"), [(Forgetful, "it generates other tokens"), (Misspelling, "into other tokens")]
)
def test_a_form_that_generates_or_reads_something_else_is_refused(runtime: type[Runtime], problem, original):
    same = compare(TransformersRuntime(original, tokenizer()), TransformersRuntime(original, tokenizer()), "it", 1e-9)
    assert same == {"divergence": 0, "logit_difference": 0, "same_greedy_tokens": 1}
    with pytest.raises(UserError, match=problem):
        compare(TransformersRuntime(original, tokenizer()), runtime(original, tokenizer()), "it", 1e-9)


def test_the_divergence_is_the_bits_that_are_lost(original):
    """For probabilities p and those of a uniform form, it is log2(vocabulary) minus the entropy of p."""

    class Uniform(TransformersRuntime):
        def logits(self, ids: Sequence[int]) -> torch.Tensor:
            return torch.zeros(len(ids), self.config.vocab_size)

    ids = tokenizer()(PROMPTS[0])["input_ids"][:32]
    expected = logits(original, input_ids=torch.tensor([ids]))[0]
    entropy = torch.distributions.Categorical(logits=expected).entropy() / np.log(2)
    assert_close(
        check._divergence(expected, torch.zeros_like(expected)).float(), np.log2(original.config.vocab_size) - entropy
    )
    with pytest.raises(UserError, match="bits per token, more than the limit of"):
        compare(TransformersRuntime(original, tokenizer()), Uniform(original, tokenizer()), "it", 0.1)


def test_a_form_with_other_weights_is_refused_and_the_earlier_export_stays(source, tmp_path, monkeypatch):
    folder = exported(source, "llama", tmp_path / "llama")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write = llama.write_llama

    def damaged(model, *arguments):
        model.model.layers[1].self_attn.k_proj.weight.data.mul_(1.1)
        return write(model, *arguments)

    monkeypatch.setattr(llama, "write_llama", damaged)
    with pytest.raises(UserError, match="not exported: its probabilities differ"):
        exported(source, "llama", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_folder_with_something_else_is_not_replaced(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files than an export"):
        exported(source, "llama", tmp_path)


def test_the_report_and_the_card_name_the_model_and_its_bits_per_byte(source, original, tmp_path):
    texts = [
        f"{topic}\nA trial of {number} patients." for number, topic in enumerate(["Asthma", "Gout", "Fever", "Pain"])
    ]
    rows = "".join(json.dumps(dict(zip(("title", "text"), text.split("\n"), strict=True))) + "\n" for text in texts)
    (tmp_path / "data.jsonl").write_text(rows)
    data = {"data": [str(tmp_path / "data.jsonl")], "documents": 3}
    folder = exported(source, "llama", tmp_path / "llama", base="someone/tiny", **data)

    texts = texts[:3]
    ids = tokenizer()(texts)["input_ids"]
    score = score_documents(original, [np.array(one) for one in ids], [len(text.encode()) for text in texts])
    report = report_of(folder)
    for form in ("original", "fp32"):
        assert report["held_out"]["forms"][form]["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)
    assert report["base"]["model"] == str(source)
    assert report["forms"]["fp32"]["same_greedy_tokens"] == 1

    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.base_model_relation, card.data.license) == (
        "someone/tiny",
        "quantized",
        "mit",
    )
    assert f"| fp32 | {score.bits_per_byte:.4f} | too few documents | +0.0000" in card.text
    assert report["base"]["sha256"] in card.text
    assert "none of it is medical advice" in card.text


def test_the_number_of_documents_is_refused_without_documents(source, run_script_here, tmp_path):
    arguments = ["--model", source, "--format", "llama", "--output", tmp_path / "out", "--documents", 3]
    done = run_script_here("export", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: --documents: needs --data")
    assert not (tmp_path / "out").exists()


def test_the_script_reports_a_wrong_format(source, run_script_here, tmp_path):
    run = run_script_here("export", "--model", source, "--format", "ggml", "--output", tmp_path / "out")
    assert (run.returncode, "--format: expected Literal" in run.stderr) == (2, True)


# GGUF


def metadata_of(path: Path) -> dict:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def test_gguf_files_open_in_transformers_with_nearly_the_same_logits(gguf_folder, original):
    expected = logits(original)
    for name, allowed in (("tiny-F16", 0.01), ("tiny-Q8_0", 0.5)):
        model = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=f"{name}.gguf", dtype=torch.float32)
        assert_close(logits(model), expected, rtol=0, atol=allowed)
    assert AutoTokenizer.from_pretrained(gguf_folder, gguf_file="tiny-F16.gguf").convert_tokens_to_ids("<|end|>") == 5


def test_the_card_of_gguf_files_names_a_file_that_is_there(gguf_folder):
    commands = re.search(r"```bash\n(.*?)```", (gguf_folder / "README.md").read_text(), re.DOTALL)[1]
    (file,) = re.findall(r"llama-cli -m (\S+)", commands)
    (modelfile,) = re.findall(r"ollama create \S+ -f (\S+)", commands)
    assert (gguf_folder / file).is_file() and (gguf_folder / modelfile).is_file()


def test_gguf_metadata_are_complete(gguf_folder, source):
    found = metadata_of(gguf_folder / "tiny-Q8_0.gguf")
    assert found["general.name"] == "tiny"
    assert found["general.license"] == "mit"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["llama.context_length"] == 64
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert [found[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding")] == [0, 0, 1]
    assert len(found["tokenizer.ggml.tokens"]) == len(tokenizer()) + 8
    assert len(found["tokenizer.ggml.merges"]) == len(tokenizer()) - len(byte_tokenizer()) > 0
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert "generation %}" not in found["tokenizer.chat_template"]
    rendered = AutoTokenizer.from_pretrained(source).apply_chat_template(messages, tokenize=False)
    template = jinja2.Environment().from_string(found["tokenizer.chat_template"])
    assert template.render(messages=messages, bos_token="<|endoftext|>", eos_token="<|endoftext|>") == rendered


def test_llama_cpp_turns_any_text_into_the_same_tokens(gguf_folder):
    from healthslm.export.gguf import LlamaCppRuntime

    runtime = LlamaCppRuntime(gguf_folder / "tiny-F16.gguf", tokenizer())
    for text in TEXTS:
        assert runtime.encode(text) == tokenizer()(text)["input_ids"], repr(text)


def test_gguf_needs_an_activation_that_llama_cpp_has(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    with pytest.raises(UserError, match="it needs hidden_act silu and rope_type default, not gelu and default"):
        exported(write_model(tmp_path / "gelu", hidden_act="gelu"), "gguf", tmp_path / "gguf")


# ONNX


def test_onnx_files_have_the_names_that_transformers_js_expects(onnx_folder):
    import onnxruntime

    for name in ("model.onnx", "model_quantized.onnx"):
        session = onnxruntime.InferenceSession(onnx_folder / "onnx" / name)
        states = [f"{layer}.{kind}" for layer in range(3) for kind in ("key", "value")]
        inputs, outputs = ([one.name for one in some] for some in (session.get_inputs(), session.get_outputs()))
        expected = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{state}" for state in states)]
        assert inputs == expected
        assert outputs == ["logits", *(f"present.{state}" for state in states)]
        # transformers.js makes the first cache from these shapes: batch_size has a value, other names are 0.
        assert {tuple(one.shape) for one in session.get_inputs()[3:]} == {("batch_size", 2, "past_sequence_length", 8)}
    assert AutoConfig.from_pretrained(onnx_folder).model_type == "llama"
    assert (onnx_folder / "tokenizer.json").is_file() and (onnx_folder / "generation_config.json").is_file()


def test_onnx_gives_the_logits_of_padded_batches_in_one_or_several_steps(onnx_folder, original):
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_folder / "onnx/model.onnx")
    ids, mask = random_ids(3, 15), torch.ones(3, 15, dtype=torch.long)
    for row, padded in enumerate((0, 4, 9)):
        mask[row, :padded] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = logits(original, input_ids=ids, attention_mask=mask, position_ids=positions)
    for ends in ([15], [10, 15], [10, 11, 12, 13, 14, 15]):
        states, found, start = [np.zeros((3, 2, 0, 8), np.float32)] * 6, [], 0
        for end in ends:
            given = [ids[:, start:end], mask[:, :end], positions[:, start:end]]
            names = [one.name for one in session.get_inputs()]
            inputs = dict(zip(names, [*(one.numpy() for one in given), *states], strict=True))
            step, *states = session.run(None, inputs)
            found.append(torch.from_numpy(step))
            start = end
        assert_close(torch.cat(found, 1)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_onnx_in_8_bits_is_the_model_with_each_output_of_its_matrices_rounded(source, onnx_folder):
    import onnxruntime

    rounded = open_model(str(source), "cpu")
    with torch.no_grad():
        for weight in (one for one in rounded.parameters() if one.ndim == 2):  # (outputs, inputs) or (tokens, hidden)
            factors, zeros = weight.abs().amax(1) / 127, torch.zeros(len(weight))
            weight.copy_(torch.fake_quantize_per_channel_affine(weight, factors, zeros, 0, -127, 127))
    session = onnxruntime.InferenceSession(onnx_folder / "onnx/model_quantized.onnx")
    ids = random_ids(2, 15)
    given = [ids.numpy(), np.ones((2, 15), np.int64), np.arange(15)[None].repeat(2, 0)]
    names = [one.name for one in session.get_inputs()]
    states = [np.zeros((2, 2, 0, 8), np.float32)] * 6
    found = session.run(["logits"], dict(zip(names, [*given, *states], strict=True)))[0]
    assert_close(torch.from_numpy(found), logits(rounded, input_ids=ids), rtol=1e-4, atol=1e-4)
    assert (logits(rounded, input_ids=ids) - logits(open_model(str(source), "cpu"), input_ids=ids)).abs().max() > 1e-3
