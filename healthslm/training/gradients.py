"""The gradients of one step, accumulated over the micro-batches of each process."""

from collections.abc import Callable, Generator, Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from healthslm.models import accepts
from healthslm.training.attention import document_bounds
from healthslm.training.packing import PackedSequences, prefetch
from healthslm.training.precision import bf16_autocast

MicroBatch = dict[str, torch.Tensor]


def micro_batches(
    accelerator: Accelerator,
    model: PreTrainedModel,
    sequences: PackedSequences,
    steps: Iterable[range],
    micro_batch_size: int,
) -> Generator[list[MicroBatch], None, None]:
    """The micro-batches of this process for each step. A thread prepares those of the next step during a step.

    Args:
        model: Its attention implementation determines whether a batch has the documents' bounds.
        steps: The indices of the sequences of each step.
        micro_batch_size: Sequences of a micro-batch.
    """
    first = accelerator.process_index * micro_batch_size
    stride = accelerator.num_processes * micro_batch_size
    attention = model.config._attn_implementation

    def load(indices: range) -> list[MicroBatch]:
        return [_micro_batch(sequences.batch(range(i, i + micro_batch_size))) for i in indices[first::stride]]

    def _micro_batch(arrays: dict[str, np.ndarray]) -> MicroBatch:
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        bounds = document_bounds(batch["position_ids"], attention)
        if bounds is not None:
            batch["cu_seq_lens_q"] = bounds
        if accelerator.device.type == "cuda":
            return {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch

    return prefetch(load, steps)


def accumulate_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batches: list[MicroBatch],
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Accumulate the gradients of a step's mean loss over the micro-batches of this process.

    Args:
        model: The model that Accelerate prepared, compiled or not.
        batches: The micro-batches of one step, from `micro_batches`.
        progress: Called after each micro-batch with its number of tokens over all processes.

    Returns:
        The mean loss over the tokens of this process; the step's loss is the mean over all processes. Accelerate
        averages the gradients over the processes at the last micro-batch.
    """
    unwrapped_model = accelerator.unwrap_model(model, keep_torch_compile=False)
    settings: dict[str, Any] = {"skip_logits": True} if accepts(unwrapped_model, "skip_logits") else {}
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


def reduce_outcome(accelerator: Accelerator, loss: torch.Tensor, grad_norm: torch.Tensor, stop: bool) -> torch.Tensor:
    """Average the outcome of a step over all processes, so that they all act alike.

    Returns:
        (3,), on the device: the loss; the gradient norm, not finite if that of one process is not; and a number above
        0 if a process was asked to stop.
    """
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    own = torch.stack([loss, grad_norm.to(loss), torch.full_like(loss, float(stop))])
    return accelerator.reduce(own, "mean")


def has_failed(outcome: torch.Tensor) -> torch.Tensor:
    """1 if the loss or the gradient norm of an outcome is not finite, or if the norm is exactly zero, else 0.

    A model that still has something to learn has a gradient: an exact zero means that the software lost it.
    """
    return (~outcome.isfinite().all() | (outcome[1] == 0)).float()


def seed_dropout(*numbers: int) -> None:
    """Seed PyTorch from all these numbers, so that a checkpoint needs no random state."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
