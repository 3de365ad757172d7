"""The data card of a corpus: a Markdown page with figures that says what the corpus contains and where it comes from.

    card/README.md      the page, with the metadata that the Hub reads from a dataset card
    card/*.png          documents by source, license, year and length, and chunks by number of tokens

`templates/README.md.jinja` holds the text. All numbers come from the corpus's report.json and from
`healthslm.data_card.statistics`. The same corpus gives the same bytes.
"""

import importlib.metadata
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from healthslm import markdown
from healthslm.corpus.records import SOURCE as PUBMED
from healthslm.corpus.report import REPORT
from healthslm.corpus.sources import UNSTATED
from healthslm.data_card import figures
from healthslm.data_card.figures import FIGURES, SOURCES, draw_figures
from healthslm.data_card.options import DataCardOptions
from healthslm.data_card.statistics import (
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
from healthslm.files import check_output_folder, read_json, replacing
from healthslm.plots import write_figures

PAGE = "README.md"
MAX_SOURCES = 100

# In the order in which documents are checked, see `healthslm.corpus.screening` and `healthslm.corpus.selection`.
REASONS = {
    "deletion": "The record is NCBI's order to delete a citation, not a citation.",
    "deleted": "A later file deletes the citation.",
    "superseded": "A later record, or one of a higher version, replaces it.",
    "no_abstract": "The citation has no abstract, only a title.",
    "no_text": "The text is empty.",
    "no_title": "A PubMed citation has no title.",
    "truncated": "The abstract ends with NLM's mark for a truncated abstract.",
    "too_short": "The text has fewer than {min_words} words.",
    "not_english": "The text is clearly in another language, at its beginning or later on.",
    "held_out": "A held-out document has the same id, the same letters and digits, or nearly the same text.",
    "held_out_overlap": "It shares {overlap_words} consecutive words with a held-out document, "
    "and at most {common_ngram} documents contain them.",
    "duplicate_id": "An earlier document has the same id.",
    "duplicate_text": "An earlier document has the same letters and digits.",
    "near_duplicate": "An earlier document has nearly the same text.",
    "retracted": "The article was retracted.",
    "retraction_notice": "It is a notice of retraction.",
}


def describe_corpus(options: DataCardOptions) -> None:
    """Write the data card of a corpus.

    Raises:
        UserError: There is no corpus, its files do not match its report, the tokens belong to another corpus, `names`
            has a file that is not an input, or the output folder holds other files than a card.
    """
    report = _read_report(options.corpus)
    _check(options, report)
    with replacing(options.output.absolute()) as card:
        card.mkdir()
        statistics = corpus_statistics(options.corpus, report, card.with_name("documents.duckdb"))
        tokens = None if options.tokens is None else token_statistics(options.tokens, report, options.context)
        rename(options.names, report, statistics)
        write_figures(card, partial(draw_figures, statistics, tokens))
        (card / PAGE).write_text(render_page(options.title, report, statistics, tokens), encoding="utf-8")


def _read_report(corpus: Path) -> dict[str, Any]:
    path = corpus / REPORT
    if not path.is_file():
        raise UserError(f"{corpus}: not a corpus: it has no {REPORT}; build one with scripts/build_corpus.py")
    report = read_json(path)
    needed = {"read", "kept", "dropped", "splits", "settings", "selection", "held_out", "files", "versions"}
    if not isinstance(report, dict) or not needed <= report.keys():
        raise UserError(f"{path}: not the report of a corpus of this version; build the corpus again")
    if unknown := sorted(report["dropped"].keys() - REASONS.keys()):
        raise UserError(f"{path}: from another version: unknown reasons {', '.join(unknown)}; build the corpus again")
    return report


def _check(options: DataCardOptions, report: dict[str, Any]) -> None:
    inputs = {file["name"] for file in (*report["files"], *report["held_out"])}
    if unknown := sorted(options.names.keys() - inputs):
        raise UserError(
            f"names: {', '.join(unknown)}: not an input of {options.corpus}, which has {', '.join(sorted(inputs))}"
        )
    check_output_folder(options.output, "a data card", _is_card)


def _is_card(folder: Path) -> bool:
    return {PAGE, SOURCES} <= {path.name for path in folder.iterdir()} <= {PAGE, *FIGURES}


def rename(names: dict[str, str], report: dict[str, Any], statistics: Statistics) -> None:
    """Replace the names of files, and of the sources named after their file, with the names to show."""
    for file in (*report["files"], *report["held_out"]):
        file["name"] = names.get(file["name"], file["name"])
    statistics["sources"] = [(names.get(source, source), *more) for source, *more in statistics["sources"]]


def render_page(title: str, report: dict[str, Any], statistics: Statistics, tokens: TokenStatistics | None) -> str:
    """Fill the template of the card."""
    documents, chunks, num_bytes, addresses = statistics["totals"][0]
    years: dict[int | None, int] = dict(statistics["years"])
    years_unstated = years.pop(None, 0)
    bands, rows_per_band = report["selection"]["bands"], report["selection"]["rows"]
    context = {
        "title": title,
        "metadata": _metadata(title, report, statistics),
        "report": report,
        "totals": {"documents": documents, "chunks": chunks, "bytes": num_bytes, "addresses": addresses},
        "dropped": sum(report["dropped"].values()),
        "columns": DOCUMENT_SCHEMA.names,
        "splits": _splits(report, tokens),
        "sources": shorten(statistics["sources"], MAX_SOURCES),
        "largest_source": sum_by(statistics["sources"], column=0)[0],
        "licenses": sum_by(statistics["sources"], column=1),
        "kinds": statistics["kinds"],
        "years": years,
        "years_unstated": years_unstated,
        "tokens": tokens,
        "reasons": {
            reason: text.format(**report["settings"], **report["selection"])
            for reason, text in REASONS.items()
            if reason in report["dropped"]
        },
        "match_chances": {jaccard: 1 - (1 - jaccard**rows_per_band) ** bands for jaccard in (0.5, 0.7, 0.8)},
        "versions": report["versions"] | {"matplotlib (figures)": importlib.metadata.version("matplotlib")},
        "figures": figures,
        "PUBMED": PUBMED,
        "UNSTATED": UNSTATED,
        "REPORT": REPORT,
    }
    return markdown.render("healthslm.data_card", f"{PAGE}.jinja", context)


def _metadata(title: str, report: dict[str, Any], statistics: Statistics) -> str:
    """The YAML header by which the Hub lists a dataset and finds its splits."""
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
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)


def size_category(rows: int) -> str:
    """The Hub's size category of a dataset, such as "100K<n<1M"."""
    bounds = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    categories = ["n<1K", *(f"{low}<n<{high}" for low, high in pairwise(bounds)), "n>1T"]
    return categories[sum(rows >= 10**power for power in range(3, 13))]


def _splits(report: dict[str, Any], tokens: TokenStatistics | None) -> list[dict[str, Any]]:
    """The rows of the table of splits, the last of them the total."""
    rows = [
        {"name": name, "documents": counts["documents"], "chunks": counts["parts"], "bytes": counts["bytes"]}
        | ({"tokens": tokens.counts[name]} if tokens else {})
        for name, counts in report["splits"].items()
    ]
    rows.append({"name": "all"} | {key: sum(row[key] for row in rows) for key in rows[0] if key != "name"})
    if tokens:
        for row in rows:
            text_tokens = row["tokens"] - row["chunks"]
            row["bytes_per_token"] = row["bytes"] / text_tokens if text_tokens else 0.0
    return rows
