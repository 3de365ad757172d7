"""The gradients of one step: a micro-batch after another, on every process its own."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from healthslm.models import accepts
from healthslm.training.attention import document_bounds
from healthslm.training.packing import PackedRows, prepared_ahead
from healthslm.training.precision import bf16_autocast

MicroBatch = dict[str, torch.Tensor]


def micro_batches(
    accelerator: Accelerator,
    model: PreTrainedModel,
    rows: PackedRows,
    steps: Iterable[range],
    micro_batch_rows: int,
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of this process, step by step: those of the next step are prepared while one is computed.

    Args:
        model: Tells by its attention whether it wants the documents' bounds.
        steps: The positions of the rows of each step.
    """
    first = accelerator.process_index * micro_batch_rows
    stride = accelerator.num_processes * micro_batch_rows
    attention = model.config._attn_implementation

    def load(positions: range) -> list[MicroBatch]:
        return [_micro_batch(rows.batch(range(s, s + micro_batch_rows))) for s in positions[first::stride]]

    def _micro_batch(arrays: dict[str, np.ndarray]) -> MicroBatch:
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        bounds = document_bounds(batch["position_ids"], attention)
        if bounds is not None:
            batch["cu_seq_lens_q"] = bounds
        if accelerator.device.type == "cuda":
            return {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch

    return prepared_ahead(load, steps)


def accumulate_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batches: list[MicroBatch],
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Add up the gradients of a step's mean loss, a micro-batch of this process at a time.

    Args:
        model: The model as Accelerate prepared it, compiled or not.
        batches: Of one step, as `micro_batches` gives them.
        progress: Called after each micro-batch with its tokens, those of all processes.

    Returns:
        The mean over the tokens of this process: the mean of all processes is the loss. So are the gradients, which
        Accelerate averages over the processes at the last micro-batch.
    """
    bare_model = accelerator.unwrap_model(model, keep_torch_compile=False)
    settings: dict[str, Any] = {"skip_logits": True} if accepts(bare_model, "skip_logits") else {}
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        is_last = number == len(batches)
        with nullcontext() if is_last else accelerator.no_sync(model), bf16_autocast(accelerator.device):
            loss = model(
                **batch,
                shift_labels=batch["labels"],
                num_items_in_batch=tokens,
                use_cache=False,
                **settings,
            ).loss
            accelerator.backward(loss)
        total += loss.detach()
        if progress is not None:
            progress(batch["input_ids"].numel() * accelerator.num_processes)
    return total


def agree(accelerator: Accelerator, loss: torch.Tensor, grad_norm: torch.Tensor, stopping: bool) -> torch.Tensor:
    """What all processes take for the loss, the gradient's norm (not finite if it is not so for one of them), and
    whether one of them was asked to stop (above 0): (3,), on the device, where nothing has to wait for it."""
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    own = torch.stack([loss, grad_norm.to(loss), torch.full_like(loss, float(stopping))])
    return accelerator.reduce(own, "mean")


def has_failed(outcome: torch.Tensor) -> torch.Tensor:
    """1 if, by what `agree` returned, the loss or the gradient is not finite or there is no gradient at all, else 0.

    No gradient is a mistake of the software's: a model that has still to learn gets one.
    """
    return (~outcome.isfinite().all() | (outcome[1] == 0)).float()


def seed_dropout(*numbers: int) -> None:
    """Seed PyTorch from all these numbers, so that random numbers need no saving to resume."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
