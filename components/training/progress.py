"""What people watch while a run goes on: how far it is, how long it will take, and the numbers to steer by.

In a terminal this is a display of a few lines that stays below whatever else is printed; elsewhere it is one line a logged
step. A number comes with a trend only if its scatter from step to step does not explain the change: batches differ, and an
arrow that follows them would say nothing.
"""

import logging
import math
import os
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from components.training.distributed import is_main
from components.training.messages import say

# Metric -> its name here, and the direction that is better, if one is. A run shows the first four that it has.
_NUMBERS = {
    "reward": ("reward", 1),
    "feature_matching_loss": ("feature-matching loss", -1),
    "cross_entropy": ("cross-entropy", -1),
    "duplicate_rollouts": ("duplicate rollouts", -1),
    "kl": ("KL to the reference", 0),
}
_SHOWN = 4
# The same where a step is one line.
_IN_A_LINE = {"reward": "reward", "feature_matching_loss": "fm", "cross_entropy": "ce"}

# The steps that a trend is judged by, at most and at least; and by how many standard errors it must stand out.
_KEPT, _FEWEST, _CLEAR = 100, 16, 3.0
# The steps that time left and speed are estimated from.
_RECENT = 20

_LEVELS = "▁▂▃▄▅▆▇█"
_BINS = 20


class Trend:
    """A number over the last 100 steps: the mean of their later half, and whether it differs from that of the earlier half."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=_KEPT)

    def add(self, value: float) -> None:
        """Take the next step's value; one that is not finite is left out."""
        if math.isfinite(value):
            self._values.append(value)

    def mean(self) -> float:
        """Over the later half, which has the odd one; not a number before the first value."""
        _, later = self._halves()
        return statistics.mean(later) if later else math.nan

    def direction(self) -> int:
        """1 up, -1 down; 0 if the halves differ by less than three standard errors, or there are fewer than 16 values."""
        if len(self._values) < _FEWEST:
            return 0
        earlier, later = self._halves()
        change = statistics.mean(later) - statistics.mean(earlier)
        error = math.sqrt(sum(statistics.variance(half) / len(half) for half in (earlier, later)))
        return int(math.copysign(1, change)) if abs(change) > _CLEAR * error else 0

    def sparkline(self) -> str:
        """Up to 20 means of equally many values. The scale is at least eight of their standard errors high, so that the
        scatter from step to step stays near the middle; empty below 16 values."""
        if len(self._values) < _FEWEST:
            return ""
        size = -(-len(self._values) // _BINS)
        values = list(self._values)[len(self._values) % size :]
        means = [statistics.mean(values[start : start + size]) for start in range(0, len(values), size)]
        scatter = math.sqrt(statistics.fmean((after - before) ** 2 / 2 for before, after in pairwise(values)))
        height = max(max(means) - min(means), 8 * scatter / math.sqrt(size))
        if height == 0:
            return _LEVELS[len(_LEVELS) // 2] * len(means)
        low = (max(means) + min(means) - height) / 2
        top = len(_LEVELS) - 1
        return "".join(_LEVELS[round((mean - low) / height * top)] for mean in means)

    def _halves(self) -> tuple[list[float], list[float]]:
        values = list(self._values)
        return values[: len(values) // 2], values[len(values) // 2 :]


class Progress:
    """The display of a run, up while it is entered. Every rank may use it; the main one shows it.

    Args:
        total: steps of the run.
        done: steps done before, of a run that is resumed.
        history: what was logged in them, oldest first, so that trends go on.
        pauses: what happens between steps -> every how many steps; all of them happen after the last step, too.
        console: where to show it; by default standard error.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        total: int,
        done: int,
        pauses: Mapping[str, int],
        history: Iterable[Mapping[str, float]] = (),
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._done, self._pauses, self._clock = total, done, pauses, clock
        self._console = terminal() if console is None else console
        self._step_seconds: deque[float] = deque(maxlen=_RECENT)
        self._tokens_per_second: deque[float] = deque(maxlen=_RECENT)
        self._pause_seconds: dict[str, list[float]] = defaultdict(list)
        self._trends: dict[str, Trend] = {}
        self._began = clock()
        # What the display's own thread reads; each is replaced as a whole.
        self._speed, self._left = "", math.inf
        self._rows: list[tuple[str, str, Text, Text]] = []
        self._pause: tuple[str, float] | None = None
        self._note = ""
        self._open = ExitStack()
        for metrics in history:
            self._follow(metrics)
        self._update()

    def __enter__(self) -> "Progress":
        if self._console.is_interactive:
            self._open.enter_context(_display(self._console, self._render))
        self._began = self._clock()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def advance(self, metrics: Mapping[str, float], *, logged: bool) -> None:
        """A step is done. Where there is no display, a line says so if the step is logged."""
        now = self._clock()
        self._step_seconds.append(now - self._began)
        self._began = now
        self._done += 1
        self._tokens_per_second.append(metrics.get("tokens_per_second", 0.0))
        self._follow(metrics)
        self._update()
        if logged and not self._console.is_interactive:
            numbers = ", ".join(f"{name} {metrics[key]:.4f}" for key, name in _IN_A_LINE.items() if key in metrics)
            say(f"step {self._done}/{self._total}: {numbers}, {metrics['seconds/step']:.1f} s")

    @contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """What runs inside is no step: the display names it, and time left counts it as often as it is yet to come."""
        start = self._clock()
        self._pause = name, start
        yield
        self._pause = None
        seconds = self._clock() - start
        self._began += seconds
        self._pause_seconds[name].append(seconds)
        self._update()

    def note(self, message: str) -> None:
        """Say something from a signal handler, where nothing may be locked."""
        if self._console.is_interactive:
            self._note = message
        elif is_main():
            os.write(2, f"{message}\n".encode())

    def seconds_left(self) -> float:
        """By the median of the last 20 steps, and the median of each pause as often as it is due; infinite before the first
        step. A pause that has not happened yet is taken for none."""
        if not self._step_seconds:
            return math.inf
        steps = statistics.median(self._step_seconds) * (self._total - self._done)
        return steps + sum(
            statistics.median(seconds) * self._due(self._pauses[name]) for name, seconds in self._pause_seconds.items()
        )

    def _follow(self, metrics: Mapping[str, float]) -> None:
        for name in _NUMBERS:
            if name in metrics:
                self._trends.setdefault(name, Trend()).add(metrics[name])

    def _due(self, every: int) -> int:
        """How often what happens every so many steps, and after the last, will happen yet."""
        if self._done >= self._total:
            return 0
        return -(-self._total // every) - self._done // every

    def _update(self) -> None:
        self._left = self.seconds_left()
        if self._step_seconds:
            self._speed = f"{statistics.median(self._step_seconds):.1f} s a step"
            tokens = statistics.median(self._tokens_per_second)
            self._speed += f", {tokens:.0f} tokens/s" if tokens else ""
        self._rows = [self._row(name) for name in _NUMBERS if name in self._trends][:_SHOWN]

    def _row(self, name: str) -> tuple[str, str, Text, Text]:
        title, better = _NUMBERS[name]
        trend = self._trends[name]
        direction = trend.direction()
        style = "dim" if direction == 0 else {1: "green", 0: "cyan", -1: "yellow"}[direction * better]
        sign = {1: "↗", 0: "·", -1: "↘"}[direction]
        return title, f"{trend.mean():.4f}", Text(sign, style=style), Text(trend.sparkline(), style=style)

    def _render(self) -> Group:
        facts = [self._speed] if self._speed else []
        if math.isfinite(self._left) and self._done < self._total:
            facts.append(f"{duration(self._left)} left")
        if self._pause is not None:
            name, start = self._pause
            facts.append(f"{name} {duration(self._clock() - start)}")
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._total, completed=self._done, width=20)
        line.add_row(f"step {self._done}/{self._total}", bar, ", ".join(facts))
        numbers = Table.grid(padding=(0, 2))
        for row in self._rows:
            numbers.add_row(*row)
        return Group(line, numbers, *([Text(self._note, style="bold")] if self._note else []))


def terminal() -> Console:
    """Standard error; interactive only if it is a terminal and this the rank that speaks."""
    return Console(stderr=True, force_terminal=is_main() and sys.stderr.isatty())


def duration(seconds: float) -> str:
    """In the units that people use: ``42 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def _display(console: Console, render: Callable[[], Group]) -> Iterator[None]:
    """``render()`` twice a second, below all that is printed or logged meanwhile."""
    before = sys.stderr
    with Live(console=console, get_renderable=render, refresh_per_second=2):
        # rich hides the cursor, and a process that is killed could not bring it back.
        console.show_cursor(True)
        # rich stands in for sys.stderr, but a log handler keeps the stream it was made with.
        loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
        handlers = [handler for logger in loggers for handler in logger.handlers]
        moved = [each for each in handlers if isinstance(each, logging.StreamHandler) and each.stream is before]
        for handler in moved:
            handler.setStream(sys.stderr)
        try:
            yield
        finally:
            for handler in moved:
                handler.setStream(before)
