"""The figures of an evaluation: training curve, bits per byte, minimal pairs and memorised text, with 95% intervals.

Each function draws what `healthslm.evaluation.measures` has measured; nothing is measured here. The images are the same
whatever Matplotlib's settings are where they are drawn.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from healthslm.data_card.figures import BLUE, COLOURS, STYLE, VERMILION
from healthslm.training.log import draw_curve

TRAINING = "training.png"
BITS_PER_BYTE, GROUPS, MINIMAL_PAIRS, MEMORISATION = FIGURES = tuple(
    f"{name}.png" for name in ("bits_per_byte", "decades_and_sections", "minimal_pairs", "memorisation")
)
RATES = {
    "win_rate": "the model, in the sentence",
    "without_context": "the model, of the terms alone",
    "more_frequent": "the more frequent term",
}

Results = dict[str, dict[str, Any]]
"""What each measure has found, by its name."""


def write_evaluation_figures(folder: Path, results: Results, records: list[dict[str, Any]], name: str) -> None:
    """Write the figures as images that hold no time and no version.

    Args:
        records: The metrics of the run.
        name: The model's.
    """
    with matplotlib.style.context(["default", STYLE]):  # whatever the user's is
        draw_curve(records, folder / TRAINING)
        for file, figure in draw_evaluation(results, name).items():
            figure.savefig(folder / file, dpi=150, metadata={"Software": None})


def draw_evaluation(results: Results, name: str) -> dict[str, Figure]:
    """The figures of the results by the names of their files."""
    return {
        BITS_PER_BYTE: draw_contenders(results["held_out"], results["beside"]["models"], name),
        GROUPS: draw_groups(results["pubmed"]),
        MINIMAL_PAIRS: draw_minimal_pairs(results["minimal_pairs"]),
        MEMORISATION: draw_memorisation(results["memorisation"], results["held_out"]),
    }


def draw_contenders(held_out: dict[str, Any], beside: dict[str, Any], name: str) -> Figure:
    """A dot with its interval for each that was measured on the held-out abstracts, the fewest bits on top."""
    measured = {other: found for other, found in beside.items() if "bits_per_byte" in found}
    contenders = {name: held_out["model"], "the same network, untrained": held_out["untrained"]} | measured
    compressors = {f"xz, texts {how}": {"bits_per_byte": held_out["xz"][how]} for how in ("together", "alone")}
    ordered = sorted((contenders | compressors).items(), key=lambda item: item[1]["bits_per_byte"])
    figure = Figure(figsize=(9, 1.2 + 0.35 * len(ordered)))
    ax = figure.add_subplot(xlabel="bits per byte of held-out abstracts: fewer are better")
    _draw_dots(ax, ordered, highlighted=name)
    return figure


def draw_groups(pubmed: dict[str, Any]) -> Figure:
    """Dots with intervals by decade and by section, and a line at the figure of all."""
    decades, sections = (list(pubmed[name].items()) for name in ("by_decade", "by_section"))
    figure = Figure(figsize=(9, 1.4 + 0.32 * max(len(decades), len(sections))))
    for ax, groups, title in zip(figure.subplots(1, 2), (decades, sections), ("by decade", "by section"), strict=True):
        _draw_dots(ax, groups)
        ax.axvline(pubmed["bits_per_byte"], color="0.4", linestyle="--", lw=1, zorder=0)
        ax.set(title=title, xlabel="bits per byte (dashed: of all)")
    return figure


def draw_minimal_pairs(minimal_pairs: dict[str, Any]) -> Figure:
    """For both sets, three bars for each kind of term: how often the true one is preferred, and by what else it might
    be."""
    figure = Figure(figsize=(9, 7))
    axes = figure.subplots(2, 1)
    for ax, found, title in zip(axes, (minimal_pairs, minimal_pairs["harder"]), ("pairs", "harder pairs"), strict=True):
        _draw_rates(ax, found["scores"])
        ax.set(title=title, ylabel="pairs in which the true term wins")
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


def draw_memorisation(memorisation: dict[str, dict[str, Any]], held_out: dict[str, Any]) -> Figure:
    """For training and held-out documents, the bits per byte of abstracts, and the share of documents that the model
    goes on with as they do, by place."""
    figure = Figure(figsize=(9, 6.5))
    above, ax = figure.subplots(2, 1, height_ratios=(1, 2.2))
    abstracts = {f"{name.replace('_', '-')} abstracts": found["abstracts"] for name, found in memorisation.items()}
    _draw_dots(above, (abstracts | {held_out["data"]: held_out["model"]}).items(), highlighted="training abstracts")
    above.set(xlabel="bits per byte")
    ax.set(xlabel="token behind the 50 that the model was given", ylabel="documents that match there")
    for (name, found), colour, style in zip(memorisation.items(), (VERMILION, BLUE), ("-", "--"), strict=True):
        shares = found["matching_by_position"]
        label = f"{name.replace('_', '-')} documents: {found['documents']:,}"
        ax.plot(range(1, len(shares) + 1), shares, color=colour, linestyle=style, lw=1.8, label=label)
    ax.set(xlim=(1, len(shares)), ylim=(0, None))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.grid()
    ax.legend(frameon=False)
    return figure


def _draw_dots(ax: Axes, rows: Iterable[tuple[str, dict[str, Any]]], highlighted: str | None = None) -> None:
    """A row a line, the first on top: a dot at its bits per byte, its interval where it has one, and the figure."""
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
