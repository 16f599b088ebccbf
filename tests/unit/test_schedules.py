"""Schedules of coefficients by hand, their bounds for all values, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.losses import PolicyGradientLoss
from components.schedules import DelayedWarmup, Linear, Schedule, scheduled, value_at

STEPS = st.integers(0, 1000)
NUMBERS = st.floats(0.001, 10.0)


def values(schedule, steps):
    return [schedule(step) for step in range(steps)]


def test_linear_by_hand():
    assert values(Linear(start=0.4, end=0.0, steps=4), 6) == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0, 0.0])
    assert values(Linear(start=0.0, end=1.0, steps=2), 4) == [0.0, 0.5, 1.0, 1.0]


def test_delayed_warmup_by_hand():
    """Three steps of 0, then one and two thirds of the way, then all of it."""
    assert values(DelayedWarmup(value=0.3, delay=3, warmup=2), 7) == pytest.approx([0, 0, 0, 0.1, 0.2, 0.3, 0.3])
    assert values(DelayedWarmup(value=0.3, delay=1), 3) == [0, 0.3, 0.3]


@given(NUMBERS, NUMBERS, st.integers(1, 500), STEPS)
def test_linear_starts_and_ends_exactly_and_stays_between(start, end, steps, step):
    schedule = Linear(start=start, end=end, steps=steps)
    assert schedule(0) == start
    assert schedule(steps) == schedule(steps + step) == end
    assert min(start, end) * (1 - 1e-12) <= schedule(step) <= max(start, end) * (1 + 1e-12)


@given(NUMBERS, STEPS, STEPS, STEPS)
def test_delayed_warmup_is_nothing_then_something_then_everything(value, delay, warmup, step):
    schedule = DelayedWarmup(value=value, delay=delay, warmup=warmup)
    assert (schedule(step) == 0) == (step < delay)
    assert (schedule(step) == value) == (step >= delay + warmup)
    assert schedule(step) <= schedule(step + 1)


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        (Linear, {"start": -0.1, "end": 1.0, "steps": 5}, "start is -0.1"),
        (Linear, {"start": 0.0, "end": -1.0, "steps": 5}, "end -1.0"),
        (Linear, {"start": 0.0, "end": 0.0, "steps": 5}, "one must be above 0"),
        (Linear, {"start": 1.0, "end": 0.0, "steps": 0}, "steps is 0"),
        (DelayedWarmup, {"value": 0.0}, "value is 0.0"),
        (DelayedWarmup, {"value": 1.0, "delay": -1}, "delay is -1"),
        (DelayedWarmup, {"value": 1.0, "warmup": -1}, "warmup -1"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(schedule, settings, message):
    with pytest.raises(ValueError, match=message):
        schedule(**settings)


class Downhill(Schedule):
    """1 at the first step, one less at each further."""

    def __call__(self, step):
        return 1.0 - step


def test_a_schedule_of_ones_own_is_refused_where_it_turns_negative():
    assert [value_at(Downhill(), step) for step in (0, 1)] == [1, 0]
    with pytest.raises(ValueError, match="-1.0 at step 2"):
        value_at(Downhill(), 2)


def test_only_what_is_scheduled_is_logged():
    loss = PolicyGradientLoss(rl_coef=1.0, ce_coef=Linear(start=0.4, end=0.0, steps=4), kl_coef=0.1)
    assert scheduled(loss, 1) == pytest.approx({"ce_coef": 0.3})
