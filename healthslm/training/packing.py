"""Training rows: a split's documents in an order that follows from the seed alone, cut into rows of one context."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np

from healthslm.errors import UserError
from healthslm.tokenization.tokens import TokenizedSplit

Argument, Result = TypeVar("Argument"), TypeVar("Result")


class PackedRows:
    """Rows of `context` tokens: all documents one after another, in a new order every epoch, cut every so many tokens.

    Documents change places, and not whole rows, since neighbours in a corpus are often of one journal: a row would be
    of one subject, and a small batch of few.

    What a row holds is a pure function of (seed, position): to resume, or to share the rows among processes, nothing
    but a number is needed.

    Raises:
        UserError: The split holds less than one row.
    """

    def __init__(self, split: TokenizedSplit, context: int, seed: int):
        self.split, self.context, self.seed = split, context, seed
        self.rows_per_epoch = (split.num_tokens - 1) // context
        if self.rows_per_epoch < 1:
            raise UserError(f"{split.num_tokens} training tokens are less than one row of {context}: add text")
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def batch(self, positions: range) -> dict[str, np.ndarray]:
        """The rows at these positions: `input_ids`, `labels` and `position_ids`, each (rows, context) of int64.

        Labels are the tokens that follow: already shifted, so that the last position has one too. Positions restart at
        each separator, which keeps the documents of a row apart; the last token of a document is to predict the next
        one's separator, and so learns to end.
        """
        rows = np.stack([self._row(position) for position in positions])
        inputs = rows[:, :-1]
        places = np.arange(self.context)
        starts = np.where(inputs == self.split.separator_id, places, 0)
        return {
            "input_ids": inputs,
            "labels": rows[:, 1:].copy(),  # contiguous, as losses want them
            "position_ids": places - np.maximum.accumulate(starts, axis=1),
        }

    def place(self, positions: range) -> dict[str, list[int] | list[list[int]]]:
        """Where rows lie in the data: `positions` from and to, and by row the numbers of the `documents` in it."""
        documents = [self._documents(position)[0].tolist() for position in positions]
        return {"positions": [positions.start, positions.stop], "documents": documents}

    def documents_opened(self, positions: range, tokens: int) -> np.ndarray:
        """Numbers of the documents of which a row at one of these positions holds the first so many tokens."""
        opened = []
        for epoch in range(positions.start // self.rows_per_epoch, -(-positions.stop // self.rows_per_epoch)):
            order, ends = self._epoch(epoch)
            starts = ends - self.split.document_lengths[order]
            row = starts // self.context
            position = epoch * self.rows_per_epoch + row
            is_read = (positions.start <= position) & (position < positions.stop) & (row < self.rows_per_epoch)
            opened.append(order[is_read & (starts + tokens <= (row + 1) * self.context + 1)])
        return np.unique(np.concatenate(opened))

    def _row(self, position: int) -> np.ndarray:
        documents, skipped = self._documents(position)
        tokens = np.concatenate([self.split.document(number) for number in documents])
        return tokens[skipped : skipped + self.context + 1].astype(np.int64)

    def _documents(self, position: int) -> tuple[np.ndarray, int]:
        """Numbers of the documents of a row, in their order, and how many tokens of the first it leaves out."""
        epoch, place = divmod(position, self.rows_per_epoch)
        order, ends = self._epoch(epoch)
        start = place * self.context
        first, last = np.searchsorted(ends, [start, start + self.context], side="right")
        documents = order[first : last + 1]
        return documents, start - int(ends[first] - self.split.document_lengths[documents[0]])

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the documents in an epoch, and where each then ends in the line of them all, exclusive."""
        # RandomState is the one generator whose numbers NumPy promises never to change.
        generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
        order = generator.permutation(len(self.split))
        return order, np.cumsum(self.split.document_lengths[order])


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
