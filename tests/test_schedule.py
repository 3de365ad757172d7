"""The schedule: which rows each update trains on and at which part of the peak learning rate."""

import math

import pytest

from healthslm.errors import UserError
from healthslm.training.schedule import Schedule

UPDATES = 100


def factors(**options) -> list[float]:
    schedule = Schedule(context=8, max_tokens=UPDATES * 16, batch_tokens=16, warmup_tokens=10 * 16, **options)
    assert len(schedule) == UPDATES
    return [schedule.learning_rate_factor(update) for update in range(UPDATES)]


RISE = [0.1 * (update + 1) for update in range(10)]


def test_the_learning_rate_rises_and_falls_in_straight_lines():
    assert factors() == pytest.approx(RISE + [(UPDATES - update) / 90 for update in range(10, UPDATES)])


def test_a_trapezoid_keeps_its_peak_before_it_falls():
    expected = RISE + [1.0] * 60 + [(UPDATES - update) / 30 for update in range(70, UPDATES)]
    assert factors(decay_fraction=1 / 3) == pytest.approx(expected)


def test_a_cosine_falls_to_its_floor():
    found = factors(decay="cosine", final_fraction=0.1)
    half_waves = [0.1 + 0.45 * (1 + math.cos(math.pi * (update - 10) / 90)) for update in range(10, UPDATES)]
    assert found == pytest.approx(RISE + half_waves)


def test_updates_take_up_all_rows_one_after_another():
    schedule = Schedule(context=8, max_tokens=1000, batch_tokens=32)
    taken = [position for update in range(len(schedule)) for position in schedule.positions(update)]
    assert taken == list(range(128))  # 32 updates of four rows: the last goes beyond 1,000 tokens
    assert [schedule.update_at(schedule.tokens_before(update)) for update in range(33)] == list(range(33))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 12}, "12 tokens is no whole number of rows of 8"),
        ({"warmup_tokens": 1000}, "warmup_tokens 1000 must be less"),
    ],
)
def test_numbers_that_do_not_fit_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        Schedule(**({"context": 8, "max_tokens": 1000, "batch_tokens": 64} | changes))
