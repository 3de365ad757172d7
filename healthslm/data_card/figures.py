"""What the figures of a data card show: documents by source, license, year and length, and chunks by number of tokens.

The counts are from `healthslm.data_card.statistics`, and `healthslm.plots` draws them.
"""

import numpy as np

from healthslm.data_card.statistics import (
    BINS_PER_DOUBLING,
    Row,
    Statistics,
    TokenStatistics,
    shorten,
    sum_by,
    token_edges,
)
from healthslm.plots import Figures, draw_documents_and_bytes, draw_lengths, draw_tokens, draw_years

SOURCES, LICENSES, YEARS, LENGTHS, TOKENS = FIGURES = tuple(
    f"{name}.png" for name in ("sources", "licenses", "years", "lengths", "tokens")
)
MAX_BARS = 15
MAX_LINES = 5


def draw_figures(statistics: Statistics, tokens: TokenStatistics | None) -> Figures:
    """Draw the figures, by file name. `YEARS` needs documents with a year, `TOKENS` needs `tokens`."""
    years = {year: count for year, count in statistics["years"] if year is not None}
    figures = {
        SOURCES: draw_documents_and_bytes(shorten(sum_by(statistics["sources"], column=0), MAX_BARS)),
        LICENSES: draw_documents_and_bytes(shorten(sum_by(statistics["sources"], column=1), MAX_BARS)),
        LENGTHS: draw_lengths(*length_histograms(statistics["lengths"])),
    }
    if years:
        figures[YEARS] = draw_years(years)
    if tokens is not None:
        figures[TOKENS] = draw_tokens(tokens.histogram, token_edges(tokens.context), tokens.context)
    return figures


def length_histograms(lengths: list[Row]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Documents by length, for the `MAX_LINES` kinds of text with the most documents and for all others together.

    Args:
        lengths: Kind, bin and documents; bins are of equal width on a log scale.

    Returns:
        A histogram of shape (bins,), int64, for each kind; and the bins' edges in bytes, (bins + 1,).
    """
    first, last = (find(bin_number for _, bin_number, _ in lengths) for find in (min, max))
    kinds: dict[str, np.ndarray] = {}
    for kind, bin_number, count in lengths:
        kinds.setdefault(kind, np.zeros(last - first + 1, np.int64))[bin_number - first] = count
    ordered = sorted(kinds, key=lambda kind: (-kinds[kind].sum(), kind))
    histograms = {kind: kinds[kind] for kind in ordered[:MAX_LINES]}
    if others := ordered[MAX_LINES:]:
        histograms["others"] = np.sum([kinds[kind] for kind in others], axis=0)
    return histograms, 2.0 ** (np.arange(first, last + 2) / BINS_PER_DOUBLING)
