"""Recipes: from the options of a run to its schedule and optimizers, and whether a resumed run still has the same."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
import yaml

from healthslm.errors import UserError
from healthslm.files import file_sha256, read_json, replacing
from healthslm.tokenization.tokens import INFO_FILE
from healthslm.training.options import PretrainOptions, options_with
from healthslm.training.run_folder import CONFIG_FILE
from healthslm.training.schedule import Schedule

logger = logging.getLogger(__name__)

MANY_EPOCHS = 20
"""Epochs above which a run warns. Four epochs are almost as good as new text, sixteen are much less useful, and more
hardly help (Muennighoff et al., 2023)."""


def make_schedule(options: PretrainOptions, context: int, processes: int) -> Schedule:
    """The schedule of a run, whose batches must divide evenly among processes.

    Raises:
        UserError: They don't, or the values contradict each other.
    """
    size = options.micro_batch_size or 1
    unit = context * processes * size
    if options.batch_tokens % unit:
        raise UserError(
            f"batch_tokens {options.batch_tokens} is not a multiple of {unit} (context {context} x micro_batch_size "
            f"{size} x processes {processes}); use {max(options.batch_tokens // unit, 1) * unit}"
        )
    return Schedule(
        context=context,
        max_tokens=options.max_tokens,
        batch_tokens=options.batch_tokens,
        warmup_tokens=min(options.warmup_tokens, options.max_tokens // 4),  # so that a recipe can be shortened
        decay=options.decay,
        decay_fraction=options.decay_fraction,
        final_fraction=options.final_fraction,
    )


def warn_of_many_epochs(schedule: Schedule, corpus_tokens: int) -> None:
    """Warn if a run goes through its corpus more than `MANY_EPOCHS` times, and say how to shorten it."""
    if schedule.total_tokens > MANY_EPOCHS * corpus_tokens:
        logger.warning(
            "warning: %.0f epochs of a corpus of %s tokens, which the model will memorize: lower max_tokens "
            "(%d epochs are %s) or add text",
            schedule.total_tokens / corpus_tokens,
            f"{corpus_tokens:,}",
            MANY_EPOCHS,
            f"{MANY_EPOCHS * corpus_tokens:,}",
        )


def optimizer_settings(options: PretrainOptions) -> dict[str, Any]:
    """The options that `make_optimizers` takes."""
    names = ("learning_rate", "muon_learning_rate", "weight_decay", "betas")
    return {name: getattr(options, name) for name in names}


def compiles(options: PretrainOptions, device: torch.device) -> bool:
    return device.type == "cuda" if options.compile is None else options.compile


def fingerprint(options: PretrainOptions) -> dict[str, Any]:
    """Everything that determines a run's result: its options, and checksums of the corpus and the tokenizer."""
    values = _plain(options)
    recipe = {name: values[name] for name in options_with("affects_result")}
    info = options.tokens / INFO_FILE
    return recipe | {"tokens.json": file_sha256(info), "tokenizer": read_json(info)["tokenizer_sha256"]}


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path, accept_changes: bool) -> None:
    """Check that the fingerprint of a run matches the checkpoint's.

    Raises:
        UserError: They differ, and the changes are not accepted.
    """
    names = [name for name in saved | current if saved.get(name) != current.get(name)]
    if names and not accept_changes:
        changes = "; ".join(f"{name} was {saved.get(name)!r}, is {current.get(name)!r}" for name in names)
        raise UserError(f"{checkpoint}: made with another recipe or corpus: {changes}; use --accept-changes to resume")


def write_recipe(options: PretrainOptions) -> None:
    """Write config.yaml, a recipe that repeats the run, into its folder."""
    values = _plain(options)
    with replacing(options.output / CONFIG_FILE) as new:
        saved = {name: values[name] for name in options_with("saved")}
        new.write_text(yaml.safe_dump(saved, sort_keys=False), encoding="utf-8")


def _plain(options: PretrainOptions) -> dict[str, Any]:
    values = dataclasses.asdict(options) | {"betas": list(options.betas)}
    if isinstance(options.model, str) and Path(options.model).is_dir():
        values["model"] = Path(options.model)  # absolute, so that the run can be resumed from any folder
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in values.items()}
