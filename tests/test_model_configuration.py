"""The configuration: defaults, validation, overrides, and the warning about long sequences."""

import json
import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from paths import REPOSITORY
from tiny_models import HealthSLMConfig, random_ids, tiny_model
from transformers import AutoConfig

CONFIG_JSON = json.loads((REPOSITORY / "config.json").read_text())


def test_config_json_has_the_defaults_and_fp32():
    assert HealthSLMConfig.from_dict(CONFIG_JSON).to_dict() == HealthSLMConfig(dtype="float32").to_dict()


def test_saving_the_defaults_writes_config_json(tmp_path):
    config = HealthSLMConfig(dtype="float32")
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written | {"transformers_version": None} == CONFIG_JSON | {"transformers_version": None}


def test_saving_writes_the_whole_auto_map(tmp_path):
    HealthSLMConfig(vocab_size=10).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == CONFIG_JSON["auto_map"]
    assert set(saved["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForQuestionAnswering",
    }


def test_none_derives_the_number_and_size_of_heads():
    config = HealthSLMConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=None)
    assert (config.num_key_value_heads, config.head_dim) == (6, 16)


@pytest.mark.parametrize(
    "wrong",
    (
        {"hidden_size": "256"},
        {"num_hidden_layers": 2.5},
        {"rms_norm_eps": "small"},
        {"tie_word_embeddings": "yes"},
        {"hidden_act": 3},
        {"vocab_size": None},
    ),
    ids=str,
)
def test_a_wrong_type_raises_and_names_the_key(wrong):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(wrong))):
        HealthSLMConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    (
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"num_key_value_heads": 8}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(8\)"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 6}, r"hidden_size \(256\) is not a multiple of num_attention_heads \(6\)"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ),
    ids=str,
)
def test_invalid_sizes_raise_and_are_named(wrong, message):
    with pytest.raises((StrictDataclassClassValidationError, ValueError), match=message):
        HealthSLMConfig(**wrong)


def test_overrides_reach_the_configuration():
    config = AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True, num_hidden_layers=3, head_dim=32)
    assert (config.num_hidden_layers, config.head_dim) == (3, 32)
    config, unused = AutoConfig.from_pretrained(
        REPOSITORY, trust_remote_code=True, return_unused_kwargs=True, num_hidden_layers=3, unknown=1
    )
    assert (config.num_hidden_layers, unused) == (3, {"unknown": 1})


@pytest.mark.parametrize("return_unused_kwargs", (True, False))
def test_overrides_that_do_not_match_the_configuration_raise(return_unused_kwargs):
    with pytest.raises(StrictDataclassClassValidationError, match="multiple of num_key_value_heads"):
        AutoConfig.from_pretrained(
            REPOSITORY, trust_remote_code=True, return_unused_kwargs=return_unused_kwargs, num_key_value_heads=3
        )


def test_loading_options_of_transformers_cause_no_warnings(tmp_path, caplog):
    tiny_model("healthslm").save_pretrained(tmp_path)
    options = {"gguf_file": None, "cache_dir": tmp_path, "revision": "main", "attn_implementation": "eager"}
    AutoConfig.from_pretrained(tmp_path, trust_remote_code=True, **options)
    assert not caplog.records


class TestContext:
    """A sequence longer than the context of 64 tokens logs a warning with both lengths."""

    @pytest.fixture
    def warnings(self, caplog):
        caplog.set_level(logging.WARNING)
        return lambda: [record.getMessage() for record in caplog.records if "context" in record.getMessage()]

    def test_a_longer_prompt_warns_once(self, warnings):
        model = tiny_model("healthslm")
        for _ in range(2):
            model(random_ids(2, 65))
        (warning,) = warnings()
        assert "65 tokens" in warning and "64" in warning

    def test_a_prompt_as_long_as_the_context_does_not_warn(self, warnings):
        tiny_model("healthslm")(random_ids(2, 64))
        assert not warnings()

    def test_generating_more_tokens_warns_once(self, warnings):
        model = tiny_model("healthslm", max_position_embeddings=48)
        model.generate(random_ids(1, 44), max_new_tokens=10, min_new_tokens=10, do_sample=False)
        (warning,) = warnings()
        assert "49 tokens" in warning and "48" in warning

    @pytest.mark.parametrize("cache_implementation", ("dynamic", "static"))
    def test_generating_from_a_longer_prompt_warns_once(self, warnings, cache_implementation):
        length = {"dynamic": 70, "static": 71}[cache_implementation]
        tiny_model("healthslm").generate(
            random_ids(1, length), max_new_tokens=3, do_sample=False, cache_implementation=cache_implementation
        )
        assert [f"{length} tokens" in warning for warning in warnings()] == [True]

    def test_packed_documents_within_the_context_do_not_warn(self, warnings):
        tiny_model("healthslm")(random_ids(2, 90), position_ids=(torch.arange(90) % 45).expand(2, -1))
        assert not warnings()

    def test_a_longer_packed_document_warns(self, warnings):
        tiny_model("healthslm")(random_ids(1, 90), position_ids=torch.cat((torch.arange(80), torch.arange(10)))[None])
        (warning,) = warnings()
        assert "80 tokens" in warning and "64" in warning
