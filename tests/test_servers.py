"""Other projects' servers answer requests for an exported model with the text that the model itself generates."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from exported_models import exported, tokenizer, write_model
from safetensors.torch import load_file
from tiny_models import random_ids
from torch.nn import functional
from torch.testing import assert_close

from healthslm.generation import complete_prompts
from healthslm.models import open_model
from healthslm.tokenization.encoding import load_tokenizer

SECONDS_TO_START = 300
TEXTS = [
    "Vitamin D and fractures: no effect (n = 45).",
    "IL-6 and β₂-microglobulin in Sjögren’s.",
    "<|user|>What is asthma?<|end|><|assistant|>A disease.<|end|>",
    "<|user|>What is iron?<|end|><|assistant|>A metal.<|end|>",
]
"""What the model learns by heart, each up to the end of its document."""


def learn(folder: Path) -> None:
    """Train the model of a folder until it generates the texts."""
    model = open_model(folder).train()
    batch = tokenizer()([text + "<|endoftext|>" for text in TEXTS], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny")
    learn(folder)
    return folder


@pytest.fixture(scope="module")
def llama_folder(source, tmp_path_factory) -> Path:
    return exported(source, "llama", tmp_path_factory.mktemp("exports") / "llama")


@pytest.fixture(scope="module")
def gguf_folder(source, tmp_path_factory) -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    return exported(source, "gguf", tmp_path_factory.mktemp("exports") / "gguf")


def continuation(source: Path, text: str, max_new_tokens: int = 40) -> str:
    """What the model generates by greedy decoding."""
    ids = tokenizer()(text)["input_ids"]
    written = complete_prompts(open_model(source), [ids], tokenizer().eos_token_id, max_new_tokens)[0]
    return tokenizer().decode(written, skip_special_tokens=True)


@dataclass
class Server:
    """The address of a server, and the name of its model."""

    address: str
    model: str

    @property
    def client(self):
        from openai import OpenAI

        return OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)


@contextmanager
def transformers_serve(folder: Path, log: Path) -> Iterator[Server]:
    """`transformers serve` in its own process, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            for _ in range(10 * SECONDS_TO_START):
                assert process.poll() is None, log.read_text()
                try:
                    urlopen(f"{address}/health")
                    break
                except URLError:
                    time.sleep(0.1)
            yield Server(address, str(folder))
        finally:
            process.terminate()


@contextmanager
def llama_cpp_server(folder: Path) -> Iterator[Server]:
    """llama.cpp's server in this process, on a free port."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(folder / "tiny-F16.gguf")
    settings.n_ctx = 64
    settings.cpuparams.n_threads = 1
    settings.verbosity = -1
    server = xllamacpp.Server(settings)
    yield Server(server.listening_address, settings.model.path)


@pytest.fixture(scope="module")
def of_transformers(llama_folder, tmp_path_factory) -> Iterator[Server]:
    for name in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(name)
    with transformers_serve(llama_folder, tmp_path_factory.mktemp("logs") / "log.txt") as server:
        yield server


@pytest.fixture(scope="module")
def of_llama_cpp(gguf_folder) -> Iterator[Server]:
    pytest.importorskip("openai")
    with llama_cpp_server(gguf_folder) as server:
        yield server


@pytest.fixture(params=["of_transformers", "of_llama_cpp"])
def server(request) -> Server:
    return request.getfixturevalue(request.param)


PROMPTS = {"Vitamin D and": " fractures: no effect (n = 45).", "IL-6 and β₂": "-microglobulin in Sjögren’s."}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_continued_as_the_model_continues_it(server, source, prompt):
    answer = server.client.completions.create(model=server.model, prompt=prompt, max_tokens=40, temperature=0)
    assert answer.choices[0].text == continuation(source, prompt) == PROMPTS[prompt]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(tokenizer()(prompt)["input_ids"])


def test_max_tokens_ends_a_text(server, source):
    prompt = "Vitamin D and"
    answer = server.client.completions.create(model=server.model, prompt=prompt, max_tokens=4, temperature=0)
    assert answer.choices[0].text == continuation(source, prompt, 4)
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_streamed_text_is_the_same_in_parts(server, prompt):
    stream = server.client.completions.create(
        model=server.model, prompt=prompt, max_tokens=40, temperature=0, stream=True
    )
    parts = [chunk.choices[0].text for chunk in stream]
    assert len([part for part in parts if part]) > 3
    assert "".join(parts) == PROMPTS[prompt]


@pytest.mark.parametrize(("question", "answer"), [("What is asthma?", "A disease."), ("What is iron?", "A metal.")])
def test_messages_pass_through_the_chat_template(server, source, question, answer):
    messages = [{"role": "user", "content": question}]
    found = server.client.chat.completions.create(model=server.model, messages=messages, max_tokens=40, temperature=0)
    assert found.choices[0].message.content == continuation(source, f"<|user|>{question}<|end|><|assistant|>") == answer


def test_transformers_serve_refuses_another_model_and_unknown_options(of_transformers):
    import openai

    completions = of_transformers.client.completions
    with pytest.raises(openai.BadRequestError) as refused:
        completions.create(model="other", prompt="IL-6", max_tokens=4)
    assert "requested 'other'" in refused.value.response.json()["detail"]
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        completions.create(model=of_transformers.model, prompt="IL-6", max_tokens=4, extra_body={"top_k": 5})
    assert "Unexpected fields in the request: {'top_k'}" in refused.value.response.json()["detail"]


def test_llama_cpp_ignores_the_name_of_the_model(of_llama_cpp):
    answer = of_llama_cpp.client.completions.create(model="other", prompt="IL-6 and", max_tokens=4, temperature=0)
    assert answer.model == of_llama_cpp.model


def test_llama_cpp_ends_a_text_where_the_context_is_full(of_llama_cpp):
    answer = of_llama_cpp.client.completions.create(
        model=of_llama_cpp.model, prompt="IL-6 and", temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == 64
    assert answer.choices[0].finish_reason == "length"


def test_llama_cpp_refuses_a_prompt_longer_than_the_context_and_transformers_serve_does_not(
    of_llama_cpp, of_transformers
):
    import openai

    prompt = "IL-6 " * 200
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        of_llama_cpp.client.completions.create(model=of_llama_cpp.model, prompt=prompt, max_tokens=4)
    answer = of_transformers.client.completions.create(model=of_transformers.model, prompt=prompt, max_tokens=4)
    assert answer.usage.prompt_tokens > 64
    assert answer.usage.completion_tokens == 4


def test_the_document_shows_what_the_released_model_writes(repository):
    model, tokenizer = open_model(repository), load_tokenizer(repository)
    ids = tokenizer("Vitamin D and the risk of")["input_ids"]
    written = tokenizer.decode(complete_prompts(model, [ids], tokenizer.eos_token_id, 20)[0])
    document = (repository / "docs/serving.md").read_text(encoding="utf-8")
    assert f"```text\n{written}\n```" in document
    assert f'"text": {json.dumps(written)}' in document


# vLLM and SGLang have their own Llama, which takes everything from the files.


@torch.no_grad()
def logits_from_files(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Llama as its paper and those programs define it, without Transformers: (batch, length, vocab_size)."""
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config and config["tie_word_embeddings"]
    assert (config["hidden_act"], config["attention_bias"], config["mlp_bias"]) == ("silu", False, False)
    assert config["rope_parameters"]["rope_type"] == "default"
    size, epsilon = config["head_dim"], config["rms_norm_eps"]

    def project(states: torch.Tensor, name: str) -> torch.Tensor:
        return states @ weights.pop(f"{name}.weight").float().T

    def norm(states: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(states, states.shape[-1:], weights.pop(f"{name}.weight").float(), epsilon)

    angles = torch.arange(ids.shape[1])[:, None] * config["rope_parameters"]["rope_theta"] ** (
        -torch.arange(0, size, 2) / size
    )
    rotation = torch.polar(torch.ones_like(angles), angles)

    def heads(states: torch.Tensor, number: int) -> torch.Tensor:
        return states.unflatten(-1, (number, size)).transpose(1, 2)

    def rotated(states: torch.Tensor) -> torch.Tensor:
        """Rotate feature i with feature i + size / 2."""
        turned = torch.complex(*states.chunk(2, -1)) * rotation
        return torch.cat((turned.real, turned.imag), -1)

    embedding = weights.pop("model.embed_tokens.weight").float()
    states = embedding[ids]
    for layer in (f"model.layers.{number}" for number in range(config["num_hidden_layers"])):
        normed = norm(states, f"{layer}.input_layernorm")
        query, key, value = (
            heads(project(normed, f"{layer}.self_attn.{kind}_proj"), config[f"num_{number}_heads"])
            for kind, number in (("q", "attention"), ("k", "key_value"), ("v", "key_value"))
        )
        attended = functional.scaled_dot_product_attention(
            rotated(query), rotated(key), value, is_causal=True, enable_gqa=True
        )
        states = states + project(attended.transpose(1, 2).flatten(2), f"{layer}.self_attn.o_proj")
        normed = norm(states, f"{layer}.post_attention_layernorm")
        gated = functional.silu(project(normed, f"{layer}.mlp.gate_proj")) * project(normed, f"{layer}.mlp.up_proj")
        states = states + project(gated, f"{layer}.mlp.down_proj")
    states = norm(states, "model.norm")
    assert not weights  # such as an lm_head, which a tied model must not have
    return states @ embedding.T


def test_the_files_of_the_llama_form_are_all_that_another_llama_needs(llama_folder, source):
    ids = random_ids(3, 20)
    with torch.no_grad():
        assert_close(logits_from_files(llama_folder, ids), open_model(source)(ids).logits, rtol=1e-4, atol=1e-4)
