"""One command takes every measure of a model: each is that of its own module, on the files that the options name."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from release_inputs import DECISIONS, NETWORK, held_out_rows, write_inputs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from healthslm.arguments import parse
from healthslm.bits_per_byte import score_documents
from healthslm.errors import UserError
from healthslm.evaluation.generation_quality import generate_documents
from healthslm.evaluation.measures import MEASURES, PUBMED_IDS, ReleaseEvaluationOptions, evaluate_release, read_results
from healthslm.models import make_model
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training.packing import PackedSequences

NOT_REPEATABLE = "footprint.json"  # the time that generating takes


@pytest.fixture(scope="module")
def model(sample_folders, tmp_path_factory) -> Path:
    """An untrained network with weights so wide that its predictions differ, and the sample's tokenizer."""
    torch.manual_seed(1)  # of the untrained network beside it the seed is 0
    folder = tmp_path_factory.mktemp("model")
    make_model(NETWORK | {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sample_folders.tokenizer / name, folder)
    return folder


@pytest.fixture(scope="module")
def recipe(sample_folders, model, tmp_path_factory) -> Path:
    """The keys of configs/evaluation.yaml, with the files of the test."""
    folder = tmp_path_factory.mktemp("inputs")
    values = {"corpus": sample_folders.corpus, "tokens": sample_folders.tokens, **write_inputs(folder)}
    beside = {"the same again": str(model), "GPT-2": "openai-community/gpt2"}
    recipe = {name: str(path) for name, path in values.items()} | {"beside": beside, "documents": 6}
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "evaluation.yaml"


@pytest.fixture(scope="module")
def options(recipe, model, tmp_path_factory) -> ReleaseEvaluationOptions:
    output = tmp_path_factory.mktemp("evaluation") / "results"
    return parse(ReleaseEvaluationOptions, ["--recipe", str(recipe), "--model", str(model), "--output", str(output)])


@pytest.fixture(scope="module")
def results(options) -> dict[str, Any]:
    evaluate_release(options)
    return read_results(options.output)


def test_every_measure_is_a_file_that_says_what_it_was_measured_on(options, results):
    assert {path.name for path in options.output.iterdir()} == {f"{name}.json" for name in MEASURES} | {PUBMED_IDS}
    for measure in MEASURES:
        inputs = json.loads((options.output / f"{measure}.json").read_text(encoding="utf-8"))["inputs"]
        weights = hashlib.sha256((Path(options.model) / "model.safetensors").read_bytes()).hexdigest()
        assert inputs["the same again" if measure == "beside" else "model"] == weights
        assert inputs["abstracts.jsonl"] == hashlib.sha256(options.held_out.read_bytes()).hexdigest()


def test_bits_per_byte_are_those_that_training_would_find(model, results):
    """By `score_documents`, from tokens that are encoded here."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    network = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    texts = [f"{row['title']}\n{row['text']}" for row in held_out_rows()]
    documents = [
        np.array([tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]) for text in texts
    ]
    score = score_documents(network, documents, [len(text.encode()) for text in texts])
    found = results["held_out"]
    assert found["data"] == "abstracts.jsonl"
    assert found["model"]["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)
    low, high = found["model"]["interval"]
    assert low < score.bits_per_byte < high
    assert found["untrained"]["bits_per_byte"] != pytest.approx(score.bits_per_byte, rel=1e-3)


def test_models_beside_it_are_measured_on_the_same_or_said_to_be_missing(results):
    beside = results["beside"]["models"]
    assert beside["the same again"] == results["held_out"]["model"] | {"training_tokens": None}
    assert beside["GPT-2"].keys() == {"not_measured", "training_tokens"}


def test_the_published_set_are_the_pubmed_citations_of_both_held_out_splits(sample_folders, options, results):
    files = [path for split in ("validation", "test") for path in (sample_folders.corpus / split).glob("*.parquet")]
    rows = [row for path in files for row in pq.read_table(path).to_pylist() if row["source"] == "pubmed"]
    lines = (options.output / PUBMED_IDS).read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["id"] for line in lines} == {row["id"] for row in rows}
    assert results["pubmed"]["documents"] == len(rows) > 0
    assert sum(decade["documents"] for decade in results["pubmed"]["by_decade"].values()) == len(rows)


def test_pairs_are_of_held_out_documents_and_of_several_kinds(results):
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


def test_all_questions_are_asked_and_those_of_the_hub_are_said_to_be_missing(results):
    found = results["pubmedqa"]
    assert np.sum(found["pubmedqa"]["confusion"], axis=1).tolist() == [
        DECISIONS.count(option) for option in found["pubmedqa"]["options"]
    ]
    assert found["pubmedqa"]["majority_share"] == 0.5
    assert found["medmcqa"].keys() == found["medqa_4options"].keys() == {"not_reached"}


def test_samples_are_the_first_documents_that_were_measured(model, results):
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    network = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    documents = generate_documents(network, tokenizer, count=6, seed=0)
    assert results["generation"]["samples"] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in documents[:5]
    ]
    assert results["generation"]["documents"]["generated"]["documents"] == 6


def test_memorised_text_is_looked_for_in_training_and_held_out_documents(results):
    for found in results["memorisation"].values():
        assert 0 < found["documents"] <= 12 and len(found["matching_by_position"]) == 50
    assert list(results["memorisation"]) == ["training", "held_out"]


def test_training_abstracts_are_compared_with_held_out_ones_in_bits_per_byte(model, sample_folders, options, results):
    splits = {"training": ("train",), "held_out": ("validation", "test")}
    network = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    for name, folders in splits.items():
        files = [path for folder in folders for path in sorted((sample_folders.corpus / folder).glob("*.parquet"))]
        rows = [row for path in files for row in pq.read_table(path).to_pylist()]
        found = results["memorisation"][name]["abstracts"]
        assert found["chosen_from"] == sum(row["kind"] == "abstract" for row in rows)
        assert found["documents"] == min(options.documents, found["chosen_from"])
    texts = [f"{row['title']}\n{row['text']}" for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    tokens = [np.array([tokenizer.eos_token_id, *tokenizer.encode(t, add_special_tokens=False)]) for t in texts]
    chosen = np.random.default_rng(0).permutation(len(rows))[: options.documents]
    score = score_documents(network, [tokens[i] for i in chosen], [len(texts[i].encode()) for i in chosen])
    assert found["bytes"] == score.bytes and found["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)


def test_a_corpus_that_the_tokens_are_not_of_is_refused(options, tmp_path):
    corpus = shutil.copytree(options.corpus, tmp_path / "corpus")
    file = next((corpus / "train").glob("*.parquet"))
    pq.write_table(pq.read_table(file)[1:], file)
    with pytest.raises(UserError, match="tokens: not the tokens of .*corpus: .* documents and not .* in train"):
        evaluate_release(replace(options, corpus=corpus, output=tmp_path / "some", only=["memorisation"]))


def test_a_gpu_that_is_not_there_is_missed_before_anything_is_measured(options, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: PyTorch .* finds no GPU here; use --device cpu"):
        evaluate_release(replace(options, device="cuda", output=tmp_path / "some", only=["beside"]))
    assert not (tmp_path / "some").exists()


def test_where_the_run_is_told_memorised_text_is_looked_for_in_what_it_has_read(options, results, tmp_path):
    """Of a run that has read 16 sequences, the documents that these open, and no other."""
    run = tmp_path / "run"
    run.mkdir()
    recipe = {"context": 256, "seed": 3}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    record = {"step": 1, "tokens": 16 * 256, "tokens_per_second": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    evaluate_release(replace(options, output=tmp_path / "some", training=run, only=["memorisation"]))
    found = json.loads((tmp_path / "some/memorisation.json").read_text(encoding="utf-8"))

    train = TokenizedSplit(options.tokens, "train")
    sequences = PackedSequences(train, 256, seed=3)
    assert sequences.sequences_per_epoch >= 16  # so that no document begins twice
    opened = (
        sequences.batch(range(16))["input_ids"][:, :157] == train.separator_id
    ).sum()  # a sequence has 101 tokens from there
    assert 0 < found["training"]["documents"] <= found["training"]["chosen_from"] == opened < len(train)
    assert {"config.yaml", "metrics.jsonl"} <= found["inputs"].keys()
    assert found["held_out"] == results["memorisation"]["held_out"]
    assert results["memorisation"]["training"]["chosen_from"] == len(train)


def test_the_same_again_gives_the_same_bytes(options, results, tmp_path, run_script, recipe):
    done = run_script("evaluate_release", "--recipe", recipe, "--model", options.model, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    for path in options.output.iterdir():
        if path.name != NOT_REPEATABLE:
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_only_some_measures_are_taken_where_they_are_named(options, recipe, tmp_path):
    arguments = ["--recipe", str(recipe), "--model", options.model, "--output", str(tmp_path / "some")]
    evaluate_release(parse(ReleaseEvaluationOptions, [*arguments, "--only", "held_out", "footprint"]))
    assert {path.name for path in (tmp_path / "some").iterdir()} == {"held_out.json", "footprint.json"}
    with pytest.raises(UserError, match="no measure sense, only held_out, .*footprint$"):
        evaluate_release(parse(ReleaseEvaluationOptions, [*arguments, "--only", "held_out", "sense"]))


def test_what_was_measured_of_the_same_weights_and_data_is_kept_where_that_is_asked_for(options, tmp_path):
    """The mark in a kept file is there afterwards; it would not be in one that was measured again."""
    model = shutil.copytree(options.model, tmp_path / "model")
    some = replace(options, model=str(model), output=tmp_path / "some", only=["held_out", "beside"], keep=True)
    evaluate_release(some)

    def measured_again(**changes: Any) -> set[str]:
        for name in some.only:
            marked = json.loads((some.output / f"{name}.json").read_text(encoding="utf-8")) | {"mark": True}
            (some.output / f"{name}.json").write_text(json.dumps(marked), encoding="utf-8")
        evaluate_release(replace(some, **changes))
        found = {name: json.loads((some.output / f"{name}.json").read_text(encoding="utf-8")) for name in some.only}
        return {name for name in some.only if "mark" not in found[name]}

    assert measured_again() == set()
    assert measured_again(keep=False) == {"held_out", "beside"}
    assert measured_again(beside={"GPT-2": "openai-community/gpt2"}) == {"beside"}
    evaluate_release(some)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(json.dumps(row) + "\n" for row in held_out_rows()[1:]), encoding="utf-8")
    assert measured_again(held_out=fewer) == {"held_out", "beside"}
    evaluate_release(some)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert measured_again() == {"held_out"}


def test_the_recipe_of_the_release_is_read(repository):
    recipe = str(repository / "configs" / "evaluation.yaml")
    options = parse(ReleaseEvaluationOptions, ["--recipe", recipe, "--model", ".", "--output", "results"])
    folders = (options.corpus, options.tokens, options.held_out, options.pubmedqa)
    assert all(path.resolve().is_relative_to(repository) for path in folders)
    assert {"openai-community/gpt2", "microsoft/biogpt"} <= set(options.beside.values())
