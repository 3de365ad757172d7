"""Training rows: the stream of tokens cut into rows of one context, in an order that follows from the seed alone."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch

from healthslm.errors import UserError
from healthslm.tokenization.tokens import TokenizedSplit

Argument, Result = TypeVar("Argument"), TypeVar("Result")


class PackedRows:
    """Rows of `context` tokens, each a stretch of the stream, in a new order every epoch.

    Which row stands at which position is a pure function of (seed, position): to resume, or to share the rows among
    processes, nothing but a number is needed.

    Raises:
        UserError: The split holds less than one row.
    """

    def __init__(self, split: TokenizedSplit, context: int, seed: int, at_document_starts: bool = False):
        """
        Args:
            at_document_starts: Have a row begin at the first document that starts within its stretch, so that it holds
                no end of a document whose beginning it lacks; it then goes on into the next stretch.
        """
        self.split, self.context, self.seed, self.at_document_starts = split, context, seed, at_document_starts
        self.rows_per_epoch = (split.num_tokens - 1) // context
        if self.rows_per_epoch < 1:
            raise UserError(f"{split.num_tokens} training tokens are less than one row of {context}: add text")

    def batch(self, positions: range, longest: int | None = None) -> dict[str, np.ndarray]:
        """The rows at these positions: `input_ids`, `labels` and `position_ids`, each (rows, context) of int64.

        Labels are the tokens that follow: already shifted, so that the last position has one too. Positions restart at
        each separator, which keeps the documents of a row apart; the last token of a document is to predict the next
        one's separator, and so learns to end. With `longest`, they also restart every so many tokens of a row.
        """
        rows = np.stack([self._row(position) for position in positions])
        inputs = rows[:, :-1]
        places = np.arange(self.context)
        begins = inputs == self.split.separator_id
        if longest is not None:
            begins |= places % longest == 0
        starts = np.where(begins, places, 0)
        return {
            "input_ids": inputs,
            "labels": rows[:, 1:].copy(),  # contiguous, as losses want them
            "position_ids": places - np.maximum.accumulate(starts, axis=1),
        }

    def place(self, positions: range) -> dict[str, list[int]]:
        """Where rows lie in the data: `positions` from and to, and the token of the stream at which each row begins."""
        starts = [self._start(position) for position in positions]
        return {"positions": [positions.start, positions.stop], "stream": starts}

    def documents_opened(self, positions: range, tokens: int) -> np.ndarray:
        """Numbers of the documents of which a row at one of these positions holds the first so many tokens."""
        row_starts = np.unique([self._start(position) for position in positions])
        starts = self.split.document_starts
        row = np.searchsorted(row_starts, starts, side="right") - 1  # the last that begins no later; -1 is none
        ends = np.where(row < 0, 0, row_starts[row] + self.context + 1)
        return np.flatnonzero(starts + tokens <= ends)

    def _row(self, position: int) -> np.ndarray:
        return self.split.read(self._start(position), self.context + 1).astype(np.int64)

    def _start(self, position: int) -> int:
        epoch, place = divmod(position, self.rows_per_epoch)
        start = int(_epoch_order(self.rows_per_epoch, self.seed, epoch)[place]) * self.context
        return self._next_document(start) if self.at_document_starts else start

    def _next_document(self, start: int) -> int:
        starts = self.split.document_starts
        found = int(starts[min(np.searchsorted(starts, start), len(starts) - 1)])
        fits = start <= found < start + self.context and found + self.context < self.split.num_tokens
        return found if fits else start


def document_bounds(position_ids: torch.Tensor) -> torch.Tensor:
    """Bounds (documents + 1,) of the documents in a batch (rows, context) laid out as one line, by their positions."""
    flat = position_ids.flatten()
    return torch.cat([(flat == 0).nonzero().flatten(), flat.new_tensor([len(flat)])])


def prepared_ahead(prepare: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Iterator[Result]:
    """Yield `prepare` of each argument, while a thread prepares the next."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = []
        for argument in arguments:
            waiting.append(thread.submit(prepare, argument))
            if len(waiting) == 2:
                yield waiting.pop(0).result()
        for last in waiting:
            yield last.result()


@lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState is the one generator whose numbers NumPy promises never to change.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch]))).permutation(rows)
