"""Weights: number of parameters, initialization, tying, saving, loading and resizing."""

import json
import math

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from tiny_models import FAMILIES, HEADS, HealthSLMConfig, model_class, model_config, random_ids, tiny_model
from torch.testing import assert_close
from transformers import PreTrainedModel


def is_tied(model: PreTrainedModel) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


class TestReleasedShape:
    """The released model's numbers of parameters, computed from its configuration."""

    def test_parameters(self):
        vocabulary, width, layers, feed_forward, query_width, key_width = 32_000, 256, 12, 512, 4 * 64, 2 * 64
        attention = 2 * width * query_width + 2 * width * key_width
        expected = vocabulary * width + layers * (attention + 3 * width * feed_forward + 2 * width) + width
        with torch.device("meta"):
            model = model_class("healthslm")(HealthSLMConfig())
        assert model.num_parameters() == expected == 15_276_288

    def test_parameters_without_tying(self):
        with torch.device("meta"):
            model = model_class("healthslm")(HealthSLMConfig(tie_word_embeddings=False))
        assert model.num_parameters() == 15_276_288 + 32_000 * 256 == 23_468_288


class TestInitialization:
    def test_matrices_are_normal_norms_are_one_and_padding_is_zero(self):
        torch.manual_seed(0)
        model = model_class("healthslm")(HealthSLMConfig(num_hidden_layers=2))
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                assert torch.equal(parameter, torch.ones(256)), name
            else:
                weights = parameter.detach()
                if name.endswith("embed_tokens.weight"):
                    assert torch.equal(weights[1], torch.zeros(256))
                    weights = torch.cat((weights[:1], weights[2:]))
                # Four standard errors of the mean and of the standard deviation of a normal distribution.
                assert abs(weights.mean()) < 4 * 0.02 / math.sqrt(weights.numel()), name
                assert abs(weights.std() / 0.02 - 1) < 4 / math.sqrt(2 * weights.numel()), name
                assert abs(weights).max() < 0.02 * 7, name

    def test_weights_and_buffers_missing_from_a_file_are_initialized(self):
        """Loading creates the model on the meta device. Missing weights get the values of the constructor."""
        config = model_config("healthslm")
        constructed, loaded = [], []
        for head in HEADS:
            torch.manual_seed(0)
            constructed.append(model_class("healthslm", head)(config))
            loaded.append(model_class("healthslm", head).from_pretrained(None, config=config, state_dict={}))
        for built, missing in zip(constructed, loaded, strict=True):
            assert dict(built.named_parameters()).keys() == dict(missing.named_parameters()).keys()
            for name, buffer in built.named_buffers():
                assert torch.equal(dict(missing.named_buffers())[name], buffer), name
            for name, parameter in built.named_parameters():
                loaded_parameter = dict(missing.named_parameters())[name]
                assert loaded_parameter.device == parameter.device, name
                if parameter.dim() == 2:
                    assert_close(loaded_parameter.std(), parameter.std(), rtol=0.2, atol=0)
                else:
                    assert torch.equal(loaded_parameter, parameter), name


@pytest.mark.parametrize("family", FAMILIES)
class TestSavingAndLoading:
    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    def test_a_loaded_model_computes_the_same(self, family, head, dtype, tmp_path):
        model = model_class(family, head)._from_config(model_config(family), dtype=dtype).eval()
        model.save_pretrained(tmp_path)
        loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert loaded.dtype == dtype
        assert loaded.state_dict().keys() == model.state_dict().keys()
        batch = random_ids(2, 5)
        assert torch.equal(loaded(batch)[0], model(batch)[0])

    @pytest.mark.parametrize("max_shard_size", ("1GB", "20KB"))
    def test_tied_weights_are_saved_once_and_tied_when_loaded(self, family, max_shard_size, tmp_path):
        model = tiny_model(family)
        assert is_tied(model)
        model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        files = list(tmp_path.glob("*.safetensors"))
        assert (len(files) > 1) == (max_shard_size == "20KB")
        assert not any("lm_head.weight" in load_file(file) for file in files)
        loaded = type(model).from_pretrained(tmp_path)
        assert is_tied(loaded)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)

    def test_untied_weights_are_both_saved(self, family, tmp_path):
        model = tiny_model(family, tie_word_embeddings=False)
        assert not is_tied(model)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert not is_tied(loaded)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)

    @pytest.mark.parametrize("head", HEADS[2:])
    def test_a_new_head_keeps_the_pretrained_decoder(self, family, head, tmp_path):
        if (family, head) == ("llama", "ForQuestionAnswering"):
            pytest.skip("LlamaForQuestionAnswering uses another base_model_prefix")
        pretrained = tiny_model(family)
        pretrained.save_pretrained(tmp_path)
        loaded, report = model_class(family, head).from_pretrained(tmp_path, output_loading_info=True)
        assert {name.split(".")[0] for name in report["missing_keys"]} <= {"score", "qa_outputs"}
        assert not report["unexpected_keys"]
        assert_close(loaded.base_model.state_dict(), pretrained.model.state_dict())

    def test_the_decoder_loads_from_a_model_with_a_head_and_back(self, family, tmp_path):
        model = tiny_model(family)
        model.save_pretrained(tmp_path / "causal")
        base, report = model_class(family, "Model").from_pretrained(tmp_path / "causal", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        base.save_pretrained(tmp_path / "base")
        again, report = type(model).from_pretrained(tmp_path / "base", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert is_tied(again)
        assert_close(again.state_dict(), model.state_dict())

    def test_saving_keeps_the_labels_of_the_configuration(self, family, tmp_path):
        tiny_model(family, "ForTokenClassification", num_labels=5).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["architectures"] == [model_class(family, "ForTokenClassification").__name__]
        assert len(saved["id2label"]) == 5

    @pytest.mark.parametrize("context", (init_empty_weights, lambda: torch.device("meta")), ids=("accelerate", "torch"))
    def test_weights_load_into_a_model_on_the_meta_device(self, family, context):
        model = tiny_model(family)
        with context():
            empty = type(model)(model.config)
        assert all(parameter.is_meta for parameter in empty.parameters())
        empty.load_state_dict(model.state_dict(), assign=True)
        empty.tie_weights()
        assert is_tied(empty)
        rotary = model.model.rotary_emb
        empty.model.rotary_emb = type(rotary)(model.config)  # its buffers are not in the state dict
        assert torch.equal(empty.eval()(random_ids(2, 5)).logits, model(random_ids(2, 5)).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", (True, False))
class TestResizing:
    @pytest.mark.parametrize("size", (120, 60))
    def test_remaining_tokens_keep_their_logits(self, family, tied, size, tmp_path):
        model = tiny_model(family, tie_word_embeddings=tied)
        input_ids = random_ids(2, 5) % 60
        before = model(input_ids).logits
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.config.vocab_size == model.vocab_size == model.model.embed_tokens.num_embeddings == size
        assert model.lm_head.out_features == size
        assert is_tied(model) == tied
        after = model(input_ids).logits
        assert after.shape[-1] == size
        assert_close(after[..., : min(size, 99)], before[..., : min(size, 99)])
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert is_tied(loaded) == tied
        assert torch.equal(loaded(input_ids).logits, after)

    def test_new_tokens_can_be_trained(self, family, tied):
        model = tiny_model(family, tie_word_embeddings=tied)
        model.resize_token_embeddings(101, mean_resizing=True)
        input_ids = torch.tensor([[99, 100, 5]])
        model(input_ids, labels=input_ids).loss.backward()
        assert model.get_input_embeddings().weight.grad[99:].abs().sum(-1).min() > 0

    def test_embeddings_can_be_replaced(self, family, tied):
        model = tiny_model(family, tie_word_embeddings=tied)
        embeddings = torch.nn.Embedding(99, 32)
        model.set_input_embeddings(embeddings)
        assert model.get_input_embeddings() is model.model.embed_tokens is embeddings
        head = torch.nn.Linear(32, 99, bias=False)
        model.set_output_embeddings(head)
        assert model.get_output_embeddings() is model.lm_head is head


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", HEADS)
def test_parallel_plans_name_existing_modules(family, head):
    model = tiny_model(family, head)
    names = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _ in model.named_modules()}
    assert model.tp_plan
    for pattern in model.tp_plan:
        assert pattern.removesuffix(".weight") in names
    for name in model.config.base_model_pp_plan:
        assert hasattr(model.base_model, name)


def test_parallel_plans_match_llama():
    ours, llama = (tiny_model(family) for family in FAMILIES)
    assert ours.tp_plan == llama.tp_plan
    assert ours.pp_plan == llama.pp_plan
    assert type(ours)._fsdp_plan == type(llama)._fsdp_plan
    assert ours.config.base_model_fsdp_plan == llama.config.base_model_fsdp_plan
