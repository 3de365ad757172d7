"""Recipes: the options of a training run, and whether a run that is resumed still has the same."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
import yaml

from healthslm.errors import UserError
from healthslm.files import file_sha256, read_json, replacing
from healthslm.tokenization.tokens import INFO_FILE
from healthslm.training.options import PretrainOptions
from healthslm.training.schedule import Schedule

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"

MANY_PASSES = 20
"""Passes over a corpus above which a run warns. Text seen four times teaches nearly as much as new text, text seen
sixteen times much less, and more passes hardly anything (Muennighoff et al., 2023)."""


COMMANDS = {"resume", "accept_changes", "dry_run", "tokens_per_second"}
"""Options of one call, which no recipe keeps."""

FREE_OPTIONS = COMMANDS | {
    "tokens", "output", "micro_batch_rows", "evaluate_every", "evaluation_documents", "save_every", "keep_checkpoints",
    "compile",
}  # fmt: skip
"""Options that do not say what a run computes: they may change when it is resumed. The corpus is told by checksum."""


def make_schedule(options: PretrainOptions, context: int, processes: int) -> Schedule:
    """The updates of a run, whose rows must come out even among processes.

    Raises:
        UserError: They do not, or the numbers do not fit one another.
    """
    step = context * processes * (options.micro_batch_rows or 1)
    if options.batch_tokens % step:
        raise UserError(
            f"batch_tokens {options.batch_tokens} is no multiple of {step} (context {context} x micro_batch_rows "
            f"{options.micro_batch_rows or 1} x processes {processes}); "
            f"{max(options.batch_tokens // step, 1) * step} is"
        )
    return Schedule(
        context=context,
        max_tokens=options.max_tokens,
        batch_tokens=options.batch_tokens,
        warmup_tokens=min(options.warmup_tokens, options.max_tokens // 4),  # so that a recipe may be shortened
        decay=options.decay,
        decay_fraction=options.decay_fraction,
        final_fraction=options.final_fraction,
    )


def warn_of_many_passes(schedule: Schedule, corpus_tokens: int) -> None:
    """Warn of a run that reads its corpus more than `MANY_PASSES` times, and say how far to shorten it."""
    tokens = schedule.tokens_before(len(schedule))
    if tokens > MANY_PASSES * corpus_tokens:
        logger.warning(
            "warning: %.0f passes over a corpus of %s tokens, which the model will memorize: lower max_tokens "
            "(%d passes are %s) or add text",
            tokens / corpus_tokens,
            f"{corpus_tokens:,}",
            MANY_PASSES,
            f"{MANY_PASSES * corpus_tokens:,}",
        )


def optimizer_settings(options: PretrainOptions) -> dict[str, Any]:
    """The options that `make_optimizers` takes."""
    names = ("learning_rate", "muon_learning_rate", "weight_decay", "betas")
    return {name: getattr(options, name) for name in names}


def compiles(options: PretrainOptions, device: torch.device) -> bool:
    return device.type == "cuda" if options.compile is None else options.compile


def identity(options: PretrainOptions) -> dict[str, Any]:
    """What a run computes follows from this: the options that matter, the corpus and the tokenizer by checksum."""
    recipe = {name: value for name, value in _plain(options).items() if name not in FREE_OPTIONS}
    info = options.tokens / INFO_FILE
    return recipe | {"tokens.json": file_sha256(info), "tokenizer": read_json(info)["tokenizer_sha256"]}


def check_unchanged(then: dict[str, Any], now: dict[str, Any], checkpoint: Path, accept_changes: bool) -> None:
    """Hold what a checkpoint was made with against what the run is to go on with.

    Raises:
        UserError: They differ, and that was not accepted.
    """
    names = [name for name in then | now if then.get(name) != now.get(name)]
    if names and not accept_changes:
        changes = "; ".join(f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in names)
        raise UserError(f"{checkpoint}: made with another recipe or corpus: {changes}; --accept-changes goes on anyway")


def write_recipe(options: PretrainOptions, run: Path) -> None:
    """Write config.yaml: a recipe that repeats the run."""
    values = {name: value for name, value in _plain(options).items() if name not in COMMANDS}
    with replacing(run / CONFIG_FILE) as new:
        new.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _plain(options: PretrainOptions) -> dict[str, Any]:
    values = dataclasses.asdict(options) | {"betas": list(options.betas)}
    if isinstance(options.model, str) and Path(options.model).is_dir():
        values["model"] = Path(options.model)  # which means the same from wherever the run is gone on with
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in values.items()}
