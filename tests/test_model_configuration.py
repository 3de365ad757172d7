"""The configuration: its defaults, what it refuses, and what it warns of."""

import json
import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from networks import REPOSITORY, HealthSLMConfig, network, random_ids
from transformers import AutoConfig

CONFIG_JSON = json.loads((REPOSITORY / "config.json").read_text())


def test_config_json_holds_the_defaults_and_the_type_to_load_the_weights_in():
    assert HealthSLMConfig.from_dict(CONFIG_JSON).to_dict() == HealthSLMConfig(dtype="float32").to_dict()


def test_config_json_is_what_saving_the_defaults_writes(tmp_path):
    config = HealthSLMConfig(dtype="float32")
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    version = "transformers_version"  # of the one who saved it
    assert {**written, version: None} == {**CONFIG_JSON, version: None}


def test_auto_map_names_every_class_and_survives_saving(tmp_path):
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


def test_left_out_head_counts_follow_from_the_others():
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
def test_a_wrong_type_is_an_error_that_names_the_key(wrong):
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
def test_a_shape_that_cannot_be_is_an_error_that_names_it(wrong, message):
    with pytest.raises((StrictDataclassClassValidationError, ValueError), match=message):
        HealthSLMConfig(**wrong)


@pytest.mark.parametrize(
    ("key", "nearest"), (("hiden_size", "hidden_size"), ("n_layers", None), ("max_positions_embeddings", None))
)
@pytest.mark.parametrize("way", ("constructor", "override of AutoConfig"))
def test_an_unknown_key_is_answered_with_the_nearest(key, nearest, way, caplog):
    if way == "constructor":
        HealthSLMConfig(**{key: 3})
    else:
        AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True, **{key: 3})
    (warning,) = (record.getMessage() for record in caplog.records if key in record.getMessage())
    assert "changes nothing" in warning
    if nearest:
        assert f"nearest is '{nearest}'" in warning


def test_keys_of_the_library_are_no_unknown_ones(caplog, tmp_path):
    keys = {
        "attn_implementation": "eager",
        "dtype": "bfloat16",
        "torch_dtype": "float32",
        "num_labels": 3,
        "id2label": {0: "a", 1: "b", 2: "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
        "problem_type": "single_label_classification",
        "output_hidden_states": True,
        "output_attentions": False,
        "return_dict": True,
        "rope_theta": 500_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "name_or_path": "somewhere",
        "_name_or_path": "somewhere",
        "chunk_size_feed_forward": 0,
        "is_encoder_decoder": False,
        "max_length": 30,
        "use_cache": False,
    }
    HealthSLMConfig(**keys).save_pretrained(tmp_path)
    AutoConfig.from_pretrained(tmp_path, trust_remote_code=True, cache_dir=tmp_path, revision="main")
    assert "has no key" not in caplog.text


def test_overrides_reach_the_configuration():
    config = AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True, num_hidden_layers=3, head_dim=32)
    assert (config.num_hidden_layers, config.head_dim) == (3, 32)
    config, unused = AutoConfig.from_pretrained(
        REPOSITORY, trust_remote_code=True, return_unused_kwargs=True, num_hidden_layers=3, unheard_of=1
    )
    assert (config.num_hidden_layers, unused) == (3, {"unheard_of": 1})


class TestContext:
    """A sequence beyond the context of 64 is answered with a warning that names both lengths."""

    @pytest.fixture
    def warnings(self, caplog):
        caplog.set_level(logging.WARNING)
        return lambda: [record.getMessage() for record in caplog.records if "context" in record.getMessage()]

    def test_a_prompt_beyond_it_warns_once(self, warnings):
        model = network("healthslm")
        for _ in range(2):
            model(random_ids(2, 65))
        (warning,) = warnings()
        assert "65 tokens" in warning and "64" in warning

    def test_a_prompt_within_it_does_not(self, warnings):
        network("healthslm")(random_ids(2, 64))
        assert not warnings()

    def test_generating_beyond_it_warns_once(self, warnings):
        model = network("healthslm", max_position_embeddings=48)
        model.generate(random_ids(1, 44), max_new_tokens=10, min_new_tokens=10, do_sample=False)
        (warning,) = warnings()
        assert "49 tokens" in warning and "48" in warning

    @pytest.mark.parametrize("cache_implementation", ("dynamic", "static"))
    def test_generating_from_a_prompt_beyond_it_warns_once(self, warnings, cache_implementation):
        length = {"dynamic": 70, "static": 71}[cache_implementation]
        network("healthslm").generate(
            random_ids(1, length), max_new_tokens=3, do_sample=False, cache_implementation=cache_implementation
        )
        assert [f"{length} tokens" in warning for warning in warnings()] == [True]

    def test_a_row_of_documents_that_fit_does_not(self, warnings):
        network("healthslm")(random_ids(2, 90), position_ids=(torch.arange(90) % 45).expand(2, -1))
        assert not warnings()

    def test_a_packed_document_beyond_it_does(self, warnings):
        network("healthslm")(random_ids(1, 90), position_ids=torch.cat((torch.arange(80), torch.arange(10)))[None])
        (warning,) = warnings()
        assert "80 tokens" in warning and "64" in warning
