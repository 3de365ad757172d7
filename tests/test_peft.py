"""Adapters and quantized weights: PEFT and bitsandbytes work with HealthSLM like with any model of Transformers."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from paths import REPOSITORY
from safetensors.torch import load_file
from tiny_models import llama_twin, random_ids, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

CAUSAL_LM = {"task_type": "CAUSAL_LM"}
METHODS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", **CAUSAL_LM),
    "dora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True, **CAUSAL_LM),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL_LM
    ),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL_LM),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL_LM),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL_LM),
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("healthslm").save_pretrained(folder)
    return folder


def load(folder: Path, auto_class: type = AutoModelForCausalLM, **options) -> PreTrainedModel:
    return auto_class.from_pretrained(folder, trust_remote_code=True, **options)


def train(model: torch.nn.Module, labels: torch.Tensor | None = None) -> list[float]:
    """Train four steps on one batch and return the losses."""
    ids = random_ids(2, 12)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    losses = []
    model.train()
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids if labels is None else labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=random_ids(2, 9)).logits


@torch.no_grad()
def likeliest_tokens(model: torch.nn.Module, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Continue tokens (batch, length) greedily, without a cache."""
    for _ in range(count):
        following = model(input_ids=tokens, use_cache=False).logits[:, -1].clone()
        following[:, model.config.eos_token_id] = -torch.inf
        tokens = torch.cat((tokens, following.argmax(-1, keepdim=True)), dim=1)
    return tokens


def test_lora_of_rank_16_on_all_linear_layers_trains_786432_weights() -> None:
    config = AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", **CAUSAL_LM))
    trained, total = model.get_nb_trainable_parameters()
    assert (trained, total - trained) == (786_432, 15_276_288)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_can_be_trained_saved_and_loaded_onto_its_base(method: str, folder: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(load(folder), METHODS[method]())
    losses = train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    restored = peft.PeftModel.from_pretrained(load(folder), tmp_path)
    torch.testing.assert_close(logits(restored), logits(model), rtol=0, atol=0)
    assert not torch.allclose(logits(model)[:, -9:], logits(load(folder)))  # a tuned prompt has logits too
    prompt = random_ids(1, 5)
    generated = restored.generate(input_ids=prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(generated, likeliest_tokens(restored, prompt, 6))


def test_a_merged_adapter_gives_a_plain_model(folder: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(load(folder), METHODS["lora"]())
    train(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    torch.testing.assert_close(logits(load(tmp_path)), logits(merged), rtol=0, atol=0)


def test_an_adapter_folder_is_enough_to_load_the_adapter_with_its_base(folder: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(load(folder), METHODS["lora"]())
    train(model)
    model.save_pretrained(tmp_path)
    restored = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    torch.testing.assert_close(logits(restored), logits(model), rtol=0, atol=0)


@pytest.mark.skipif(Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="Transformers refuses this PEFT")
def test_adapters_added_through_transformers_can_be_disabled_and_loaded(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.add_adapter(METHODS["lora"]())
    train(model)
    model.save_pretrained(tmp_path)
    restored = load(folder)
    restored.load_adapter(tmp_path)
    torch.testing.assert_close(logits(restored), logits(model), rtol=0, atol=0)
    restored.disable_adapters()
    torch.testing.assert_close(logits(restored), logits(load(folder)), rtol=0, atol=0)


def test_the_adapter_of_a_classifier_includes_the_trained_head(folder: Path, tmp_path: Path) -> None:
    def classifier() -> PreTrainedModel:
        torch.manual_seed(1)
        return load(folder, AutoModelForSequenceClassification, num_labels=3)

    model = peft.get_peft_model(classifier(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    losses = train(model, labels=torch.tensor([0, 2]))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    restored = peft.PeftModel.from_pretrained(classifier(), tmp_path)
    torch.testing.assert_close(logits(restored), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_does_not_change_the_gradients_of_an_adapter(folder: Path, use_reentrant: bool) -> None:
    def gradients(prepare: Callable[[PreTrainedModel], None]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **CAUSAL_LM)
        model = peft.get_peft_model(load(folder), config)
        prepare(model)
        ids = random_ids(2, 12)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    def checkpoint_layers(model: PreTrainedModel) -> None:
        model.enable_input_require_grads()  # the frozen embedding would otherwise cut reentrant checkpoints off
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    plain = gradients(lambda model: None)
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    torch.testing.assert_close(gradients(checkpoint_layers), plain)


def test_prefix_tuning_gives_the_same_logits_as_with_llama(folder: Path) -> None:
    def tuned(model: PreTrainedModel) -> torch.nn.Module:
        torch.manual_seed(2)
        return peft.get_peft_model(model, METHODS["prefix"]()).eval()

    model = load(folder)
    padded = {"input_ids": random_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    padded["attention_mask"][0, :4] = 0
    torch.testing.assert_close(tuned(model)(**padded).logits, tuned(llama_twin(model))(**padded).logits)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrix rows are multiples of 64 wide: on CPUs with bf16, bitsandbytes needs whole 4-bit blocks."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_model("healthslm", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def quantized(folder: Path, auto_class: type = AutoModelForCausalLM, **options) -> PreTrainedModel:
    return load(folder, auto_class, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16)


def test_nf4_keeps_the_embedding_in_16_bits_and_stores_projections_in_4_bits(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    model.save_pretrained(tmp_path)
    embedding = model.get_input_embeddings().weight.numel()
    projections = sum(weight.numel() for name, weight in model.named_parameters() if "_proj" in name)
    footprint = quantized(tmp_path, **NF4).get_memory_footprint()
    assert footprint == pytest.approx(2 * embedding + projections / 2, rel=1e-3)
    assert round(footprint / 1e6, 1) == 19.9


@pytest.mark.parametrize("options", [NF4, INT8], ids=["nf4", "int8"])
def test_quantized_weights_equal_those_of_llama_and_can_be_saved(
    options: dict, wide_folder: Path, tmp_path: Path
) -> None:
    llama_twin(load(wide_folder)).save_pretrained(tmp_path / "llama")
    model = quantized(wide_folder, **options)
    expected = logits(quantized(tmp_path / "llama", LlamaForCausalLM, **options))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert model.generate(random_ids(1, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 9)
    model.save_pretrained(tmp_path / "quantized")
    restored = load(tmp_path / "quantized")
    assert restored.is_quantized
    torch.testing.assert_close(logits(restored), logits(model), rtol=0, atol=0)


def test_an_adapter_learns_while_the_weights_in_8_bits_stay_fixed(wide_folder: Path) -> None:
    """tests/test_quantization.py does so in 4 bits."""
    base = peft.prepare_model_for_kbit_training(quantized(wide_folder, **INT8))
    before = logits(base)
    model = peft.get_peft_model(base, METHODS["lora"]())
    losses = train(model)
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
