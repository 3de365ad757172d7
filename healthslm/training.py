"""Pretraining: any causal language model, on a tokenised corpus, with Accelerate.

`pretrain` reads from top to bottom: model and data, optimizer, resume, then the loop of updates with what happens every
so many of them. A run is a folder:

    runs/NAME/config.yaml             the options that it was started with
    runs/NAME/metrics.jsonl           loss, learning rate, speed and evaluations, one JSON object a line
    runs/NAME/checkpoints/step-N/     models with the state to resume from
    runs/NAME/best/                   the model with the fewest validation bits per byte
"""

import dataclasses
import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from healthslm.bits_per_byte import score_documents
from healthslm.checkpoint import load_training_state, newest_checkpoint, save_checkpoint, save_model
from healthslm.errors import UserError
from healthslm.files import replacing
from healthslm.metrics import RunMetrics
from healthslm.models import accepts, make_model, open_model
from healthslm.optimization import learning_rate_at, make_optimizer
from healthslm.packing import PackedRows
from healthslm.tokens import TOKENIZER_FOLDER, TokenizedSplit

logger = logging.getLogger(__name__)


@dataclass
class PretrainOptions:
    """Options of `pretrain`."""

    model: str | dict[str, Any]
    """What to train: a folder or Hub name, whose weights are trained further, or a model_type with overrides, which
    starts from new weights: {model_type: gpt2, n_layer: 6}."""
    tokens: Path
    """Folder of the tokenised corpus."""
    output: Path
    """Run folder to write: runs/NAME."""
    max_tokens: int
    """Tokens to train on; the last update may go beyond by less than batch_tokens."""
    batch_tokens: int = 65_536
    """Tokens of an update, over all processes."""
    micro_batch_rows: int = 8
    """Rows of one context that a process computes at once; more need more memory and change no result."""
    context: int | None = None
    """Tokens of a row; by default the model's longest."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_tokens: int = 2_000_000
    """Tokens over which the learning rate rises to its peak; from there it falls linearly to zero."""
    weight_decay: float = 0.1
    """AdamW's weight decay, on matrices alone."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moment."""
    max_grad_norm: float = 1.0
    """Norm to which larger gradients are clipped."""
    seed: int = 0
    """Of the initial weights, the order of the rows and dropout."""
    evaluate_every: int = 100
    """Updates from one evaluation on the validation split to the next; there is one at the start and the end too."""
    evaluation_documents: int = 500
    """Documents of the validation split to evaluate on: the first so many."""
    save_every: int = 500
    """Updates from one checkpoint to the next; there is one at the end too."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""


def pretrain(options: PretrainOptions) -> None:
    """Train a causal language model from memory-mapped tokens.

    Raises:
        UserError: An option does not fit the model, the corpus or the run folder.
    """
    # Said outright, because Accelerate would take several processes on the CPU for as many runs of one.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    is_main = accelerator.is_main_process
    checkpoints = options.output / "checkpoints"
    checkpoint = newest_checkpoint(checkpoints) if options.resume else None
    if checkpoint is None and options.output.exists():
        raise UserError(f"{options.output}: this run exists; go on with it by --resume, or name another --output")

    # Data and model
    train = TokenizedSplit(options.tokens, "train")
    validation = TokenizedSplit(options.tokens, "validation")
    tokenizer_folder = options.tokens / TOKENIZER_FOLDER
    torch.manual_seed(options.seed)
    bare_model = make_model(options.model) if checkpoint is None else open_model(checkpoint)
    fit_to_tokenizer(bare_model, train, tokenizer_folder)
    context = options.context or bare_model.config.max_position_embeddings
    rows = PackedRows(train, context, options.seed)

    # Plan
    rows_per_update = check_batch(options, context, accelerator.num_processes)
    updates = math.ceil(options.max_tokens / options.batch_tokens)
    warmup_updates = min(math.ceil(options.warmup_tokens / options.batch_tokens), updates - 1)

    # Optimizer, and where to begin
    bare_optimizer = make_optimizer(bare_model, options.weight_decay, options.betas)
    model, optimizer = accelerator.prepare(bare_model, bare_optimizer)
    state = {"update": 0, "best_bits_per_byte": math.inf}
    if checkpoint is not None:
        state = load_training_state(checkpoint, bare_model, bare_optimizer)
    if is_main:
        options.output.mkdir(parents=True, exist_ok=True)
        write_options(options)
        metrics = RunMetrics(options.output, state["update"])
    bar = progress_bar(state["update"], updates, options.batch_tokens, visible=is_main)
    bar.write(description(options, accelerator, bare_model, rows, updates, state["update"]))

    def evaluate(update: int) -> None:
        """Score the model on validation documents, and keep it if it is the best so far."""
        documents = [validation.document(i) for i in range(min(options.evaluation_documents, len(validation)))]
        score = score_documents(bare_model, documents, validation.document_bytes[: len(documents)], context=context)
        figures = {"validation_loss": score.loss, "validation_bits_per_byte": score.bits_per_byte}
        metrics.write({"update": update, "tokens": update * options.batch_tokens, **figures})
        metrics.draw()
        bar.write(f"update {update}: validation {score.bits_per_byte:.4f} bits per byte, loss {score.loss:.4f}")
        if score.bits_per_byte < state["best_bits_per_byte"]:
            state["best_bits_per_byte"] = score.bits_per_byte
            with replacing(options.output / "best") as folder:
                folder.mkdir()
                save_model(folder, bare_model, tokenizer_folder)

    if is_main and state["update"] == 0:
        evaluate(0)

    bare_model.train()
    for update in range(state["update"], updates):
        started = time.perf_counter()
        learning_rate = learning_rate_at(update, updates, warmup_updates, options.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        seed_dropout(options.seed, update, accelerator.process_index)

        first_row = update * rows_per_update
        positions = range(first_row, first_row + rows_per_update)
        loss = accumulate_gradients(accelerator, model, rows, positions, options.micro_batch_rows)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        state["update"] = update + 1
        loss = accelerator.reduce(loss, "mean").item()
        if is_main:
            bar.update(options.batch_tokens)
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{learning_rate:.1e}")
            figures = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm.item()}
            figures["tokens_per_second"] = options.batch_tokens / (time.perf_counter() - started)
            metrics.write({"update": update + 1, "tokens": (update + 1) * options.batch_tokens, **figures})
            if due(update + 1, options.evaluate_every, updates):
                evaluate(update + 1)
            if due(update + 1, options.save_every, updates):
                save_checkpoint(
                    checkpoints, bare_model, tokenizer_folder, bare_optimizer, state, keep=options.keep_checkpoints
                )
        accelerator.wait_for_everyone()

    bar.close()
    if is_main:
        metrics.close()
        logger.info("%s: best validation %.4f bits per byte", options.output / "best", state["best_bits_per_byte"])
    accelerator.end_training()


def accumulate_gradients(
    accelerator: Accelerator, model: torch.nn.Module, rows: PackedRows, positions: range, micro_batch_rows: int
) -> torch.Tensor:
    """Add up the gradients of the mean loss over these rows, a micro-batch of this process at a time.

    Returns:
        This process's part of that mean, times the number of processes: their mean is the loss. So are the gradients,
        which Accelerate averages over the processes at the last micro-batch.
    """
    bare_model = accelerator.unwrap_model(model)
    settings = {"skip_logits": True} if accepts(bare_model, "skip_logits") else {}
    tokens_of_process = len(positions) * rows.context // accelerator.num_processes
    stride = micro_batch_rows * accelerator.num_processes
    starts = positions[accelerator.process_index * micro_batch_rows :: stride]
    total = torch.zeros((), device=accelerator.device)
    for start in starts:
        batch = rows.batch(range(start, start + micro_batch_rows))
        batch = {name: torch.from_numpy(array).to(accelerator.device) for name, array in batch.items()}
        is_last = start == starts[-1]
        with nullcontext() if is_last else accelerator.no_sync(model), bf16_autocast(accelerator.device):
            loss = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                labels=batch["labels"],
                shift_labels=batch["labels"],
                num_items_in_batch=tokens_of_process,
                use_cache=False,
                **settings,
            ).loss
            accelerator.backward(loss)
        total += loss.detach()
    return total


def bf16_autocast(device: torch.device) -> torch.autocast:
    """Matrix products in bf16 where the machine computes in it, and not where it would only imitate it."""
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def seed_dropout(*numbers: int) -> None:
    """Seed PyTorch from all these numbers, so that random numbers need no saving to resume."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


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


def check_batch(options: PretrainOptions, context: int, processes: int) -> int:
    """Return the rows of an update, which must come out even among micro-batches and processes."""
    step = context * options.micro_batch_rows * processes
    if options.batch_tokens % step:
        raise UserError(
            f"batch_tokens {options.batch_tokens} is no multiple of {step} (context {context} x micro_batch_rows "
            f"{options.micro_batch_rows} x processes {processes}); {max(options.batch_tokens // step, 1) * step} is"
        )
    return options.batch_tokens // context


def write_options(options: PretrainOptions) -> None:
    """Write config.yaml: a recipe that repeats the run."""
    values = {
        name: str(Path(value).resolve()) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(options).items()
        if name != "resume"
    }
    values["betas"] = list(options.betas)
    with replacing(options.output / "config.yaml") as new:
        new.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def progress_bar(update: int, updates: int, batch_tokens: int, visible: bool) -> tqdm:
    return tqdm(
        total=updates * batch_tokens,
        initial=update * batch_tokens,
        unit="token",
        unit_scale=True,
        smoothing=0.05,
        disable=not visible,
    )


def description(
    options: PretrainOptions,
    accelerator: Accelerator,
    model: PreTrainedModel,
    rows: PackedRows,
    updates: int,
    update: int,
) -> str:
    tokens = updates * options.batch_tokens
    precision = "bf16" if bf16_autocast(accelerator.device)._enabled else "fp32"
    return (
        f"{model.config.model_type}, {model.num_parameters():,} parameters, on {accelerator.num_processes} x "
        f"{accelerator.device.type} in {precision}: {tokens:,} tokens in {updates:,} updates, "
        f"{tokens / rows.split.num_tokens:.2f} passes over the corpus" + (f", from update {update:,}" if update else "")
    )
