"""Every recipe: its options are known, and its network has the size that its name promises."""

from pathlib import Path

import pytest
import torch

from command_line import parse
from healthslm.models import make_model
from healthslm.recipe import PretrainOptions, make_schedule

RECIPES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
PARAMETERS = {"healthslm-15m": 15_276_288, "lightbrain-tiny": 29_995_392}


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request) -> Path:
    return request.param


def test_a_recipe_is_read_and_its_batches_come_out_even(recipe):
    options = parse(PretrainOptions, ["--recipe", str(recipe)])
    with torch.device("meta"):
        model = make_model(options.model)
    context = options.context or model.config.max_position_embeddings
    assert len(make_schedule(options, context, processes=1).positions(0)) * context <= options.batch_tokens
    assert model.num_parameters() == PARAMETERS.get(recipe.stem, model.num_parameters())
    assert options.warmup_tokens < options.max_tokens / 2


def test_paths_of_a_recipe_are_relative_to_it(recipe):
    options = parse(PretrainOptions, ["--recipe", str(recipe)])
    assert options.tokens.resolve().is_relative_to(recipe.parents[1])
