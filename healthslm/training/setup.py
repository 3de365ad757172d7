"""Setting up a training run: its corpus, model and optimizers, new or from a checkpoint, and its folder."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, PreTrainedModel

from healthslm.errors import UserError
from healthslm.files import remove_partials
from healthslm.models import check_tokenizer, choose_context, make_model, open_model, zero_residual_projections
from healthslm.tokenization.tokens import TOKENIZER_FOLDER, TokenizedSplit
from healthslm.training.checkpoint import list_checkpoints, load_optimizers, load_state, newest_checkpoint
from healthslm.training.hardware import describe_hardware
from healthslm.training.learner import Learner
from healthslm.training.log import RunLog
from healthslm.training.options import PretrainOptions
from healthslm.training.packing import PackedSequences
from healthslm.training.plan import fit_micro_batch, flops_per_token
from healthslm.training.precision import computes_in_bf16
from healthslm.training.recipe import (
    check_fingerprint,
    compiles,
    fingerprint,
    make_schedule,
    optimizer_settings,
    warn_of_many_epochs,
    write_recipe,
)
from healthslm.training.run_folder import CHECKPOINTS_FOLDER
from healthslm.training.schedule import Schedule

logger = logging.getLogger(__name__)

CPU_FLOPS = 1e11
"""Floating-point operations per second and core of a fast CPU, see docs/performance.md."""


@dataclass
class TrainingState:
    """What a checkpoint holds in addition to the model and its optimizers."""

    fingerprint: dict[str, Any]
    """What determines the result of the run."""
    tokens: int = 0
    """Tokens seen."""
    skipped_in_a_row: int = 0
    """Failed steps since the last one that was taken."""
    best_bits_per_byte: float = math.inf
    """Validation bits per byte of the model in best/."""


@dataclass
class Run:
    """A training run: its data, its model and how far it has come."""

    options: PretrainOptions
    accelerator: Accelerator
    sequences: PackedSequences
    validation: TokenizedSplit
    schedule: Schedule
    learner: Learner
    state: TrainingState
    log: RunLog
    micro_batch_size: int

    @property
    def step(self) -> int:
        """The next step, which is the number of steps so far."""
        return self.schedule.step_at(self.state.tokens)


def set_up(options: PretrainOptions, accelerator: Accelerator) -> Run:
    """Open the corpus, make the model or load it from the newest checkpoint, and create the run folder."""
    checkpoint = find_checkpoint(options)
    train_split, validation = TokenizedSplit(options.tokens, "train"), TokenizedSplit(options.tokens, "validation")
    unwrapped_model = load_model(options, checkpoint)
    fit_to_tokenizer(unwrapped_model, train_split, options.tokens / TOKENIZER_FOLDER)
    context = choose_context(unwrapped_model, options.context)
    sequences = PackedSequences(train_split, context, options.seed)
    schedule = make_schedule(options, context, accelerator.num_processes)
    if accelerator.is_main_process:
        warn_of_many_epochs(schedule, train_split.num_tokens)
        warn_of_missing_bf16(accelerator.device)
        warn_of_long_run(unwrapped_model, schedule, accelerator.device)

    state = TrainingState(fingerprint(options))
    if checkpoint is not None:
        saved = TrainingState(**load_state(checkpoint))
        check_fingerprint(saved.fingerprint, state.fingerprint, checkpoint, options.accept_changes)
        state = replace(saved, fingerprint=state.fingerprint)
    learner = Learner(
        accelerator,
        unwrapped_model,
        compiled=compiles(options, accelerator.device),
        max_grad_norm=options.max_grad_norm,
        settings=optimizer_settings(options),
    )
    if checkpoint is not None:
        load_optimizers(checkpoint, unwrapped_model, learner.optimizers)
    fitting = fit_micro_batch(unwrapped_model, options, context, accelerator.num_processes, accelerator.device)
    # Processes must agree, but their GPUs may have different amounts of free memory.
    micro_batch_size = int(accelerator.gather(torch.tensor([fitting], device=accelerator.device)).min())

    accelerator.wait_for_everyone()  # all processes have seen whether the run folder exists
    if accelerator.is_main_process:
        remove_partials(options.output)
        remove_partials(options.output / CHECKPOINTS_FOLDER)
        write_recipe(options)
    step = schedule.step_at(state.tokens)
    log = RunLog(accelerator, options, -1 if checkpoint is None else step, state.tokens, schedule.total_tokens)
    hardware = describe_hardware(accelerator.device, accelerator.num_processes)
    log.write({"step": step, "tokens": state.tokens, "hardware": hardware})
    log.print(describe_run(accelerator, unwrapped_model, schedule, train_split.num_tokens, step))
    return Run(
        options=options,
        accelerator=accelerator,
        sequences=sequences,
        validation=validation,
        schedule=schedule,
        learner=learner,
        state=state,
        log=log,
        micro_batch_size=micro_batch_size,
    )


def find_checkpoint(options: PretrainOptions) -> Path | None:
    """The checkpoint to resume from. None for a new run, or one that was killed before its first checkpoint.

    Raises:
        UserError: The run folder exists but the run is not resumed, or the other way around.
    """
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"{options.output}: this is a file; give a new folder as --output")
    if options.output.exists() and not options.resume:
        raise UserError(f"{options.output}: this run exists; continue it with --resume, or give another --output")
    if options.resume and not options.output.exists():
        raise UserError(f"{options.output}: no run to resume")
    checkpoints = options.output / CHECKPOINTS_FOLDER
    return newest_checkpoint(checkpoints) if list_checkpoints(checkpoints) else None


def load_model(options: PretrainOptions, checkpoint: Path | None) -> PreTrainedModel:
    """The model of a checkpoint, or the one that a new run starts from."""
    torch.manual_seed(options.seed)
    if checkpoint is not None:
        return open_model(checkpoint)
    if not options.accept_changes:
        check_tokenizer(options.model, options.tokens / TOKENIZER_FOLDER)
    model = make_model(options.model)
    if options.zero_residual_projections:
        zero_residual_projections(model)
    return model


def fit_to_tokenizer(model: PreTrainedModel, train: TokenizedSplit, tokenizer_folder: Path) -> None:
    """Set the model's special tokens to the tokenizer's.

    Raises:
        UserError: The model has fewer embeddings than the tokenizer has entries.
    """
    if train.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{tokenizer_folder}: the tokenizer has {train.vocab_size} entries, the model only "
            f"{model.config.vocab_size}; set the model's vocab_size"
        )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = train.separator_id
        config.pad_token_id = tokenizer.pad_token_id


def warn_of_missing_bf16(device: torch.device) -> None:
    if device.type == "cuda" and not computes_in_bf16(device):
        name = torch.cuda.get_device_name(device)
        logger.warning("warning: %s does not compute in bf16: training in fp32, which is slower", name)


def warn_of_long_run(model: PreTrainedModel, schedule: Schedule, device: torch.device) -> None:
    """Warn of a run that takes more than a day on a CPU."""
    operations = flops_per_token(model, schedule.context) * schedule.total_tokens
    hours = operations / (CPU_FLOPS * torch.get_num_threads()) / 3600
    if device.type == "cpu" and hours > 24:
        logger.warning("warning: at best %s hours on this CPU: use a GPU, or lower max_tokens", f"{hours:,.0f}")


def describe_run(
    accelerator: Accelerator, model: PreTrainedModel, schedule: Schedule, corpus_tokens: int, step: int
) -> str:
    precision = "bf16" if computes_in_bf16(accelerator.device) else "fp32"
    return (
        f"{model.config.model_type}, {model.num_parameters():,} parameters, on {accelerator.num_processes} x "
        f"{accelerator.device.type} in {precision}: {schedule.total_tokens:,} tokens in {len(schedule):,} steps, "
        f"{schedule.total_tokens / corpus_tokens:.2f} epochs" + (f", from step {step:,}" if step else "")
    )
