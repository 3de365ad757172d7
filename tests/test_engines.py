"""HealthSLM works with serving engines such as vLLM and SGLang, tested with a small engine that runs models as they do.

Such an engine creates the model on the meta device, replaces its layers, passes the tokens of all requests as one
sequence, and keeps the keys and values in its own attention layers, which it finds by `layer_idx`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from tiny_models import random_ids, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModel, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

BACKENDS = ("vllm", "sglang")


class ServedAttention:
    """The engine's attention of one layer. It keeps the keys and values of each request."""

    def __init__(self) -> None:
        self.past: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, requests: dict[str, int]
    ) -> torch.Tensor:
        """Attend with queries (tokens, heads, head_dim). `requests` has the number of tokens of each request."""
        outputs, start = [], 0
        for name, length in requests.items():
            tokens = slice(start, start + length)
            start += length
            keys, values = key[tokens], value[tokens]
            if name in self.past:
                keys, values = torch.cat((self.past[name][0], keys)), torch.cat((self.past[name][1], values))
            self.past[name] = keys, values
            group = query.shape[1] // keys.shape[1]
            scores = torch.einsum("qhd,khd->hqk", query[tokens], keys.repeat_interleave(group, 1)) * scaling
            future = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + len(keys) - length)
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1)))
        return torch.cat(outputs)


def served_attention(module, query, key, value, attention_mask, scaling, attention_instances, requests, **kwargs):
    """The attention function that the engine registers. It needs no mask."""
    assert attention_mask is None
    assert module.is_causal is True
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    return attention_instances[module.layer_idx].forward(query, key, value, scaling, requests), None


class ServedLinear(nn.Module):
    """The engine's linear layer, with the sizes of the one it replaces."""

    def __init__(self, replaced: nn.Linear) -> None:
        super().__init__()
        assert replaced.weight.is_meta and replaced.bias is None
        self.weight = nn.Parameter(torch.empty(replaced.out_features, replaced.in_features))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states @ self.weight.T


class Engine:
    """Runs a saved model as vLLM and SGLang do."""

    def __init__(self, folder: Path, backend: str) -> None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        config._attn_implementation = backend
        with init_empty_weights(include_buffers=False):
            self.model = AutoModel.from_config(config, trust_remote_code=True)
        self.replace_layers(self.model)
        embedding = self.model.get_input_embeddings()
        self.model.set_input_embeddings(nn.Embedding(embedding.num_embeddings, embedding.embedding_dim))
        weights = {
            name.removeprefix("model."): weight for name, weight in load_file(folder / "model.safetensors").items()
        }
        self.model.load_state_dict(weights)
        self.attention_instances = {layer: ServedAttention() for layer in range(config.num_hidden_layers)}

    def replace_layers(self, module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, ServedLinear(child))
            elif type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon))
            else:
                self.replace_layers(child)

    @torch.no_grad()
    def logits(self, requests: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the logits (length, vocab_size) of each request's next tokens (length,)."""
        lengths = {name: len(ids) for name, ids in requests.items()}
        past = self.attention_instances[0].past
        starts = {name: len(past[name][0]) if name in past else 0 for name in requests}
        positions = torch.cat([torch.arange(starts[name], starts[name] + lengths[name]) for name in requests])
        hidden_states = self.model(
            input_ids=torch.cat(list(requests.values()))[None],
            position_ids=positions[None],
            use_cache=False,
            return_dict=False,
            attention_instances=self.attention_instances,
            requests=lengths,
        )[0][0]
        logits = hidden_states @ self.model.get_input_embeddings().weight.T
        return dict(zip(requests, logits.split(list(lengths.values())), strict=True))


@pytest.fixture(scope="module", autouse=True)
def registered_backends() -> None:
    for backend in BACKENDS:
        ALL_ATTENTION_FUNCTIONS.register(backend, served_attention)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    tiny_model("healthslm").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_in_one_batch_get_the_same_logits_as_alone(folder: Path, backend: str) -> None:
    model, engine = tiny_model("healthslm"), Engine(folder, backend)
    texts = {"first": random_ids(3, 14)[0], "second": random_ids(3, 14)[1], "late": random_ids(3, 14)[2]}
    expected = {name: model(ids[None]).logits[0] for name, ids in texts.items()}
    served = {"first": [], "second": [], "late": []}
    # Prompts of different lengths, then single tokens together with a later prompt, then one request alone.
    for tokens in (
        {"first": (0, 9), "second": (0, 4)},
        {"second": (4, 5), "late": (0, 7), "first": (9, 10)},
        {"first": (10, 14), "second": (5, 14), "late": (7, 8)},
        {"late": (8, 14)},
    ):
        for name, logits in engine.logits({name: texts[name][slice(*span)] for name, span in tokens.items()}).items():
            served[name].append(logits)
    for name in texts:
        torch.testing.assert_close(torch.cat(served[name]), expected[name])


class ShapeOnlyAttention:
    """Attention whose output has the right shape only."""

    def forward(self, query: torch.Tensor, *_: object) -> torch.Tensor:
        return query


def served_model(device: str = "cpu") -> PreTrainedModel:
    with torch.device(device):
        return tiny_model("healthslm", "Model", attention="vllm")


def run_without_values(model: PreTrainedModel, ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    instances = {layer: ShapeOnlyAttention() for layer in range(model.config.num_hidden_layers)}
    return model(
        input_ids=ids, position_ids=position_ids, use_cache=False, attention_instances=instances, requests={}
    ).last_hidden_state


def test_forward_in_an_engine_does_not_read_values() -> None:
    """As CUDA graphs require. Tensors on the meta device have no values."""
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    assert run_without_values(served_model("meta"), ids, ids).shape == (1, 8, 32)


def test_one_compiled_graph_works_for_batches_of_any_length() -> None:
    compiled = torch.compile(served_model(), backend="eager", fullgraph=True, dynamic=True)
    run_without_values(compiled, random_ids(1, 8), random_ids(1, 8))
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (2, 9, 100):  # the context is 64
            assert run_without_values(compiled, random_ids(1, length), random_ids(1, length)).shape == (1, length, 32)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log records of Transformers."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def test_a_batch_of_requests_longer_than_the_context_does_not_warn(messages) -> None:
    ids = random_ids(1, 77)
    run_without_values(served_model(), ids, torch.arange(77)[None])
    assert "77" not in messages.text
    tiny_model("healthslm", "Model")(input_ids=ids)
    assert "77" in messages.text


class MissingLayer(nn.Module):
    """Replaces the layers of other stages in a pipeline stage: it returns its input."""

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden_states


@torch.no_grad()
def test_two_pipeline_stages_split_by_the_plan_match_the_whole_model() -> None:
    first, second, whole = (tiny_model("healthslm", "Model") for _ in range(3))
    before, layers, after = whole.config.base_model_pp_plan
    first.get_submodule(layers)[1] = MissingLayer()
    first.set_submodule(after, MissingLayer())
    second.set_submodule(before, MissingLayer())
    second.get_submodule(layers)[0] = MissingLayer()
    ids, positions = random_ids(1, 9), torch.arange(9)[None]
    hidden_states = first(input_ids=ids, position_ids=positions).last_hidden_state
    staged = second(inputs_embeds=hidden_states, position_ids=positions).last_hidden_state
    torch.testing.assert_close(staged, whole(input_ids=ids).last_hidden_state)


def test_every_model_in_auto_map_supports_attention_backends(repository: Path) -> None:
    config = AutoConfig.from_pretrained(repository, trust_remote_code=True)
    for reference in config.auto_map.values():
        remote_class = get_class_from_dynamic_module(reference, str(repository))
        if issubclass(remote_class, PreTrainedModel):
            assert remote_class.is_backend_compatible()
            assert remote_class.base_model_prefix == "model"


def test_the_base_model_is_the_decoder_and_has_one_list_of_layers() -> None:
    model = tiny_model("healthslm", "Model")
    assert model.get_decoder() is model
    (layers,) = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(model.config.num_hidden_layers))


class ShapeOnlyCache:
    """Like the cache of continuous batching, which has no length and is no `Cache`, but without values."""

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict):
        return key, value


def test_forward_in_continuous_batching_does_not_read_values() -> None:
    """As CUDA graphs require, also with more tokens in total than the context."""
    with torch.device("meta"):
        model = tiny_model("healthslm")
        ids, mask, bounds = torch.zeros(1, 77).long(), torch.zeros(1, 1, 77, 77), torch.zeros(4).int()
    output = model(ids, mask, position_ids=ids, past_key_values=ShapeOnlyCache(), cu_seq_lens_q=bounds, use_cache=True)
    assert output.logits.shape == (1, 77, 99)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "paged|eager"])
def test_continuous_batching_generates_the_same_tokens_as_each_prompt_alone(attention: str, messages) -> None:
    model = tiny_model("healthslm", attention=attention.removeprefix("paged|"))
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=1)
    prompts = [random_ids(3, 30)[0, :30], random_ids(3, 30)[1, :7], random_ids(3, 30)[2, :29]]
    expected = [model.generate(prompt[None], generation_config=greedy)[0, len(prompt) :] for prompt in prompts]
    model.set_attn_implementation(attention)
    small_cache = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=128)
    requests = [prompt.tolist() for prompt in prompts]
    batch = model.generate_batch(requests, generation_config=greedy, continuous_batching_config=small_cache)
    generated = {tuple(output.prompt_ids): output.generated_tokens for output in batch.values()}
    assert [generated[tuple(request)] for request in requests] == [tokens.tolist() for tokens in expected]
    assert "context" not in messages.text  # 66 tokens in total, but each prompt fits into the context of 64
