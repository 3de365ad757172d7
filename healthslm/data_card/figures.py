"""The figures of a data card: documents by source, license, year and length, and chunks by number of tokens.

Each function draws counts from `healthslm.data_card.statistics`; none reads files.
"""

import textwrap
from collections import Counter

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from healthslm.data_card.options import BINS_PER_CONTEXT
from healthslm.data_card.statistics import (
    BINS_PER_DOUBLING,
    Row,
    Statistics,
    TokenStatistics,
    shorten,
    sum_by,
    token_edges,
)
from healthslm.plots import BLUE, COLOURS, VERMILION

SOURCES, LICENSES, YEARS, LENGTHS, TOKENS = FIGURES = tuple(
    f"{name}.png" for name in ("sources", "licenses", "years", "lengths", "tokens")
)
MAX_BARS = 15
MAX_LINES = 5

LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
THOUSANDS = "{x:,.0f}"


def draw_figures(statistics: Statistics, tokens: TokenStatistics | None) -> dict[str, Figure]:
    """Draw the figures, by file name. `YEARS` needs documents with a year, `TOKENS` needs `tokens`."""
    years = {year: count for year, count in statistics["years"] if year is not None}
    figures = {
        SOURCES: draw_shares(shorten(sum_by(statistics["sources"], column=0), MAX_BARS)),
        LICENSES: draw_shares(shorten(sum_by(statistics["sources"], column=1), MAX_BARS)),
        LENGTHS: draw_lengths(statistics["lengths"]),
    }
    if years:
        figures[YEARS] = draw_years(years)
    if tokens is not None:
        figures[TOKENS] = draw_tokens(tokens)
    return figures


def draw_shares(rows: list[Row]) -> Figure:
    """Draw bars of documents and bars of bytes, side by side. A row is a name, documents and bytes."""
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(rows)))
    left, right = figure.subplots(1, 2, sharey=True)
    names, documents, num_bytes = zip(*rows, strict=True)
    for ax, values, colour, label, ticks, numbers in (
        (left, documents, BLUE, "documents", THOUSANDS, "{:,.0f}"),
        (right, num_bytes, VERMILION, "bytes of UTF-8 text", EngFormatter("B"), EngFormatter("B", places=1)),
    ):
        bars = ax.barh(range(len(rows)), values, color=colour)
        ax.bar_label(bars, fmt=numbers, padding=3, fontsize=8)
        ax.set_xlim(0, max(values) * 1.3)
        ax.set_xlabel(label)
        ax.xaxis.set_major_formatter(ticks)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.grid(axis="x")
    left.set_yticks(
        range(len(rows)), ["\n".join(textwrap.wrap(name, 44, max_lines=2, placeholder=" …")) for name in names]
    )
    left.invert_yaxis()
    right.tick_params(axis="y", left=False)
    return figure


def draw_years(years: dict[int, int]) -> Figure:
    """Draw bars of documents by year of publication."""
    figure = Figure(figsize=(9, 4))
    ax = figure.add_subplot(xlabel="year of publication", ylabel="documents per year")
    ax.bar(list(years), list(years.values()), width=0.9, color=BLUE)
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    if max(years.values()) > 100 * min(years.values()):
        ax.set(yscale="log", ylabel="documents per year (log scale)", ylim=(0.7, None))
    ax.set_xlim(min(years) - 1, max(years) + 1)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(THOUSANDS)
    ax.grid(axis="y")
    return figure


def draw_lengths(lengths: list[Row]) -> Figure:
    """Draw one line per kind of text: the share of its documents by length, in bins of equal width on a log scale."""
    kinds: dict[str, Counter[int]] = {}
    for kind, bin_number, count in lengths:
        kinds.setdefault(kind, Counter())[bin_number] = count
    ordered = sorted(kinds, key=lambda kind: (-kinds[kind].total(), kind))
    drawn = {kind: kinds[kind] for kind in ordered[:MAX_LINES]}
    if others := ordered[MAX_LINES:]:
        drawn["others"] = sum((kinds[kind] for kind in others), Counter())

    bins = range(min(map(min, drawn.values())), max(map(max, drawn.values())) + 1)
    edges = 2.0 ** (np.arange(bins.start, bins.stop + 1) / BINS_PER_DOUBLING)
    figure = Figure(figsize=(9, 4))
    ax = figure.add_subplot(
        xlabel="bytes of text per document (log scale)", ylabel="share of the kind's documents", xscale="log"
    )
    for (kind, counts), colour, style in zip(drawn.items(), COLOURS, LINE_STYLES, strict=False):
        documents = counts.total()
        shares = [counts[number] / documents for number in bins]
        noun = "document" if documents == 1 else "documents"
        ax.stairs(shares, edges, color=colour, linestyle=style, lw=1.8, label=f"{kind}: {documents:,} {noun}")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter(THOUSANDS)
    ax.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.grid()
    ax.legend(frameon=False)
    return figure


def draw_tokens(tokens: TokenStatistics) -> Figure:
    """Draw bars of chunks by number of tokens, with a line at the context."""
    context, edges = tokens.context, token_edges(tokens.context)
    figure = Figure(figsize=(9, 4))
    ax = figure.add_subplot(xlabel="tokens per chunk, with its separator", ylabel="chunks")
    colours = [BLUE] * BINS_PER_CONTEXT + [VERMILION] * BINS_PER_CONTEXT
    ax.bar(edges[:-1], tokens.histogram, np.diff(edges) * 0.92, align="edge", color=colours)
    ax.axvline(context + 0.5, color="black", linestyle="--", lw=1)
    label = f" context: {context:,} tokens\n longer: {tokens.too_long:,} chunks"
    ax.annotate(label, (context, 1), xycoords=("data", "axes fraction"), va="top")
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlim(0, 2 * context)
    ticks = np.arange(9) * context / 4
    ax.set_xticks(ticks, [*(f"{tick:,.0f}" for tick in ticks[:-1]), f"{2 * context:,}\nor more"])
    ax.yaxis.set_major_formatter(THOUSANDS)
    ax.grid(axis="y")
    return figure
