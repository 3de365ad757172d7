"""Bits per byte: how well a model predicts documents, defined in one place for every model.

The bits of a document are the sum of -log2 p over the tokens of its title, a newline and its text. Each document is
scored alone, after the separator. A document longer than the context is scored in windows that overlap by half; each
token is scored once, in the window that gives it the most context. Bits are divided by the document's UTF-8 bytes, so
that models with different tokenizers can be compared.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from healthslm.models import accepts, by_device, choose_context


@dataclass(frozen=True)
class Score:
    """The bits that a model needs to encode documents."""

    documents: int
    tokens: int
    """Predicted tokens, all except the separators."""
    bytes: int
    bits: float

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return self.bits * math.log(2) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes

    def to_dict(self) -> dict[str, int | float]:
        derived = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return asdict(self) | derived


class Window(NamedTuple):
    document: int
    start: int
    end: int
    """Inputs are tokens[start:end] of the document, targets tokens[start + 1 : end + 1]."""
    first_scored: int
    """Targets before this one are scored in an earlier window."""


def windows(lengths: Sequence[int], context: int) -> Iterator[Window]:
    """Split documents into windows of at most `context` inputs. Lengths are in tokens, including the separator."""
    stride = max(context // 2, 1)
    for document, length in enumerate(lengths):
        inputs = length - 1
        for start in range(0, max(inputs - context, 0) + stride, stride):
            end = min(start + context, inputs)
            first_scored = 0 if start == 0 else context - stride
            if end > start:  # an empty document has nothing to predict
                yield Window(document, start, end, first_scored)


@torch.no_grad()
def token_bits(
    model: PreTrainedModel,
    documents: Sequence[np.ndarray],
    context: int | None = None,
    batch_tokens: int | None = None,
    first_tokens: Sequence[int] | None = None,
    progress: bool = False,
    process_index: int = 0,
    num_processes: int = 1,
) -> list[np.ndarray]:
    """The bits of each token of each document under a model.

    Args:
        model: Any causal language model. Its training mode is restored at the end.
        documents: Token ids of each document, with the separator first.
        context: Maximum window in tokens. By default the model's context.
        batch_tokens: Tokens of a forward pass, including padding. It changes memory and speed, not the result. By
            default 1,024 on a CPU and 8,192 on a GPU.
        first_tokens: Index of the first token of each document to score, at least 1. Tokens before it are only read and
            count 0 bits. By default every token is scored.
        process_index: Index of this process among `num_processes`. They share the windows, and each returns zeros for
            windows of the others, so the sum over processes is the result. All run the same number of forward passes,
            which FSDP requires.

    Returns:
        For each document (tokens - 1,), float64, without the separator.
    """
    context = choose_context(model, context)
    batch_tokens = batch_tokens or by_device(model, cpu=1024, gpu=8192)
    found_windows = windows([len(document) for document in documents], context)
    all_windows = sorted(
        found_windows if first_tokens is None else _windows_from(first_tokens, found_windows),
        key=lambda window: (window.start - window.end, window.first_scored),
    )
    batches = []
    while all_windows:
        count = max(batch_tokens // (all_windows[0].end - all_windows[0].start), 1)
        batches.append(all_windows[:count])
        all_windows = all_windows[count:]
    bits = [np.zeros(len(document) - 1) for document in documents]
    was_training = model.training
    model.eval()
    for turn in tqdm(range(0, len(batches), num_processes), desc="evaluating", unit="batch", disable=not progress):
        number = turn + process_index
        batch = batches[min(number, len(batches) - 1)]
        first, width = min(window.first_scored for window in batch), batch[0].end - batch[0].start
        found = _window_bits(model, documents, batch, first, width)
        for window, window_bits in zip(batch, found, strict=True):
            if number < len(batches):  # otherwise this process only runs as many forward passes as the others
                scored = slice(window.first_scored - first, window.end - window.start - first)
                bits[window.document][window.start + first : window.end][scored] = window_bits[scored]
    model.train(was_training)
    return bits


def _windows_from(first_tokens: Sequence[int], found_windows: Iterable[Window]) -> Iterator[Window]:
    """The windows that score tokens from the first one of each document, see `token_bits`."""
    for window in found_windows:
        first_scored = max(window.first_scored, first_tokens[window.document] - 1 - window.start)
        if window.start + first_scored < window.end:
            yield window._replace(first_scored=first_scored)


def _window_bits(
    model: PreTrainedModel, documents: Sequence[np.ndarray], batch: list[Window], first: int, width: int
) -> np.ndarray:
    """The bits of the targets of each window from index `first`: (windows, width - first)."""
    # Padding is on the right, so causal attention never sees it and needs no mask.
    inputs = torch.zeros(len(batch), width, dtype=torch.long)
    targets = torch.full((len(batch), width), -100)
    for row, window in enumerate(batch):
        tokens = torch.from_numpy(documents[window.document][window.start : window.end + 1].astype(np.int64))
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, : len(tokens) - 1] = tokens[1:]
    # Logits are most of the work of a small model, and those before `first` were computed in an earlier window.
    fewer = {"logits_to_keep": width - first} if accepts(model, "logits_to_keep") else {}
    logits = model(input_ids=inputs.to(model.device), use_cache=False, **fewer).logits[:, first - width :]
    targets = targets[:, first:].to(logits.device)
    # One window at a time, because fp32 copies of all logits would take more memory than training.
    nats = [F.cross_entropy(row.float(), target, reduction="none") for row, target in zip(logits, targets, strict=True)]
    return (torch.stack(nats).double() / math.log(2)).cpu().numpy()


def document_bits(model: PreTrainedModel, documents: Sequence[np.ndarray], **settings: Any) -> np.ndarray:
    """The bits of each document: the sum of its `token_bits`, whose arguments this takes.

    Returns:
        (documents,), float64.
    """
    return np.array([bits.sum() for bits in token_bits(model, documents, **settings)])


def score_documents(
    model: PreTrainedModel,
    documents: Sequence[np.ndarray],
    document_bytes: Sequence[int] | np.ndarray,
    **settings: Any,
) -> Score:
    """Score documents together, given the UTF-8 bytes of each. Takes the arguments of `token_bits`."""
    bits = document_bits(model, documents, **settings)
    return Score(
        documents=len(documents),
        tokens=sum(len(document) - 1 for document in documents),
        bytes=int(sum(document_bytes)),
        bits=float(bits.sum()),
    )
