"""Estimates of a run before it starts: parameters, operations, tokens, memory by part, disk space and hours.

The estimate computes nothing and allocates almost nothing. It builds the model from fake tensors, which have a shape, a
type and a device but no values, and counts the bytes that the optimizers and one micro-batch would hold.
"""

import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import PreTrainedModel

from healthslm.models import accepts, choose_context, make_model
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training.attention import PACKED_DOCUMENTS, document_bounds, fit_attention
from healthslm.training.optimization import find_embeddings, make_optimizers
from healthslm.training.precision import bf16_autocast, computes_in_bf16
from healthslm.training.recipe import (
    PretrainOptions,
    compiles,
    make_schedule,
    optimizer_settings,
    warn_of_many_epochs,
)
from healthslm.training.schedule import Schedule

FREE_MEMORY_USED = 0.8
"""Fraction of a GPU's free memory that micro-batches may fill, because their memory is an estimate."""

_human = tqdm.format_sizeof  # three digits: 15.3M


def plan_run(options: PretrainOptions, processes: int, device: torch.device) -> str:
    """Estimate the run that these options describe, on a number of processes with one device each.

    Raises:
        UserError: An option does not fit the model or the corpus.
    """
    corpus_tokens = TokenizedSplit(options.tokens, "train").num_tokens
    TokenizedSplit(options.tokens, "validation")  # which the run needs too
    # Transformers can't load weights from a folder onto the meta device.
    with torch.device("meta") if isinstance(options.model, dict) else nullcontext():
        model = make_model(options.model)
    fit_attention(model, device, compiles(options, device))
    context = choose_context(model, options.context)
    schedule = make_schedule(options, context, processes)
    warn_of_many_epochs(schedule, corpus_tokens)
    options = replace(options, micro_batch_size=fit_micro_batch(model, options, context, processes, device))
    return describe_plan(model, schedule, options, corpus_tokens, processes, device)


def fit_micro_batch(
    model: PreTrainedModel, options: PretrainOptions, context: int, processes: int, device: torch.device
) -> int:
    """Sequences of a micro-batch: the number asked for, or as many as fit into the GPU's memory (8 on a CPU)."""
    if options.micro_batch_size is not None:
        return options.micro_batch_size
    sequences, free = options.batch_tokens // (context * processes), free_memory(device)

    def fits(count: int) -> bool:
        if free is None:
            return count <= 8
        parts = memory_by_part(model, replace(options, micro_batch_size=count), context, device)
        return sum(parts.values()) <= FREE_MEMORY_USED * free

    counts = (count for count in range(sequences, 1, -1) if sequences % count == 0)
    return next((count for count in counts if fits(count)), 1)


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a GPU's memory; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def describe_plan(
    model: PreTrainedModel,
    schedule: Schedule,
    options: PretrainOptions,
    corpus_tokens: int,
    processes: int,
    device: torch.device,
) -> str:
    """The estimate as lines of three columns: name, exact value, and the value in human units or a remark.

    Args:
        model: The model to train, with the attention implementation of training. It may be on the meta device.
        corpus_tokens: Tokens of the training split.
        device: The device of each process.
    """
    parameters, trained = model.num_parameters(), sum(p.requires_grad for p in model.parameters())
    embeddings = sum(weight.numel() for weight in {module.weight for module in find_embeddings(model)})
    flops, tokens = flops_per_token(model, schedule.context), schedule.total_tokens
    size = options.micro_batch_size or 1
    micro_batch = size * schedule.context
    micro_batches = schedule.batch_tokens // (micro_batch * processes)
    memory = memory_by_part(model, options, schedule.context, device)
    checkpoint = sum(size for part, size in memory.items() if part.startswith(("weights", "moments")))
    lines = [
        (model.config.model_type, "", ""),
        ("  parameters", f"{parameters:,}", _human(parameters)),
        ("    embeddings", f"{embeddings:,}", _human(embeddings)),
        ("    others", f"{parameters - embeddings:,}", _human(parameters - embeddings)),
        ("  tensors to train", f"{trained:,}", ""),
        ("  operations a token", f"{flops:,}", _human(flops, "FLOP")),
        (f"run on {processes} x {device.type}", "", ""),
        ("  tokens", f"{tokens:,}", _human(tokens)),
        ("  epochs", f"{tokens / corpus_tokens:,.2f}", f"of {corpus_tokens:,}"),
        ("  steps", f"{len(schedule):,}", ""),
        ("  tokens of a step", f"{schedule.batch_tokens:,}", ""),
        ("  micro-batches of a step and process", f"{micro_batches:,}", ""),
        ("  tokens of a micro-batch", f"{micro_batch:,}", f"{size} x {schedule.context:,}"),
        ("  operations", f"{flops * tokens:,}", _human(flops * tokens, "FLOP")),
        ("memory of a process, bytes", "", ""),
        *((f"  {part}", f"{size:,}", _human(size, "B")) for part, size in memory.items()),
        ("  in all", f"{sum(memory.values()):,}", _human(sum(memory.values()), "B")),
        ("disk, bytes", "", ""),
        ("  a checkpoint", f"{checkpoint:,}", _human(checkpoint, "B")),
    ]
    if options.tokens_per_second is not None:
        speed = options.tokens_per_second
        lines.append((f"at {speed:,.0f} tokens a second", "", _human(flops * speed, "FLOP/s")))
        lines.append(("  hours", f"{tokens / speed / 3600:,.2f}", ""))
    names, counts = (max(len(line[column]) for line in lines) for column in (0, 1))
    return "\n".join(f"{name:<{names}}  {count:>{counts}}  {remark}".rstrip() for name, count, remark in lines)


def flops_per_token(model: PreTrainedModel, context: int) -> int:
    """Floating-point operations of training, forward and backward, for each token of a sequence of `context`:

        6 * matrix weights + 12 * layers * heads * head_dim * context / 2

    A multiply-add counts as two operations, and the backward pass takes twice as many as the forward pass (Kaplan et
    al., 2020, section 2.1; Chowdhery et al., 2022, appendix B; the attention term is half of theirs, because attention
    is causal). The count includes the matrices of the layers and the output projection, tied or not. It leaves out the
    embedding lookup, norms, activations, softmax and the optimizers. Attention is counted as if a sequence were one
    document; shorter documents take less.
    """
    config, output = model.config, model.get_output_embeddings().weight
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * context
    return 6 * (_hidden_matrix_weights(model) + output.numel()) + 6 * attention


def memory_by_part(
    model: PreTrainedModel, options: PretrainOptions, context: int, device: torch.device
) -> dict[str, int]:
    """Peak memory of a process in bytes during a micro-batch, without FSDP.

    Weights, gradients and moments are exact: those of the optimizers from `make_optimizers`, after a step. The others
    are estimates, which count each tensor from the operation that creates it until it is freed. Workspaces, the
    allocator's overhead, libraries, and DDP's copy of the gradients are not included; torch.compile needs less. The
    estimates are

    - bf16 copies: 2 bytes for each weight of the layers' matrices, under autocast;
    - activations: everything else that the decoder keeps for the backward pass, for the documents that need the most
      memory: one per sequence if attention runs document by document, several (with a mask) otherwise;
    - logits and temporaries: the rest at the peak, mostly the logits and their gradient, whole or, if the model takes
      `skip_logits`, of one chunk.
    """
    size, autocast, fake_mode = options.micro_batch_size or 1, bf16_autocast(device), FakeTensorMode()
    after_decoder: list[int] = []
    with fake_mode, device:
        fake = type(model)(model.config).train()
        optimizers = make_optimizers(fake, **optimizer_settings(options))
        for parameter in fake.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
        ids = torch.zeros(size, context, dtype=torch.long)
    # Transformers can't read the values of fake `position_ids`, so it builds the mask that several documents need.
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": ids, "labels": ids, "use_cache": False}
    if accepts(fake, "skip_logits"):
        batch["skip_logits"] = True
    attention = fake.config._attn_implementation
    bounds = document_bounds(torch.arange(context).expand(size, -1), attention)
    if bounds is not None:
        # Attention one document at a time reads the values of the bounds.
        is_fake = attention != PACKED_DOCUMENTS
        batch["cu_seq_lens_q"] = fake_mode.from_tensor(bounds.to(device)) if is_fake else bounds
    with _LiveBytes(fake_mode) as live, autocast:
        fake.base_model.register_forward_hook(lambda *_: after_decoder.append(live.now))
        fake(**batch).loss.backward()
    copies = 2 * _hidden_matrix_weights(fake) if computes_in_bf16(device) else 0
    parts = {name: sum(p.nbytes for p in fake.parameters()) for name in ("weights", "gradients")}
    for optimizer in optimizers:
        moments = (moment for state in optimizer.state.values() for moment in state.values())
        parts[f"moments of {type(optimizer).__name__}"] = sum(moment.nbytes for moment in moments)
    return parts | {
        "bf16 copies": copies,
        "activations": after_decoder[0] - copies,
        "logits and temporaries": live.peak - after_decoder[0],
    }


class _LiveBytes(TorchDispatchMode):
    """Runs operations on fake tensors, unless all inputs are real, and counts the live bytes of their results."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self.fake_mode, self.now, self.peak = fake_mode, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs))
        is_real = given and not any(isinstance(tensor, FakeTensor) for tensor in given)
        with nullcontext() if is_real else self.fake_mode:
            result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for storage in (tensor.untyped_storage() for tensor in _tensors(result)):
            if storage._cdata not in known:  # neither a view nor written in place
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def _tensors(values: object) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _hidden_matrix_weights(model: PreTrainedModel) -> int:
    embeddings = {id(embedding.weight) for embedding in find_embeddings(model)}
    return sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in embeddings)
