"""The schedule of a run: the sequences and the learning rate of each step, as pure functions of the step."""

import math
from dataclasses import dataclass
from typing import Literal

from healthslm.errors import UserError

Decay = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """Steps, counted from 0, until `max_tokens` tokens have been seen.

    The learning rate rises linearly over `warmup_tokens`, and decays over the last `decay_fraction` of the remaining
    tokens. 1.0 decays from the peak on (linear decay to zero: Bergsma et al., 2025); a smaller fraction stays at the
    peak in between (a trapezoid: Hägele et al., 2024).

    Raises:
        UserError: The values contradict each other.
    """

    context: int
    """Tokens of a sequence."""
    max_tokens: int
    batch_tokens: int
    warmup_tokens: int
    decay: Decay
    decay_fraction: float
    final_fraction: float
    """Fraction of the peak that the learning rate decays to."""

    def __post_init__(self) -> None:
        if self.batch_tokens % self.context:
            raise UserError(f"batch_tokens {self.batch_tokens} is not a multiple of the context, {self.context} tokens")
        if not 0 <= self.warmup_tokens < self.max_tokens:
            raise UserError(f"warmup_tokens {self.warmup_tokens} must be less than max_tokens {self.max_tokens}")

    def __len__(self) -> int:
        """Number of steps."""
        return -(-self.max_tokens // self.batch_tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run, whose last step may go beyond `max_tokens`."""
        return self.tokens_before(len(self))

    def tokens_before(self, step: int) -> int:
        """Tokens seen before a step."""
        return step * self.batch_tokens

    def step_at(self, tokens: int) -> int:
        """The step that starts after this number of tokens."""
        return -(-tokens // self.batch_tokens)

    def sequences(self, step: int) -> range:
        """Indices of the sequences of a step."""
        count = self.batch_tokens // self.context
        return range(step * count, (step + 1) * count)

    def learning_rate_factor(self, step: int) -> float:
        """The learning rate of a step, as a fraction of the peak."""
        before, after = self.tokens_before(step), self.tokens_before(step + 1)
        if after <= self.warmup_tokens:
            return after / self.warmup_tokens
        left = min((self.total_tokens - before) / (self.decay_fraction * (self.total_tokens - self.warmup_tokens)), 1.0)
        if self.decay == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        return self.final_fraction + (1.0 - self.final_fraction) * left
