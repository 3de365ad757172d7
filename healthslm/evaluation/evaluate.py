"""Evaluate a model on held-out documents."""

import logging

from healthslm.bits_per_byte import score_documents
from healthslm.corpus.sources import read_source_texts
from healthslm.evaluation.options import EvaluationOptions
from healthslm.files import write_json
from healthslm.models import choose_context, open_model
from healthslm.tokenization.encoding import encode_documents, load_tokenizer

logger = logging.getLogger(__name__)


def evaluate(options: EvaluationOptions) -> None:
    """Measure loss, perplexity and bits per byte of a model on documents.

    Raises:
        UserError: There is no such model, tokenizer or device, or there are no documents.
    """
    tokenizer = load_tokenizer(options.model)
    model = open_model(options.model, options.device)
    context = choose_context(model, options.context)
    texts = read_source_texts(options.data, options.documents)
    score = score_documents(
        model,
        encode_documents(tokenizer, texts),
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
