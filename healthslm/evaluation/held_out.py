"""Bits per byte of held-out documents, in total, by decade and by section, and of the compressor xz as a baseline.

Definitions:

- The **bits** of a document are defined in `healthslm.bits_per_byte`. The chunks of a long document share
  its id and count as one document, since they are not independent of each other.
- **Bits per byte** of a group of documents is the sum of their bits divided by the sum of their UTF-8 bytes, so long
  documents weigh more than short ones.
- The **interval** is a 95% bootstrap interval over documents, see `healthslm.statistics.bootstrap_interval`. It
  estimates how much the result would change with other documents of the same kind. It does not cover other training
  seeds. It is None for fewer than `FEWEST_DOCUMENTS` documents, where it would be too narrow.
- The **decade** is that of the year of publication. Documents without a year belong to no decade.
- The **section** is the category that NLM assigns to a section of a structured abstract. UNASSIGNED are labeled
  sections that have none of NLM's categories, `unstructured` is the text of abstracts without sections, `title` is the
  title with its newline, and `labels` is the text between sections: "METHODS: " and spaces. The bits of the sections
  add up to those of the documents: a token that spans two sections has its bits divided in proportion to its bytes.
  Documents without section annotations belong to no section, nor do documents whose tokens don't spell out their text
  byte by byte.
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
from healthslm.models import open_model
from healthslm.options import Device
from healthslm.statistics import RESAMPLES, bootstrap_interval
from healthslm.tokenization.encoding import encode_documents, load_tokenizer

FEWEST_DOCUMENTS = 20
CATEGORIES = ("BACKGROUND", "OBJECTIVE", "METHODS", "RESULTS", "CONCLUSIONS")
SECTIONS = ("title", *CATEGORIES, "UNASSIGNED", "unstructured", "labels")

_BYTE_LEVEL = ByteLevel(add_prefix_space=False, use_regex=False)

Document = Mapping[str, Any]
"""A document of a corpus with a text and, optionally, id, title, year and sections."""
Costs = dict[str | int, np.ndarray]
"""The bits and the bytes of each document of a group, by the document's id."""


def measure_held_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    context: int | None = None,
    batch_tokens: int | None = None,
    resamples: int = RESAMPLES,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure the bits per byte of a model on documents.

    Neither the order of the documents nor `batch_tokens` changes the result.

    Args:
        context: Maximum window in tokens. Defaults to the model's context.
        batch_tokens: Tokens of a forward pass, see `healthslm.bits_per_byte.token_bits`.

    Returns:
        `documents`, `bytes`, `bits_per_byte` and `interval` (two numbers or None) of all documents, and the same for
        each group that has documents: `by_decade` (such as "1970s") and `by_section` (keys from `SECTIONS`). Also
        `parameters`, `context`, `tokens`, `nats_per_token`, `resamples`, and `restored_documents`: how many texts the
        tokenizer restores exactly from their tokens. For the other texts, bits per byte are too low, since the model
        doesn't predict what the tokenizer loses.

    Raises:
        UserError: There are no documents.
    """
    if not documents:
        raise UserError("no held-out documents to evaluate on")
    texts = [document_text(document.get("title") or "", document["text"]) for document in documents]
    encoded = encode_documents(tokenizer, texts)
    context = context or model.config.max_position_embeddings
    bits = token_bits(model, encoded, context=context, batch_tokens=batch_tokens, progress=progress)
    token_ids = [ids[1:].tolist() for ids in encoded]
    total, by_decade, by_section = _group_costs(tokenizer, documents, texts, token_ids, bits)

    def summarize(group: Costs) -> dict[str, Any]:
        return summarize_costs(np.array(list(group.values())), resamples)

    tokens = sum(map(len, token_ids))
    restored = [
        tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        for ids, text in zip(token_ids, texts, strict=True)
    ]
    return {
        "parameters": model.num_parameters(),
        "context": context,
        **summarize(total),
        "tokens": tokens,
        "nats_per_token": float(sum(costs.sum() for costs in bits) * np.log(2) / tokens),
        "restored_documents": sum(restored),
        "resamples": resamples,
        "by_decade": {decade: summarize(by_decade[decade]) for decade in sorted(by_decade)},
        "by_section": {name: summarize(by_section[name]) for name in SECTIONS if name in by_section},
    }


def _group_costs(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    texts: list[str],
    token_ids: list[list[int]],
    bits: list[np.ndarray],
) -> tuple[Costs, dict[str, Costs], dict[str, Costs]]:
    """The costs of all documents, by decade and by section. `bits` are those of each token of each document."""
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
    return total, by_decade, by_section


def _add(group: Costs, key: str | int, cost: np.ndarray) -> None:
    group[key] = group.get(key, 0) + cost


def summarize_costs(costs: np.ndarray, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Bits per byte of a group of documents, as defined above.

    Args:
        costs: (documents, 2), the bits and the bytes of each document.

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


def compare_costs(bits: np.ndarray, baseline: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """Bits per byte of documents, and how much they differ from a baseline on the same documents.

    Args:
        bits: (documents,)
        baseline: (documents,), the bits of the same documents under another model.
        sizes: (documents,), in UTF-8 bytes.

    Returns:
        `bits_per_byte` and `interval`, and the same of the additional bits per byte, whose interval is paired, in
        `difference`.
    """
    score, more = (summarize_costs(np.stack([costs, sizes], axis=1)) for costs in (bits, bits - baseline))
    names = ("bits_per_byte", "interval")
    return {name: score[name] for name in names} | {"difference": {name: more[name] for name in names}}


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> np.ndarray | None:
    """The end of each token as a byte offset into the UTF-8 text. A token can end within a character.

    Returns:
        (tokens,), int64; the last entry is the number of bytes. None if the tokens don't spell out the text in the
        alphabet of a byte-level tokenizer, where each symbol is one byte.
    """
    tokens = tokenizer.convert_ids_to_tokens(ids)
    spelled = "".join(symbols for symbols, _ in _BYTE_LEVEL.pre_tokenize_str(text))
    return np.cumsum([len(token) for token in tokens]) if "".join(tokens) == spelled else None


def section_costs(document: Document, ends: np.ndarray, bits: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Divide the bits of a document among its title, sections and labels.

    Args:
        document: Must have `sections`.
        ends: (tokens,), byte offsets at which the tokens end, see `token_ends`.
        bits: (tokens,)

    Returns:
        (name, [bits, bytes]) of each piece of text that is not empty, in order.
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


def measure_model(name: str, documents: Sequence[Document], device: Device = "cpu", **settings: Any) -> dict[str, Any]:
    """Measure the model of a folder or Hub name, with its own tokenizer, as `measure_held_out` does.

    Returns:
        The result of `measure_held_out`. If the model can't be opened, for example because there is no network,
        `not_measured` with the reason.
    """
    try:
        tokenizer, model = load_tokenizer(name), open_model(name, device)
    except UserError as error:
        return {"not_measured": str(error)}
    return measure_held_out(model, tokenizer, documents, **settings)


def untrained_model(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A model of the same architecture in fp32 and on the same device, with newly initialized weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        untrained = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True, dtype=torch.float32)
    return untrained.to(model.device).eval()


def xz_bits_per_byte(texts: Iterable[str]) -> dict[str, float | str]:
    """Bits per byte of texts compressed by xz (LZMA2, preset 9e), not counting file headers.

    Returns:
        `alone`: each text is compressed separately, which shows how much repetition within a document saves.
        `together`: all texts are compressed as one stream, in alphabetical order and joined by newlines, so that a
        text can also refer to earlier ones. Unlike a trained model, xz has seen no training text in either case.
    """
    encoded = sorted(text.encode() for text in texts)
    size = sum(map(len, encoded))
    return {
        "preset": "9e",
        "alone": 8 * sum(map(_compressed_size, encoded)) / size,
        "together": 8 * _compressed_size(b"\n".join(encoded)) / size,
    }


def _compressed_size(data: bytes) -> int:
    # A dictionary larger than the data changes only the time needed to clear it.
    dictionary = min(max(len(data), 4096), 2**26)
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=[lzma2]))
