"""Recipes: the options of a training run, and whether a run that is resumed still has the same."""

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml

from healthslm.errors import UserError
from healthslm.files import file_sha256, read_json, replacing
from healthslm.options import CheckedOptions, NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Seed, UnitInterval
from healthslm.tokenization.tokens import INFO_FILE
from healthslm.training.schedule import Decay, Schedule

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"

MANY_PASSES = 20
"""Passes over a corpus above which a run warns. Text seen four times teaches nearly as much as new text, text seen
sixteen times much less, and more passes hardly anything (Muennighoff et al., 2023)."""


@dataclass
class PretrainOptions(CheckedOptions):
    """Options of `pretrain`."""

    model: str | dict[str, Any]
    """What to train: a folder or Hub name, whose weights are trained further, or a model_type with overrides, which
    starts from new weights: {model_type: gpt2, n_layer: 6}."""
    tokens: Path
    """Folder of the tokenised corpus."""
    output: Path
    """Run folder to write: runs/NAME."""
    max_tokens: PositiveInt
    """Tokens to train on; the last update may go beyond by less than batch_tokens."""
    batch_tokens: PositiveInt = 65_536
    """Tokens of an update, over all processes."""
    micro_batch_rows: Annotated[int | None, Range(at_least=1)] = field(default=None, metadata={"memory": True})
    """Rows of one context that a process computes at once; more need more memory and change no result. By default as
    many as fit into a GPU's memory, and at most 8 on a CPU."""
    context: Annotated[int | None, Range(at_least=1)] = None
    """Tokens of a row; by default the model's longest."""
    zero_residual_projections: bool = False
    """Start with zeros in the last matrix of each attention and feed-forward block: layers begin as the identity."""
    learning_rate: NonNegativeFloat = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: Annotated[float | None, Range(at_least=0)] = None
    """Peak learning rate of Muon, which then trains the hidden matrices; by default AdamW does."""
    warmup_tokens: NonNegativeInt = 2_000_000
    """Tokens over which the learning rates rise to their peaks; at most a quarter of the run."""
    decay: Decay = "linear"
    """How they fall: in a straight line or along a cosine."""
    decay_fraction: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Part of the tokens after warm-up over which they fall: the last."""
    final_fraction: UnitInterval = 0.0
    """Part of the peaks towards which they fall."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay, on matrices alone."""
    betas: Annotated[tuple[float, float], Range(at_least=0, below=1)] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moment."""
    max_grad_norm: Annotated[float, Range(above=0)] = 1.0
    """Norm to which larger gradients are clipped."""
    seed: Seed = 0
    """Of the initial weights, the order of the documents and dropout."""
    evaluate_every: PositiveInt = 100
    """Updates from one evaluation on the validation split to the next; there is one at the start and the end too."""
    evaluation_documents: PositiveInt = 500
    """Documents of the validation split to evaluate on: the first so many."""
    save_every: PositiveInt = 500
    """Updates from one checkpoint to the next; there is one at the end too."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep."""
    compile: bool | None = None
    """Compile the network with torch.compile; by default on a GPU."""
    resume: bool = False
    """Go on from the newest valid checkpoint in the run folder."""
    accept_changes: bool = False
    """Resume even though the recipe, the corpus or the tokenizer has changed, or train the weights of a folder or Hub
    name on tokens of another tokenizer than theirs."""
    dry_run: bool = False
    """Print what the run would take (operations, memory by part, disk), and start nothing."""
    tokens_per_second: Annotated[float | None, Range(above=0)] = None
    """Speed over all processes, for the dry run to tell hours."""


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
