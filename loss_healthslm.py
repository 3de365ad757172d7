"""The language modeling loss in chunks: its value and gradients without the memory for all logits."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# Number of tokens whose logits are computed at a time. On a CPU, 512 take 65 MB in fp32. A GPU needs larger matrix
# products: 4,096 take 0.5 GB in fp32, and half as much in bf16.
LOSS_CHUNK_TOKENS = 512
LOSS_CHUNK_TOKENS_ON_GPU = 4096


def chunked_causal_lm_loss(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor:
    """Compute what Transformers' `ForCausalLMLoss` computes from all logits, with one chunk of logits at a time.

    Args:
        hidden_states: (batch, length, hidden_size).
        lm_head: The output projection, an `nn.Linear` without bias.
        labels: (batch, length), the input ids. They are shifted by one here.
        shift_labels: (batch, length), labels that are already shifted. They take precedence over `labels`.
        num_items_in_batch: Divisor of the summed loss. Defaults to the number of labels that are not ignored.
        ignore_index: Label of tokens that do not count.

    Returns:
        The loss, a scalar in fp32.

    Raises:
        ValueError: There are no labels, or `lm_head` is another kind of module.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("skip_logits=True returns only the loss, which needs labels: pass `labels` too.")
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if type(lm_head).forward is not nn.Linear.forward:  # FSDP's subclasses of nn.Linear keep its forward
        raise ValueError(
            f"skip_logits=True needs an nn.Linear as lm_head, not {type(lm_head).__name__}: use skip_logits=False."
        )
    weight = lm_head.weight
    if isinstance(weight, DTensor):  # tensor parallelism shards it
        weight = weight.full_tensor()
    shift_labels = shift_labels.flatten().to(hidden_states.device)
    counted = shift_labels != ignore_index
    targets = shift_labels.where(counted, 0)
    loss = ChunkedCrossEntropy.apply(hidden_states.flatten(0, 1), weight, targets, counted, torch.is_grad_enabled())
    if num_items_in_batch is None:
        num_items_in_batch = counted.sum()
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden_states @ weight.T`, computed chunk by chunk.

    The gradients of a chunk are computed together with its loss, while its probabilities are in memory. The backward
    pass only scales them.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        with_gradients: bool,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (tokens, hidden_size).
            weight: (vocab_size, hidden_size).
            targets: (tokens,), the token to predict at each position.
            counted: (tokens,), False for positions that the sum leaves out.
            with_gradients: Whether a backward pass may follow.
        """
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        hidden, matrix = hidden_states.to(dtype), weight.to(dtype)
        chunk_tokens = min(LOSS_CHUNK_TOKENS if device == "cpu" else LOSS_CHUNK_TOKENS_ON_GPU, len(hidden))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = weight_gradient = None
        if with_gradients and ctx.needs_input_grad[0]:
            hidden_gradient = torch.empty_like(hidden_states, dtype=torch.float32)
        if with_gradients and ctx.needs_input_grad[1]:
            weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        chunk = _CompiledChunk(matrix) if torch.compiler.is_compiling() else _EagerChunk(matrix, chunk_tokens)

        for start in range(0, len(hidden), chunk_tokens):
            positions = slice(start, start + chunk_tokens)
            hidden_chunk, target, weighing = hidden[positions], targets[positions, None], counted[positions, None]
            target_log_probs, logits_gradient = chunk(hidden_chunk, target)
            loss = loss - (target_log_probs * weighing).sum()
            if hidden_gradient is not None:
                hidden_gradient[positions] = logits_gradient @ matrix * weighing
            if weight_gradient is not None:
                weight_gradient += logits_gradient.T @ (hidden_chunk * weighing)

        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.dtypes = hidden_states.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, loss_gradient: torch.Tensor) -> tuple:
        gradients = (
            None if gradient is None else (gradient * loss_gradient).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None


class _CompiledChunk:
    """Computes the log-probabilities (tokens, 1) of a chunk's targets in fp32 and the gradient (tokens, vocab_size) of
    its logits: the probabilities, minus one for the target."""

    def __init__(self, matrix: torch.Tensor):
        self.matrix = matrix
        self.entries = torch.arange(len(matrix), device=matrix.device)

    def __call__(self, hidden_chunk: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = (hidden_chunk @ self.matrix.T).float().log_softmax(-1)
        gradient = log_probs.exp() - (self.entries == target).float()
        return log_probs.gather(1, target), gradient.to(self.matrix.dtype)


class _EagerChunk:
    """Computes the same and reuses its buffers for every chunk: on a CPU, allocating them takes as long as computing.

    Not for torch.compile, which plans memory itself. With PyTorch 2.11 it would return zero gradients for buffers that
    are written in place.
    """

    def __init__(self, matrix: torch.Tensor, chunk_tokens: int):
        self.matrix = matrix
        self.logits = matrix.new_empty(chunk_tokens, len(matrix))
        self.log_probs = torch.empty_like(self.logits, dtype=torch.float32)

    def __call__(self, hidden_chunk: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, log_probs = self.logits[: len(target)], self.log_probs[: len(target)]
        torch.mm(hidden_chunk, self.matrix.T, out=logits)
        torch.log_softmax(log_probs.copy_(logits), dim=-1, out=log_probs)
        target_log_probs = log_probs.gather(1, target)
        log_probs.exp_().scatter_add_(1, target, log_probs.new_full(target.shape, -1.0))
        return target_log_probs, logits.copy_(log_probs)
