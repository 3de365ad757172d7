"""How well a model predicts documents, in bits per byte: one definition for every model and everywhere.

The bits of a document are the sum of -log2 p over the tokens of its title, newline and text. Each document stands alone
behind the separator; one longer than the context is read in windows that overlap by half, each token scored once, with
the most context that a window gives it. Divided by the document's UTF-8 bytes, figures of different tokenizers compare.
"""

import math
from collections.abc import Iterator, Sequence
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
    """What a model needs to write documents down."""

    documents: int
    tokens: int
    """Tokens predicted: all but the separators."""
    bytes: int
    bits: float

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
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
    """Targets before this one have been scored in an earlier window."""


def windows(lengths: Sequence[int], context: int) -> Iterator[Window]:
    """Cut documents of so many tokens, separator included, into windows of at most `context` inputs."""
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
    progress: bool = False,
    process_index: int = 0,
    num_processes: int = 1,
) -> list[np.ndarray]:
    """The bits that each token of each document costs under the model.

    Args:
        model: Any causal language model; it is left in the mode (training or not) in which it came.
        documents: Token ids of each, its separator first.
        context: Longest window in tokens; by default the model's own.
        batch_tokens: Tokens of a forward pass, padding included: by default 1,024 on a CPU and 8,192 on a GPU. It
            changes memory and speed, not the result.
        process_index: Which of `num_processes` this is. They share the windows, and each leaves zeros for those of the
            others: the sum over processes is the result. All take as many forward passes, as FSDP needs it.

    Returns:
        For each document (tokens - 1,), float64: of all its tokens but the separator.
    """
    context = choose_context(model, context)
    batch_tokens = batch_tokens or by_device(model, cpu=1024, gpu=8192)
    pieces = sorted(
        windows([len(document) for document in documents], context),
        key=lambda piece: (piece.start - piece.end, piece.first_scored),
    )
    batches = []
    while pieces:
        count = max(batch_tokens // (pieces[0].end - pieces[0].start), 1)
        batches.append(pieces[:count])
        pieces = pieces[count:]
    bits = [np.zeros(len(document) - 1) for document in documents]
    was_training = model.training
    model.eval()
    for turn in tqdm(range(0, len(batches), num_processes), desc="evaluating", unit="batch", disable=not progress):
        number = turn + process_index
        batch = batches[min(number, len(batches) - 1)]
        first, width = min(piece.first_scored for piece in batch), batch[0].end - batch[0].start
        found = _window_bits(model, documents, batch, first, width)
        for piece, piece_bits in zip(batch, found, strict=True):
            if number < len(batches):  # else there is none left for this process, which only keeps step with the others
                scored = slice(piece.first_scored - first, piece.end - piece.start - first)
                bits[piece.document][piece.start + first : piece.end][scored] = piece_bits[scored]
    model.train(was_training)
    return bits


def _window_bits(
    model: PreTrainedModel, documents: Sequence[np.ndarray], batch: list[Window], first: int, width: int
) -> np.ndarray:
    """The bits of the targets from the first one on of each window, (windows, width - first)."""
    # Padding stands on the right, where nothing that is scored can see it: it needs no mask.
    inputs = torch.zeros(len(batch), width, dtype=torch.long)
    targets = torch.full((len(batch), width), -100)
    for row, piece in enumerate(batch):
        tokens = torch.from_numpy(documents[piece.document][piece.start : piece.end + 1].astype(np.int64))
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, : len(tokens) - 1] = tokens[1:]
    # Logits are the larger part of a small network's work, and those in front have been had in an earlier window.
    fewer = {"logits_to_keep": width - first} if accepts(model, "logits_to_keep") else {}
    logits = model(input_ids=inputs.to(model.device), use_cache=False, **fewer).logits[:, first - width :]
    targets = targets[:, first:].to(logits.device)
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (nats.double() / math.log(2)).view(targets.shape).cpu().numpy()


def document_bits(model: PreTrainedModel, documents: Sequence[np.ndarray], **settings: Any) -> np.ndarray:
    """The bits that each document costs under the model: the sum of its `token_bits`, whose arguments this takes.

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
    """Score documents (see `document_bits`) of so many UTF-8 bytes each, as one."""
    bits = document_bits(model, documents, **settings)
    return Score(
        documents=len(documents),
        tokens=sum(len(document) - 1 for document in documents),
        bytes=int(sum(document_bytes)),
        bits=float(bits.sum()),
    )
