"""Training rows: the stream of tokens cut into rows of one context, in an order that follows from the seed alone."""

from functools import lru_cache

import numpy as np

from healthslm.errors import UserError
from healthslm.tokens import TokenizedSplit


class PackedRows:
    """Rows of `context` tokens, each a stretch of the stream, in a new order every epoch.

    Which row stands at which position is a pure function of (seed, position): to resume, or to share the rows among
    processes, nothing but a number is needed.

    Raises:
        UserError: The split holds less than one row.
    """

    def __init__(self, split: TokenizedSplit, context: int, seed: int):
        self.split, self.context, self.seed = split, context, seed
        self.rows_per_epoch = (split.num_tokens - 1) // context
        if self.rows_per_epoch < 1:
            raise UserError(f"{split.num_tokens} training tokens are less than one row of {context}: add text")

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

    def _row(self, position: int) -> np.ndarray:
        epoch, place = divmod(position, self.rows_per_epoch)
        start = int(_epoch_order(self.rows_per_epoch, self.seed, epoch)[place]) * self.context
        return self.split.read(start, self.context + 1).astype(np.int64)


@lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState is the one generator whose numbers NumPy promises never to change.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch]))).permutation(rows)
