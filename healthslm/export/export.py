"""Export a model to another form, which replaces an earlier export only if it computes the same."""

import importlib
import logging
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from healthslm.bits_per_byte import document_bits
from healthslm.corpus.sources import read_source_texts
from healthslm.evaluation.held_out import compare_costs
from healthslm.export.card import write_card
from healthslm.export.check import Form, Runtime, TransformersRuntime, compare
from healthslm.export.llama import to_llama
from healthslm.export.options import ExportOptions
from healthslm.export.source import find_source
from healthslm.files import check_output_folder, replacing, write_json
from healthslm.models import open_model
from healthslm.tokenization.encoding import encode_documents, load_tokenizer

logger = logging.getLogger(__name__)

REPORT = "report.json"


def export(options: ExportOptions) -> None:
    """Write a model in another form, with its tokenizer, a model card and report.json, into a folder.

    Every written file is opened in the program that it is for, and compared with the original model.

    Raises:
        ModuleNotFoundError: A library for the format is not installed.
        UserError: There is no such model, it has no such form, a written form computes something else, there are no
            documents, or the folder holds something else than an export.
    """
    check_output_folder(options.output, "an export", lambda folder: (folder / REPORT).is_file())
    write = getattr(importlib.import_module(f"healthslm.export.{options.format}"), f"write_{options.format}")
    tokenizer, model = load_tokenizer(options.model), open_model(options.model)
    llama = to_llama(model)
    texts = read_source_texts(options.data, options.documents) if options.data else []
    source = find_source(options.model, options.base)
    original = TransformersRuntime(model, tokenizer)

    with replacing(options.output) as folder:
        folder.mkdir()
        forms: list[Form] = write(llama, tokenizer, folder, source)
        runtimes = {form.name: form.open() for form in forms}
        report: dict[str, Any] = {
            "format": options.format,
            "base": {"model": options.model, "sha256": source.sha256},
            "forms": {form.name: _check(original, runtimes[form.name], form) for form in forms},
        }
        if texts:
            report["held_out"] = {"data": options.data} | _score({"original": original} | runtimes, texts, tokenizer)
        write_card(folder, source, report)
        write_json(folder / REPORT, report)
    logger.info("%s: %s in %s form", options.output, options.model, options.format)


def _check(original: Runtime, runtime: Runtime, form: Form) -> dict[str, Any]:
    found = compare(original, runtime, form.name, form.largest_divergence)
    size = form.file.stat().st_size
    logger.info(
        "%s: %.1f MB, %.2g bits per token from the original, %.1f%% of the greedy tokens are the same",
        *(form.name, size / 1e6, found["divergence"], 100 * found["same_greedy_tokens"]),
    )
    return {"file": form.file.name, "bytes": size, **found}


def _score(runtimes: dict[str, Runtime], texts: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Bits per byte of each form, and its difference to the first one, with paired 95% intervals."""
    sizes = np.array([len(text.encode()) for text in texts])
    documents = encode_documents(tokenizer, texts)
    costs = {name: document_bits(runtime, documents, progress=True) for name, runtime in runtimes.items()}
    found = {name: compare_costs(bits, costs["original"], sizes) for name, bits in costs.items()}
    return {"documents": len(texts), "bytes": int(sizes.sum()), "forms": found}
