"""Fine-tuning: losses, adapters, merged models, resumed runs, and what is refused before training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from finetuning_runs import ROWS, nats_by_hand, options
from in_precision import set_precision
from row_files import write_lines
from safetensors.torch import load_file, save_file
from tiny_models import byte_model, byte_tokenizer, chat_tokenizer, llama_twin
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from healthslm.errors import UserError
from healthslm.finetuning import adapters, run, sft
from healthslm.finetuning.adapters import check_packing
from healthslm.finetuning.examples import IGNORED
from healthslm.finetuning.trainer import CompletionTrainer, make_trainer
from healthslm.options import OptionError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, for the tokenizer of single bytes with the chat template."""
    folder = tmp_path_factory.mktemp("base")
    byte_model().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base: Path):
    return AutoTokenizer.from_pretrained(base, trust_remote_code=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "data": [str(write_lines(folder / "train.jsonl", ROWS))],
        "validation": [str(write_lines(folder / "validation.jsonl", ROWS[:3]))],
    }


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


@torch.no_grad()
@pytest.mark.parametrize(
    ("packing", "precision", "tolerance"), [(True, "fp32", 1e-4), (False, "fp32", 1e-4), (True, "bf16", 1e-2)]
)
def test_the_first_loss_is_the_cross_entropy_of_the_completions_alone(
    base, files, tokenizer, tmp_path, monkeypatch, packing, precision, tolerance
):
    set_precision(precision, monkeypatch.setattr)
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
    assert metrics["training"]["first_loss"] == pytest.approx(nats.mean().item(), rel=tolerance)
    assert metrics["data"]["training"]["completion_tokens"] == len(nats)
    assert metrics["training"]["sequences"] == (3 if packing else 8)


def test_a_machine_with_several_gpus_trains_on_one(tmp_path):
    """Trainer would give each of them a micro-batch, and split arguments of the model that are not batches."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=3)
    arguments._n_gpu = 2
    assert arguments.train_batch_size == 6
    assert run.on_one_gpu(arguments).train_batch_size == 3


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
    assert "weights were chosen on the validation data" in card


def test_a_run_stops_after_the_best_evaluation_and_keeps_its_weights(base, tmp_path):
    said = [[{"prompt": f"Item {n} is", "completion": f" {word}."} for n in range(8)] for word in ("odd", "new")]
    data, validation = ([str(write_lines(tmp_path / f"{n}.jsonl", rows))] for n, rows in enumerate(said))
    more = {"epochs": 10.0, "evaluations": 20, "patience": 1, "learning_rate": 0.03, "packing": False}
    sft.finetune(options(base, tmp_path / "run", data=data, validation=validation, **more))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    training = metrics["training"]
    *_, best, last = training["evaluations"]
    assert best["loss"] == min(found["loss"] for found in training["evaluations"]) < 0.98 * last["loss"]
    assert training["best_step"] == best["step"] < last["step"] == training["steps"] < 40
    assert metrics["validation"]["after"]["loss"] == pytest.approx(best["loss"], rel=1e-3)


class _Stop(TrainerCallback):
    def on_save(self, *arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def stopped(base: Path, files, tmp_path, monkeypatch) -> Path:
    """The folder of a run that was interrupted after its first checkpoint."""

    def make_stopping_trainer(*arguments: Any) -> Any:
        trainer = make_trainer(*arguments)
        trainer.add_callback(_Stop())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(sft, "make_trainer", make_stopping_trainer)
        with pytest.raises(KeyboardInterrupt):
            sft.finetune(options(base, tmp_path / "stopped", **files))
    assert [path.name for path in (tmp_path / "stopped/checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    return tmp_path / "stopped"


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(adapter, base, files, stopped):
    sft.finetune(options(base, stopped, **files, resume=True))
    expected = load_file(adapter / "adapter_model.safetensors")
    found = load_file(stopped / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=0, atol=0)
    whole, resumed = ((folder, json.loads((folder / "metrics.json").read_text())) for folder in (adapter, stopped))
    assert [folder for folder, metrics in (whole, resumed) if "seconds" in metrics["training"]] == [adapter]
    assert [folder for folder, _ in (whole, resumed) if "| time |" in (folder / "README.md").read_text()] == [adapter]
    with pytest.raises(UserError, match="already holds a finished run"):
        sft.finetune(options(base, stopped, **files, resume=True))


def test_a_run_is_not_resumed_with_other_options_data_or_weights(base, files, stopped, tmp_path):
    with pytest.raises(UserError, match="holds an unfinished run: continue it with --resume"):
        sft.finetune(options(base, stopped, **files))
    with pytest.raises(OptionError, match="started with 0.01, not 0.02"):
        sft.finetune(options(base, stopped, **files, resume=True, learning_rate=0.02))
    for path, problem in [
        (Path(files["data"][0]), "the training data changed"),
        (base / "model.safetensors", "the base weights changed"),
    ]:
        before = path.read_bytes()
        try:
            if path.suffix == ".jsonl":
                write_lines(path, ROWS[::-1] + ROWS[:1])
            else:
                save_file({name: -weight for name, weight in load_file(path).items()}, path, {"format": "pt"})
            with pytest.raises(UserError, match=problem):
                sft.finetune(options(base, stopped, **files, resume=True))
        finally:
            path.write_bytes(before)


def test_a_run_that_was_stopped_before_its_first_step_is_resumed(base, files, tmp_path, monkeypatch):
    def stop(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    asked = options(base, tmp_path / "run", data=files["data"], epochs=1.0, report_to="tensorboard")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CompletionTrainer, "__init__", stop)
        sft.finetune(asked)
    sft.finetune(replace(asked, resume=True))
    assert (tmp_path / "run/metrics.json").exists()


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
    file, output = str(write_lines(tmp_path / "chats.jsonl", rows)), tmp_path / "run"
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
    file = str(write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts]))
    sft.finetune(options(base, tmp_path / "run", data=[file], validation=[file], batch_size=8, evaluations=1))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert "weights were chosen" not in (tmp_path / "run/README.md").read_text()
    assert metrics["training"]["first_loss"] == pytest.approx(nats.mean().item(), rel=1e-4)
    assert metrics["data"]["training"]["completion_tokens"] == len(nats)
    assert metrics["validation"]["after"]["loss"] < metrics["validation"]["before"]["loss"]


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
        ({"validation_examples": 2, "validation": []}, "validation_examples: needs --validation"),
        ({"method": "full", "rank": 4}, "rank: is for adapters, but --method full"),
        ({"method": "full", "target_modules": ["q_proj"]}, "target_modules: is for adapters"),
        ({"method": "full", "merge": True}, "merge: is for adapters"),
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
