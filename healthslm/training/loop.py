"""Pretraining: any causal language model, on a tokenized corpus, with Accelerate.

`pretrain` sets up a run and trains it. `train` is the loop over steps, which also evaluates and saves. A run is a
folder, described in `healthslm.training.run_folder`.
"""

import gc
import logging
import shlex
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from healthslm.bits_per_byte import Score, score_documents
from healthslm.errors import Stopped, UserError, one_line
from healthslm.files import replacing
from healthslm.models import find_device
from healthslm.tokenization.tokens import TOKENIZER_FOLDER
from healthslm.training.checkpoint import (
    gather_weights,
    list_checkpoints,
    newest_checkpoint,
    save_checkpoint,
    save_model,
)
from healthslm.training.gradients import micro_batches, seed_dropout
from healthslm.training.interruption import StopSignals
from healthslm.training.learner import Outcome
from healthslm.training.log import check_tracker, is_spike
from healthslm.training.options import PretrainOptions
from healthslm.training.plan import plan_run
from healthslm.training.precision import bf16_autocast
from healthslm.training.run_folder import BEST_FOLDER, CHECKPOINTS_FOLDER, CONFIG_FILE
from healthslm.training.setup import Run, set_up

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10
"""Failed steps in a row, with a loss or gradient that is not finite or no gradient at all, that end a run."""


def pretrain(options: PretrainOptions) -> None:
    """Train a causal language model on memory-mapped tokens.

    Raises:
        UserError: An option doesn't fit the model, the corpus or the run folder; too many steps in a row failed.
        Stopped: A signal asked for it; the run can be resumed from a checkpoint.
    """
    check_tracker(options.report_to)
    # Accelerate would otherwise start a separate run in each of several processes on a CPU.
    accelerator = Accelerator(
        cpu=find_device(options.device).type == "cpu",
        mixed_precision="no",
        log_with=None if options.report_to == "none" else options.report_to,
        project_dir=options.output,
    )
    if options.dry_run:
        if accelerator.is_main_process:
            print(plan_run(options, accelerator.num_processes, accelerator.device))
        return
    run = set_up(options, accelerator)
    with closing(run.log), explaining_failed_compilation():
        train(run)
    state, steps, total_steps = run.state, run.step, len(run.schedule)
    # If a wrapped model outlives the process group, it may hang: it ends the group's threads while it holds Python's
    # lock, which one of them may be waiting for (github.com/pytorch/pytorch/issues/56297).
    del run
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    if steps < total_steps:
        raise Stopped(f"stopped after step {steps}; {resume_advice(options)}" if accelerator.is_main_process else "")
    if accelerator.is_main_process:
        logger.info("%s: best validation %.4f bits per byte", options.output / BEST_FOLDER, state.best_bits_per_byte)


def train(run: Run) -> None:
    """Take the remaining steps, with evaluations and checkpoints in between, until the end or a signal to stop."""
    options, accelerator, schedule, learner = run.options, run.accelerator, run.schedule, run.learner
    steps = range(run.step, len(schedule))
    if run.step == 0:
        evaluate(run)
    indices = (schedule.sequences(step) for step in steps)
    batches = micro_batches(accelerator, learner.unwrapped_model, run.sequences, indices, run.micro_batch_size)
    learner.unwrapped_model.train()
    run.log.restart_clock()
    waiting: deque[Outcome] = deque()
    stopping = False
    with StopSignals() as signals, closing(batches):
        for step, batch in zip(steps, batches, strict=True):
            seed_dropout(options.seed, step, accelerator.process_index)
            factor = schedule.learning_rate_factor(step)
            waiting.append(learner.step(batch, factor, lambda: signals.received is not None, run.log.advance))

            evaluating = is_due(step + 1, options.evaluate_every, len(schedule))
            saving = is_due(step + 1, options.save_every, len(schedule))
            ahead = 0 if evaluating or saving else steps_ahead(accelerator.device)
            while len(waiting) > (0 if stopping else ahead):
                stopping = record_step(run, waiting.popleft()) or stopping
            if evaluating:
                evaluate(run)
            if saving or stopping:
                save(run)
            if evaluating or saving or stopping:
                accelerator.wait_for_everyone()
                run.log.restart_clock()
            if stopping:
                break


def record_step(run: Run, outcome: Outcome) -> bool:
    """Wait for the next step's outcome and record it. Returns whether to stop.

    Raises:
        UserError: Too many steps in a row failed.
    """
    options, schedule, state, log = run.options, run.schedule, run.state, run.log
    step, indices = run.step, schedule.sequences(run.step)
    loss, grad_norm, failed, stop = outcome.wait()
    state.tokens = schedule.tokens_before(step + 1)
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if failed else 0
    if log.is_active:
        factor = schedule.learning_rate_factor(step)
        speed = schedule.batch_tokens / log.seconds_of_step()
        log.show(loss=f"{loss:.3f}", lr=f"{factor * options.learning_rate:.1e}")
        figures: dict[str, Any] = {"skipped": run.sequences.locate(indices)}
        if failed:
            log.print(f"step {step + 1}: skipped, with loss {loss} and gradient norm {grad_norm}")
        else:
            figures = {"loss": loss, "grad_norm": grad_norm, "learning_rate_factor": factor, "tokens_per_second": speed}
            if is_spike(log.recent_losses, loss):
                figures["spike"] = run.sequences.locate(indices)
                log.print(f"step {step + 1}: the loss jumped to {loss:.3f}")
        log.write({"step": step + 1, "tokens": state.tokens, **figures})
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise UserError(describe_failure(options.output / CHECKPOINTS_FOLDER, state.skipped_in_a_row))
    return stop


def evaluate(run: Run) -> None:
    """Score the model on validation documents, and save it to best/ if it is the best so far."""
    state, log, unwrapped_model = run.state, run.log, run.learner.unwrapped_model
    score = score_validation(run)
    is_best = score.bits_per_byte < state.best_bits_per_byte
    if is_best:
        state.best_bits_per_byte = score.bits_per_byte
    figures = {"validation_loss": score.loss, "validation_bits_per_byte": score.bits_per_byte}
    log.write({"step": run.step, "tokens": state.tokens, **figures})
    log.draw_curve()
    log.print(f"step {run.step}: validation {score.bits_per_byte:.4f} bits per byte, loss {score.loss:.4f}")
    if is_best:
        weights = gather_weights(unwrapped_model)
        if run.accelerator.is_main_process:
            with replacing(run.options.output / BEST_FOLDER) as folder:
                folder.mkdir()
                save_model(folder, unwrapped_model, run.options.tokens / TOKENIZER_FOLDER, weights)


def score_validation(run: Run) -> Score:
    """Score the first validation documents, which the processes share."""
    accelerator, validation = run.accelerator, run.validation
    count = min(run.options.evaluation_documents, len(validation))
    with bf16_autocast(accelerator.device):
        score = score_documents(
            run.learner.unwrapped_model,
            [validation.document(i) for i in range(count)],
            validation.document_bytes[:count],
            context=run.sequences.context,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
    bits = torch.tensor(score.bits, dtype=torch.float64, device=accelerator.device)
    return replace(score, bits=accelerator.reduce(bits, "sum").item())


def save(run: Run) -> None:
    """Save a checkpoint to resume from."""
    save_checkpoint(
        run.options.output / CHECKPOINTS_FOLDER,
        run.step,
        run.learner.unwrapped_model,
        run.learner.optimizers,
        run.options.tokens / TOKENIZER_FOLDER,
        asdict(run.state),
        keep=run.options.keep_checkpoints,
        writes=run.accelerator.is_main_process,
    )


def steps_ahead(device: torch.device) -> int:
    """Steps that may be queued on a device while the host waits for an earlier one. A CPU has no queue."""
    return 0 if device.type == "cpu" else 1


def is_due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps


def describe_failure(checkpoints: Path, skipped: int) -> str:
    saved = newest_checkpoint(checkpoints) if list_checkpoints(checkpoints) else "none"
    return (
        f"{skipped} steps in a row failed: the loss or gradient norm was not finite, or the norm was exactly zero. "
        f"They did not change the weights; the last checkpoint is {saved}. If a value was not finite, lower the "
        "learning rate or check the text there; if the norm was zero, check that the model has trainable weights, and "
        "try --compile false"
    )


@contextmanager
def explaining_failed_compilation() -> Iterator[None]:
    """Say what to do if torch.compile fails, for example because there is no C++ compiler.

    Raises:
        UserError: It does.
    """
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise UserError(f"can't compile the model: {one_line(error)}; use --compile false") from error


def resume_advice(options: PretrainOptions) -> str:
    command = ["healthslm", "pretrain", "--recipe", str(options.output / CONFIG_FILE), "--resume"]
    return f"resume with: {shlex.join(command)}"
