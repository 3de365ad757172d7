"""The schedule: which sequences each step trains on and at which part of the peak learning rate."""

import math

import pytest

from healthslm.errors import UserError
from healthslm.training.schedule import Schedule

STEPS = 100


def make_schedule(**changes) -> Schedule:
    linear = {"warmup_tokens": 0, "decay": "linear", "decay_fraction": 1.0, "final_fraction": 0.0}
    return Schedule(**({"context": 8, "max_tokens": 1000, "batch_tokens": 32} | linear | changes))


def factors(**options) -> list[float]:
    schedule = make_schedule(max_tokens=STEPS * 16, batch_tokens=16, warmup_tokens=10 * 16, **options)
    assert len(schedule) == STEPS
    return [schedule.learning_rate_factor(step) for step in range(STEPS)]


RISE = [0.1 * (step + 1) for step in range(10)]


def test_the_learning_rate_rises_and_decays_linearly():
    assert factors() == pytest.approx(RISE + [(STEPS - step) / 90 for step in range(10, STEPS)])


def test_a_trapezoid_stays_at_its_peak_before_it_decays():
    expected = RISE + [1.0] * 60 + [(STEPS - step) / 30 for step in range(70, STEPS)]
    assert factors(decay_fraction=1 / 3) == pytest.approx(expected)


def test_a_cosine_decays_to_its_final_fraction():
    found = factors(decay="cosine", final_fraction=0.1)
    half_waves = [0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / 90)) for step in range(10, STEPS)]
    assert found == pytest.approx(RISE + half_waves)


def test_steps_use_all_sequences_in_order():
    schedule = make_schedule()
    taken = [index for step in range(len(schedule)) for index in schedule.sequences(step)]
    assert taken == list(range(128))  # 32 steps of four sequences: the last goes beyond 1,000 tokens
    assert [schedule.step_at(schedule.tokens_before(step)) for step in range(33)] == list(range(33))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 12}, "batch_tokens 12 is not a multiple of the context, 8 tokens"),
        ({"warmup_tokens": 1000}, "warmup_tokens 1000 must be less"),
    ],
)
def test_values_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_schedule(**changes)
