"""Training sequences: a split's documents in an order set by the seed, packed into sequences of one context."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np

from healthslm.errors import UserError
from healthslm.tokenization.tokens import TokenizedSplit

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class PackedSequences:
    """Sequences of `context` tokens: each epoch joins all documents in a new order, and cuts the result into sequences.

    Documents are shuffled, not sequences. Neighboring documents of a corpus often come from one journal, so a sequence
    of neighbors would cover one subject and a small batch only a few.

    The content of a sequence is a pure function of (seed, index): resuming a run or sharing it among processes needs
    only a number.

    Raises:
        UserError: The split is shorter than one sequence.
    """

    def __init__(self, split: TokenizedSplit, context: int, seed: int):
        self.split, self.context, self.seed = split, context, seed
        self.sequences_per_epoch = (split.num_tokens - 1) // context
        if self.sequences_per_epoch < 1:
            raise UserError(f"{split.num_tokens} training tokens are less than one sequence of {context}: add text")
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def batch(self, indices: range) -> dict[str, np.ndarray]:
        """The sequences with these indices: `input_ids`, `labels` and `position_ids`, each (sequences, context), int64.

        Labels are already shifted: they are the next tokens, so the last token of a sequence has one too. Positions
        restart at each separator, which keeps packed documents apart. The last token of a document predicts the
        separator of the next document, so the model learns where to stop.
        """
        sequences = np.stack([self._sequence(index) for index in indices])
        inputs = sequences[:, :-1]
        offsets = np.arange(self.context)
        starts = np.where(inputs == self.split.separator_id, offsets, 0)
        return {
            "input_ids": inputs,
            "labels": sequences[:, 1:].copy(),  # losses need them contiguous
            "position_ids": offsets - np.maximum.accumulate(starts, axis=1),
        }

    def locate(self, indices: range) -> dict[str, list[int] | list[list[int]]]:
        """Where sequences come from: `sequences`, the first and last index (exclusive), and each one's `documents`."""
        documents = [self._documents(index)[0].tolist() for index in indices]
        return {"sequences": [indices.start, indices.stop], "documents": documents}

    def documents_opened(self, indices: range, tokens: int) -> np.ndarray:
        """Numbers of the documents whose first `tokens` tokens are in one of these sequences."""
        opened = []
        for epoch in range(indices.start // self.sequences_per_epoch, -(-indices.stop // self.sequences_per_epoch)):
            order, ends = self._epoch(epoch)
            starts = ends - self.split.document_lengths[order]
            in_epoch = starts // self.context
            index = epoch * self.sequences_per_epoch + in_epoch
            is_read = (indices.start <= index) & (index < indices.stop) & (in_epoch < self.sequences_per_epoch)
            opened.append(order[is_read & (starts + tokens <= (in_epoch + 1) * self.context + 1)])
        return np.unique(np.concatenate(opened))

    def _sequence(self, index: int) -> np.ndarray:
        documents, skipped = self._documents(index)
        tokens = np.concatenate([self.split.document(number) for number in documents])
        return tokens[skipped : skipped + self.context + 1].astype(np.int64)

    def _documents(self, index: int) -> tuple[np.ndarray, int]:
        """Numbers of the documents in a sequence, in order, and how many tokens of the first one precede it."""
        epoch, in_epoch = divmod(index, self.sequences_per_epoch)
        order, ends = self._epoch(epoch)
        start = in_epoch * self.context
        first, last = np.searchsorted(ends, [start, start + self.context], side="right")
        documents = order[first : last + 1]
        return documents, start - int(ends[first] - self.split.document_lengths[documents[0]])

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the documents in an epoch, and the offset at which each one ends when they are joined."""
        # RandomState is the only generator whose numbers NumPy promises never to change.
        generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
        order = generator.permutation(len(self.split))
        return order, np.cumsum(self.split.document_lengths[order])


def prefetch(prepare: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Generator[Result, None, None]:
    """Yield `prepare` of each argument, while a thread prepares the next one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = []
        for argument in arguments:
            waiting.append(thread.submit(prepare, argument))
            if len(waiting) == 2:
                yield waiting.pop(0).result()
        for last in waiting:
            yield last.result()
