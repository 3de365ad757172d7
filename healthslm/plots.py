"""All plots of the library, with one look, drawn from results that were computed elsewhere.

This is the only module that uses Matplotlib. An image depends neither on the user's Matplotlib settings nor on the
time or the versions of the software.
"""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from healthslm.files import replacing

# Okabe and Ito, "Color Universal Design", 2008: colors that people with any color vision can tell apart.
BLUE, VERMILION = "#0072B2", "#D55E00"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
THOUSANDS = "{x:,.0f}"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.wspace": 0.06,
    "grid.color": "0.9",
    "text.parse_math": False,
}

BITS_PER_BYTE, GROUPS, MINIMAL_PAIRS, MEMORIZATION = FIGURES = tuple(
    f"{name}.png" for name in ("bits_per_byte", "decades_and_sections", "minimal_pairs", "memorization")
)
RATES = {
    "win_rate": "model, full sentence",
    "without_context": "model, term alone",
    "more_frequent": "more frequent term",
}
XZ = {"together": "all texts as one stream", "alone": "each text separately"}

Figures = dict[str, Figure]
"""Figures by their file names."""
Results = dict[str, dict[str, Any]]
"""The result of each metric of `healthslm.evaluation.metrics`, by its name."""


def write_figures(folder: Path, draw: Callable[[], Figures]) -> None:
    """Draw figures in the library's style and write them as PNG images.

    Args:
        draw: Returns the figures by their file names.
    """
    with matplotlib.style.context(["default", STYLE]):
        for name, figure in draw().items():
            with replacing(folder / name) as new:
                figure.savefig(new, dpi=150, metadata={"Software": None})


def draw_training(records: list[dict[str, Any]]) -> Figure:
    """Training loss (left axis) and validation bits per byte (right axis) over the tokens seen.

    Args:
        records: The metrics of a run, see `healthslm.training.run_folder.read_metrics`.
    """
    training = [record for record in records if "loss" in record]
    validation = [record for record in records if "validation_bits_per_byte" in record]
    figure = Figure(figsize=(8, 4.5))
    losses = figure.add_subplot(xlabel="tokens seen", ylabel="training loss, nats per token")
    losses.plot([r["tokens"] for r in training], [r["loss"] for r in training], color=BLUE, lw=1, label="training")
    bits = losses.twinx()
    bits.set_ylabel("validation, bits per byte")
    bits.plot(
        [r["tokens"] for r in validation],
        [r["validation_bits_per_byte"] for r in validation],
        color=VERMILION,
        marker="o",
        markersize=3,
        label="validation",
    )
    bits.spines["right"].set_visible(True)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_evaluation(results: Results, name: str) -> Figures:
    """The figures of an evaluation by their file names.

    Args:
        name: Display name of the model.
    """
    return {
        BITS_PER_BYTE: draw_comparison(results["held_out"], results["baselines"]["models"], name),
        GROUPS: draw_groups(results["pubmed"]),
        MINIMAL_PAIRS: draw_minimal_pairs(results["minimal_pairs"]),
        MEMORIZATION: draw_memorization(results["memorization"], results["held_out"]),
    }


def draw_comparison(held_out: dict[str, Any], baselines: dict[str, Any], name: str) -> Figure:
    """Bits per byte of the model and its baselines, with intervals, the best on top."""
    measured = {other: found for other, found in baselines.items() if "bits_per_byte" in found}
    models = {name: held_out["model"], f"{name}, untrained": held_out["untrained"]} | measured
    compressors = {f"xz, {how}": {"bits_per_byte": held_out["xz"][key]} for key, how in XZ.items()}
    ordered = sorted((models | compressors).items(), key=lambda item: item[1]["bits_per_byte"])
    figure = Figure(figsize=(9, 1.2 + 0.35 * len(ordered)))
    ax = figure.add_subplot(xlabel="bits per byte of held-out abstracts (lower is better)")
    _draw_dots(ax, ordered, highlighted=name)
    return figure


def draw_groups(pubmed: dict[str, Any]) -> Figure:
    """Bits per byte by decade and by section, with intervals and a line at the overall result."""
    decades, sections = (list(pubmed[name].items()) for name in ("by_decade", "by_section"))
    figure = Figure(figsize=(9, 1.4 + 0.32 * max(len(decades), len(sections))))
    for ax, groups, title in zip(figure.subplots(1, 2), (decades, sections), ("by decade", "by section"), strict=True):
        _draw_dots(ax, groups)
        ax.axvline(pubmed["bits_per_byte"], color="0.4", linestyle="--", lw=1, zorder=0)
        ax.set(title=title, xlabel="bits per byte (dashed: overall)")
    return figure


def draw_minimal_pairs(minimal_pairs: dict[str, Any]) -> Figure:
    """For both sets and each kind of term, how often the original term wins: by the model and by two baselines."""
    figure = Figure(figsize=(9, 7))
    axes = figure.subplots(2, 1)
    for ax, found, title in zip(axes, (minimal_pairs, minimal_pairs["harder"]), ("pairs", "harder pairs"), strict=True):
        _draw_rates(ax, found["scores"])
        ax.set(title=title, ylabel="pairs won by the original term")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def _draw_rates(ax: Axes, scores: dict[str, dict[str, Any]]) -> None:
    kinds = list(scores)
    width = 0.8 / len(RATES)
    for number, ((rate, label), colour) in enumerate(zip(RATES.items(), COLOURS, strict=False)):
        shares = np.array([scores[kind][rate]["share"] for kind in kinds])
        intervals = np.array([scores[kind][rate]["interval"] for kind in kinds]).T
        places = np.arange(len(kinds)) + (number - (len(RATES) - 1) / 2) * width
        errors = np.abs(intervals - shares)
        ax.bar(places, shares, width * 0.92, yerr=errors, color=colour, capsize=2, label=label, ecolor="0.2")
    ax.axhline(0.5, color="0.2", linestyle="--", lw=1, label="chance")
    ax.set_xticks(range(len(kinds)), [f"{kind}\n{scores[kind]['pairs']:,} pairs" for kind in kinds])
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(axis="y")


def draw_memorization(memorization: dict[str, dict[str, Any]], held_out: dict[str, Any]) -> Figure:
    """Bits per byte of training and held-out abstracts, and the share of documents that match a greedy continuation at
    each position."""
    figure = Figure(figsize=(9, 6.5))
    above, ax = figure.subplots(2, 1, height_ratios=(1, 2.2))
    abstracts = {f"{name.replace('_', '-')} abstracts": found["abstracts"] for name, found in memorization.items()}
    _draw_dots(above, (abstracts | {held_out["data"]: held_out["model"]}).items(), highlighted="training abstracts")
    above.set(xlabel="bits per byte")
    ax.set(xlabel="token of the continuation", ylabel="documents that match")
    for (name, found), colour, style in zip(memorization.items(), (VERMILION, BLUE), ("-", "--"), strict=True):
        shares = found["matching_by_position"]
        label = f"{name.replace('_', '-')} documents: {found['documents']:,}"
        ax.plot(range(1, len(shares) + 1), shares, color=colour, linestyle=style, lw=1.8, label=label)
    ax.set(xlim=(1, len(shares)), ylim=(0, None))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.grid()
    ax.legend(frameon=False)
    return figure


def _draw_dots(ax: Axes, rows: Iterable[tuple[str, dict[str, Any]]], highlighted: str | None = None) -> None:
    """One line per row, the first on top: a dot at its bits per byte, the interval if it has one, and the number."""
    names = []
    for place, (name, found) in enumerate(rows):
        bits, interval = found["bits_per_byte"], found.get("interval")
        colour = VERMILION if name == highlighted else BLUE
        errors = None if interval is None else np.abs(np.array(interval)[:, None] - bits)
        ax.errorbar(bits, place, xerr=errors, fmt="o", color=colour, capsize=3)
        ax.annotate(f"{bits:.3f}", (bits, place), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        names.append(name)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.8)
    ax.margins(x=0.1)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x")


def draw_documents_and_bytes(rows: Sequence[tuple[str, int, int]]) -> Figure:
    """Bars of documents and bars of bytes, side by side.

    Args:
        rows: Name, documents and bytes of each bar.
    """
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
    """Bars of documents by year of publication, on a log scale if they differ widely."""
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


def draw_lengths(histograms: dict[str, np.ndarray], edges: np.ndarray) -> Figure:
    """One stepped line per kind of text: the share of its documents by length, on a log scale.

    Args:
        histograms: Documents of each kind by length, (bins,) each, for at most six kinds.
        edges: Of the bins, in bytes, (bins + 1,).
    """
    figure = Figure(figsize=(9, 4))
    ax = figure.add_subplot(
        xlabel="bytes of text per document (log scale)", ylabel="share of the kind's documents", xscale="log"
    )
    for (kind, counts), colour, style in zip(histograms.items(), COLOURS, LINE_STYLES, strict=False):
        documents = counts.sum()
        noun = "document" if documents == 1 else "documents"
        label = f"{kind}: {documents:,} {noun}"
        ax.stairs(counts / documents, edges, color=colour, linestyle=style, lw=1.8, label=label)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter(THOUSANDS)
    ax.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.grid()
    ax.legend(frameon=False)
    return figure


def draw_tokens(histogram: np.ndarray, edges: np.ndarray, context: int) -> Figure:
    """Bars of chunks by number of tokens, with a line at the context.

    Args:
        histogram: Chunks by number of tokens, (bins,); the last bin also counts all that are longer.
        edges: Of the bins, in tokens, (bins + 1,), from 0 to twice the context.
    """
    longer = edges[:-1] > context
    figure = Figure(figsize=(9, 4))
    ax = figure.add_subplot(xlabel="tokens per chunk, with its separator", ylabel="chunks")
    colours = np.where(longer, VERMILION, BLUE).tolist()
    ax.bar(edges[:-1], histogram, np.diff(edges) * 0.92, align="edge", color=colours)
    ax.axvline(context + 0.5, color="black", linestyle="--", lw=1)
    label = f" context: {context:,} tokens\n longer: {histogram[longer].sum():,} chunks"
    ax.annotate(label, (context, 1), xycoords=("data", "axes fraction"), va="top")
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlim(0, 2 * context)
    ticks = np.arange(9) * context / 4
    ax.set_xticks(ticks, [*(f"{tick:,.0f}" for tick in ticks[:-1]), f"{2 * context:,}\nor more"])
    ax.yaxis.set_major_formatter(THOUSANDS)
    ax.grid(axis="y")
    return figure
