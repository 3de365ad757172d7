"""The scripts that evaluate a model and generate text."""

import hashlib
import json
import os
import re
import shutil

import pytest
import torch
from pipeline_folders import TINY_MODEL
from row_files import write_lines
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from healthslm.bits_per_byte import score_documents
from healthslm.errors import UserError
from healthslm.generation import generate
from healthslm.generation_options import GenerationOptions
from healthslm.models import make_model, open_model, weights_sha256
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training.checkpoint import save_model


@pytest.fixture(scope="module")
def model_folder(sample_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_model(folder, make_model(TINY_MODEL | {"initializer_range": 0.3}), sample_folders.tokenizer)
    return folder


def test_evaluating_a_corpus_gives_the_result_for_its_tokens(model_folder, sample_folders, run_script_here, tmp_path):
    done = run_script_here(
        "evaluate",
        "--model",
        model_folder,
        "--data",
        sample_folders.corpus / "validation",
        "--output",
        tmp_path / "r.json",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    split = TokenizedSplit(sample_folders.tokens, "validation")
    model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True)
    score = score_documents(model, [split.document(i) for i in range(len(split))], split.document_bytes)
    expected = score.to_dict()
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert f"{expected['bits_per_byte']:.4f} bits per byte" in done.stderr


def test_fewer_documents_and_smaller_batches_give_the_result_of_these_documents(
    model_folder, sample_folders, run_script_here, tmp_path
):
    passes: list[int] = []  # tokens of each
    hook = register_module_forward_pre_hook(
        lambda module, inputs: passes.append(inputs[0].numel()) if isinstance(module, torch.nn.Embedding) else None
    )
    with hook:
        done = run_script_here(
            *("evaluate", "--model", model_folder, "--data", sample_folders.corpus / "validation"),
            *("--documents", 2, "--batch-tokens", 130, "--output", tmp_path / "r.json"),
        )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    split = TokenizedSplit(sample_folders.tokens, "validation")
    assert len(split) > 2 and 64 < max(passes) <= 130
    model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True)
    expected = score_documents(model, [split.document(i) for i in range(2)], split.document_bytes[:2]).to_dict()
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("damage", ["cut weights", "other shape", "wrong type"])
def test_a_damaged_model_is_reported_in_one_line(model_folder, tmp_path, damage):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    if damage == "cut weights":
        os.truncate(folder / "model.safetensors", 1000)
    else:
        config = json.loads((folder / "config.json").read_text())
        config |= {"intermediate_size": 96} if damage == "other shape" else {"hidden_size": "large"}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"^{folder}: can't load a causal language model: ") as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


def test_the_checksum_of_shards_depends_on_each_of_them(model_folder, tmp_path):
    whole = hashlib.sha256((model_folder / "model.safetensors").read_bytes()).hexdigest()
    assert weights_sha256(str(model_folder)) == whole
    open_model(model_folder).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    sums = "".join(hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards)
    assert len(shards) > 1
    assert weights_sha256(str(tmp_path / "shards")) == hashlib.sha256(sums.encode()).hexdigest()
    for shard in shards:
        shard.unlink()
    with pytest.raises(UserError, match=f"^{tmp_path}/shards: no weights"):
        weights_sha256(str(tmp_path / "shards"))


def test_greedy_decoding_takes_the_most_likely_token_each_time(model_folder, run_script_here):
    done = run_script_here(
        "generate", "--model", model_folder, "--prompt", "Vitamin", "--temperature", 0, "--max-new-tokens", 8
    )
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = [tokenizer.eos_token_id, *tokenizer.encode("Vitamin", add_special_tokens=False)]
    for _ in range(8):
        token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(token)
        if token == tokenizer.eos_token_id:
            break
    assert done.stdout.rstrip("\n") == tokenizer.decode(ids, skip_special_tokens=True).rstrip("\n")


def test_the_seed_decides_the_text(model_folder, run_script_here, tmp_path):
    (tmp_path / "prompts.txt").write_text("Vitamin D\nThe patients\n")
    texts = [
        run_script_here(
            "generate",
            "--model",
            model_folder,
            "--prompts",
            tmp_path / "prompts.txt",
            "--seed",
            seed,
            "--max-new-tokens",
            12,
        ).stdout
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert "Vitamin D" in texts[0] and "The patients" in texts[0]


@pytest.mark.parametrize("option", ["top_k", "top_p"])
def test_tokens_are_drawn_from_the_likeliest_ones_at_a_temperature(model_folder, tmp_path, monkeypatch, option):
    """The first new token of many equal prompts, of which three are possible."""
    temperature, count = 0.3, 100
    tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=True)
    ids = [tokenizer.eos_token_id, *tokenizer.encode("Vitamin", add_special_tokens=False)]
    model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    sums = (logits / temperature).softmax(-1).sort(descending=True).values.cumsum(-1)
    likeliest = logits.topk(3)
    expected = (likeliest.values / temperature).softmax(-1)
    assert (expected - likeliest.values.softmax(-1)).abs().max() > 0.2  # the temperature matters

    drawn: list[int] = []
    generate_ids = GenerationMixin.generate

    def generate_and_note(self, *arguments, **settings):
        result = generate_ids(self, *arguments, **settings)
        drawn.append(result[0, -1].item())
        return result

    monkeypatch.setattr(GenerationMixin, "generate", generate_and_note)
    (tmp_path / "prompts.txt").write_text("Vitamin\n" * count)
    limit = {"top_k": 3} if option == "top_k" else {"top_k": 0, "top_p": sums[1:3].mean().item()}
    options = {"prompts": tmp_path / "prompts.txt", "max_new_tokens": 1, "temperature": temperature, **limit}
    generate(GenerationOptions(model=str(model_folder), **options))
    assert len(drawn) == count and set(drawn) == set(likeliest.indices.tolist())
    shares = [drawn.count(token) / count for token in likeliest.indices.tolist()]
    assert shares == pytest.approx(expected.tolist(), abs=0.12)  # about three standard deviations


def test_text_that_fills_the_context_continues_from_its_last_half(model_folder, run_script_here, tmp_path):
    (tmp_path / "prompts.txt").write_text("Vitamin D\nThe patients\n")
    arguments = ["--model", model_folder, "--prompts", tmp_path / "prompts.txt", "--temperature", 0]
    longer = run_script_here("generate", *arguments, "--max-new-tokens", 150)
    assert longer.returncode == 0, longer.stderr
    message = "the model sees 64 tokens: where they are full, a text continues from the last half of them"
    assert longer.stderr.count(message) == 1

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True)
    new_tokens = 0
    texts = []
    for prompt in ("Vitamin D", "The patients"):
        ids = [tokenizer.eos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        first = 0  # of the tokens that the model sees
        for _ in range(150):
            if len(ids) - first == 64:
                first += 32
            ids.append(model(torch.tensor([ids[first:]])).logits[0, -1].argmax().item())
            new_tokens += 1
            if ids[-1] == tokenizer.eos_token_id:
                break
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    assert max(map(len, map(tokenizer.encode, texts))) > 96  # at least one text leaves its first half behind twice
    assert longer.stdout == "\n\n".join(texts) + "\n"
    assert re.search(rf"^{new_tokens} tokens in [\d.]+ seconds: \d+ tokens/s$", longer.stderr, re.MULTILINE)

    shorter = run_script_here("generate", *arguments, "--max-new-tokens", 8)
    assert "the model sees" not in shorter.stderr


def test_the_longest_prompt_that_fits_leaves_room_for_one_token(model_folder, run_script_here, tmp_path):
    """62 tokens, the separator and a new token fill the context of 64."""
    assert len(AutoTokenizer.from_pretrained(model_folder).encode("@" * 62, add_special_tokens=False)) == 62
    for length, status in ((62, 0), (63, 1)):
        (tmp_path / "prompts.txt").write_text("@" * length + "\n")
        done = run_script_here("generate", "--model", model_folder, "--prompts", tmp_path / "prompts.txt")
        assert done.returncode == status, done.stderr
    message = "error: prompt 1 has 63 tokens, but the limit is 62: the model's context of 64 also holds the separator"
    assert done.stderr.splitlines()[-1].startswith(message) and done.stdout == ""


def test_generated_text_comes_with_a_warning(model_folder, run_script_here):
    done = run_script_here("generate", "--model", model_folder, "--max-new-tokens", 2)
    assert "not medical advice" in done.stderr


def test_a_context_that_exceeds_the_model_s_is_refused(model_folder, sample_folders, run_script_here):
    data = sample_folders.corpus / "validation"
    done = run_script_here("evaluate", "--model", model_folder, "--data", data, "--context", 512)
    assert done.returncode == 2
    message = "error: --context: must be at most 64, the model's context, not 512 (see --help)"
    assert done.stderr.splitlines()[-1] == message


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("generate", ["--model", "no-such-folder"], "no-such-folder"),
        ("generate", ["--model", "{model}", "--prompt", "a", "--prompts", "b"], "exclude each other"),
        ("generate", ["--model", "{model}", "--prompts", "no-such-file"], "no-such-file"),
        ("evaluate", ["--model", "{model}", "--data", "no-such-file.parquet"], "no-such-file.parquet"),
        ("evaluate", ["--model", "no-such-folder", "--data", "x.parquet"], "no-such-folder"),
        ("generate", ["--model", "{model}", "--prompts", "{model}/model.safetensors"], "safetensors: not UTF-8 text"),
        ("evaluate", ["--model", "{model}", "--data", "{data}/numbers.jsonl"], "row 1: column text holds numbers"),
        ("generate", ["--model", "{model}", "--prompts", os.devnull], "this file contains no prompts"),
        ("evaluate", ["--model", "{model}", "--data", "x.parquet", "--device", "cuda"], "--device cuda: PyTorch "),
        ("generate", ["--model", "{model}", "--device", "cuda"], "finds no GPU here; use --device cpu"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    model_folder, run_script_here, monkeypatch, tmp_path, script, arguments, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_lines(tmp_path / "numbers.jsonl", [{"text": 12}])
    done = run_script_here(script, *[argument.format(model=model_folder, data=tmp_path) for argument in arguments])
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ") and message in error and "Traceback" not in done.stderr
