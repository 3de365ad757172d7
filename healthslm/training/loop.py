"""Pretraining: any causal language model, on a tokenised corpus, with Accelerate.

`pretrain` reads from top to bottom: model and data, optimizers, resume, then the loop of updates with what happens
every so many of them. A run is a folder:

    runs/NAME/config.yaml             the options that it was started with
    runs/NAME/metrics.jsonl           loss, learning rate, speed and evaluations, one JSON object a line
    runs/NAME/checkpoints/step-N/     models with the state to resume from
    runs/NAME/best/                   the model with the fewest validation bits per byte
"""

import gc
import logging
import math
import os
import shlex
import time
from collections import deque
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from healthslm.errors import Stopped, UserError
from healthslm.evaluation.bits_per_byte import score_documents
from healthslm.files import remove_partials, replacing
from healthslm.models import (
    REPOSITORY,
    check_tokenizer,
    choose_context,
    make_model,
    open_model,
    zero_residual_projections,
)
from healthslm.tokenization.tokens import TOKENIZER_FOLDER, TokenizedSplit
from healthslm.training.attention import fit_attention
from healthslm.training.checkpoint import (
    gather_weights,
    list_checkpoints,
    load_optimizers,
    load_state,
    newest_checkpoint,
    save_checkpoint,
    save_model,
)
from healthslm.training.gradients import accumulate_gradients, agree, has_failed, micro_batches, seed_dropout
from healthslm.training.hardware import describe_hardware
from healthslm.training.interruption import StopSignals
from healthslm.training.metrics import RunMetrics, is_spike
from healthslm.training.optimization import make_optimizers, set_learning_rates, skip_failed
from healthslm.training.packing import PackedRows
from healthslm.training.plan import fit_micro_batch, plan_run
from healthslm.training.precision import bf16_autocast, computes_in_bf16
from healthslm.training.recipe import (
    PretrainOptions,
    check_unchanged,
    compiles,
    identity,
    make_schedule,
    optimizer_settings,
    warn_of_many_passes,
    write_recipe,
)
from healthslm.training.schedule import Schedule

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10
"""Failed updates, without a finite loss and gradient or with no gradient at all, after which a run gives up."""


def pretrain(options: PretrainOptions) -> None:
    """Train a causal language model from memory-mapped tokens.

    Raises:
        UserError: An option does not fit the model, the corpus or the run folder; too many updates in a row failed.
        Stopped: A signal asked for it; there is a checkpoint to resume from.
    """
    # Said outright, because Accelerate would take several processes on the CPU for as many runs of one.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no")
    is_main = accelerator.is_main_process
    if options.dry_run:
        if is_main:
            print(plan_run(options, accelerator.num_processes, accelerator.device))
        return
    checkpoints = options.output / "checkpoints"
    if options.output.exists() and not options.resume:
        raise UserError(f"{options.output}: this run exists; go on with it by --resume, or name another --output")
    if options.resume and not options.output.exists():
        raise UserError(f"{options.output}: no run to resume")
    # A run that was killed before its first checkpoint begins again.
    checkpoint = newest_checkpoint(checkpoints) if list_checkpoints(checkpoints) else None

    # Data and model
    train = TokenizedSplit(options.tokens, "train")
    validation = TokenizedSplit(options.tokens, "validation")
    tokenizer_folder = options.tokens / TOKENIZER_FOLDER
    if checkpoint is None and not options.accept_changes:
        check_tokenizer(options.model, tokenizer_folder)
    torch.manual_seed(options.seed)
    bare_model = make_model(options.model) if checkpoint is None else open_model(checkpoint)
    if checkpoint is None and options.zero_residual_projections:
        zero_residual_projections(bare_model)
    fit_to_tokenizer(bare_model, train, tokenizer_folder)
    context = choose_context(bare_model, options.context)
    rows = PackedRows(train, context, options.seed)
    schedule = make_schedule(options, context, accelerator.num_processes)
    if is_main:
        warn_of_many_passes(schedule, train.num_tokens)
        if accelerator.device.type == "cuda" and not computes_in_bf16(accelerator.device):
            name = torch.cuda.get_device_name(accelerator.device)
            logger.warning("warning: %s does not compute in bf16: training in fp32, which is slower", name)

    # Optimizers, and where to begin
    bare_optimizers = make_optimizers(bare_model, **optimizer_settings(options))
    model, *optimizers = accelerator.prepare(bare_model, *bare_optimizers)
    state = {"tokens": 0, "skipped_in_a_row": 0, "best_bits_per_byte": math.inf, "run": identity(options)}
    if checkpoint is not None:
        saved = load_state(checkpoint)
        check_unchanged(saved["run"], state["run"], checkpoint, options.accept_changes)
        state |= {name: saved[name] for name in ("tokens", "skipped_in_a_row", "best_bits_per_byte")}
        load_optimizers(checkpoint, bare_model, bare_optimizers)
    first_update = schedule.update_at(state["tokens"])
    compiled = compiles(options, accelerator.device)
    fit_attention(bare_model, accelerator.device, compiled)
    # CUDA graphs spare the host a thousand launches a step; DDP and FSDP hook into the model in ways that break them.
    graphs = compiled and accelerator.device.type == "cuda" and accelerator.num_processes == 1
    network = torch.compile(model, dynamic=False, mode="reduce-overhead" if graphs else None) if compiled else model
    if graphs:  # whose own memory each micro-batch overwrites: gradients need one that stays
        for parameter in bare_model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    micro_batch_rows = fit_micro_batch(bare_model, options, context, accelerator.num_processes, accelerator.device)
    steps = (schedule.positions(update) for update in range(first_update, len(schedule)))
    batches = micro_batches(accelerator, bare_model, rows, steps, micro_batch_rows)

    accelerator.wait_for_everyone()  # until each has seen whether the run exists
    if is_main:
        remove_partials(options.output)
        remove_partials(checkpoints)
        write_recipe(options, options.output)
        metrics = RunMetrics(options.output, -1 if checkpoint is None else first_update)
        machine = describe_hardware(accelerator.device, accelerator.num_processes)
        metrics.write({"update": first_update, "tokens": state["tokens"], "hardware": machine})
    bar = progress_bar(state["tokens"], schedule.tokens_before(len(schedule)), visible=is_main)
    if is_main:
        bar.write(description(accelerator, bare_model, rows, schedule, first_update))

    def evaluate(update: int) -> None:
        """Score the model on validation documents, and keep it if it is the best so far."""
        documents = [validation.document(i) for i in range(min(options.evaluation_documents, len(validation)))]
        with bf16_autocast(accelerator.device):
            score = score_documents(
                bare_model,
                documents,
                validation.document_bytes[: len(documents)],
                context=context,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
            )
        bits = accelerator.reduce(torch.tensor(score.bits, dtype=torch.float64, device=accelerator.device), "sum")
        score = replace(score, bits=bits.item())
        is_best = score.bits_per_byte < state["best_bits_per_byte"]
        if is_best:
            state["best_bits_per_byte"] = score.bits_per_byte
        weights = gather_weights(bare_model) if is_best else {}
        if not is_main:
            return
        figures = {"validation_loss": score.loss, "validation_bits_per_byte": score.bits_per_byte}
        metrics.write({"update": update, "tokens": state["tokens"], **figures})
        metrics.draw()
        bar.write(f"update {update}: validation {score.bits_per_byte:.4f} bits per byte, loss {score.loss:.4f}")
        if is_best:
            with replacing(options.output / "best") as folder:
                folder.mkdir()
                save_model(folder, bare_model, tokenizer_folder, weights)
        bar.unpause()  # the time that it shows as left is that of training alone

    def save(update: int) -> None:
        save_checkpoint(
            checkpoints,
            update,
            bare_model,
            bare_optimizers,
            tokenizer_folder,
            state,
            keep=options.keep_checkpoints,
            writes=is_main,
        )

    if first_update == 0:
        evaluate(0)

    def finish(update: int, outcome: torch.Tensor) -> bool:
        """Take note of an update, which is waited for here alone. Returns whether to stop."""
        nonlocal finished_at
        loss, grad_norm, stopping = outcome.tolist()
        failed = bool(has_failed(outcome))
        state["tokens"] = schedule.tokens_before(update + 1)
        state["skipped_in_a_row"] = state["skipped_in_a_row"] + 1 if failed else 0
        if is_main:
            positions, learning_rate_factor = schedule.positions(update), schedule.learning_rate_factor(update)
            tokens, now = len(positions) * context, time.perf_counter()
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{learning_rate_factor * options.learning_rate:.1e}", refresh=False)
            figures = {"loss": loss, "grad_norm": grad_norm, "learning_rate_factor": learning_rate_factor}
            figures["tokens_per_second"] = tokens / (now - finished_at)
            finished_at = now
            if failed:
                figures = {"skipped": rows.place(positions)}
                bar.write(f"update {update + 1}: skipped, with loss {loss} and gradient norm {grad_norm}")
            elif is_spike(metrics.recent_losses, loss):
                figures["spike"] = rows.place(positions)
                bar.write(f"update {update + 1}: the loss leaps to {loss:.3f}")
            metrics.write({"update": update + 1, "tokens": state["tokens"], **figures})
        if state["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
            bar.close()
            raise UserError(failed_updates(checkpoints, state["skipped_in_a_row"]))
        return stopping > 0

    bare_model.train()
    unfinished: deque[tuple[int, torch.Tensor]] = deque()
    stopping, finished_at = False, time.perf_counter()
    with StopSignals() as stop, closing(batches):
        for update, batch in zip(range(first_update, len(schedule)), batches, strict=True):
            set_learning_rates(bare_optimizers, schedule.learning_rate_factor(update))
            seed_dropout(options.seed, update, accelerator.process_index)
            loss = accumulate_gradients(accelerator, network, batch, bar.update)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            outcome = agree(accelerator, loss, grad_norm, stop.received is not None)
            skip_failed(bare_optimizers, has_failed(outcome))
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=not graphs)

            # A device computes this update while the one before is taken note of.
            unfinished.append((update, outcome))
            evaluating = due(update + 1, options.evaluate_every, len(schedule))
            saving = due(update + 1, options.save_every, len(schedule))
            while unfinished and (
                stopping or evaluating or saving or len(unfinished) > updates_ahead(accelerator.device)
            ):
                stopping = finish(*unfinished.popleft()) or stopping
            if evaluating:
                evaluate(update + 1)
            if stopping or saving:
                save(update + 1)
            if stopping or evaluating or saving:
                accelerator.wait_for_everyone()
                finished_at = time.perf_counter()
            if stopping:
                break

    bar.close()
    if is_main:
        metrics.close()
    # A wrapped model that outlives the group of the processes may hang: it then ends the group's threads while it holds
    # Python's lock, for which one of them may be waiting (github.com/pytorch/pytorch/issues/56297).
    del model, network
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    updates = schedule.update_at(state["tokens"])
    if updates < len(schedule):
        raise Stopped(f"stopped after update {updates}; {resume_command(options)}" if is_main else "")
    if is_main:
        logger.info("%s: best validation %.4f bits per byte", options.output / "best", state["best_bits_per_byte"])


def updates_ahead(device: torch.device) -> int:
    """Updates that are queued on a device before the first of them is waited for: a CPU has no queue."""
    return 0 if device.type == "cpu" else 1


def due(update: int, every: int, updates: int) -> bool:
    return update % every == 0 or update == updates


def fit_to_tokenizer(model: PreTrainedModel, train: TokenizedSplit, tokenizer_folder: Path) -> None:
    """Have the model end its texts, and pad them, by the tokenizer's tokens.

    Raises:
        UserError: The model has not as many embeddings as the tokenizer has entries.
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


def failed_updates(checkpoints: Path, skipped: int) -> str:
    """Say that a run gives up, and what there is to go on from."""
    saved = newest_checkpoint(checkpoints) if list_checkpoints(checkpoints) else "none"
    return (
        f"{skipped} updates in a row failed: the loss or gradient norm was not finite, or the norm was exactly zero. "
        f"None of them changed the weights; the last good checkpoint is {saved}. If not finite, lower the learning "
        "rate or look at the text there; if zero, check that the model has weights to train, and try --compile false"
    )


def resume_command(options: PretrainOptions) -> str:
    script = os.path.relpath(REPOSITORY / "scripts/pretrain.py")
    return "go on by: " + shlex.join(["python", script, "--recipe", str(options.output / "config.yaml"), "--resume"])


def progress_bar(tokens: int, max_tokens: int, visible: bool) -> tqdm:
    return tqdm(total=max_tokens, initial=tokens, unit="token", unit_scale=True, smoothing=0.05, disable=not visible)


def description(
    accelerator: Accelerator, model: PreTrainedModel, rows: PackedRows, schedule: Schedule, first_update: int
) -> str:
    tokens = schedule.tokens_before(len(schedule))
    precision = "bf16" if computes_in_bf16(accelerator.device) else "fp32"
    return (
        f"{model.config.model_type}, {model.num_parameters():,} parameters, on {accelerator.num_processes} x "
        f"{accelerator.device.type} in {precision}: {tokens:,} tokens in {len(schedule):,} updates, "
        f"{tokens / rows.split.num_tokens:.2f} passes over the corpus"
        + (f", from update {first_update:,}" if first_update else "")
    )
