"""HealthSLM meets the contract by which vLLM and SGLang run custom code: held against a small server that works so.

Such a server builds the model without memory, puts layers of its own in the place of Transformers', feeds it all
requests as one row of tokens, and lets its own attention keep their keys and values, found by the layer's number.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from networks import network, random_ids
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

BACKENDS = ("vllm", "sglang")


class ServedAttention:
    """One layer's attention over the requests of a server, whose keys and values it keeps."""

    def __init__(self) -> None:
        self.past: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, requests: dict[str, int]
    ) -> torch.Tensor:
        """Attend with queries (tokens, heads, head_dim), of which each request has the next few."""
        outputs, start = [], 0
        for name, length in requests.items():
            own = slice(start, start + length)
            start += length
            keys, values = key[own], value[own]
            if name in self.past:
                keys, values = torch.cat((self.past[name][0], keys)), torch.cat((self.past[name][1], values))
            self.past[name] = keys, values
            group = query.shape[1] // keys.shape[1]
            scores = torch.einsum("qhd,khd->hqk", query[own], keys.repeat_interleave(group, 1)) * scaling
            future = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + len(keys) - length)
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1)))
        return torch.cat(outputs)


def served_attention(module, query, key, value, attention_mask, scaling, attention_instances, requests, **kwargs):
    """What a server registers: it takes no mask, and finds its own layer by `layer_idx`."""
    assert attention_mask is None
    assert module.is_causal is True
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    return attention_instances[module.layer_idx].forward(query, key, value, scaling, requests), None


class ServedLinear(nn.Module):
    """A server's own projection, which knows no more than the sizes of the one it replaces."""

    def __init__(self, replaced: nn.Linear) -> None:
        super().__init__()
        assert replaced.weight.is_meta and replaced.bias is None
        self.weight = nn.Parameter(torch.empty(replaced.out_features, replaced.in_features))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states @ self.weight.T


class Server:
    """Runs a saved folder as vLLM and SGLang do."""

    def __init__(self, folder: Path, backend: str) -> None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        config._attn_implementation = backend
        with init_empty_weights(include_buffers=False):
            self.body = AutoModel.from_config(config, trust_remote_code=True)
        self.replace_layers(self.body)
        embedding = self.body.get_input_embeddings()
        self.body.set_input_embeddings(nn.Embedding(embedding.num_embeddings, embedding.embedding_dim))
        weights = {
            name.removeprefix("model."): weight for name, weight in load_file(folder / "model.safetensors").items()
        }
        self.body.load_state_dict(weights)
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
        """Feed each request's next tokens (length,) and give their logits (length, vocabulary)."""
        lengths = {name: len(ids) for name, ids in requests.items()}
        past = self.attention_instances[0].past
        starts = {name: len(past[name][0]) if name in past else 0 for name in requests}
        positions = torch.cat([torch.arange(starts[name], starts[name] + lengths[name]) for name in requests])
        hidden_states = self.body(
            input_ids=torch.cat(list(requests.values()))[None],
            position_ids=positions[None],
            use_cache=False,
            return_dict=False,
            attention_instances=self.attention_instances,
            requests=lengths,
        )[0][0]
        logits = hidden_states @ self.body.get_input_embeddings().weight.T
        return dict(zip(requests, logits.split(list(lengths.values())), strict=True))


@pytest.fixture(scope="module", autouse=True)
def registered_backends() -> None:
    for backend in BACKENDS:
        ALL_ATTENTION_FUNCTIONS.register(backend, served_attention)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    network("healthslm").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_served_together_get_what_each_gets_alone(folder: Path, backend: str) -> None:
    model, server = network("healthslm"), Server(folder, backend)
    texts = {"first": random_ids(3, 14)[0], "second": random_ids(3, 14)[1], "late": random_ids(3, 14)[2]}
    expected = {name: model(ids[None]).logits[0] for name, ids in texts.items()}
    served = {"first": [], "second": [], "late": []}
    # Prompts of different lengths, then single tokens beside a prompt that comes later, then one request alone.
    for step in (
        {"first": (0, 9), "second": (0, 4)},
        {"second": (4, 5), "late": (0, 7), "first": (9, 10)},
        {"first": (10, 14), "second": (5, 14), "late": (7, 8)},
        {"late": (8, 14)},
    ):
        for name, logits in server.logits({name: texts[name][slice(*part)] for name, part in step.items()}).items():
            served[name].append(logits)
    for name in texts:
        torch.testing.assert_close(torch.cat(served[name]), expected[name])


class AnyShapeAttention:
    """A layer's attention of which nothing but the shape is true."""

    def forward(self, query: torch.Tensor, *_: object) -> torch.Tensor:
        return query


def served_body(device: str = "cpu") -> PreTrainedModel:
    with torch.device(device):
        return network("healthslm", "Model", attention="vllm")


def run_for_shape(body: PreTrainedModel, ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    instances = {layer: AnyShapeAttention() for layer in range(body.config.num_hidden_layers)}
    return body(
        input_ids=ids, position_ids=position_ids, use_cache=False, attention_instances=instances, requests={}
    ).last_hidden_state


def test_a_served_model_computes_without_looking_at_values() -> None:
    """Or it could not be captured as a CUDA graph: on the meta device there is no value to look at."""
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    assert run_for_shape(served_body("meta"), ids, ids).shape == (1, 8, 32)


def test_one_compiled_graph_serves_batches_of_any_length() -> None:
    compiled = torch.compile(served_body(), backend="eager", fullgraph=True, dynamic=True)
    run_for_shape(compiled, random_ids(1, 8), random_ids(1, 8))
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (2, 9, 100):  # the context is 64
            assert run_for_shape(compiled, random_ids(1, length), random_ids(1, length)).shape == (1, length, 32)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What Transformers' loggers say."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def test_a_served_batch_longer_than_the_context_is_not_taken_for_a_long_prompt(messages) -> None:
    ids = random_ids(1, 77)
    run_for_shape(served_body(), ids, torch.arange(77)[None])
    assert "77" not in messages.text
    network("healthslm", "Model")(input_ids=ids)
    assert "77" in messages.text


class MissingLayer(nn.Module):
    """What a pipeline's stage has in the place of the layers of other stages: it hands on what it is given."""

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden_states


@torch.no_grad()
def test_two_pipeline_stages_cut_by_the_plan_compute_what_the_whole_does() -> None:
    first, second, whole = network("healthslm", "Model"), network("healthslm", "Model"), network("healthslm", "Model")
    before, layers, after = whole.config.base_model_pp_plan
    first.get_submodule(layers)[1] = MissingLayer()
    first.set_submodule(after, MissingLayer())
    second.set_submodule(before, MissingLayer())
    second.get_submodule(layers)[0] = MissingLayer()
    ids, positions = random_ids(1, 9), torch.arange(9)[None]
    hidden_states = first(input_ids=ids, position_ids=positions).last_hidden_state
    staged = second(inputs_embeds=hidden_states, position_ids=positions).last_hidden_state
    torch.testing.assert_close(staged, whole(input_ids=ids).last_hidden_state)


def test_every_class_of_the_auto_map_declares_itself_compatible(repository: Path) -> None:
    config = AutoConfig.from_pretrained(repository, trust_remote_code=True)
    for reference in config.auto_map.values():
        remote_class = get_class_from_dynamic_module(reference, str(repository))
        if issubclass(remote_class, PreTrainedModel):
            assert remote_class.is_backend_compatible()
            assert remote_class.base_model_prefix == "model"


def test_a_body_is_its_own_decoder_with_one_list_of_layers() -> None:
    body = network("healthslm", "Model")
    assert body.get_decoder() is body
    (layers,) = (module for module in body.modules() if isinstance(module, nn.ModuleList))
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(body.config.num_hidden_layers))


class AnyShapeCache:
    """The cache of continuous batching, of which nothing but the shape is true: it has no length, and is no `Cache`."""

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict):
        return key, value


def test_continuous_batching_computes_without_looking_at_values() -> None:
    """Or it could not be captured as a CUDA graph, with more tokens in all than the context has room for."""
    with torch.device("meta"):
        model = network("healthslm")
        ids, mask, bounds = torch.zeros(1, 77).long(), torch.zeros(1, 1, 77, 77), torch.zeros(4).int()
    output = model(ids, mask, position_ids=ids, past_key_values=AnyShapeCache(), cu_seq_lens_q=bounds, use_cache=True)
    assert output.logits.shape == (1, 77, 99)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "paged|eager"])
def test_continuous_batching_generates_what_each_prompt_does_alone(attention: str, messages) -> None:
    model = network("healthslm", attention=attention.removeprefix("paged|"))
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=1)
    prompts = [random_ids(3, 30)[0, :30], random_ids(3, 30)[1, :7], random_ids(3, 30)[2, :29]]
    expected = [model.generate(prompt[None], generation_config=greedy)[0, len(prompt) :] for prompt in prompts]
    model.set_attn_implementation(attention)
    small_cache = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=128)
    requests = [prompt.tolist() for prompt in prompts]
    batch = model.generate_batch(requests, generation_config=greedy, continuous_batching_config=small_cache)
    generated = {tuple(output.prompt_ids): output.generated_tokens for output in batch.values()}
    assert [generated[tuple(request)] for request in requests] == [tokens.tolist() for tokens in expected]
    assert "context" not in messages.text  # 66 tokens in all, but no prompt is longer than the 64 of the context
