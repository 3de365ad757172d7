"""The schedule of a run: the rows of each update and its learning rate, as pure functions of the update's number."""

import math
from dataclasses import dataclass
from typing import Literal

from healthslm.errors import UserError

Decay = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """Updates from the first to the one that reaches `max_tokens`, counted from 0.

    The learning rate rises linearly over `warmup_tokens` and falls over the last `decay_fraction` of the others: with
    1.0 from the peak on (for a linear fall to zero see Bergsma et al., 2025), with less it keeps the peak in between (a
    trapezoid, Hägele et al., 2024).

    Raises:
        UserError: The numbers do not fit one another.
    """

    context: int
    """Tokens of a row."""
    max_tokens: int
    batch_tokens: int
    warmup_tokens: int = 0
    decay: Decay = "linear"
    decay_fraction: float = 1.0
    final_fraction: float = 0.0
    """Part of the peak towards which the learning rate falls."""

    def __post_init__(self) -> None:
        if self.batch_tokens % self.context:
            raise UserError(f"a batch of {self.batch_tokens} tokens is no whole number of rows of {self.context}")
        if not 0 <= self.warmup_tokens < self.max_tokens:
            raise UserError(f"warmup_tokens {self.warmup_tokens} must be less than max_tokens {self.max_tokens}")

    def __len__(self) -> int:
        """Number of updates."""
        return -(-self.max_tokens // self.batch_tokens)

    def tokens_before(self, update: int) -> int:
        """Tokens trained on before this update; with the number of updates, those of the run."""
        return update * self.batch_tokens

    def update_at(self, tokens: int) -> int:
        """The update that begins when so many tokens have been trained on."""
        return -(-tokens // self.batch_tokens)

    def positions(self, update: int) -> range:
        """Positions of this update's rows among all rows."""
        rows = self.batch_tokens // self.context
        return range(update * rows, (update + 1) * rows)

    def learning_rate_factor(self, update: int) -> float:
        """The part of the peak that the learning rate is in this update."""
        before, after = self.tokens_before(update), self.tokens_before(update + 1)
        if after <= self.warmup_tokens:
            return after / self.warmup_tokens
        end = self.tokens_before(len(self))
        left = min((end - before) / (self.decay_fraction * (end - self.warmup_tokens)), 1.0)
        if self.decay == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        return self.final_fraction + (1.0 - self.final_fraction) * left
