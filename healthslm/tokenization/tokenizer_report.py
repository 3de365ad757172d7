"""Comparing tokenizers on the same text: bytes per token, and tokens per word and per biomedical term.

Terms are found in the text itself (see `healthslm.tokenization.terms`), so they do not depend on a tokenizer.
"""

from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from healthslm.corpus.sources import read_source_texts
from healthslm.errors import UserError
from healthslm.files import write_json
from healthslm.tokenization.encoding import encode, open_tokenizer
from healthslm.tokenization.options import TokenizerReportOptions
from healthslm.tokenization.terms import TERM_CLASSES, Spans, find_terms

BATCH_TEXTS = 256


def report_tokenizers(options: TokenizerReportOptions) -> None:
    """Compare tokenizers on documents (title, newline, text) and print the tables.

    Files are read like the sources of `scripts/build_corpus.py`; PubMedQA's files give questions and contexts.

    Raises:
        UserError: A tokenizer or file cannot be opened, or there is no text.
    """
    if options.output is not None and options.output.is_dir():
        raise UserError(f"{options.output}: is a folder, but the output is a file; choose another path")
    tokenizers = {name: open_tokenizer(name) for name in options.tokenizers}
    if not tokenizers:
        raise UserError("tokenizers: give at least one folder or Hub name")
    texts = read_source_texts(options.data)
    spans = [find_terms(text) for text in texts]
    report = {
        "data": options.data,
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "occurrences": {name: sum(len(found[name]) for found in spans) for name in TERM_CLASSES},
        "tokenizers": {
            name: evaluate_tokenizer(tokenizer, texts, spans, name) for name, tokenizer in tokenizers.items()
        },
    }
    if options.output is not None:
        write_json(options.output, report)
    print(format_report(report))


def tokens_per_term(offsets: list[tuple[int, int]], terms: np.ndarray) -> np.ndarray:
    """Count the tokens that share at least one character with each term.

    Terms are counted in running text, because most tokenizers split a term differently without the space before it. A
    token that extends beyond the term counts too.

    Args:
        offsets: Start and exclusive end of each token, in characters.
        terms: Start and exclusive end of each term: shape (terms, 2).

    Returns:
        Shape (terms,), int64.
    """
    starts, ends = np.sort(np.array(offsets, dtype=np.int64).reshape(-1, 2), axis=0).T
    # Tokens that start before the term's end, minus those that also end before its start, overlap it.
    return np.searchsorted(starts, terms[:, 1], "left") - np.searchsorted(ends, terms[:, 0], "right")


def evaluate_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], spans: list[Spans], description: str | None = None
) -> dict[str, Any]:
    """Compute the metrics of one tokenizer on texts, whose terms are at `spans`.

    Texts are encoded without special tokens, see `healthslm.tokenization.encoding.encode`.

    Returns:
        Vocabulary size, tokens, UTF-8 bytes per token, documents that decoding restores exactly, and for each class of
        terms the mean tokens per term and the share of terms that are a single token (None if there are no terms). For
        words these are the fertility, and one minus the proportion of continued words, of Rust et al., "How good is
        your tokenizer?", ACL 2021.
    """
    tokens = restored = 0
    counts: dict[str, list[np.ndarray]] = {name: [] for name in TERM_CLASSES}
    with tqdm(total=len(texts), desc=description, unit="document", disable=description is None) as progress:
        for start in range(0, len(texts), BATCH_TEXTS):
            batch = texts[start : start + BATCH_TEXTS]
            encoding = encode(tokenizer, batch, return_offsets_mapping=True)
            tokens += sum(map(len, encoding["input_ids"]))
            decoded = tokenizer.batch_decode(encoding["input_ids"], clean_up_tokenization_spaces=False)
            restored += sum(after == before for after, before in zip(decoded, batch, strict=True))
            for offsets, found in zip(encoding["offset_mapping"], spans[start : start + BATCH_TEXTS], strict=True):
                for name, terms in found.items():
                    counts[name].append(tokens_per_term(offsets, terms))
            progress.update(len(batch))
    return {
        "vocabulary": len(tokenizer),
        "tokens": tokens,
        "bytes_per_token": sum(len(text.encode()) for text in texts) / tokens,
        "documents_restored": restored,
        "terms": {name: _summary(np.concatenate(of_texts)) for name, of_texts in counts.items()},
    }


def _summary(counts: np.ndarray) -> dict[str, float | None]:
    if not len(counts):
        return {"tokens_per_term": None, "single_token_share": None}
    return {"tokens_per_term": float(counts.mean()), "single_token_share": float((counts == 1).mean())}


def format_report(report: dict[str, Any]) -> str:
    """Format the metrics as two Markdown tables with aligned columns."""
    documents = report["documents"]
    overall = [["tokenizer", "vocabulary", "tokens", "bytes per token", "restored exactly"]]
    by_class = [["tokens per term (single-token)", *(f"{name}: {n:,}" for name, n in report["occurrences"].items())]]
    for name, metrics in report["tokenizers"].items():
        numbers = f"{metrics['vocabulary']:,}", f"{metrics['tokens']:,}", f"{metrics['bytes_per_token']:.3f}"
        overall.append([name, *numbers, f"{metrics['documents_restored'] / documents:.1%}"])
        by_class.append([name, *map(_format_terms, metrics["terms"].values())])
    heading = f"{documents:,} documents, {report['bytes']:,} bytes"
    return "\n\n".join([heading, _table(overall), _table(by_class)])


def _format_terms(metrics: dict[str, float | None]) -> str:
    if metrics["tokens_per_term"] is None:
        return "none"
    return f"{metrics['tokens_per_term']:.2f} ({metrics['single_token_share']:.1%})"


def _table(rows: list[list[str]]) -> str:
    """Format a Markdown table; the first row is the header, and the first column is left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [rows[0], rule, *rows[1:]]
    return "\n".join(
        f"| {' | '.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])} |" for line in lines
    )
