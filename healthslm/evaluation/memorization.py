"""How much of its training text a model has memorized, compared with text that it has never seen.

Two metrics, each on training documents and on held-out documents of the same sources and kinds:

**Bits per byte** of randomly chosen documents. A model that has only learned what documents have in common needs as
many bits for training documents as for others. The difference measures what it remembers of the documents themselves.
It shows long before any text is repeated verbatim (Yeom et al. 2018, "Privacy Risk in Machine Learning: Analyzing the
Connection to Overfitting").

**Verbatim continuations.** The model reads the separator and the first 50 tokens of a document with at least 100
tokens. It generates the next 50 tokens greedily, and each is compared with the document's token (Carlini et al. 2023,
"Quantifying Memorization Across Neural Language Models"). Held-out documents show how many matches are common phrases
rather than memorized text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from healthslm.bits_per_byte import document_bits
from healthslm.evaluation.held_out import summarize_costs
from healthslm.generation import GREEDY, continue_prompts
from healthslm.models import by_device
from healthslm.statistics import mean, share

PREFIX_TOKENS = 50
CONTINUATION_TOKENS = 50
OPENING_TOKENS = 1 + PREFIX_TOKENS + CONTINUATION_TOKENS  # including the separator


def measure_bits(
    model: PreTrainedModel,
    document: Callable[[int], np.ndarray],
    document_bytes: np.ndarray,
    numbers: np.ndarray,
    count: int,
    seed: int = 0,
    **settings: int | bool | None,
) -> dict[str, Any]:
    """Bits per byte of `count` randomly chosen documents, or of all documents if there are fewer.

    Args:
        document: Returns the tokens of a document by its index, see `choose_openings`.
        document_bytes: (documents,), size of each document in UTF-8 bytes.
        numbers: Indices of the documents to choose from.
        settings: Further arguments of `document_bits`.

    Returns:
        `chosen_from`, the number of documents, and the result of `healthslm.evaluation.held_out.summarize_costs`.
    """
    chosen = np.random.default_rng(seed).permutation(numbers)[:count]
    bits = document_bits(model, [document(int(number)) for number in chosen], **settings)
    return {"chosen_from": len(numbers), **summarize_costs(np.stack([bits, document_bytes[chosen]], axis=1))}


def choose_openings(
    document: Callable[[int], np.ndarray], numbers: Sequence[int] | np.ndarray, count: int, seed: int = 0
) -> np.ndarray:
    """The separator and the first 100 tokens of `count` randomly chosen documents that are long enough.

    Args:
        document: Returns the tokens of a document by its index, starting with the separator, such as
            `TokenizedSplit.document`.
        numbers: Indices of the documents to choose from.

    Returns:
        (count, 101), int64; fewer rows if there are fewer documents of that length.
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
    """Continue the separator and the first 50 tokens of each document with greedy decoding.

    Args:
        openings: The result of `choose_openings`, of which the first 51 columns are read.
        separator: Token id that ends a document.
        batch_size: Defaults to 32 on a CPU and 512 on a GPU. It changes memory and speed but not the result.

    Returns:
        (documents, 50), int64. After an early end of the document, the rest is filled with the separator, which never
        occurs within a document.
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
    """Compare continuations with those of the documents.

    Args:
        written: (documents, 50), the result of `continue_greedily`.
        openings: (documents, 101), the result of `choose_openings`.

    Returns:
        `documents`: their number.
        `exact`: share of documents for which all 50 tokens match, with its 95% interval.
        `leading_tokens`: mean number of matching tokens before the first mismatch, with its 95% interval.
        `matching_tokens`: mean share of the 50 tokens that match, position by position, with its 95% interval.
        `matching_by_position`: share of documents that match at each of the 50 positions.
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
