"""Evaluate a model on held-out documents."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np

from healthslm.corpus.sources import find_sources, read_rows
from healthslm.documents import document_text
from healthslm.errors import UserError
from healthslm.evaluation.bits_per_byte import score_documents
from healthslm.files import write_json
from healthslm.models import Device, choose_context, open_model
from healthslm.options import CheckedOptions, Range
from healthslm.tokenization.encoding import encode_texts, load_tokenizer, separator_id

logger = logging.getLogger(__name__)


@dataclass
class EvaluationOptions(CheckedOptions):
    """Options of `evaluate`."""

    model: str
    """Folder or Hub name of a causal language model, with its tokenizer."""
    data: list[str]
    """Parquet or JSON Lines files with columns `title` and `text`, or folders or glob patterns of such files."""
    output: Path | None = None
    """JSON file to write the results to."""
    documents: Annotated[int | None, Range(at_least=1)] = None
    """Number of documents to evaluate on, from the first one. By default all."""
    context: Annotated[int | None, Range(at_least=1)] = None
    """Maximum window in tokens. By default the model's context."""
    batch_tokens: Annotated[int | None, Range(at_least=1)] = field(default=None, metadata={"memory": True})
    """Tokens of a forward pass. It changes memory and speed but not the result. By default 1,024 on a CPU and 8,192 on
    a GPU."""
    device: Device = "auto"
    """Device to run on. `auto` uses a GPU if there is one."""


def evaluate(options: EvaluationOptions) -> None:
    """Measure loss, perplexity and bits per byte of a model on documents.

    Raises:
        UserError: There is no such model, tokenizer or device, or there are no documents.
    """
    tokenizer = load_tokenizer(options.model)
    model = open_model(options.model, options.device)
    context = choose_context(model, options.context)
    texts = [
        document_text(row.get("title") or "", row["text"])
        for source in find_sources(options.data)
        for row in read_rows(source.location)
        if row.get("text")
    ][: options.documents]
    if not texts:
        raise UserError(f"{' '.join(options.data)}: no documents with a column `text`")
    documents = [np.array([separator_id(tokenizer), *ids]) for ids in encode_texts(tokenizer, texts)]
    score = score_documents(
        model,
        documents,
        [len(text.encode()) for text in texts],
        context=context,
        batch_tokens=options.batch_tokens,
        progress=True,
    )
    result = {"model": options.model, "data": options.data, **score.to_dict()}
    if options.output is not None:
        write_json(options.output, result)
    logger.info(
        "%s: %.4f bits per byte, loss %.4f, perplexity %.2f on %d documents (%d tokens, %d bytes)",
        *(options.model, score.bits_per_byte, score.loss, score.perplexity),
        *(score.documents, score.tokens, score.bytes),
    )
