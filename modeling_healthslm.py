"""HealthSLM: a LLaMA-style decoder, in the order in which data meets it.

Token ids are embedded, pass through layers of attention and feed-forward network, each behind a normalisation and
added to the residual stream, and are projected onto the vocabulary by the transposed embedding. With the same weights
it computes what `LlamaForCausalLM` computes; the loss can in addition be had without ever holding all logits.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask, packed_sequence_mask_function
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_healthslm import HealthSLMConfig

logger = logging.get_logger(__name__)

# Positions projected onto the vocabulary at a time when the logits are not asked for: 65 MB of them in fp32.
LOSS_CHUNK_TOKENS = 512


# What Transformers calls past_key_values up to 5.23 is cache from 5.24 on, and generation hands it over by that name.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class HealthSLMRMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019), computed in fp32 whatever the weights' type."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.float()
        mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(mean_square + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class HealthSLMRotaryEmbedding(nn.Module):
    """Rotary positions (Su et al., 2021): the cosines and sines by which queries and keys are turned."""

    def __init__(self, config: HealthSLMConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: HealthSLMConfig, *_, **__) -> tuple[torch.Tensor, float]:
        """Angle per position of each of the `head_dim / 2` pairs, and the scale (none) of cosine and sine."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate_half(states: torch.Tensor) -> torch.Tensor:
    """Turn every pair (i, i + head_dim / 2) by a right angle."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn query and key (batch, heads, length, head_dim) by their positions' angles (batch, length, head_dim)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the implementation that can also return its weights (batch, heads, length, length)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    attn_weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    return (attn_weights @ value).transpose(1, 2).contiguous(), attn_weights


class HealthSLMAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions."""

    def __init__(self, config: HealthSLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = past_key_values if cache is None else cache
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)

        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


class HealthSLMMLP(nn.Module):
    """SwiGLU feed-forward network (Shazeer, 2020)."""

    def __init__(self, config: HealthSLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class HealthSLMDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: HealthSLMConfig, layer_idx: int):
        super().__init__()
        self.self_attn = HealthSLMAttention(config, layer_idx)
        self.mlp = HealthSLMMLP(config)
        self.input_layernorm = HealthSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = HealthSLMRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attn_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HealthSLMPreTrainedModel(PreTrainedModel):
    config: HealthSLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HealthSLMDecoderLayer"]
    _skip_keys_device_placement = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HealthSLMDecoderLayer, "attentions": HealthSLMAttention}


def has_past(past_length: int | torch.Tensor) -> bool:
    """Whether a call goes on from keys and values of earlier ones."""
    # A static cache counts in a tensor, which cannot be looked at while a graph is traced: it is taken to be filled.
    return (isinstance(past_length, torch.Tensor) and is_tracing(past_length)) or bool(past_length > 0)


def find_documents(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Number the documents packed into each row: a new one starts wherever the positions do not go on by one.

    Args:
        position_ids: (batch, length).
        attention_mask: (batch, at least length), 0 for padding, or None. Padding may stand before, between and after
            documents; its own positions mean nothing, and within a document they may have been counted or not. A ready
            mask of four dimensions says by itself what sees what.

    Returns:
        Document numbers (batch, length), or None where each row holds a single one or the mask is ready. While a graph
        is traced, values cannot be looked at, so the numbers are always returned.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        return None
    length = position_ids.shape[1]
    token = torch.ones_like(position_ids) if attention_mask is None else attention_mask[:, :length]
    token = token.to(position_ids.device, torch.bool)
    index = torch.arange(length, device=position_ids.device)
    last = torch.where(token, index, -1).cummax(dim=-1).values[:, :-1]  # the last token before each but the first
    step = position_ids[:, 1:] - position_ids.gather(1, last.clamp(min=0))
    restarts = token[:, 1:] & (last >= 0) & ((step < 1) | (step > index[1:] - last))
    if not is_tracing(position_ids) and not restarts.any():
        return None
    first = token[:, 1:] & (last < 0)  # sets padding at the front of the row apart
    return nn.functional.pad(restarts | first, (1, 0)).cumsum(dim=-1)


def varlen_kwargs(documents: torch.Tensor, kv_length: int) -> dict[str, torch.Tensor | int]:
    """Describe documents (batch, length) as flash attention wants them: offsets into the flattened batch.

    Keys beyond `length` are slots that a static cache has not filled yet: a stretch of keys without queries.
    """
    batch, length = documents.shape
    rows = torch.arange(batch, device=documents.device).unsqueeze(1) * (length + 1)
    numbers = nn.functional.pad(documents, (0, kv_length - length), value=length) + rows
    numbers, key_lengths = numbers.flatten().unique_consecutive(return_counts=True)
    query_lengths = key_lengths.where(numbers % (length + 1) != length, 0)
    return {
        "cu_seq_lens_q": nn.functional.pad(query_lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        "cu_seq_lens_k": nn.functional.pad(key_lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        "max_length_q": int(query_lengths.max()),
        "max_length_k": int(key_lengths.max()),
    }


class HealthSLMModel(HealthSLMPreTrainedModel):
    """The decoder without a head: token ids in, hidden states out."""

    _auto_class = "AutoModel"

    def __init__(self, config: HealthSLMConfig):
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(HealthSLMDecoderLayer(config, idx) for idx in range(config.num_hidden_layers))
        self.norm = HealthSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = HealthSLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (batch, length); or inputs_embeds: (batch, length, hidden_size).
            attention_mask: (batch, past + length), 0 for padding; or a ready mask, (batch, 1, length, keys).
            position_ids: (batch, length). Where they restart in a call without a past, documents are packed into the
                row, and none of them sees another.
            past_key_values: Keys and values of earlier calls.
            use_cache: Whether to return them, with this call's own, for the next.
            cache: What Transformers calls past_key_values from 5.24 on: either name will do.

        Raises:
            ValueError: Both or neither of input_ids and inputs_embeds are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        length = inputs_embeds.shape[1]
        past_length = cache.get_seq_length() if cache is not None else 0
        flash = is_flash_attention_requested(self.config)
        # Serving engines (vLLM, SGLang), and bounds handed to flash attention, keep documents apart without our help.
        kept_apart = self.config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS
        kept_apart = kept_apart or (flash and "cu_seq_lens_q" in kwargs)
        documents = None
        if position_ids is None:
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past_length).unsqueeze(0)
        elif length > 1 and not kept_apart and not has_past(past_length):
            documents = find_documents(position_ids.expand(inputs_embeds.shape[0], -1), attention_mask)
        if not kept_apart:
            packed = documents is not None or "cu_seq_lens_q" in kwargs
            self._warn_beyond_context(length, past_length, position_ids if packed else None)

        same_document = None
        if documents is not None:
            # A static cache has room for more keys than there are yet: these belong to no document.
            kv_length = cache.get_mask_sizes(length, 0)[0] if cache is not None else length
            if flash:
                # Padding stands at the front of a row or behind a document, where causality hides it.
                kwargs, attention_mask = {**kwargs, **varlen_kwargs(documents, kv_length)}, None
            else:
                documents = nn.functional.pad(documents, (0, kv_length - length), value=-1)
                same_document = packed_sequence_mask_function(documents)

        causal_mask = create_causal_mask(
            self.config, inputs_embeds, attention_mask, cache, and_mask_function=same_document
        )

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        # Self-speculative decoding drafts with the first layers alone: it lowers the configuration's number of them.
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})

    def _warn_beyond_context(
        self, length: int, past_length: int | torch.Tensor, packed_position_ids: torch.Tensor | None
    ) -> None:
        """Warn when a sequence first reaches beyond the context, from shapes alone unless a row holds several."""
        if is_tracing(packed_position_ids):  # a comparison would bind the graph to this length
            return
        context = self.config.max_position_embeddings
        past_length = past_length if isinstance(past_length, int) else 0
        if not past_length <= context < past_length + length:
            return
        length += past_length
        if packed_position_ids is not None:
            length = int(packed_position_ids.max()) + 1
        if length > context:
            logger.warning_once(
                f"A sequence of {length} tokens is longer than the {context} of this model's context: it was trained "
                "on nothing as long, and what it gives beyond is not to be trusted."
            )


def select_positions(hidden_states: torch.Tensor, positions: int | torch.Tensor) -> torch.Tensor:
    """Take some positions of hidden_states (batch, length, hidden_size).

    Args:
        positions: An int for the last so many (0 for all); indices (count,), the same ones of each row, or (batch,
            count); or a boolean mask (batch, length), which flattens the two dimensions into one.
    """
    if isinstance(positions, int):
        return hidden_states[:, -positions:]
    if positions.ndim == 1:
        return hidden_states[:, positions]
    if positions.dtype == torch.bool:
        return hidden_states[positions]
    return hidden_states.take_along_dim(positions.unsqueeze(-1), dim=1)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden_states @ weight.T`, of which no more than one chunk of rows is ever held.

    Each chunk's gradients are computed with its loss, while its probabilities are at hand; the backward pass scales
    them.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        with_gradients: bool,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (tokens, hidden_size).
            weight: (vocab_size, hidden_size).
            targets: (tokens,), the token that each position is to predict.
            counted: (tokens,), False for positions that are left out of the sum.
            with_gradients: Whether a backward pass may follow.
        """
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        hidden, matrix = hidden_states.to(dtype), weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = weight_gradient = None
        if with_gradients and ctx.needs_input_grad[0]:
            hidden_gradient = torch.empty_like(hidden_states, dtype=torch.float32)
        if with_gradients and ctx.needs_input_grad[1]:
            weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        # The same memory for every chunk: to be given a new one each time costs as much as to compute with it.
        shape = (min(LOSS_CHUNK_TOKENS, len(hidden)), len(matrix))
        logits_buffer = torch.empty(shape, dtype=dtype, device=hidden.device)
        log_probs_buffer = torch.empty(shape, dtype=torch.float32, device=hidden.device)

        for start in range(0, len(hidden), LOSS_CHUNK_TOKENS):
            rows = slice(start, start + LOSS_CHUNK_TOKENS)
            hidden_chunk, target, weighing = hidden[rows], targets[rows, None], counted[rows, None]
            logits, log_probs = logits_buffer[: len(target)], log_probs_buffer[: len(target)]
            torch.mm(hidden_chunk, matrix.T, out=logits)
            torch.log_softmax(log_probs.copy_(logits), dim=-1, out=log_probs)
            loss -= (log_probs.gather(1, target) * weighing).sum()
            # The gradient of the logits: probabilities, less one for the token that followed.
            logits.copy_(log_probs.exp_().scatter_add_(1, target, log_probs.new_full(target.shape, -1.0)))
            if hidden_gradient is not None:
                hidden_gradient[rows] = logits @ matrix * weighing
            if weight_gradient is not None:
                weight_gradient += logits.T @ (hidden_chunk * weighing)

        ctx.gradients = hidden_gradient, weight_gradient
        ctx.dtypes = hidden_states.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, loss_gradient: torch.Tensor) -> tuple:
        gradients = (
            None if gradient is None else (gradient * loss_gradient).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None


class HealthSLMForCausalLM(HealthSLMPreTrainedModel, GenerationMixin):
    """The language model: the decoder, and its embedding transposed as output projection."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HealthSLMConfig):
        super().__init__(config)
        self.model = HealthSLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: (batch, length), the input ids themselves: the shift by one happens here. -100 is not counted.
            logits_to_keep: What to project onto the vocabulary, see `select_positions`.
            skip_logits: Compute the loss in chunks and return no logits: the same value and gradients in a fraction
                of the memory. `shift_labels` (already shifted) and `num_items_in_batch` (the loss is then a sum
                divided by it) work as without it.
            The others: see `HealthSLMModel.forward`.

        Raises:
            ValueError: skip_logits without labels.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss, logits = None, None
        if skip_logits:
            loss = self._chunked_loss(hidden_states, labels, **kwargs)
        else:
            logits = self.lm_head(select_positions(hidden_states, logits_to_keep))
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _chunked_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        **_: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Cross-entropy of hidden_states (batch, length, hidden_size) that holds the logits of one chunk at a time."""
        if shift_labels is None:
            if labels is None:
                raise ValueError("skip_logits=True returns nothing but the loss: give labels as well.")
            shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
        if type(self.lm_head).forward is not nn.Linear.forward:  # that of FSDP's own class is
            raise ValueError(f"skip_logits=True needs a plain output projection, not a {type(self.lm_head).__name__}.")
        shift_labels = shift_labels.flatten().to(hidden_states.device)
        counted = shift_labels != ignore_index
        targets = shift_labels.where(counted, 0)
        weight = self.lm_head.weight
        if isinstance(weight, DTensor):  # a part of it on each device, with tensor parallelism
            weight = weight.full_tensor()
        loss = ChunkedCrossEntropy.apply(hidden_states.flatten(0, 1), weight, targets, counted, torch.is_grad_enabled())
        if num_items_in_batch is None:
            num_items_in_batch = counted.sum()
        elif isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch


# Transformers' generic heads build their base model through AutoModel, which asks for a trust that a loaded repository
# has already been given: these build it themselves and take over the rest.


class HealthSLMForSequenceClassification(GenericForSequenceClassification, HealthSLMPreTrainedModel):
    """One label for a sequence, read off its last token that is not padding."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: HealthSLMConfig):
        HealthSLMPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HealthSLMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class HealthSLMForTokenClassification(GenericForTokenClassification, HealthSLMPreTrainedModel):
    """One label for each token."""

    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: HealthSLMConfig):
        HealthSLMPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HealthSLMModel(config)
        self.dropout = nn.Dropout(0.1)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class HealthSLMForQuestionAnswering(GenericForQuestionAnswering, HealthSLMPreTrainedModel):
    """The first and last token of an answer within the sequence."""

    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: HealthSLMConfig):
        HealthSLMPreTrainedModel.__init__(self, config)
        self.model = HealthSLMModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "HealthSLMForCausalLM",
    "HealthSLMForQuestionAnswering",
    "HealthSLMForSequenceClassification",
    "HealthSLMForTokenClassification",
    "HealthSLMModel",
    "HealthSLMPreTrainedModel",
]
