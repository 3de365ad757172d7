"""Bits per byte of held-out documents: of all, by decade and by section, each with an interval, and what stands beside.

The definitions:

- A document's **bits** are those of `healthslm.bits_per_byte`. The parts of a document that is longer than
  a context have its id and count as one document, since they are not independent of each other.
- **Bits per byte** of a group of documents is the sum of their bits over the sum of their UTF-8 bytes, so a long
  document counts for more than a short one.
- The **interval** holds 95%: documents are drawn with replacement, as many as there are, and the ratio of the sums is
  taken anew; its 2.5th and 97.5th percentile over the resamples are the ends (Efron 1979, "Bootstrap methods: another
  look at the jackknife"). It tells how far the figure would move with other documents of the same kind, and nothing of
  other seeds of training. Below `FEWEST_DOCUMENTS` it would be too narrow, and is None.
- The **decade** is that of the year of publication. A document that does not state its year is in none.
- The **section** is the category that NLM gives a section of a structured abstract; UNASSIGNED has those that are
  labelled and in no category of NLM's. `unstructured` is the text of abstracts without sections, `title` the title with
  its newline, `labels` what stands between sections: "METHODS: " and the spaces. So the groups' bits add up to the
  documents'. A token that crosses from one into another has its bits divided by its bytes. A document that does not
  state its sections, or whose tokens do not spell it byte by byte, is in none.
"""

import lzma
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from healthslm.bits_per_byte import token_bits
from healthslm.documents import document_text
from healthslm.errors import UserError
from healthslm.models import Device, open_model
from healthslm.tokenization.encoding import encode_texts, load_tokenizer, separator_id

FEWEST_DOCUMENTS = 20
RESAMPLES = 10_000
CATEGORIES = ("BACKGROUND", "OBJECTIVE", "METHODS", "RESULTS", "CONCLUSIONS")
SECTIONS = ("title", *CATEGORIES, "UNASSIGNED", "unstructured", "labels")

_PERCENTILES = (2.5, 97.5)
_CHUNK = 2**21  # documents drawn at a time
_BYTE_LEVEL = ByteLevel(add_prefix_space=False, use_regex=False)

Document = Mapping[str, Any]
"""A row of a corpus, of which id, title, text, year and sections are read; all but the text may be missing."""
Costs = dict[str | int, np.ndarray]
"""For each document of a group, by its id, its bits and its bytes."""


def measure_held_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    context: int | None = None,
    batch_tokens: int | None = None,
    resamples: int = RESAMPLES,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure a model on documents: neither their order nor `batch_tokens` changes the result.

    Args:
        context: Longest window in tokens; by default the model's own.
        batch_tokens: Tokens of a forward pass, as `document_bits` takes them.

    Returns:
        `documents`, `bytes`, `bits_per_byte` and `interval` (two numbers or None) of all documents, and the same in
        `by_decade` ("1970s") and `by_section` (of `SECTIONS`) for each group that has documents. Besides: `parameters`,
        `context`, `tokens`, `nats_per_token`, `resamples`, and `restored_documents`: how many of the rows the tokenizer
        restores from their tokens as they were. The bits of the others leave out what tells their text from others.

    Raises:
        UserError: There is no document.
    """
    if not documents:
        raise UserError("no held-out document to measure on")
    texts = [document_text(document.get("title") or "", document["text"]) for document in documents]
    token_ids = encode_texts(tokenizer, texts)
    context = context or model.config.max_position_embeddings
    bits = token_bits(
        model,
        [np.array([separator_id(tokenizer), *ids]) for ids in token_ids],
        context=context,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    total: Costs = {}
    by_decade: dict[str, Costs] = defaultdict(dict)
    by_section: dict[str, Costs] = defaultdict(dict)
    for number, (document, text, ids, costs) in enumerate(zip(documents, texts, token_ids, bits, strict=True)):
        key = document.get("id") or number
        cost = np.array([costs.sum(), len(text.encode())])
        _add(total, key, cost)
        if document.get("year"):
            _add(by_decade[f"{document['year'] // 10 * 10}s"], key, cost)
        ends = token_ends(tokenizer, ids, text) if document.get("sections") else None
        if ends is not None:
            for section, section_cost in section_costs(document, ends, costs):
                _add(by_section[section], key, section_cost)
    tokens = sum(map(len, token_ids))
    restored = [
        tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        for ids, text in zip(token_ids, texts, strict=True)
    ]
    return {
        "parameters": model.num_parameters(),
        "context": context,
        **figures(_costs(total), resamples),
        "tokens": tokens,
        "nats_per_token": float(sum(costs.sum() for costs in bits) * np.log(2) / tokens),
        "restored_documents": sum(restored),
        "resamples": resamples,
        "by_decade": {decade: figures(_costs(by_decade[decade]), resamples) for decade in sorted(by_decade)},
        "by_section": {name: figures(_costs(by_section[name]), resamples) for name in SECTIONS if name in by_section},
    }


def _add(group: Costs, key: str | int, cost: np.ndarray) -> None:
    group[key] = group.get(key, 0) + cost


def _costs(group: Costs) -> np.ndarray:
    return np.array(list(group.values()))


def figures(costs: np.ndarray, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Bits per byte of documents of which (documents, 2) are the bits and the bytes, as in the module's docstring.

    Returns:
        `documents`, `bytes`, `bits_per_byte` and `interval` (two numbers or None).
    """
    bits, sizes = costs.T
    return {
        "documents": len(costs),
        "bytes": int(sizes.sum()),
        "bits_per_byte": float(bits.sum() / sizes.sum()),
        "interval": list(bootstrap_interval(bits, sizes, resamples)) if len(costs) >= FEWEST_DOCUMENTS else None,
    }


def bootstrap_interval(
    bits: np.ndarray, sizes: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of 95% of sum(bits) / sum(sizes), both (documents,), over resampled documents.

    The order of the documents does not change it.
    """
    order = np.lexsort((bits, sizes))
    bits, sizes = bits[order], sizes[order]
    numbers = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    rows = max(_CHUNK // len(bits), 1)
    for start in range(0, resamples, rows):
        drawn = numbers.integers(len(bits), size=(min(rows, resamples - start), len(bits)))
        ratios[start : start + rows] = bits[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.percentile(ratios, _PERCENTILES)
    return float(low), float(high)


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> np.ndarray | None:
    """Where each token of a text ends in its UTF-8 bytes; within a character where a token holds but a part of it.

    Returns:
        (tokens,), int64, the last one the length in bytes; None where the tokens do not spell the text in a byte-level
        tokenizer's alphabet, in which one symbol stands for one byte.
    """
    tokens = tokenizer.convert_ids_to_tokens(ids)
    spelled = "".join(symbols for symbols, _ in _BYTE_LEVEL.pre_tokenize_str(text))
    return np.cumsum([len(token) for token in tokens]) if "".join(tokens) == spelled else None


def section_costs(document: Document, ends: np.ndarray, bits: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Divide a document that states its sections: (name, [bits, bytes]) of each piece that is not empty, in order.

    Args:
        ends: (tokens,), where the tokens end in the document's bytes, see `token_ends`.
        bits: (tokens,)
    """
    text = document_text(document.get("title") or "", document["text"])
    text_start = len(text) - len(document["text"])
    names, places = ["title"], [0, text_start]
    for section in document["sections"]:
        names += ["labels", _section_name(section)]
        places += [text_start + section["start"], text_start + section["end"]]
    names.append("labels")
    places.append(len(text))
    byte_places = np.array([len(text[:place].encode()) for place in places])
    bits_before = np.interp(byte_places, np.r_[0, ends], np.r_[0, bits.cumsum()])
    costs = np.stack([np.diff(bits_before), np.diff(byte_places)], axis=1)
    return [(name, cost) for name, cost in zip(names, costs, strict=True) if cost[1] > 0]


def _section_name(section: Mapping[str, Any]) -> str:
    if section["category"] in CATEGORIES:
        return section["category"]
    return "UNASSIGNED" if section["category"] or section["label"] else "unstructured"


def measure_model(
    name: str, documents: Sequence[Document], device: Device = "cpu", **settings: int | bool | None
) -> dict[str, Any]:
    """Measure the model of a folder or Hub name with its own tokenizer, as `measure_held_out` does.

    Returns:
        What `measure_held_out` returns; for a model that cannot be opened, as none of the Hub can without a network,
        `not_measured` with the reason.
    """
    try:
        tokenizer, model = load_tokenizer(name), open_model(name, device)
    except UserError as error:
        return {"not_measured": str(error)}
    return measure_held_out(model, tokenizer, documents, **settings)


def untrained_network(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The same network as a model, in fp32 on its device, with weights as they are before training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True, dtype=torch.float32)
    return network.to(model.device).eval()


def xz_bits_per_byte(texts: Iterable[str]) -> dict[str, float | str]:
    """What the compressor xz (LZMA2, preset 9e) makes of texts, in bits per byte, without the headers of its files.

    Returns:
        `alone`: each text is compressed by itself, so that all that is known of it stands in it: what repetition within
        a document is worth. `together`: all as one stream, in alphabetical order and joined by newlines, in which a
        text may also draw on those before it. Neither has seen the training text, which a model has.
    """
    encoded = sorted(text.encode() for text in texts)
    size = sum(map(len, encoded))
    return {
        "preset": "9e",
        "alone": 8 * sum(map(_compressed_size, encoded)) / size,
        "together": 8 * _compressed_size(b"\n".join(encoded)) / size,
    }


def _compressed_size(data: bytes) -> int:
    # A dictionary larger than the data changes nothing but the time it takes to clear it.
    dictionary = min(max(len(data), 4096), 2**26)
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=[lzma2]))
