"""Plots with one look for the whole library, drawn from results that were computed elsewhere.

An image depends neither on the user's Matplotlib settings nor on the time or the versions of the software.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from healthslm.files import replacing

# Okabe and Ito, "Color Universal Design", 2008: colors that people with any color vision can tell apart.
BLUE, VERMILION = "#0072B2", "#D55E00"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
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

Results = dict[str, dict[str, Any]]
"""The result of each metric of `healthslm.evaluation.metrics`, by its name."""


def write_figures(folder: Path, draw: Callable[[], dict[str, Figure]]) -> None:
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


def draw_evaluation(results: Results, name: str) -> dict[str, Figure]:
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
