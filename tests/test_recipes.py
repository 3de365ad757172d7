"""Every recipe has valid options, and its model has the size in its name."""

import math
import re
from pathlib import Path

import pytest
import torch
from paths import REPOSITORY

from healthslm.arguments import parse
from healthslm.classification.options import ClassifierOptions
from healthslm.finetuning.options import FinetuneOptions
from healthslm.models import make_model, open_model
from healthslm.pubmedqa.options import CrossValidationOptions
from healthslm.training.options import PretrainOptions, options_with
from healthslm.training.recipe import make_schedule
from healthslm.training.run_folder import read_metrics

CONFIGS = REPOSITORY / "configs"
RECIPES = sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "evaluation.yaml"})
PARAMETERS = {
    "demo": 571_264,
    "healthslm-15m": 15_276_288,
    "healthslm-15m-cpu": 15_276_288,
    "adamw": 15_276_288,
    "healthslm-55m": 54_776_448,
    "healthslm-135m": 135_255_744,
    "healthslm-350m": 345_355_200,
    "lightbrain-tiny": 29_995_392,
    "lightbrain-tiny-muon": 29_995_392,
}
FINETUNING = {
    "bc5cdr": ClassifierOptions,
    "consumer-qa": FinetuneOptions,
    "ncbi-disease": ClassifierOptions,
    "pubmedqa": CrossValidationOptions,
    "sentence-roles": ClassifierOptions,
    "title": FinetuneOptions,
}
"""The options of the command that takes each recipe in configs/finetune."""


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request) -> Path:
    return request.param


def test_a_recipe_is_valid_and_its_batches_divide_evenly(recipe):
    options = parse(PretrainOptions, ["--recipe", str(recipe)])
    with torch.device("meta"):
        model = make_model(options.model)
    context = options.context or model.config.max_position_embeddings
    batches = [make_schedule(options, context, processes=1).sequences(step) for step in range(3)]
    assert all(len(batch) * context == options.batch_tokens for batch in batches)
    assert all(len(batch) % (options.micro_batch_size or 1) == 0 for batch in batches)
    assert model.num_parameters() == PARAMETERS[recipe.stem]
    assert options.warmup_tokens < options.max_tokens / 2


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name.startswith("healthslm-")])
def test_a_size_in_a_name_is_within_two_percent(name):
    millions = int(re.fullmatch(r"healthslm-(\d+)m(-cpu)?", name)[1])
    options = parse(PretrainOptions, ["--recipe", str(CONFIGS / f"{name}.yaml")])
    with torch.device("meta"):
        model = make_model(options.model)
    assert model.num_parameters() == PARAMETERS[name]
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.02)
    assert model.config.tie_word_embeddings and model.config.head_dim == 64 and model.config.vocab_size == 32_000


def test_the_recipe_of_the_release_repeats_its_run(repository):
    """Its options that affect the result are those of the recipe that the documentation names."""
    released = parse(PretrainOptions, ["--recipe", str(repository / "results/training/config.yaml")])
    documented = parse(PretrainOptions, ["--recipe", str(CONFIGS / "healthslm-15m.yaml")])
    assert released.tokens.resolve() == documented.tokens.resolve() == repository / "tokens"
    different = {
        name for name in options_with("affects_result") if getattr(released, name) != getattr(documented, name)
    }
    assert different == {"max_tokens"}  # which was chosen for the time of the machine
    assert released.max_tokens == pytest.approx(documented.max_tokens, rel=1e-3)


def test_paths_of_a_recipe_are_relative_to_it(recipe):
    options = parse(PretrainOptions, ["--recipe", str(recipe)])
    assert options.tokens.resolve().is_relative_to(recipe.parents[1])


def test_every_recipe_of_finetuning_is_tested():
    assert {path.stem for path in (CONFIGS / "finetune").iterdir()} == set(FINETUNING)


@pytest.mark.parametrize("name", FINETUNING)
def test_a_recipe_of_finetuning_is_valid_and_its_paths_are_relative_to_it(name, repository):
    arguments = ["--recipe", str(CONFIGS / f"finetune/{name}.yaml")]
    if FINETUNING[name] is ClassifierOptions:
        options = parse(ClassifierOptions, arguments)
        assert options.output.resolve() == repository / "runs" / name
    else:
        options = parse(FINETUNING[name], [*arguments, "--output", "runs/x"])
        assert options.output == Path("runs/x")
    base = options.base if name == "pubmedqa" else options.model
    assert Path(base).resolve() == repository


@pytest.mark.slow
def test_a_larger_recipe_trains(sample_folders, run_script, tmp_path):
    """A few steps of few tokens, with the sample's tokenizer of 512 entries."""
    run = tmp_path / "run"
    done = run_script(
        "pretrain", "--recipe", CONFIGS / "healthslm-55m.yaml", "--tokens", sample_folders.tokens, "--output", run,
        "--max-tokens", 4 * 128, "--context", 64, "--batch-tokens", 128, "--micro-batch-size", 2,
        "--warmup-tokens", 128, "--evaluation-documents", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [record["loss"] for record in read_metrics(run) if "loss" in record]
    assert losses[0] == pytest.approx(math.log(32_000), abs=0.3)  # all tokens of the vocabulary alike
    assert len(losses) == 4 and losses[-1] < losses[0] - 1
    assert open_model(run / "checkpoints/step-4").num_parameters() == PARAMETERS["healthslm-55m"]


def test_a_shortened_recipe_warms_up_over_a_quarter_of_the_run(recipe):
    options = parse(PretrainOptions, ["--recipe", str(recipe), "--max-tokens", "8000000", "--warmup-tokens", "9000000"])
    context = options.context or 128
    schedule = make_schedule(options, context, processes=1)
    factors = [schedule.learning_rate_factor(step) for step in range(len(schedule))]
    rising = [factor for factor, following in zip(factors, factors[1:], strict=False) if following > factor]
    assert abs(len(rising) - len(schedule) / 4) <= 2 and max(factors) <= 1
