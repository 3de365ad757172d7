"""Fine-tuned classifiers: what they learn, that pipelines open them elsewhere, resuming, and errors before training."""

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clean_process import result_of, start_clean_process
from in_precision import set_precision
from row_files import write_lines
from safetensors.torch import load_file
from tiny_models import byte_model, byte_tokenizer, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, trainer

from healthslm.classification.finetune import finetune_classifier
from healthslm.classification.options import ClassifierOptions
from healthslm.errors import UserError
from healthslm.hub.files import sibling_files
from healthslm.models import weights_sha256

DRUGS = ("aspirin", "heparin", "lithium", "insulin", "quinine")
DISEASES = ("gout", "acute gout", "mania", "asthma")


def sentence_lines(drug: str, disease: str) -> str:
    first, *rest = disease.split()
    rows = [drug, "B-Drug"], ["eases", "O"], [first, "B-Disease"], *[[word, "I-Disease"] for word in rest]
    return "".join(f"{word}\t{tag}\n" for word, tag in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small untrained model with a tokenizer of bytes, and labeled data of each kind."""
    folder = tmp_path_factory.mktemp("classification")
    byte_model().save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    sentences = [sentence_lines(drug, disease) for drug in DRUGS for disease in DISEASES]
    (folder / "mentions.tsv").write_text("\n".join(sentences))
    roles = [
        {"sentences": [f"We saw {drug}.", f"We saw {disease}.", "It works."], "labels": ["A", "B", "C"]}
        for drug in DRUGS
        for disease in DISEASES
    ]
    (folder / "roles.jsonl").write_text("\n".join(map(json.dumps, roles)))
    texts = [{"text": f"took {drug}", "label": "drug"} for drug in DRUGS]
    texts += [{"text": f"had {disease}", "label": "disease"} for disease in DISEASES]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder


def options_for(folder: Path, output: Path, data: str = "mentions.tsv", **more) -> ClassifierOptions:
    steps = {"epochs": 6, "learning_rate": 1e-2, "batch_size": 2, "device": "cpu"}
    train = folder / data
    files = {"train": [train], "validation": train, "test": train}
    return ClassifierOptions(**{"model": str(folder / "base"), "output": output, **files, **steps, **more})


def stop(*arguments, **more):
    raise KeyboardInterrupt


def metrics_of(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def mentions_model(folder) -> Path:
    output = folder / "mentions-model"
    finetune_classifier(options_for(folder, output, bidirectional=True))
    return output


def find_mentions(folder: str, text: str) -> dict:
    """Mentions of a text, in a process without this project, and whether the first token sees the last one."""
    from transformers import pipeline

    classifier = pipeline("token-classification", folder, trust_remote_code=True, aggregation_strategy="simple")
    logits = [
        classifier.model(**classifier.tokenizer(changed, return_tensors="pt")).logits[0, 1]
        for changed in (text, text[:-1] + "x")
    ]
    found = [[mention["entity_group"], mention["start"], mention["end"]] for mention in classifier(text)]
    return {"mentions": found, "bidirectional": bool((logits[0] - logits[1]).abs().max() > 1e-3)}


def test_a_pipeline_in_another_process_finds_whole_mentions_and_attends_in_both_directions(mentions_model, tmp_path):
    text = "heparin eases acute gout"
    found = result_of(start_clean_process(tmp_path / "home", find_mentions, mentions_model, text))
    assert [(kind, text[start:end]) for kind, start, end in found["mentions"]] == [
        ("Drug", "heparin"),
        ("Disease", "acute gout"),
    ]
    assert found["bidirectional"]


def test_a_small_model_learns_twenty_sentences_by_heart(mentions_model):
    metrics = metrics_of(mentions_model)
    assert metrics["test"]["f1"] == metrics["validation"]["f1"] == 1
    assert metrics["test"]["mentions"] == 2 * len(DRUGS) * len(DISEASES)
    assert metrics["baselines"]["dictionary"]["f1"] == 1
    assert metrics["data"]["train"]["examples"] == 20
    assert {path.name for path in mentions_model.iterdir()} >= {"README.md", "tokenizer.json", "modeling_healthslm.py"}
    assert not list(mentions_model.rglob("checkpoint*")) and not list(mentions_model.rglob("*.p*t*h"))
    card = (mentions_model / "README.md").read_text(encoding="utf-8")
    assert "may have read the text of the evaluation data in pretraining" in card


def run_card(output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the code in the card of a classifier prints."""
    usage = (output / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    capsys.readouterr()
    exec(usage.replace("path/to/this/folder", str(output)), {})
    return capsys.readouterr().out


@pytest.mark.parametrize(("data", "precision"), [("roles.jsonl", "bf16"), ("texts.jsonl", "fp32")])
def test_sentences_and_texts_are_learned_by_heart(data, precision, folder, tmp_path, capsys, monkeypatch):
    set_precision(precision, monkeypatch.setattr)
    task = "sentences" if data == "roles.jsonl" else "text"
    finetune_classifier(options_for(folder, tmp_path / "out", data, task=task))
    metrics = metrics_of(tmp_path / "out")
    assert metrics["test"]["macro_f1"] == 1
    assert metrics["baselines"]["majority"]["macro_f1"] < 0.5
    printed = ast.literal_eval(run_card(tmp_path / "out", capsys))
    if task == "text":
        assert printed[0]["label"] in ("drug", "disease")
    else:
        assert len(printed) == 3 and set(printed) <= {"A", "B", "C"}


def test_fields_have_any_name_and_a_baseline_begins_with_new_weights_and_stops_without_progress(folder, tmp_path):
    rows = [{"abstract": f"took {drug}", "kind": "drug"} for drug in DRUGS] + [{"abstract": "had gout", "kind": 2}]
    fields = {"text_field": "abstract", "label_field": "kind"}
    slow = {"learning_rate": 1e-9, "epochs": 5, "patience": 1, "seed": 1}
    write_lines(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "out"
    finetune_classifier(
        options_for(
            tmp_path, output, "rows.jsonl", task="text", from_scratch=True, model=str(folder / "base"), **fields, **slow
        )
    )
    metrics = metrics_of(output)
    assert metrics["labels"] == ["2", "drug"] and len(metrics["epochs"]) == 2
    name = "model.layers.0.mlp.up_proj.weight"
    weights = torch.stack([load_file(path / "model.safetensors")[name].flatten() for path in (folder / "base", output)])
    assert abs(torch.corrcoef(weights)[0, 1]) < 0.2  # it would be 1
    assert "trained from new weights" in (output / "README.md").read_text()


def test_the_card_of_a_classifier_of_mentions_runs(mentions_model, folder, tmp_path, capsys, monkeypatch):
    assert run_card(mentions_model, capsys).startswith("[{'entity_group': ")
    monkeypatch.chdir(folder / "base")
    finetune_classifier(options_for(folder, tmp_path / "causal", model=".", epochs=1))
    assert metrics_of(tmp_path / "causal")["base"]["model"] == str(folder.resolve() / "base")
    tags = ast.literal_eval(run_card(tmp_path / "causal", capsys))
    assert len(tags) == 4 and set(tags) <= {"O", "B-Drug", "I-Drug", "B-Disease", "I-Disease"}


def test_a_published_card_names_its_repository_and_its_base_as_the_hub_does(mentions_model, folder):
    files = sibling_files(mentions_model, "lab/tags", "lab/base", weights_sha256(str(folder / "base")))
    card = next(file.content for file in files if file.name == "README.md").decode()
    assert 'pipeline("token-classification", model="lab/tags", trust_remote_code=True' in card
    assert "\nbase_model: lab/base\n" in card and "| base model | lab/base |" in card
    assert not [file.name for file in files if str(folder).encode() in file.content]


def test_the_metrics_and_the_card_name_all_files(folder, tmp_path):
    other = tmp_path / "mentions.tsv"
    other.write_text(sentence_lines("aspirin", "gout"))
    finetune_classifier(
        options_for(folder, tmp_path / "out", train=[folder / "mentions.tsv", other], validation=None, epochs=1)
    )
    files = metrics_of(tmp_path / "out")["data"]["train"]["files"]
    assert [file["name"] for file in files] == ["mentions.tsv"] * 2 and files[0]["sha256"] != files[1]["sha256"]
    assert "tokens) of mentions.tsv, mentions.tsv |" in (tmp_path / "out/README.md").read_text()


def test_adapters_are_merged_with_their_head(folder, tmp_path):
    options = options_for(folder, tmp_path / "out", method="lora", bidirectional=True, rank=8)
    finetune_classifier(options)
    assert metrics_of(tmp_path / "out")["test"]["f1"] > 0.9
    weights, before = load_file(tmp_path / "out/model.safetensors"), load_file(folder / "base/model.safetensors")
    changed = {name for name in weights if name not in before or not torch.equal(weights[name], before[name])}
    assert {name.split(".")[-2] for name in changed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "score")
    }


class Interrupt(TrainerCallback):
    def on_epoch_end(self, args, state, control, **more):
        if state.epoch == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_with_the_same_weights(folder, tmp_path, monkeypatch):
    options = options_for(folder, tmp_path / "stopped", epochs=3)
    finetune_classifier(replace(options, output=tmp_path / "whole"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Interrupt])
        finetune_classifier(options)
    checkpoints = tmp_path / "stopped/checkpoints"
    (complete,) = checkpoints.glob("checkpoint-*")
    unfinished = shutil.copytree(complete, checkpoints / "checkpoint-99")  # of a process that was killed
    (unfinished / "trainer_state.json").unlink()
    with pytest.raises(UserError, match="holds an unfinished run: continue it with --resume"):
        finetune_classifier(options)
    with pytest.raises(UserError, match=r"seed: the run was started with 0, not 1"):
        finetune_classifier(replace(options, resume=True, seed=1))
    finetune_classifier(replace(options, resume=True))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    found = {name: metrics_of(tmp_path / name) for name in ("whole", "stopped")}
    assert found["stopped"]["epochs"] == found["whole"]["epochs"] and len(found["whole"]["epochs"]) == 3
    assert [name for name in found if "training_seconds" in found[name]] == ["whole"]  # the other's is not known
    assert "training\\_seconds" in (tmp_path / "whole/README.md").read_text()


@pytest.mark.parametrize("changed", ["train data", "test data", "base weights"])
def test_a_run_is_not_resumed_with_other_data_or_weights(folder, tmp_path, monkeypatch, changed):
    base, train, test = (tmp_path / name for name in ("base", "train.tsv", "test.tsv"))
    shutil.copytree(folder / "base", base)
    for path in (train, test):
        shutil.copy(folder / "mentions.tsv", path)
    options = options_for(folder, tmp_path / "run", model=str(base), train=[train], test=test, validation=None)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "train", stop)
        finetune_classifier(options)
    if changed == "base weights":
        byte_model(initializer_range=0.1).save_pretrained(base)
    else:
        path = train if changed == "train data" else test
        path.write_text(path.read_text() + "\n" + sentence_lines("aspirin", "fever"))
    with pytest.raises(UserError, match=f"run: the {changed} changed since the run was started: start a new run"):
        finetune_classifier(replace(options, resume=True))


def test_joined_sentences_and_truncated_ones_keep_their_place(folder, tmp_path):
    finetune_classifier(options_for(folder, tmp_path / "joined", join=60, bidirectional=True, epochs=10, batch_size=1))
    joined = metrics_of(tmp_path / "joined")
    assert joined["data"]["train"]["sequences"] == 10
    assert joined["test"]["f1"] > 0.9
    finetune_classifier(options_for(folder, tmp_path / "cut", context=8, truncate=True, epochs=1))
    assert metrics_of(tmp_path / "cut")["test"]["mentions"] == 40


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"context": 8}, "20 sequences are longer than 8 tokens, the first at .*line 1: use --truncate"),
        ({"context": 65}, "context: must be at most 64, the model's context, not 65"),
        ({"validation": "other.tsv"}, "other.tsv, line 1: label 'B-Gene' is not in the training data"),
        ({"train": ["no.tsv"]}, "no.tsv: no such file"),
        ({"train": ["none.tsv"]}, "none.tsv: all tags are O"),
        ({"model": "gpt2", "bidirectional": True}, "a gpt2 model has no is_causal in its configuration"),
        ({"resume": True}, "no run to resume: start it without --resume"),
        ({"report_to": "trackio"}, "--report-to trackio: trackio is not installed"),
    ],
)
def test_wrong_input_is_reported_before_training(more, problem, folder, tmp_path):
    (tmp_path / "other.tsv").write_text("BRCA1\tB-Gene\n")
    (tmp_path / "none.tsv").write_text("word\tO\n")
    if more.get("model") == "gpt2":
        tokenizer = byte_tokenizer()
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1))
        model.save_pretrained(tmp_path / "gpt2")
        tokenizer.save_pretrained(tmp_path / "gpt2")
        more = {**more, "model": str(tmp_path / "gpt2")}
    for name in ("train", "validation"):
        if name in more:
            paths = [tmp_path / path for path in ([more[name]] if name == "validation" else more[name])]
            more = {**more, name: paths[0] if name == "validation" else paths}
    with pytest.raises(UserError, match=problem):
        finetune_classifier(options_for(folder, tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_found_before_training(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="0 MB are free, but the run needs"):
        finetune_classifier(options_for(folder, tmp_path / "out"))


def test_finished_runs_and_other_files_are_not_replaced(folder, mentions_model, tmp_path):
    with pytest.raises(UserError, match="already holds a finished run"):
        finetune_classifier(options_for(folder, mentions_model))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files than a fine-tuned model"):
        finetune_classifier(options_for(folder, tmp_path))


def test_the_loss_leaves_unlabeled_tokens_out():
    model = tiny_model("healthslm", "ForTokenClassification", is_causal=False, num_labels=3)
    ids, labels = torch.arange(2, 8).unsqueeze(0), torch.tensor([[-100, 1, -100, -100, 2, -100]])
    output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0, [1, 4]], torch.tensor([1, 2]))
    torch.testing.assert_close(output.loss, expected)
