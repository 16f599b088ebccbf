"""Numbers that change during a run, such as a loss's coefficients: pure functions of the step, so resuming needs no state.

Learning rates are torch's to schedule (``components.training.warmup_then``).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass


class Schedule(ABC):
    """A number that depends on the step alone."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The value, at least 0, for optimizer step ``step`` (0 is the first)."""


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """From ``start`` at step 0 in a straight line to ``end`` at step ``steps``, and constant from there on.

    Raises:
        ValueError: a negative value, a line from 0 to 0, or fewer than 1 step.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if min(self.start, self.end) < 0 or self.start == self.end == 0:
            raise ValueError(f"start is {self.start} and end {self.end}; neither may be negative, one must be above 0")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give at least 1, or write end in place of the schedule")

    def __call__(self, step: int) -> float:
        """See :class:`Schedule`."""
        progress = min(1.0, step / self.steps)
        return (1 - progress) * self.start + progress * self.end


@dataclass(frozen=True, kw_only=True)
class DelayedWarmup(Schedule):
    """0 for ``delay`` steps, then ``warmup`` steps that rise in a straight line, then ``value``.

    As in ``warmup_then``, the steps of the warm-up lie strictly between 0 and ``value``.

    Raises:
        ValueError: a value that is not above 0, or a negative number of steps.
    """

    value: float
    delay: int = 0
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.value <= 0:
            raise ValueError(f"value is {self.value}; give a number above 0, or write 0 in place of the schedule")
        if min(self.delay, self.warmup) < 0:
            raise ValueError(f"delay is {self.delay} and warmup {self.warmup}; both count steps, from 0")

    def __call__(self, step: int) -> float:
        """See :class:`Schedule`."""
        return self.value * max(0.0, min(1.0, (step - self.delay + 1) / (self.warmup + 1)))


def value_at(number: float | Schedule, step: int) -> float:
    """A number, or what its schedule says for ``step``.

    Raises:
        ValueError: a schedule that gives a negative number.
    """
    if not isinstance(number, Schedule):
        return number
    value = number(step)
    if value < 0:
        raise ValueError(f"{number} gives {value} at step {step}; a schedule may not be negative")
    return value


def scheduled(part: object, step: int) -> dict[str, float]:
    """Those attributes of a part of the pipeline that follow a schedule, with their values at ``step``: what to log."""
    return {name: value_at(value, step) for name, value in vars(part).items() if isinstance(value, Schedule)}
