"""Properties of generated documents and titles, compared with those written by people.

Words are runs of letters and digits, case-folded, as in `healthslm.corpus.signatures`. n-grams don't cross documents.

- `repeated_4grams`: the share of a document's 4-grams that occurred earlier in the same document (Welleck et al. 2020,
  "Neural Text Generation with Unlikelihood Training").
- `distinct`: the number of different n-grams divided by the number of n-grams, over all documents (Li et al. 2016, "A
  Diversity-Promoting Objective Function for Neural Conversation Models"). It decreases with the length of the text, so
  it is computed over the first n-grams of each set, as many as the smaller set has.
- `in_training`: the share of a document's 8-grams and 13-grams that occur in the training text.

Titles are generated zero-shot from the separator, the abstract, a newline and "Title:", with greedy decoding up to the
end of the line. No training document looks like that, since titles precede the text. The baseline is the first sentence
of the abstract, and a small model is expected to score below it. Scores are those of `healthslm.text_overlap` against
the original title.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from healthslm.corpus.signatures import ngram_hashes
from healthslm.generation import complete_prompts, continue_prompts, up_to_separator
from healthslm.generation_options import GenerationOptions
from healthslm.models import by_device
from healthslm.sentences import sentence_end
from healthslm.statistics import mean
from healthslm.text_overlap import score_rouge
from healthslm.tokenization.encoding import encode_texts, separator_id

MAX_DOCUMENT_TOKENS = 512
MAX_TITLE_TOKENS = 48
TITLE_PROMPT = "\nTitle:"

_REPEATED, _DISTINCT, _OVERLAPS = 4, (1, 2, 3), (8, 13)


def generate_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    max_tokens: int = MAX_DOCUMENT_TOKENS,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[list[int]]:
    """Generate documents from the separator alone, with the default sampling options of `scripts/generate.py`.

    Args:
        max_tokens: Documents that haven't ended by then are cut off.
        batch_size: Defaults to 32 on a CPU and 256 on a GPU. Another batch size or device gives other documents of the
            same distribution, since all documents share one random number generator.

    Returns:
        The token ids of each document, without separators.
    """
    set_seed(seed)
    batch_size = batch_size or by_device(model, cpu=32, gpu=256)
    separator = separator_id(tokenizer)
    sampling = {name: getattr(GenerationOptions, name) for name in ("temperature", "top_k", "top_p")}
    documents: list[list[int]] = []
    with tqdm(total=count, desc="generating", unit="document", disable=not progress) as bar:
        while len(documents) < count:
            prompts = torch.full((min(batch_size, count - len(documents)), 1), separator)
            documents += up_to_separator(
                continue_prompts(model, prompts, separator, max_tokens, do_sample=True, **sampling), separator
            )
            bar.update(len(prompts))
    return documents


def describe_generation(
    tokenizer: PreTrainedTokenizerBase,
    generated: list[list[int]],
    human: list[str],
    training_texts: Iterable[str],
    max_tokens: int = MAX_DOCUMENT_TOKENS,
) -> dict[str, dict[str, Any]]:
    """Compare generated documents with documents written by people, see above for the metrics.

    Args:
        generated: The result of `generate_documents` with the same `max_tokens`.
        human: The same number of held-out documents, including titles. They are cut to `max_tokens` as well.
        training_texts: All documents that the model was trained on, including titles. They are read once, and memory
            depends only on the other documents.

    Returns:
        For "generated" and "human": `documents`; `ended`, the share of documents that end within `max_tokens`; `tokens`
        and `words`, the mean length of a document; `repeated_4grams`; `distinct` by n; `in_training` by n. Means are
        over documents, {"mean": …, "interval": [lower, upper]}, with 95% intervals. A document with fewer than n words
        counts as 0.
    """
    sets = {"generated": generated, "human": [ids[: max_tokens + 1] for ids in encode_texts(tokenizer, human)]}
    lengths = {name: np.array([len(ids) for ids in documents]) for name, documents in sets.items()}
    texts = {
        name: [tokenizer.decode(ids[:max_tokens], skip_special_tokens=True) for ids in documents]
        for name, documents in sets.items()
    }
    ngrams = {
        n: {name: [ngram_hashes(text, n) for text in documents] for name, documents in texts.items()}
        for n in {_REPEATED, *_DISTINCT, *_OVERLAPS}
    }
    found = _in_training({n: ngrams[n]["generated"] + ngrams[n]["human"] for n in _OVERLAPS}, training_texts)
    return {
        name: {
            "documents": len(documents),
            # A document of exactly `max_tokens` may have been about to end: in both sets it counts as cut off.
            "ended": float(np.mean(lengths[name] < max_tokens)),
            "tokens": mean(np.minimum(lengths[name], max_tokens)),
            "words": mean(np.array([len(words) for words in ngrams[1][name]])),
            "repeated_4grams": mean(np.array([_repeated(hashes) for hashes in ngrams[_REPEATED][name]])),
            "distinct": {str(n): _distinct(ngrams[n], name) for n in _DISTINCT},
            "in_training": {
                str(n): mean(np.array([_share_within(hashes, found[n]) for hashes in ngrams[n][name]]))
                for n in _OVERLAPS
            },
        }
        for name, documents in texts.items()
    }


def generate_titles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    abstracts: list[str],
    batch_size: int | None = None,
    progress: bool = False,
) -> list[str]:
    """Generate a title for each abstract, see above for the prompt. A title is empty if the model writes none.

    An abstract that doesn't fit into the model's context is cut at its end.

    Args:
        batch_size: See `healthslm.generation.complete_prompts`.
    """
    question = encode_texts(tokenizer, [TITLE_PROMPT])[0]
    room = model.config.max_position_embeddings - MAX_TITLE_TOKENS - len(question) - 1
    separator = separator_id(tokenizer)
    prompts = [[separator, *ids[:room], *question] for ids in encode_texts(tokenizer, abstracts)]
    titles = complete_prompts(model, prompts, separator, MAX_TITLE_TOKENS, batch_size, progress)
    return [_first_line(tokenizer.decode(ids, skip_special_tokens=True)) for ids in titles]


def score_titles(generated: list[str], titles: list[str], abstracts: list[str]) -> dict[str, Any]:
    """ROUGE of generated titles against the original ones, with the abstract's first sentence as a baseline.

    Returns:
        `documents`, `prompt`, and for "generated" and "first_sentence" the mean F-measures `rouge1`, `rouge2` and
        `rougeL` with their 95% intervals, {"mean": …, "interval": [lower, upper]}.
    """
    first_sentences = [abstract[: sentence_end(abstract)] for abstract in abstracts]
    return {
        "documents": len(titles),
        "prompt": TITLE_PROMPT,
        "generated": score_rouge(generated, titles),
        "first_sentence": score_rouge(first_sentences, titles),
    }


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip()


def _repeated(hashes: np.ndarray) -> float:
    return 1 - len(np.unique(hashes)) / len(hashes) if len(hashes) else 0.0


def _distinct(ngrams: dict[str, list[np.ndarray]], name: str) -> float:
    compared = min(sum(map(len, documents)) for documents in ngrams.values())
    return len(np.unique(np.concatenate(ngrams[name])[:compared])) / max(compared, 1)


def _in_training(ngrams: dict[int, list[np.ndarray]], training_texts: Iterable[str]) -> dict[int, np.ndarray]:
    """Sorted hashes, for each n, of the n-grams that occur in the training text."""
    sought = {n: np.unique(np.concatenate(hashes)) for n, hashes in ngrams.items()}
    found = {n: np.zeros(len(hashes), dtype=bool) for n, hashes in sought.items()}
    for text in training_texts:
        for n, hashes in sought.items():
            of_text = ngram_hashes(text, n)
            places = np.searchsorted(hashes, of_text)  # few n-grams in a large array
            found[n][places[hashes.take(places, mode="clip") == of_text]] = True
    return {n: hashes[found[n]] for n, hashes in sought.items()}


def _share_within(hashes: np.ndarray, known: np.ndarray) -> float:
    return float(np.isin(hashes, known).mean()) if len(hashes) else 0.0
