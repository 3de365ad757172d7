"""The data card of a corpus: a page in Markdown with figures, which says what the corpus holds and where it is from.

    card/README.md      the page, with the metadata that the Hub reads of a data set
    card/*.png          documents by source, licence, year and length, and passages by number of tokens

The page is written from report.json and from what `healthslm.corpus.statistics` counts; every number in it comes from
one of these. The same corpus gives the same bytes.
"""

import importlib.metadata
import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from healthslm.corpus.figures import FIGURES, LENGTHS, LICENSES, SOURCES, TOKENS, YEARS, write_figures
from healthslm.corpus.options import DataCardOptions
from healthslm.corpus.records import SOURCE as PUBMED
from healthslm.corpus.report import COUNTS, REPORT
from healthslm.corpus.sources import UNSTATED
from healthslm.corpus.statistics import (
    Row,
    Statistics,
    TokenStatistics,
    corpus_statistics,
    shorten,
    sum_by,
    sum_splits,
    token_statistics,
)
from healthslm.documents import DOCUMENT_SCHEMA
from healthslm.errors import UserError
from healthslm.files import read_json, replacing

PAGE = "README.md"
LISTED_SOURCES = 100

# In the order in which a document is judged, see `healthslm.corpus.screening` and `healthslm.corpus.selection`.
REASONS = {
    "deletion": "The record is NCBI's order to delete a citation, not a citation.",
    "deleted": "A later file deletes the citation.",
    "superseded": "A later record, or one of a higher version, replaces it.",
    "no_abstract": "There is no abstract: the citation is a title alone.",
    "no_text": "There is no text.",
    "no_title": "A citation of PubMed has no title.",
    "truncated": "The abstract ends in one of NLM's marks that the rest of it is missing.",
    "too_short": "The text has fewer than {min_words} words.",
    "not_english": "The text is surely in another language, at its beginning or further on.",
    "held_out": "A held-out document has the same id, the same letters and digits, or nearly the same text.",
    "held_out_overlap": "It shares {overlap_words} words in a row with a held-out document, "
    "unless over {common_ngram} documents do.",
    "duplicate_id": "A document that comes first has the same id.",
    "duplicate_text": "A document that comes first has the same letters and digits.",
    "near_duplicate": "A document that comes first has nearly the same text.",
    "retracted": "The article was retracted.",
    "retraction_notice": "It is the notice of a retraction.",
}


def describe_corpus(options: DataCardOptions) -> None:
    """Write the data card of a corpus.

    Raises:
        UserError: there is no corpus, its files are not those of its report, the tokens are of another corpus, a name
            is given to a file that is no input, or the output holds other things than a card.
    """
    report = _read_report(options.corpus)
    _check(options, report)
    with replacing(options.output.absolute()) as card:
        card.mkdir()
        statistics = corpus_statistics(options.corpus, report, card.with_name("documents.duckdb"))
        tokens = None if options.tokens is None else token_statistics(options.tokens, report, options.context)
        rename(options.names, report, statistics)
        write_figures(card, statistics, tokens)
        (card / PAGE).write_text(write_page(options.title, report, statistics, tokens), encoding="utf-8")


def _read_report(corpus: Path) -> dict[str, Any]:
    path = corpus / REPORT
    if not path.is_file():
        raise UserError(f"{corpus}: no corpus, for there is no {REPORT} in it; scripts/build_corpus.py writes one")
    report = read_json(path)
    needed = {"read", "kept", "dropped", "splits", "settings", "selection", "held_out", "files", "versions"}
    if not isinstance(report, dict) or not needed <= report.keys():
        raise UserError(f"{path}: not the report of a corpus of this version; scripts/build_corpus.py writes one")
    if unknown := sorted(report["dropped"].keys() - REASONS.keys()):
        raise UserError(f"{path}: of another version: unknown reasons {', '.join(unknown)}; build the corpus again")
    return report


def _check(options: DataCardOptions, report: dict[str, Any]) -> None:
    inputs = {file["name"] for file in (*report["files"], *report["held_out"])}
    if unknown := sorted(options.names.keys() - inputs):
        raise UserError(f"names: {', '.join(unknown)}: no input of {options.corpus}: {', '.join(sorted(inputs))}")
    output = options.output
    found = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if output.is_file() or (found and not {PAGE, SOURCES} <= found <= {PAGE, *FIGURES}):
        raise UserError(f"{output}: holds other things than a data card, and would be replaced")


def rename(names: dict[str, str], report: dict[str, Any], statistics: Statistics) -> None:
    """Put names to show in the place of those of files, and of the sources that are called after their file."""
    for file in (*report["files"], *report["held_out"]):
        file["name"] = names.get(file["name"], file["name"])
    statistics["sources"] = [(names.get(source, source), *more) for source, *more in statistics["sources"]]


# The page. What a section returns is split at empty lines, and its paragraphs are filled.


def write_page(title: str, report: dict[str, Any], statistics: Statistics, tokens: TokenStatistics | None) -> str:
    """The card in Markdown, with the metadata of a data set in front."""
    sections = [
        _overview(title, report, statistics),
        _splits(report, tokens),
        _sources(statistics["sources"]),
        _years(dict(statistics["years"])),
        _lengths(statistics["kinds"]),
        _tokens(tokens) if tokens else "",
        _dropped(report),
        _use_and_limits(report, statistics),
        _making(report, tokens),
    ]
    blocks = [_fill(block.strip()) for block in re.split(r"\n\s*\n", "\n\n".join(sections)) if block.strip()]
    return "\n\n".join([_metadata(title, report, statistics), *blocks]) + "\n"


def _metadata(title: str, report: dict[str, Any], statistics: Statistics) -> str:
    """The YAML block in front of the page, by which the Hub files a data set and finds its splits."""
    licenses = {license for _, license, *_ in statistics["sources"]}
    splits = [
        {"split": name, "path": f"{name}/*.parquet"} for name, counts in report["splits"].items() if counts["parts"]
    ]
    metadata = {
        "pretty_name": title,
        **({"language": ["en"]} if report["settings"]["english_only"] else {}),
        "license": "unknown" if licenses == {UNSTATED} else "other",
        "task_categories": ["text-generation"],
        "size_categories": [size_category(sum_splits(report, "parts"))],
        "tags": ["biology", "medical", "pretraining"],
        "configs": [{"config_name": "default", "data_files": splits}],
    }
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---"


def size_category(rows: int) -> str:
    """The Hub's class of a data set's size: "100K<n<1M"."""
    bounds = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    classes = ["n<1K", *(f"{low}<n<{high}" for low, high in pairwise(bounds)), "n>1T"]
    return classes[sum(rows >= 10**power for power in range(3, 13))]


def _overview(title: str, report: dict[str, Any], statistics: Statistics) -> str:
    documents, passages, num_bytes, _ = statistics["totals"][0]
    columns = ", ".join(f"`{name}`" for name in DOCUMENT_SCHEMA.names)
    return f"""
        # {_escape(title)}

        Biomedical text to train small language models on: {documents:,} documents, {num_bytes:,} bytes in UTF-8. Of
        {report["read"]:,} documents read, {report["kept"]:,} were kept and {sum(report["dropped"].values()):,} dropped.

        A text of more than {report["settings"]["max_bytes"]:,} bytes is cut, at paragraphs where it can be, into
        passages that each have the document's title: {passages:,} passages, one a row. The columns are {columns}; a
        model reads the title, a newline and the text.

        `scripts/describe_corpus.py` wrote this page from the corpus; no figure in it was typed by hand.
    """


def _splits(report: dict[str, Any], tokens: TokenStatistics | None) -> str:
    heading, note = "split | documents | passages | bytes", ""
    rows = [[name, *(counts[key] for key in COUNTS)] for name, counts in report["splits"].items()]
    rows.append(["all", *(sum_splits(report, key) for key in COUNTS)])
    if tokens:
        heading += " | tokens | bytes a token"
        for row, count in zip(rows, [*tokens.counts.values(), sum(tokens.counts.values())], strict=True):
            _, _, passages, num_bytes = row
            row += [count, num_bytes / (count - passages) if count else 0.0]
        note = f"""
            Tokens are those of a tokenizer of {tokens.vocab_size:,} entries, and one separator a passage, which bytes a
            token leave out.
        """
    return f"""
        ## Splits

        {_table(heading, rows)}

        {note}
    """


def _sources(sources: list[Row]) -> str:
    courtesy = f"""
        Documents of the source `{PUBMED}` are citations from the files that NCBI distributes, courtesy of the U.S.
        National Library of Medicine, which neither endorses this corpus nor vouches for it. The corpus reflects the
        files listed below and not NLM's most current data. NLM's
        [terms](https://www.nlm.nih.gov/databases/download/terms_and_conditions.html) apply to them. PubMed is a
        trademark of the National Library of Medicine.
    """
    listed = map(_escaped, shorten(sources, LISTED_SOURCES))
    return f"""
        ## Sources and licences

        {courtesy if any(source == PUBMED for source, *_ in sources) else ""}

        A licence is what the source states, `{UNSTATED}` where it states none; nobody has verified it. It may be that
        of a collection and not of each text in it: abstracts stay under their publishers' terms wherever they were
        collected, and articles under those that they were published with.

        ![Documents and bytes of text by source]({SOURCES})

        {_table("source | licence as stated | kinds of text | documents | bytes", listed)}

        ![Documents and bytes of text by licence]({LICENSES})

        {_table("licence as stated | documents | bytes", map(_escaped, sum_by(sources, column=1)))}
    """


def _years(years: dict[int | None, int]) -> str:
    unstated = years.pop(None, 0)
    if not years:
        return "## Years of publication\n\nNo document states the year of its publication."
    span = f"{min(years)} to {max(years)}"
    return f"""
        ## Years of publication

        ![Documents by year of publication, {span}]({YEARS})

        {sum(years.values()):,} documents state a year, from {span}; {unstated:,} state none and are not in the figure.
    """


def _lengths(kinds: list[Row]) -> str:
    heading = "kind of text | documents | passages | bytes | 5th percentile | median | 95th percentile | longest"
    return f"""
        ## Kinds of text and their lengths

        ![Share of documents by bytes of text, for each kind of text]({LENGTHS})

        {_table(heading, map(_escaped, kinds))}

        The last four columns and the figure are of bytes of text of whole documents, without the title.
    """


def _tokens(tokens: TokenStatistics) -> str:
    passages, fitting, context = tokens.passages, tokens.passages - tokens.too_long, tokens.context
    return f"""
        ## Lengths in tokens

        ![Passages by number of tokens, with the context of {context:,} tokens marked]({TOKENS})

        {fitting:,} of {passages:,} passages ({1 - tokens.too_long / passages:.2%}) fit into a context of {context:,}
        tokens with their separator. The figure's last bar holds all of {2 * context:,} tokens or more.
    """


def _dropped(report: dict[str, Any]) -> str:
    values = report["settings"] | report["selection"]
    rows = [
        [f"`{reason}`", report["dropped"][reason], text.format(**values)]
        for reason, text in REASONS.items()
        if reason in report["dropped"]
    ]
    held_out = "No evaluation data was held out."
    if report["held_out"]:
        files = [[_escape(file["name"]), _checksum(file)] for file in report["held_out"]]
        held_out = f"""
            Documents of these files, and what overlaps them, stay out of all splits:

            {_table("file | SHA-256", files)}
        """
    bands, rows_per_band = values["bands"], values["rows"]
    chances = ", ".join(f"{1 - (1 - jaccard**rows_per_band) ** bands:.2f} at {jaccard}" for jaccard in (0.5, 0.7, 0.8))
    return f"""
        ## What was dropped, and why

        {_table("reason | documents | why", rows)}

        A document counts under the first reason that applies. Of copies the one that comes first stays: one in the test
        or validation split before one in the training split, then in the order of the input files below. A copy of a
        retracted article leaves with it.

        Two texts are nearly the same where any of {bands} bands of {rows_per_band} MinHash values is equal, which
        nothing verifies further. The chance of that is, by the Jaccard similarity of their sets of word
        {values["shingle_words"]}-grams: {chances}.

        ## Held out

        {held_out}
    """


def _use_and_limits(report: dict[str, Any], statistics: Statistics) -> str:
    documents, passages, num_bytes, addresses = statistics["totals"][0]
    source, source_documents, source_bytes = sum_by(statistics["sources"], column=0)[0]
    english = "Texts that are surely in another language than English were dropped; in doubt, a text stayed."
    kinds = ", ".join(_escape(kind) for kind, *_ in statistics["kinds"])
    return f"""
        ## Personal data

        E-mail addresses and publishers' copyright notices are removed from texts by patterns. A search for what still
        looks like an address finds it in {addresses:,} of {passages:,} passages. Lists of authors and their
        affiliations are not read from PubMed's files. Nobody has searched the texts, of whichever kind ({kinds}), for
        other personal data, such as the names of patients or authors.

        ## Intended use and limits

        For pretraining and studying small language models of biomedical text. Neither the corpus nor a model trained on
        it is a source for diagnosis, treatment or any other medical decision.

        - The mixture is that of the input files and represents no field: the source with the most documents,
          {_escape(source)}, gives {source_documents / documents:.1%} of the documents and
          {source_bytes / num_bytes:.1%} of the bytes.
        - {english if report["settings"]["english_only"] else "Texts of all languages were kept."}
        - Texts carry the biases and errors of what was published. Retracted articles are known from PubMed's records
          alone, as of the files read; what was refuted but not retracted is in the corpus.
        - Overlap with evaluation data that was not held out is unknown, and paraphrases of what was held out are not
          found.
        - Nobody has read the documents one by one.
    """


def _making(report: dict[str, Any], tokens: TokenStatistics | None) -> str:
    settings = [[f"`{name}`", str(value)] for name, value in report["settings"].items()]
    versions = report["versions"] | {"matplotlib, of the figures": importlib.metadata.version("matplotlib")}
    files = [
        [_escape(file["name"]), file["read"], file["kept"], sum(file["dropped"].values()), _checksum(file)]
        for file in report["files"]
    ]
    files.append(["all", report["read"], report["kept"], sum(report["dropped"].values()), ""])
    return f"""
        ## How it was made

        `scripts/build_corpus.py` made it with these settings, which its `--help` explains:

        {_table("setting | value", settings)}

        {_table("software | version", versions.items())}

        {f"SHA-256 of the tokenizer's `tokenizer.json`: `{tokens.tokenizer_sha256}`" if tokens else ""}

        **Seeds.** MinHash takes its hash functions from the fixed seed {report["selection"]["seed"]}. The split is a
        hash of the document's id (SHA-256, without a seed), so that a document never changes sides when others are
        added. Nothing else is drawn. With these versions, the same input gives the same corpus and the same card, byte
        for byte.

        ## Input files

        {_table("file | read | kept | dropped | SHA-256", files)}

        The corpus's `{REPORT}` tells how many documents of each file were dropped for which reason.
    """


def _checksum(file: dict[str, Any]) -> str:
    return f"`{file['sha256']}`" if file["sha256"] else "none: from the Hub"


def _fill(block: str) -> str:
    """A paragraph, or each point of a list, in lines of at most 120 characters; a heading, figure or table as it is."""
    if block.startswith(("#", "!", "|")):
        return block
    indent = "  " if block.startswith("- ") else ""
    points = [" ".join(point.split()) for point in re.split(r"\n\s*(?=- )", block)]
    return "\n".join(
        textwrap.fill(point, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        for point in points
    )


def _table(heading: str, rows: Iterable[Sequence[str | int | float]]) -> str:
    """A Markdown table; columns of numbers stand on the right."""
    names, rows = heading.split(" | "), list(rows)
    is_text = [any(isinstance(row[place], str) for row in rows) for place in range(len(names))]
    lines = [names, ["---" if left else "---:" for left in is_text], *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _escaped(row: Row) -> Row:
    return tuple(_escape(value) if isinstance(value, str) else value for value in row)


def _escape(text: str) -> str:
    """Text of the data as Markdown that shows it as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
