"""Configuration of HealthSLM: every number that fixes the network's shape."""

import difflib
from collections.abc import Iterable
from dataclasses import field, fields

from transformers import GenerationConfig
from transformers.configuration_utils import PreTrainedConfig, strict
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_healthslm.HealthSLMConfig",
    "AutoModel": "modeling_healthslm.HealthSLMModel",
    "AutoModelForCausalLM": "modeling_healthslm.HealthSLMForCausalLM",
    "AutoModelForSequenceClassification": "modeling_healthslm.HealthSLMForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_healthslm.HealthSLMForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_healthslm.HealthSLMForQuestionAnswering",
}

# Keys that Transformers itself hands to a configuration without declaring them.
_LIBRARY_KEYS = {
    "attn_implementation",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "per_layer_config",
    "quantization_config",
    "rope_theta",
    "tokenizer_class",
    "use_bidirectional_attention",
} | set(GenerationConfig().to_dict())


@strict
class HealthSLMConfig(PreTrainedConfig):
    """Shape of a HealthSLM network. The defaults give the 15,276,288 parameters of the released model.

    Args:
        vocab_size: Entries of the vocabulary, rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the SwiGLU feed-forward network.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads; each serves
            `num_attention_heads / num_key_value_heads` query heads. None means one for each query head.
        head_dim: Width of one head. None means `hidden_size / num_attention_heads`.
        hidden_act: Activation of the feed-forward network's gate.
        max_position_embeddings: Context in tokens: the longest sequence that the model is trained on.
        initializer_range: Standard deviation of the initial weights.
        rms_norm_eps: Added to the mean square before the root.
        use_cache: Whether `forward` returns keys and values for the next call.
        attention_dropout: Share of attention weights dropped while training.
        rope_parameters: Rotary positions, as Transformers describes them; None means base 10,000 without scaling.
        tie_word_embeddings: Whether the output projection shares the embedding's weights.

    Raises:
        ValueError: head_dim is left out and does not follow from the other sizes.
        huggingface_hub.errors.StrictDataclassClassValidationError: The head counts do not fit each other, or a size is
            not positive.
        huggingface_hub.errors.StrictDataclassFieldValidationError: A value has the wrong type.
    """

    model_type = "healthslm"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32_000
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    num_key_value_heads: int | None = 2
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    attention_dropout: int | float = 0.0
    rope_parameters: RopeParameters | dict | None = None
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 1
    architectures: list[str] | None = field(default_factory=lambda: ["HealthSLMForCausalLM"])
    auto_map: dict[str, str] | None = None

    def __post_init__(self, **kwargs) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim, rest = divmod(self.hidden_size, self.num_attention_heads)
            if rest:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                    f"({self.num_attention_heads}): give head_dim as well."
                )
        # Always whole and always local: a saved folder carries its own code, and saving one class would otherwise
        # leave the other Auto classes without an entry.
        self.auto_map = dict(AUTO_MAP)
        self._warn_of_unknown_keys(kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs):
        """As Transformers has it, but an override that no key takes is named instead of passed over."""
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        config.validate()  # overrides are set one by one, which checks their types and not how they fit each other
        if return_unused_kwargs:
            return config, unused
        config._warn_of_unknown_keys(unused)
        return config

    def _warn_of_unknown_keys(self, keys: Iterable[str]) -> None:
        known = {entry.name for entry in fields(self)} | _LIBRARY_KEYS
        for key in keys:
            if key.startswith("_") or key in known or hasattr(type(self), key):
                continue
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            logger.warning(f"HealthSLMConfig has no key '{key}': it changes nothing. The nearest is '{nearest}'.")

    def validate_architecture(self) -> None:
        """Part of `@strict`'s validation: sizes must be positive and the heads must fit each other."""
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
        for name in (*sizes, "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}): each key/value head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary positions turn pairs, so it must be even.")


__all__ = ["HealthSLMConfig"]
