"""Evaluate a model on held-out documents."""

import itertools
import logging

import numpy as np

from healthslm.bits_per_byte import score_documents
from healthslm.corpus.sources import find_sources, read_rows
from healthslm.documents import document_text
from healthslm.errors import UserError
from healthslm.evaluation.options import EvaluationOptions
from healthslm.files import write_json
from healthslm.models import choose_context, open_model
from healthslm.tokenization.encoding import encode_texts, load_tokenizer, separator_id

logger = logging.getLogger(__name__)


def evaluate(options: EvaluationOptions) -> None:
    """Measure loss, perplexity and bits per byte of a model on documents.

    Raises:
        UserError: There is no such model, tokenizer or device, or there are no documents.
    """
    tokenizer = load_tokenizer(options.model)
    model = open_model(options.model, options.device)
    context = choose_context(model, options.context)
    texts = read_held_out(options.data, options.documents)
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


def read_held_out(data: list[str], documents: int | None = None) -> list[str]:
    """The texts of the first documents of files, folders or glob patterns, by default of all that have a text.

    Raises:
        UserError: There is no such file, or no document with a text.
    """
    rows = (row for source in find_sources(data) for row in read_rows(source.location) if row.get("text"))
    texts = [document_text(row.get("title") or "", row["text"]) for row in itertools.islice(rows, documents)]
    if not texts:
        raise UserError(f"{' '.join(data)}: no documents with a column `text`")
    return texts
