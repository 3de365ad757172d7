"""One command computes all metrics of a model, each on its declared inputs, and keeps those that are up to date."""

import hashlib
import importlib.metadata
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import constants
from release_inputs import DECISIONS, MODEL_CONFIG, held_out_rows, write_inputs
from row_files import write_lines, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from healthslm.arguments import parse
from healthslm.bits_per_byte import score_documents
from healthslm.errors import UserError
from healthslm.evaluation.evaluate_release import evaluate_release, read_results
from healthslm.evaluation.generation_quality import generate_documents
from healthslm.evaluation.metrics import METRICS, PUBMED_IDS
from healthslm.evaluation.options import ReleaseEvaluationOptions
from healthslm.evaluation.registry import INPUTS
from healthslm.files import read_json, write_json
from healthslm.models import make_model
from healthslm.tokenization.tokenize import TokenizeOptions, tokenize_corpus
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training.packing import PackedSequences

NOT_REPEATABLE = "quantization.json"  # it contains times


@pytest.fixture(scope="module")
def model(sample_folders, tmp_path_factory) -> Path:
    """A random model with large weights, so that its predictions differ, and the sample's tokenizer."""
    torch.manual_seed(1)  # the untrained baseline has seed 0
    folder = tmp_path_factory.mktemp("model")
    make_model(MODEL_CONFIG | {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sample_folders.tokenizer / name, folder)
    return folder


def write_run(file: Path, model: Path, seed: int) -> Path:
    """The metrics of a model that was fine-tuned from another one."""
    result = {"metric": "f1, test", "value": 0.8 + seed / 100, "interval": [0.7, 0.9], "baselines": {"dictionary": 0.5}}
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    run = {"base": {"model": str(model), "sha256": weights}, "seed": seed, "results": [result], "labels": ["O"]}
    file.write_text(json.dumps(run), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def recipe(sample_folders, model, tmp_path_factory) -> Path:
    """A recipe with the keys of configs/evaluation.yaml and the files of the test."""
    folder = tmp_path_factory.mktemp("inputs")
    values = {"corpus": sample_folders.corpus, "tokens": sample_folders.tokens, **write_inputs(folder)}
    baselines = {"the same model": str(model), "GPT-2": "openai-community/gpt2"}
    recipe = {name: str(path) for name, path in values.items()} | {"baselines": baselines, "documents": 6}
    runs = [str(write_run(folder / f"seed-{seed}.json", model, seed)) for seed in range(2)]
    recipe["finetuned"] = {"mentions": runs, "gone": [str(folder / "gone.json")]}
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "evaluation.yaml"


@pytest.fixture(scope="module")
def options(recipe, model, tmp_path_factory) -> ReleaseEvaluationOptions:
    output = tmp_path_factory.mktemp("evaluation") / "results"
    return parse(ReleaseEvaluationOptions, ["--recipe", str(recipe), "--model", str(model), "--output", str(output)])


@pytest.fixture(scope="module")
def results(options, tmp_path_factory) -> dict[str, Any]:
    """The results of all metrics, each computed while the files and models that it doesn't declare as inputs are
    missing."""
    missing = tmp_path_factory.mktemp("missing") / "file.jsonl"
    for metric in METRICS.values():
        hidden = {name: missing for name in ("corpus", "tokens", "held_out", "pubmedqa") if name not in metric.inputs}
        hidden |= {name: str(missing) for name in ("model",) if name not in metric.inputs}
        hidden |= {name: 10**9 for name in ("documents",) if name not in metric.inputs}
        hidden |= {name: {"no": str(missing)} for name in ("baselines",) if name not in metric.inputs}
        evaluate_release(replace(options, only=[metric.name], **hidden))
    return read_results(options.output)


def test_each_metric_is_a_file_with_its_version_its_inputs_and_the_software(options, results):
    assert {path.name for path in options.output.iterdir()} == {f"{name}.json" for name in METRICS} | {PUBMED_IDS}
    checksums = {
        "model": Path(options.model) / "model.safetensors",
        "corpus": options.corpus / "report.json",
        "tokens": options.tokens / "tokens.json",
        "held_out": options.held_out,
        "pubmedqa": options.pubmedqa,
    }
    expected = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in checksums.items()} | {
        "baselines": {"the same model": hashlib.sha256(checksums["model"].read_bytes()).hexdigest()}
        | {"GPT-2": "openai-community/gpt2"},
        "documents": 6,
        "training": None,
        "finetuned": {
            name: [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.exists()]
            for name, files in options.finetuned.items()
        },
    }
    for name, metric in METRICS.items():
        record = json.loads((options.output / f"{name}.json").read_text(encoding="utf-8"))
        assert record["version"] == metric.version
        assert record["inputs"] == {name: expected[name] for name in metric.inputs}
        assert record["software"]["torch"] == importlib.metadata.version("torch")
        assert not {"version", "inputs", "software"} & results[name].keys()


def test_inputs_are_options(options):
    assert INPUTS.keys() <= {field.name for field in fields(options)}
    assert {name for metric in METRICS.values() for name in metric.inputs} == INPUTS.keys()


def test_bits_per_byte_equal_those_of_training(model, results):
    """Those of `score_documents`, for texts that are tokenized here."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    opened = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    texts = [f"{row['title']}\n{row['text']}" for row in held_out_rows()]
    documents = [
        np.array([tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]) for text in texts
    ]
    score = score_documents(opened, documents, [len(text.encode()) for text in texts])
    found = results["held_out"]
    assert found["data"] == "abstracts.jsonl"
    assert found["model"]["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)
    low, high = found["model"]["interval"]
    assert low < score.bits_per_byte < high
    assert found["untrained"]["bits_per_byte"] != pytest.approx(score.bits_per_byte, rel=1e-3)


def test_baselines_are_measured_on_the_same_documents_or_reported_as_missing(results):
    baselines = results["baselines"]["models"]
    assert baselines["the same model"] == results["held_out"]["model"] | {"training_tokens": None}
    assert baselines["GPT-2"].keys() == {"not_measured", "training_tokens"}


def test_the_published_set_contains_the_pubmed_citations_of_both_held_out_splits(sample_folders, options, results):
    files = [path for split in ("validation", "test") for path in (sample_folders.corpus / split).glob("*.parquet")]
    rows = [row for path in files for row in pq.read_table(path).to_pylist() if row["source"] == "pubmed"]
    published = json.loads((options.output / PUBMED_IDS).read_text(encoding="utf-8"))
    assert {document["id"] for document in published["documents"]} == {row["id"] for row in rows}
    report = json.loads((sample_folders.corpus / "report.json").read_text(encoding="utf-8"))
    assert published["settings"] == report["settings"]
    assert results["pubmed"]["documents"] == len(rows) > 0
    assert sum(decade["documents"] for decade in results["pubmed"]["by_decade"].values()) == len(rows)


def test_pairs_come_from_held_out_documents_and_have_several_kinds(results):
    scores, pairs = results["minimal_pairs"]["scores"], results["minimal_pairs"]["pairs"]
    texts = [row["text"] for row in held_out_rows()]
    assert (
        len(pairs) == scores["all"]["pairs"] == sum(found["pairs"] for kind, found in scores.items() if kind != "all")
    )
    assert {"drugs", "diseases"} <= set(scores)
    for pair in pairs:
        assert any(pair["true"] in text and pair["other"] not in text for text in texts)
    harder = results["minimal_pairs"]["harder"]
    assert harder["scores"]["all"]["pairs"] == len(harder["pairs"]) == len(pairs)
    places = [[(pair["document"], pair["start"], pair["true"]) for pair in found] for found in (pairs, harder["pairs"])]
    assert places[0] == places[1]


def test_all_questions_are_asked_and_hub_tasks_are_reported_as_missing(results):
    found = results["pubmedqa"]
    assert np.sum(found["pubmedqa"]["confusion"], axis=1).tolist() == [
        DECISIONS.count(option) for option in found["pubmedqa"]["options"]
    ]
    assert found["pubmedqa"]["majority_share"] == 0.5
    assert found["medmcqa"].keys() == found["medqa_4options"].keys() == {"not_reached"}


def test_samples_are_the_first_generated_documents(model, results):
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    opened = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    documents = generate_documents(opened, tokenizer, count=6, seed=0)
    assert results["generation"]["samples"] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in documents[:5]
    ]
    assert results["generation"]["documents"]["generated"]["documents"] == 6


def test_memorization_is_tested_on_training_and_held_out_documents(results):
    for found in results["memorization"].values():
        assert 0 < found["documents"] <= 12 and len(found["matching_by_position"]) == 50
    assert list(results["memorization"]) == ["training", "held_out"]


def test_bits_per_byte_of_training_and_held_out_abstracts_are_compared(model, sample_folders, options, results):
    splits = {"training": ("train",), "held_out": ("validation", "test")}
    opened = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    for name, folders in splits.items():
        files = [path for folder in folders for path in sorted((sample_folders.corpus / folder).glob("*.parquet"))]
        rows = [row for path in files for row in pq.read_table(path).to_pylist()]
        found = results["memorization"][name]["abstracts"]
        assert found["chosen_from"] == sum(row["kind"] == "abstract" for row in rows)
        assert found["documents"] == min(options.documents, found["chosen_from"])
    texts = [f"{row['title']}\n{row['text']}" for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    tokens = [np.array([tokenizer.eos_token_id, *tokenizer.encode(t, add_special_tokens=False)]) for t in texts]
    chosen = np.random.default_rng(0).permutation(len(rows))[: options.documents]
    score = score_documents(opened, [tokens[i] for i in chosen], [len(texts[i].encode()) for i in chosen])
    assert found["bytes"] == score.bytes and found["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)


def test_tokens_of_another_corpus_are_refused(options, tmp_path):
    corpus = shutil.copytree(options.corpus, tmp_path / "corpus")
    file = next((corpus / "train").glob("*.parquet"))
    pq.write_table(pq.read_table(file)[1:], file)
    with pytest.raises(
        UserError,
        match="tokens: not the tokens of .*corpus: .* documents instead of .* in train; tokenize the corpus again",
    ):
        evaluate_release(replace(options, corpus=corpus, output=tmp_path / "some", only=["memorization"]))


def test_a_missing_gpu_is_reported_before_anything_is_computed(options, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: PyTorch .* finds no GPU here; use --device cpu"):
        evaluate_release(replace(options, device="cuda", output=tmp_path / "some", only=["baselines"]))
    assert not (tmp_path / "some").exists()


def test_memorization_of_a_known_run_is_tested_on_documents_that_it_has_read(options, results, tmp_path):
    """A run that has read 16 sequences, and the documents that begin in them."""
    run = tmp_path / "run"
    run.mkdir()
    recipe = {"context": 256, "seed": 3}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    record = {"step": 1, "tokens": 16 * 256, "tokens_per_second": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    evaluate_release(replace(options, output=tmp_path / "some", training=run, only=["memorization"]))
    found = json.loads((tmp_path / "some/memorization.json").read_text(encoding="utf-8"))

    train = TokenizedSplit(options.tokens, "train")
    sequences = PackedSequences(train, 256, seed=3)
    assert sequences.sequences_per_epoch >= 16  # so that no document begins twice
    opened = (
        sequences.batch(range(16))["input_ids"][:, :157] == train.separator_id
    ).sum()  # documents of which the sequence has 101 tokens
    assert 0 < found["training"]["documents"] <= found["training"]["chosen_from"] == opened < len(train)
    assert found["inputs"]["training"] == {"tokens": 16 * 256, "context": 256, "seed": 3}
    assert found["held_out"] == results["memorization"]["held_out"]
    assert results["memorization"]["training"]["chosen_from"] == len(train)


def test_evaluating_again_gives_the_same_bytes(options, results, tmp_path, run_script, recipe):
    done = run_script("evaluate_release", "--recipe", recipe, "--model", options.model, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    for path in options.output.iterdir():
        if path.name != NOT_REPEATABLE:
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_only_the_named_metrics_are_computed(options, recipe, tmp_path):
    arguments = ["--recipe", str(recipe), "--model", options.model, "--output", str(tmp_path / "some")]
    evaluate_release(parse(ReleaseEvaluationOptions, [*arguments, "--only", "held_out", "finetuning"]))
    assert {path.name for path in (tmp_path / "some").iterdir()} == {"held_out.json", "finetuning.json"}
    with pytest.raises(UserError, match="unknown metric sense: choose from held_out, .*finetuning$"):
        evaluate_release(parse(ReleaseEvaluationOptions, [*arguments, "--only", "held_out", "sense"]))


def change_a_weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def test_results_of_fine_tuned_models_are_those_of_their_runs_from_these_weights(options, tmp_path):
    some = replace(options, output=tmp_path, only=["finetuning"])
    evaluate_release(some)
    found = json.loads((tmp_path / "finetuning.json").read_text(encoding="utf-8"))
    assert list(found["models"]) == ["mentions"]
    assert [run["results"][0]["value"] for run in found["models"]["mentions"]] == [0.8, 0.81]

    gone = {name: [tmp_path / "gone.json"] for name in some.finetuned}
    evaluate_release(replace(some, finetuned=gone))
    assert json.loads((tmp_path / "finetuning.json").read_text(encoding="utf-8"))["models"] == found["models"]

    other = shutil.copytree(options.model, tmp_path / "other")
    change_a_weight(other)
    with pytest.raises(UserError, match=r"seed-0.json: this model was fine-tuned from other weights than .*other"):
        evaluate_release(replace(some, model=str(other)))
    evaluate_release(replace(some, model=str(other), finetuned=gone))
    assert json.loads((tmp_path / "finetuning.json").read_text(encoding="utf-8"))["models"] == {}


def test_a_model_on_the_hub_is_known_by_its_weights_too(options, tmp_path):
    """In a cache, which all tests share, as the Hub's client writes it."""
    name = f"someone/{tmp_path.name}"
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    snapshot = Path(shutil.copytree(options.model, repository / "snapshots" / ("0" * 40)))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    some = replace(options, model=name, baselines={"same": name}, output=tmp_path, only=["finetuning", "baselines"])
    evaluate_release(some)
    assert list(read_json(tmp_path / "finetuning.json")["models"]) == ["mentions"]
    before = read_json(tmp_path / "baselines.json")
    change_a_weight(snapshot)
    with pytest.raises(UserError, match=f"this model was fine-tuned from other weights than {name}"):
        evaluate_release(replace(some, only=["finetuning"]))
    evaluate_release(replace(some, only=["baselines"], keep=True))
    assert read_json(tmp_path / "baselines.json") != before


@pytest.mark.parametrize(
    ("metric", "rows", "message"),
    [
        ("held_out", [{"title": "A trial", "text": ""}], "no document has any text"),
        ("held_out", [{"title": "A trial", "text": 7}], "column text holds 7, where text is expected"),
        ("held_out", [{"title": "A trial", "text": ["We", "gave"]}], r"column text holds \['We', 'gave'\], where text"),
        ("held_out", [{"title": "A trial"}], "no document has any text"),
        ("quantization", [{"text": None}], "no document has any text"),
        ("generation", [{"text": "We gave aspirin to patients."}], "no document has a title to compare with"),
        ("minimal_pairs", [{"text": "It is what it is."}], "no sentence has a biomedical term that makes a pair"),
    ],
)
def test_held_out_documents_that_lack_what_a_metric_needs_are_refused(options, tmp_path, metric, rows, message):
    held_out = write_lines(tmp_path / "few.jsonl", rows)
    with pytest.raises(UserError, match=f"^{held_out}: {message}"):
        evaluate_release(replace(options, held_out=held_out, output=tmp_path / "some", only=[metric]))
    assert not (tmp_path / "some").exists()


def test_short_documents_have_no_openings_to_test_for_memorization(options, tmp_path):
    corpus = tmp_path / "corpus"
    for split in ("train", "validation", "test"):
        write_rows(corpus / split / "a.parquet", [{"title": "", "text": "Short.", "kind": "abstract"}])
    write_json(corpus / "report.json", {})
    tokens = tmp_path / "tokens"
    tokenize_corpus(TokenizeOptions(corpus=corpus, tokenizer=options.model, output=tokens, workers=1))
    some = replace(options, corpus=corpus, tokens=tokens, output=tmp_path / "some", only=["memorization"])
    with pytest.raises(UserError, match=f"^{tokens}: no documents of 100 tokens in train to evaluate on"):
        evaluate_release(some)


def test_results_that_are_up_to_date_are_kept_on_request(options, tmp_path, monkeypatch):
    """A file that was kept still has its mark afterwards; a file that was computed again does not."""
    model = shutil.copytree(options.model, tmp_path / "model")
    some = replace(options, model=str(model), output=tmp_path / "some", only=["held_out", "baselines"], keep=True)
    evaluate_release(some)

    def computed_again(**changes: Any) -> set[str]:
        for name in some.only:
            marked = json.loads((some.output / f"{name}.json").read_text(encoding="utf-8")) | {"mark": True}
            (some.output / f"{name}.json").write_text(json.dumps(marked), encoding="utf-8")
        evaluate_release(replace(some, **changes))
        found = {name: json.loads((some.output / f"{name}.json").read_text(encoding="utf-8")) for name in some.only}
        return {name for name in some.only if "mark" not in found[name]}

    assert computed_again() == set()
    assert computed_again(keep=False) == {"held_out", "baselines"}
    assert computed_again(baselines={"GPT-2": "openai-community/gpt2"}) == {"baselines"}
    evaluate_release(some)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(json.dumps(row) + "\n" for row in held_out_rows()[1:]), encoding="utf-8")
    assert computed_again(held_out=fewer) == {"held_out", "baselines"}
    evaluate_release(some)
    change_a_weight(model)
    assert computed_again() == {"held_out"}
    another = tmp_path / "questions.jsonl"
    shutil.copy(options.pubmedqa, another)
    with another.open("a", encoding="utf-8") as file:
        file.write(another.read_text(encoding="utf-8"))
    assert computed_again(pubmedqa=another) == set()  # neither metric reads it
    newer = replace(METRICS["baselines"], version=METRICS["baselines"].version + 1)
    monkeypatch.setitem(METRICS, "baselines", newer)
    assert computed_again() == {"baselines"}
    assert json.loads((some.output / "baselines.json").read_text(encoding="utf-8"))["version"] == newer.version
    assert computed_again() == set()


def test_a_result_is_computed_again_if_one_of_its_files_is_missing(options, tmp_path):
    some = replace(options, output=tmp_path / "some", only=["pubmed"], keep=True)
    evaluate_release(some)
    published = (some.output / PUBMED_IDS).read_bytes()
    (some.output / PUBMED_IDS).unlink()
    evaluate_release(some)
    assert (some.output / PUBMED_IDS).read_bytes() == published


def test_a_baseline_that_is_missing_keeps_its_result_only_for_the_same_documents_and_version(
    options, tmp_path, monkeypatch
):
    model = shutil.copytree(options.model, tmp_path / "model")
    some = replace(options, baselines={"other": str(model)}, output=tmp_path / "some", only=["baselines"], keep=True)

    def found(**changes: Any) -> dict[str, Any]:
        evaluate_release(replace(some, **changes))
        return json.loads((some.output / "baselines.json").read_text(encoding="utf-8"))["models"]["other"]

    measured = found()
    shutil.rmtree(model)
    assert found() == measured and "bits_per_byte" in measured
    evaluated = (some.output / "baselines.json").read_bytes()
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(json.dumps(row) + "\n" for row in held_out_rows()[1:]), encoding="utf-8")
    assert "not_measured" in found(held_out=fewer)
    (some.output / "baselines.json").write_bytes(evaluated)
    newer = replace(METRICS["baselines"], version=METRICS["baselines"].version + 1)
    monkeypatch.setitem(METRICS, "baselines", newer)
    assert "not_measured" in found()


def test_the_recipe_of_the_release_can_be_read(repository):
    recipe = str(repository / "configs" / "evaluation.yaml")
    options = parse(ReleaseEvaluationOptions, ["--recipe", recipe, "--model", ".", "--output", "results"])
    folders = (options.corpus, options.tokens, options.held_out, options.pubmedqa)
    assert all(path.resolve().is_relative_to(repository) for path in folders)
    assert {"openai-community/gpt2", "microsoft/biogpt"} <= set(options.baselines.values())
