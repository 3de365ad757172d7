"""The gradients of one update: a micro-batch after another, on every process its own."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from healthslm.models import accepts
from healthslm.training.attention import PACKED_DOCUMENTS
from healthslm.training.packing import PackedRows, document_bounds, prepared_ahead


def accumulate_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    rows: PackedRows,
    positions: range,
    micro_batch_rows: int,
    longest: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Add up the gradients of the mean loss over these rows, a micro-batch of this process at a time.

    Args:
        model: The model as Accelerate prepared it, compiled or not.
        longest: Tokens of a row that see one another, see `PackedRows.batch`.
        progress: Called after each micro-batch with its tokens, those of all processes.

    Returns:
        This process's part of that mean, times the number of processes: their mean is the loss. So are the gradients,
        which Accelerate averages over the processes at the last micro-batch.
    """
    bare_model = accelerator.unwrap_model(model, keep_torch_compile=False)
    settings: dict[str, Any] = {"skip_logits": True} if accepts(bare_model, "skip_logits") else {}
    tokens_of_process = len(positions) * rows.context // accelerator.num_processes
    stride = micro_batch_rows * accelerator.num_processes
    starts = positions[accelerator.process_index * micro_batch_rows :: stride]
    total = torch.zeros((), device=accelerator.device)

    def load(start: int) -> dict[str, torch.Tensor]:
        batch = rows.batch(range(start, start + micro_batch_rows), longest)
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        return {name: t.pin_memory() for name, t in tensors.items()} if total.is_cuda else tensors

    for start, batch in zip(starts, prepared_ahead(load, starts), strict=True):
        if bare_model.config._attn_implementation == PACKED_DOCUMENTS:
            settings["cu_seq_lens_q"] = document_bounds(batch["position_ids"])
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
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
        if progress is not None:
            progress(stride * rows.context)
    return total


def agree(
    accelerator: Accelerator, loss: torch.Tensor, grad_norm: torch.Tensor, stopping: bool
) -> tuple[float, float, bool]:
    """What all processes take for the loss, the gradient's norm (not finite if it is not so for one of them), and
    whether one of them was asked to stop."""
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    own = torch.stack([loss, grad_norm.to(loss), torch.full_like(loss, float(stopping))])
    loss_mean, norm_mean, stopping_mean = accelerator.reduce(own, "mean").tolist()
    return loss_mean, norm_mean, stopping_mean > 0


def bf16_autocast(device: torch.device) -> torch.autocast:
    """Matrix products in bf16 where the machine computes in it, and not where it would only imitate it."""
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def fit_attention(model: PreTrainedModel, device: torch.device, compiled: bool) -> None:
    """Have a model attend document by document on a CPU, unless it is compiled: documents have all lengths."""
    if device.type == "cpu" and not compiled:
        model.set_attn_implementation(PACKED_DOCUMENTS)


def seed_dropout(*numbers: int) -> None:
    """Seed PyTorch from all these numbers, so that random numbers need no saving to resume."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
