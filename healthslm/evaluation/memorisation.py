"""How much of its training text a model has memorized, compared with text that it has never seen.

Two metrics, each on training documents and on held-out documents of the same sources and kinds:

**Bits per byte** of documents chosen at random. A model that has learnt only what documents have in common needs as
many bits for those it has read as for others. The difference is what it remembers of the documents themselves. It
shows long before any text is repeated word for word (Yeom et al. 2018, "Privacy Risk in Machine Learning: Analyzing the
Connection to Overfitting").

**Word for word.** Of a document of at least 100 tokens, the model sees the separator and the first 50, writes the next
50 greedily, and each is held against the document's own (Carlini et al. 2023, "Quantifying Memorization Across Neural
Language Models"). Held-out documents show how much of a match is common phrases and not memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from healthslm.bits_per_byte import document_bits
from healthslm.evaluation.held_out import figures
from healthslm.evaluation.intervals import mean, share
from healthslm.generation import GREEDY, continue_prompts
from healthslm.models import by_device

PREFIX_TOKENS = 50
CONTINUATION_TOKENS = 50
OPENING_TOKENS = 1 + PREFIX_TOKENS + CONTINUATION_TOKENS  # with the separator


def measure_bits(
    model: PreTrainedModel,
    documents: Sequence[np.ndarray],
    document_bytes: np.ndarray,
    count: int,
    seed: int = 0,
    **settings: int | bool | None,
) -> dict[str, Any]:
    """Bits per byte of `count` documents chosen at random; of all where there are not so many.

    Args:
        documents: Token ids of each, its separator first.
        document_bytes: (documents,), UTF-8 bytes of each.
        settings: Further arguments of `document_bits`.

    Returns:
        `chosen_from`, the number of documents, and what `healthslm.evaluation.held_out.figures` gives.
    """
    chosen = np.random.default_rng(seed).permutation(len(documents))[:count]
    bits = document_bits(model, [documents[number] for number in chosen], **settings)
    return {"chosen_from": len(documents), **figures(np.stack([bits, document_bytes[chosen]], axis=1))}


def choose_openings(
    document: Callable[[int], np.ndarray], numbers: Sequence[int] | np.ndarray, count: int, seed: int = 0
) -> np.ndarray:
    """The separator and the first 100 tokens of `count` documents that are long enough, chosen at random.

    Args:
        document: Gives the tokens of a document by its number, its separator first; as `TokenizedSplit.document`.
        numbers: Of the documents to choose from.

    Returns:
        (count, 101), int64; fewer rows where there are not so many documents that long.
    """
    openings: list[np.ndarray] = []
    for number in np.random.default_rng(seed).permutation(numbers):
        if len(openings) == count:
            break
        tokens = document(int(number))
        if len(tokens) >= OPENING_TOKENS:
            openings.append(tokens[:OPENING_TOKENS])
    return np.array(openings, dtype=np.int64).reshape(-1, OPENING_TOKENS)


@torch.no_grad()
def continue_greedily(
    model: PreTrainedModel, openings: np.ndarray, separator: int, batch_size: int | None = None, progress: bool = False
) -> np.ndarray:
    """What the model writes behind the separator and the first 50 tokens, always taking the likeliest token.

    Args:
        openings: As `choose_openings` gives them; of each row the first 51 tokens are read.
        separator: Ends a document.
        batch_size: By default 32 on a CPU and 512 on a GPU. It changes memory and speed, not the result.

    Returns:
        (documents, 50), int64; what lies behind an early end of the document is the separator, which no document holds.
    """
    batch_size = batch_size or by_device(model, cpu=32, gpu=512)
    prompts = torch.from_numpy(openings[:, : 1 + PREFIX_TOKENS])
    written = np.full((len(openings), CONTINUATION_TOKENS), separator)
    for start in tqdm(range(0, len(openings), batch_size), desc="continuing", unit="batch", disable=not progress):
        batch = prompts[start : start + batch_size]
        new = continue_prompts(model, batch, separator, CONTINUATION_TOKENS, **GREEDY).numpy()
        written[start : start + len(new), : new.shape[1]] = new
    return written


def measure_matches(written: np.ndarray, openings: np.ndarray) -> dict[str, Any]:
    """How far continuations match the documents' own.

    Args:
        written: (documents, 50), as `continue_greedily` gives it.
        openings: (documents, 101), as `choose_openings` gives them.

    Returns:
        `documents`, their number;
        `exact`, the share of documents of which all 50 tokens match, with Wilson's 95% interval;
        `leading_tokens`, the mean number of tokens that match before the first that does not, with its 95% interval;
        `matching_tokens`, the mean share of a document's 50 tokens that match, each at its own place, with its 95%
        interval;
        `matching_by_position`, the share of documents that match at each of the 50 places.
    """
    matches = written == openings[:, 1 + PREFIX_TOKENS :]
    leading = np.cumprod(matches, axis=1).sum(axis=1)
    return {
        "documents": len(matches),
        "exact": share(int(matches.all(axis=1).sum()), len(matches)),
        "leading_tokens": mean(leading),
        "matching_tokens": mean(matches.mean(axis=1)),
        "matching_by_position": matches.mean(axis=0).tolist(),
    }
