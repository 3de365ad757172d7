"""Fine-tuning on examples: losses, packing, adapters, resumed runs, and what is refused."""

import json
import math
import random
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from tiny_models import byte_model, byte_tokenizer, llama_twin
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
    pipeline,
)

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

from healthslm.errors import UserError  # noqa: E402
from healthslm.files import write_json  # noqa: E402
from healthslm.finetuning import adapters, run, sft  # noqa: E402
from healthslm.finetuning.adapters import check_packing  # noqa: E402
from healthslm.finetuning.completions import measure_completions, score_completions  # noqa: E402
from healthslm.finetuning.examples import IGNORED, Example, read_examples  # noqa: E402
from healthslm.finetuning.options import FinetuneOptions  # noqa: E402
from healthslm.finetuning.run import check_resumed, run_facts  # noqa: E402
from healthslm.finetuning.trainer import CompletionTrainer, make_trainer  # noqa: E402
from healthslm.options import OptionError  # noqa: E402
from healthslm.text_overlap import score_token_f1  # noqa: E402

ROWS = [
    {"prompt": f"Item {number} is", "completion": f" {'even' if number % 2 == 0 else 'odd'}."} for number in range(8)
]
FAST = {"rank": 4, "batch_size": 2, "epochs": 2.0, "learning_rate": 0.01, "evaluations": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, for the tokenizer of single bytes with the chat template."""
    folder = tmp_path_factory.mktemp("base")
    byte_model().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (REPOSITORY / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base: Path):
    return AutoTokenizer.from_pretrained(base, trust_remote_code=True)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "data": [write_rows(folder / "train.jsonl", ROWS)],
        "validation": [write_rows(folder / "validation.jsonl", ROWS[:3])],
    }


def options(base: Path, output: Path, **more: Any) -> FinetuneOptions:
    return FinetuneOptions(**({"model": str(base), "output": output} | FAST | more))


@pytest.fixture(scope="module")
def adapter(base: Path, files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, merged too."""
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    more = {"merge": True, "generate": 2, "max_new_tokens": 5, "report_to": "tensorboard"}
    sft.finetune(options(base, folder, **files, **more))
    return folder


def load(folder: Path, auto_class: Any = AutoModelForCausalLM) -> torch.nn.Module:
    return auto_class.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(6, 40)[None]).logits


def read(rows: list[dict[str, Any]], tokenizer: Any, tmp_path: Path, context: int = 64, **more: Any) -> list[Example]:
    asked = options(Path("none"), tmp_path, data=[write_rows(tmp_path / "rows.jsonl", rows)], **more)
    return read_examples(asked.data, asked, tokenizer, context, asked.examples).examples


def nats_by_hand(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """The negative log-likelihood of each token of a completion."""
    ids = torch.tensor([prompt + completion])
    log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, ids.shape[1] - 1)
    return -torch.stack([log_probs[place, ids[0, place + 1]] for place in places])


@torch.no_grad()
@pytest.mark.parametrize("packing", [True, False])
def test_the_first_loss_is_the_cross_entropy_of_the_completions_alone(base, files, tokenizer, tmp_path, packing):
    model = load(base)
    nats = torch.cat(
        [
            nats_by_hand(
                model,
                tokenizer(row["prompt"])["input_ids"],
                [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
            )
            for row in ROWS
        ]
    )
    with torch.enable_grad():
        asked = options(base, tmp_path / "run", data=files["data"], packing=packing, batch_size=8, epochs=1.0)
        sft.finetune(asked)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["training"]["first_loss"] == pytest.approx(nats.mean().item(), rel=1e-4)
    assert metrics["data"]["training"]["completion_tokens"] == len(nats)
    assert metrics["training"]["sequences"] == (3 if packing else 8)


@torch.no_grad()
def test_bits_per_byte_of_completions_equal_those_counted_by_hand(base, tokenizer, tmp_path):
    model = load(base)
    examples = read(ROWS, tokenizer, tmp_path)
    nats, size = 0.0, 0
    for row in ROWS:
        ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        nats += nats_by_hand(model, tokenizer(row["prompt"])["input_ids"], [*ids, 0]).sum().item()
        size += len(row["completion"].encode())
    found = measure_completions(model, examples)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["interval"][0] < found["bits_per_byte"] < found["interval"][1]


def gradients(trainer_class: type, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, list]:
    trainer = trainer_class(
        model=model,
        args=trl.SFTConfig(
            output_dir="unused", bf16=False, gradient_checkpointing=False, report_to="none", use_cpu=True
        ),
        train_dataset=Dataset.from_dict({"input_ids": [[0, 7, 8]], "labels": [[-100, 7, 8]]}),
        processing_class=byte_tokenizer(),
    )
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(7))
    loss.backward()
    return loss.item(), [weight.grad for weight in model.parameters() if weight.requires_grad]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_trainer_computes_trls_loss_and_gradients(base):
    ids = torch.arange(6, 30).view(2, 12)
    labels = ids.clone()
    labels[0, :5] = labels[1, :9] = IGNORED
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    ours, theirs = (gradients(kind, load(base), batch) for kind in (CompletionTrainer, trl.SFTTrainer))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)


def test_an_adapter_opens_in_another_folder_and_learns(adapter, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load(adapter, peft.AutoPeftModelForCausalLM)
    assert not torch.allclose(logits(model), logits(load(base)), atol=1e-2)
    found = json.loads((adapter / "metrics.json").read_text())
    assert found["validation"]["after"]["loss"] < found["validation"]["before"]["loss"]
    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=True)
    written = pipeline("text-generation", model=str(adapter), trust_remote_code=True, device="cpu")
    text = written("Item 2 is", max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    prompt = tokenizer("Item 2 is", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert text == tokenizer.decode(expected[0, 10:], skip_special_tokens=True)


def test_the_merged_model_has_the_logits_of_base_and_adapter(adapter):
    unmerged = logits(load(adapter, peft.AutoPeftModelForCausalLM))
    merged = load(adapter / "merged")
    torch.testing.assert_close(logits(merged), unmerged, rtol=1e-4, atol=1e-4)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(adapter / "merged/model.safetensors")


def test_the_output_has_a_card_and_nothing_of_the_run(adapter):
    assert {path.name for path in adapter.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "merged", "metrics.json"),
        *("README.md", "tensorboard", "tokenizer.json", "tokenizer_config.json"),
    }
    metrics, card = json.loads((adapter / "metrics.json").read_text()), (adapter / "README.md").read_text()
    assert f"{metrics['validation']['after']['bits_per_byte']:.3f}" in card
    assert metrics["base"]["sha256"] in card and "medical advice" in card
    assert "AutoPeftModelForCausalLM" in card
    assert "AutoPeftModelForCausalLM" not in (adapter / "merged/README.md").read_text()
    assert metrics["validation"]["completions"]["examples"] == 2
    assert list((adapter / "tensorboard").glob("events.*"))


class _Stop(TrainerCallback):
    def on_save(self, *arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(adapter, base, files, tmp_path, monkeypatch):
    output = tmp_path / "stopped"
    asked = options(base, output, **files)

    def make_stopping_trainer(*arguments: Any) -> Any:
        trainer = make_trainer(*arguments)
        trainer.add_callback(_Stop())
        return trainer

    monkeypatch.setattr(sft, "make_trainer", make_stopping_trainer)
    with pytest.raises(KeyboardInterrupt):
        sft.finetune(asked)
    monkeypatch.undo()
    assert [path.name for path in (output / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]

    with pytest.raises(UserError, match="holds an unfinished run: continue it with --resume"):
        sft.finetune(asked)
    with pytest.raises(OptionError, match="started with 0.01, not 0.02"):
        sft.finetune(options(base, output, **files, resume=True, learning_rate=0.02))
    with pytest.raises(UserError, match="the training data changed"):
        changed = write_rows(tmp_path / "changed.jsonl", ROWS[::-1] + ROWS[:1])
        run_file = output / "run.json"
        saved = json.loads(run_file.read_text())
        saved["options"]["data"] = [changed]
        run_file.write_text(json.dumps(saved))
        sft.finetune(options(base, output, **(files | {"data": [changed]}), resume=True))
    saved["options"]["data"] = files["data"]
    run_file.write_text(json.dumps(saved))

    sft.finetune(options(base, output, **files, resume=True))
    expected = load_file(adapter / "adapter_model.safetensors")
    found = load_file(output / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=0, atol=0)
    with pytest.raises(UserError, match="already holds a finished run"):
        sft.finetune(options(base, output, **files, resume=True))


def test_other_weights_under_the_same_name_are_not_resumed(base, files, tmp_path):
    facts = {"base": {"model": str(base), "sha256": "one"}, "data": {"training": {"sha256": "a"}, "validation": None}}
    asked = options(base, tmp_path, **files)
    write_json(tmp_path / "run.json", run_facts(asked, facts))
    check_resumed(asked, run_facts(asked, facts))
    other = facts | {"base": {"model": str(base), "sha256": "two"}}
    with pytest.raises(UserError, match="the base weights changed"):
        check_resumed(asked, run_facts(asked, other))


@pytest.fixture(scope="module")
def others(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GPT-2, Llama with the weights of `base`, and Qwen2 with a head of its own, all for the tokenizer of bytes."""
    ids = {"vocab_size": len(byte_tokenizer()), "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    torch.manual_seed(0)
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **ids)),
        "llama": llama_twin(load(base)),
        "qwen2": Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                tie_word_embeddings=False,
                **ids,
            )
        ),
    }
    folders = {name: tmp_path_factory.mktemp(name) for name in models}
    for name, model in models.items():
        model.save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(base, trust_remote_code=True).save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_other_models_get_an_adapter_that_opens_and_merges(others, adapter, files, tmp_path, name):
    output = tmp_path / "run"
    sft.finetune(options(others[name], output, **files, merge=True))
    found = json.loads((output / "metrics.json").read_text())["validation"]
    assert found["after"]["loss"] < found["before"]["loss"]
    unmerged, merged = load(output, peft.AutoPeftModelForCausalLM), load(output / "merged")
    torch.testing.assert_close(logits(merged), logits(unmerged), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(unmerged), logits(load(others[name])), atol=1e-2)
    generate = pipeline("text-generation", model=str(output), trust_remote_code=True, device="cpu")
    text = generate("Item 2 is", max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = merged.generate(**generate.tokenizer("Item 2 is", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert text == generate.tokenizer.decode(ids[0, 10:], skip_special_tokens=True)
    if name == "llama":  # the same model as HealthSLM
        expected = load_file(adapter / "adapter_model.safetensors")
        for key, weights in load_file(output / "adapter_model.safetensors").items():
            torch.testing.assert_close(weights, expected[key], rtol=1e-3, atol=1e-4)


def test_all_weights_of_gpt2_are_trained(others, files, tmp_path):
    sft.finetune(options(others["gpt2"], tmp_path / "run", **files, method="full"))
    found = json.loads((tmp_path / "run/metrics.json").read_text())["validation"]
    assert found["after"]["loss"] < found["before"]["loss"]
    assert not torch.allclose(logits(load(tmp_path / "run")), logits(load(others["gpt2"])), atol=1e-3)


def test_a_model_that_mixes_packed_examples_is_refused(base, others, tmp_path):
    asked = options(base, tmp_path, data=[])
    for separating in (load(base), *map(load, others.values())):
        check_packing(separating, asked)
    model = load(others["gpt2"])
    forward = model.forward
    model.forward = lambda position_ids, **inputs: forward(
        position_ids=torch.arange(position_ids.numel())[None], **inputs
    )
    with pytest.raises(UserError, match="mixes them up: use --packing false"):
        check_packing(model, asked)


def test_the_mask_of_a_chat_is_the_assistants_text(tokenizer, tmp_path):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "α-synuclein?\n🧠"},
        {"role": "assistant", "content": " A protein é.\nYes"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "🧠"},
    ]
    (example,) = read([{"messages": chat}], tokenizer, tmp_path, context=200)
    learned = [token for token in example.labels if token != IGNORED]
    assert tokenizer.decode(learned) == " A protein é.\nYes<|end|>🧠<|end|><|endoftext|>"
    assert example.completion == " A protein é.\nYes\n🧠" and example.answer == "🧠" and example.prompt == "And?"
    assert tokenizer.decode(example.input_ids) == (
        "<|endoftext|><|system|>Be brief.<|end|><|user|>α-synuclein?\n🧠<|end|><|assistant|> A protein é.\nYes<|end|>"
        "<|user|>And?<|end|><|assistant|>🧠<|end|><|endoftext|>"
    )
    assert example.input_ids[: example.prompt_tokens] == tokenizer.apply_chat_template(
        chat[:-1], add_generation_prompt=True, return_dict=False
    )


def nats_of_rows(model: torch.nn.Module, tokenizer: Any, texts: list[tuple[str, str]]) -> torch.Tensor:
    """The negative log-likelihood of the tokens of the second of two texts, which spell their special tokens out."""
    return torch.cat(
        [
            nats_by_hand(
                model, tokenizer(before)["input_ids"], tokenizer(learned, add_special_tokens=False)["input_ids"]
            )
            for before, learned in texts
        ]
    )


def test_a_run_on_chats_learns_the_assistants_messages_and_its_card_runs(base, tokenizer, tmp_path, capsys):
    said = [(f"Is {number} even?", "Yes." if number % 2 == 0 else "No.") for number in range(8)]
    names = ("user", "assistant")
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in zip(names, pair, strict=True)]} for pair in said
    ]
    with torch.no_grad():
        nats = nats_of_rows(
            load(base),
            tokenizer,
            [(f"<|user|>{asked}<|end|><|assistant|>", f"{answer}<|end|><|endoftext|>") for asked, answer in said],
        )
    file, output = write_rows(tmp_path / "chats.jsonl", rows), tmp_path / "run"
    asked = {"data": [file], "validation": [file], "batch_size": 8, "generate": 2, "max_new_tokens": 5}
    sft.finetune(options(base, output, **asked))
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["training"]["first_loss"] == pytest.approx(nats.mean().item(), rel=1e-4)
    assert metrics["data"]["training"]["completion_tokens"] == len(nats)
    assert metrics["validation"]["after"]["loss"] < metrics["validation"]["before"]["loss"]

    usage = (output / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    capsys.readouterr()
    exec(usage.replace("path/to/this/folder", str(output)), {})
    chat = pipeline("text-generation", model=str(output), trust_remote_code=True, device="cpu")
    question = [{"role": "user", "content": metrics["validation"]["samples"][0]["prompt"]}]
    answer = chat(question, max_new_tokens=64, do_sample=False)[0]["generated_text"][-1]["content"]
    assert answer and capsys.readouterr().out == f"{answer}\n"


def test_a_run_on_plain_text_learns_all_of_it(base, tokenizer, tmp_path):
    texts = [f"Item {number} is {'even' if number % 2 == 0 else 'odd'}." for number in range(8)]
    with torch.no_grad():
        nats = nats_of_rows(load(base), tokenizer, [("", f"{text}<|endoftext|>") for text in texts])
    file = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    sft.finetune(options(base, tmp_path / "run", data=[file], validation=[file], batch_size=8))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["training"]["first_loss"] == pytest.approx(nats.mean().item(), rel=1e-4)
    assert metrics["data"]["training"]["completion_tokens"] == len(nats)
    assert metrics["validation"]["after"]["loss"] < metrics["validation"]["before"]["loss"]


def test_the_released_tokenizer_has_the_chat_template_and_no_new_tokens(repository):
    released = AutoTokenizer.from_pretrained(repository, trust_remote_code=True)
    assert len(released) == 32_000
    chat = [{"role": "user", "content": "What is <asthma>?"}, {"role": "assistant", "content": "A disease."}]
    found = released.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    learned = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert released.decode(learned) == "A disease.<|end|><|endoftext|>"
    assert [token for token in found["input_ids"] if token < 6] == [0, 3, 5, 4, 5, 0]
    assert trl.chat_template_utils.is_chat_template_stop_token_trained(released)


def test_fields_and_templates_make_the_same_examples(tokenizer, tmp_path):
    rows = [{"abstract": "Mice.", "title": "On mice", "whole": "Mice.\nTitle: On mice"}]
    (by_template,) = read(rows, tokenizer, tmp_path, prompt="{abstract}\nTitle:", completion=" {title}")
    (by_mark,) = read(rows, tokenizer, tmp_path, text="whole", completion_after="\nTitle:")
    assert by_template == by_mark
    assert tokenizer.decode(by_template.input_ids) == "<|endoftext|>Mice.\nTitle: On mice<|endoftext|>"
    assert by_template.labels.count(IGNORED) == by_template.prompt_tokens == 13
    (plain,) = read(rows, tokenizer, tmp_path, text="whole")
    assert plain.labels[1:] == plain.input_ids[1:] and plain.labels[0] == IGNORED
    (spelled,) = read([{"prompt": "a", "completion": "<|end|>"}], tokenizer, tmp_path)
    assert 5 not in spelled.input_ids


def test_cut_examples_are_counted_and_what_is_left_without_a_completion_is_dropped(tokenizer, tmp_path):
    rows = [{"prompt": "abc", "completion": "d" * 20}, {"prompt": "a" * 30, "completion": "b"}, ROWS[0]]
    asked = options(Path("none"), tmp_path, data=[write_rows(tmp_path / "rows.jsonl", rows)])
    with pytest.raises(UserError, match=r"2 of 3 examples are longer than the context of 20 tokens \(.* 33\)"):
        read_examples(asked.data, asked, tokenizer, 20, None)
    asked.truncate = True
    found = read_examples(asked.data, asked, tokenizer, 20, None)
    assert (len(found), found.truncated, found.dropped) == (2, 1, 1)
    assert {example.completion for example in found.examples} == {"d" * 16, " even."}


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "rows, more, message",
    [
        ([], {}, "no examples: there are no rows"),
        ([{"a": "b"}], {}, "no fields prompt and completion, messages, or text; the fields are a"),
        (ROWS, {"prompt": "question", "completion": "completion"}, "row 1: no field 'question'; the fields are prompt"),
        (ROWS, {"prompt": "{prompt", "completion": "completion"}, "not a template"),
        (ROWS, {"prompt": "prompt"}, "--prompt and --completion belong together"),
        (ROWS, {"text": "prompt", "messages": "x"}, "exclude each other"),
        (ROWS, {"completion_after": "x"}, "name its field with --text"),
        (ROWS, {"text": "prompt", "completion_after": "nowhere"}, "in all 8 rows, prompt or completion is empty"),
        ([{"prompt": "a", "completion": " "}], {}, "no examples"),
        ([{"messages": "hello"}], {}, "not a list of messages with role and content"),
        ([{"messages": [*CHAT, {"role": "tool", "content": "x"}]}], {}, "unknown role tool"),
        ([{"messages": [{"role": "user", "content": "<|end|>"}, CHAT[1]]}], {}, r"special token <\|end\|>"),
    ],
)
def test_data_that_cannot_be_used_is_refused_in_one_line(tokenizer, tmp_path, rows, more, message):
    with pytest.raises(UserError, match=message) as error:
        read(rows, tokenizer, tmp_path, **more)
    assert "\n" not in str(error.value)


def test_chats_need_a_template_that_marks_the_assistants_text(base, tmp_path):
    plain = AutoTokenizer.from_pretrained(base, trust_remote_code=True)
    plain.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        read([{"messages": CHAT}], plain, tmp_path)
    plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="does not mark the assistant's text"):
        read([{"messages": CHAT}], plain, tmp_path)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"target_modules": ["lm_head"]}, "lm_head is the embedding or the head, which can't be adapted"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is the embedding or the head"),
        ({"target_modules": ["q_prj"]}, "no linear layer 'q_prj'; choose from down_proj, gate_proj"),
        ({"context": 65}, "must be at most 64"),
        ({"batch_size": 3, "micro_batch_size": 2}, "multiple of --micro-batch-size"),
        ({"resume": True}, "no run to resume"),
        ({"report_to": "wandb"}, "wandb is not installed"),
        ({"generate": 2, "max_new_tokens": 64}, "leaves room"),
        ({"generate": 2, "validation": []}, "generate: needs --validation"),
        ({"patience": 2, "validation": []}, "patience: needs --validation"),
    ],
)
def test_options_that_cannot_work_are_refused_before_training(base, files, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(CompletionTrainer, "train", lambda *arguments, **settings: pytest.fail("it trains"))
    with pytest.raises(UserError, match=message):
        sft.finetune(options(base, tmp_path / "run", **(files | more)))
    assert not list(tmp_path.rglob("run.json"))  # with the right options it starts


def test_an_adapter_is_trained_on_weights_in_4_bits_and_merged_into_the_whole_ones(files, tokenizer, tmp_path):
    wide = tmp_path / "wide"  # on CPUs with bf16, bitsandbytes needs whole blocks of 64 weights
    byte_model(hidden_size=64, intermediate_size=128).save_pretrained(wide)
    tokenizer.save_pretrained(wide)
    sft.finetune(options(wide, tmp_path / "run", **files, method="qlora", merge=True))
    found = json.loads((tmp_path / "run/metrics.json").read_text())["validation"]
    assert found["after"]["loss"] < found["before"]["loss"]
    onto_whole = logits(load(tmp_path / "run", peft.AutoPeftModelForCausalLM))
    torch.testing.assert_close(logits(load(tmp_path / "run/merged")), onto_whole, rtol=1e-4, atol=1e-4)


def test_qlora_without_bitsandbytes_is_refused(base, files, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="bitsandbytes is not installed: pip install"):
        sft.finetune(options(base, tmp_path / "run", **files, method="qlora"))


def test_an_adapter_is_no_base_and_other_files_are_not_replaced(adapter, base, files, tmp_path):
    with pytest.raises(UserError, match="an adapter, not a whole model"):
        sft.finetune(options(adapter, tmp_path / "run", **files))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files than a fine-tuned model"):
        sft.finetune(options(base, tmp_path, **files))


def test_a_full_disk_is_found_before_training(base, files, tmp_path, monkeypatch):
    usage = run.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(UserError, match="0 MB are free, but the run needs"):
        sft.finetune(options(base, tmp_path / "run", **files))


def test_completions_of_one_line_are_compared_by_their_first_line():
    examples = [Example([0], [0], "One two. Three.", " one two", " one two", 1)] * 2
    found = score_completions(examples, {"before": ["one two\nthree four", "x"], "after": [" one two", " one"]})
    assert found["before"]["rouge1"]["mean"] == pytest.approx(0.5)
    assert found["after"]["rouge1"]["mean"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["first_sentence"]["rouge1"]["mean"] == 1
    assert found["after"]["token_f1"]["mean"] == pytest.approx((1 + 2 / 3) / 2)


def test_token_f1_equals_rouge_1_of_words_without_punctuation_and_articles():
    class Words:
        def tokenize(self, text: str) -> list[str]:
            kept = "".join(character for character in text.lower() if character not in string.punctuation)
            return [word for word in kept.split() if word not in ("a", "an", "the")]

    words = ["The", "a", "an", "asthma,", "Asthma", "of", "theory", "drug-induced", "drug", "(heart)"]
    choose = random.Random(0)
    texts = [" ".join(choose.choices(words, k=choose.randint(1, 8))) for _ in range(200)]
    answered = [pair for pair in zip(texts[:100], texts[100:], strict=True) if all(map(Words().tokenize, pair))]
    scorer = RougeScorer(["rouge1"], tokenizer=Words())
    for found, expected in answered:
        f1 = scorer.score(expected, found)["rouge1"].fmeasure
        assert score_token_f1([found], [expected])["mean"] == pytest.approx(f1)
    assert len(answered) > 50
    # SQuAD's rule for texts without words
    assert score_token_f1(["The", "The", "asthma"], ["a", "asthma", "a"])["mean"] == pytest.approx(1 / 3)


def test_the_command_line_reads_the_recipes(repository):
    from healthslm.arguments import parse

    for recipe in (repository / "configs/finetune").glob("*.yaml"):
        if recipe.name in ("title.yaml", "consumer-qa.yaml"):
            found = parse(FinetuneOptions, ["--recipe", str(recipe), "--output", "runs/x"])
            assert Path(found.model) == repository
