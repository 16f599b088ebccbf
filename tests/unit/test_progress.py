"""What a terminal shows of a run: trends that are none without evidence, time left, and a display that nothing tears apart."""

import io
import logging
import math
import os
import random
import re
import sys
import warnings
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from components.training import Progress, Trend, say_warnings_once, start, stop
from components.training.progress import duration


@pytest.fixture(autouse=True)
def _group():
    start("cpu")
    yield
    stop()


def trend(values):
    made = Trend()
    for value in values:
        made.add(value)
    return made


def test_a_trend_is_shown_beyond_three_standard_errors_of_the_scatter():
    """Each half has variance 8 * 0.25 / 7 = 2/7, so the change has the standard error sqrt(2 * 2/7 / 8) = 0.26726, three of
    which are 0.8018."""
    before = [0.0, 1.0] * 4
    assert trend(before + [0.80 + value for value in before]).direction() == 0
    assert trend(before + [0.81 + value for value in before]).direction() == 1
    assert trend([0.81 + value for value in before] + before).direction() == -1
    assert trend(before + [0.80 + value for value in before]).mean() == pytest.approx(1.3)


def test_a_trend_needs_sixteen_values():
    assert (trend(range(15)).direction(), trend(range(15)).sparkline()) == (0, "")
    assert (trend(range(16)).direction(), trend(range(16)).sparkline()) == (1, "▁▁▂▂▃▃▄▄▅▅▆▆▇▇██")


def test_noise_is_seldom_taken_for_a_trend_and_a_slope_within_it_is_seen():
    rng = random.Random(0)
    noise = [trend(rng.gauss(0, 1) for _ in range(100)).direction() for _ in range(500)]
    slopes = [trend(rng.gauss(0, 1) + step / 50 for step in range(100)).direction() for _ in range(100)]
    assert sum(map(abs, noise)) <= 5  # 3 standard errors: 0.3 % each
    assert sum(slopes) >= 90  # a change of 1 between halves, 5 standard errors


@given(st.floats(-1e6, 1e6), st.integers(1, 150))
def test_a_number_that_never_changes_has_no_trend(value, steps):
    made = trend([value] * steps)
    assert made.direction() == 0
    assert len(set(made.sparkline())) <= 1
    assert made.mean() == pytest.approx(value)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), max_size=250))
def test_any_series_can_be_shown_and_a_mirrored_one_shows_the_mirrored_trend(values):
    made, mirrored = trend(values), trend([-value for value in values])
    assert made.direction() == -mirrored.direction()
    assert len(made.sparkline()) == len(mirrored.sparkline()) <= 20


def test_only_the_last_hundred_steps_count():
    assert trend([1e9] * 50 + [float(step % 2) for step in range(100)]).direction() == 0
    assert trend([5.0] + [1.0] * 100).mean() == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (5940, "99 min"), (5999, "1 h 40 min"), (12000, "3 h 20 min")],
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert duration(seconds) == text


class Clock:
    """Time that passes when told to."""

    now = 0.0

    def __call__(self):
        return self.now


def run_of(clock, *, total=10, done=0, **options):
    return Progress(total=total, done=done, pauses={"validation": 4, "saving": 100}, clock=clock, **options)


def test_time_left_counts_steps_and_pauses_once_each():
    """Ten steps of 2 s, one of which takes 60 s; validations of 5 s at steps 0, 4, 8 and 10, a save of 1 s after the last."""
    clock = Clock()
    with run_of(clock) as progress:
        assert progress.seconds_left() == math.inf
        left = []
        for step in range(11):
            if step:
                clock.now += 60 if step == 3 else 2
                progress.advance({"seconds/step": 2.0}, logged=False)
            if step in (0, 4, 8, 10):
                with progress.pause("validation"):
                    clock.now += 5
            left.append(progress.seconds_left())
    assert left[1:] == [
        9 * 2 + 15,
        8 * 2 + 15,
        7 * 2 + 15,
        6 * 2 + 10,
        5 * 2 + 10,
        4 * 2 + 10,
        3 * 2 + 10,
        2 * 2 + 5,
        7,
        0,
    ]


def test_a_resumed_run_counts_what_is_left_of_it():
    clock = Clock()
    with run_of(clock, done=8) as progress:
        with progress.pause("validation"):
            clock.now += 5
        clock.now += 2
        progress.advance({"seconds/step": 2.0}, logged=False)
        assert progress.seconds_left() == 2 + 5


def test_without_a_terminal_there_is_a_line_for_each_logged_step_and_nothing_else(caplog):
    file = io.StringIO()
    with caplog.at_level("INFO"), run_of(Clock(), console=Console(file=file, force_terminal=False)) as progress:
        progress.advance({"reward": 0.5, "cross_entropy": 2.0, "seconds/step": 1.5}, logged=True)
        progress.advance({"reward": 0.5, "seconds/step": 1.5}, logged=False)
        with progress.pause("validation"):
            pass
    assert caplog.messages == ["step 1/10: reward 0.5000, ce 2.0000, 1.5 s"]
    assert file.getvalue() == ""


def lines_of(progress):
    """The display as text, without colours."""
    console = Console(file=io.StringIO(), width=110)
    console.print(progress._render())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_display_says_step_time_left_speed_and_the_numbers_with_their_trends():
    clock = Clock()
    progress = run_of(clock, total=40)
    for step in range(16):
        clock.now += 30
        metrics = {"reward": step / 16, "cross_entropy": -float(step), "duplicate_rollouts": 0.25, "lr": 1.0}
        progress.advance(metrics | {"tokens_per_second": 64.0}, logged=False)
    head, *numbers = lines_of(progress)
    assert re.fullmatch(r"step 16/40 ━{8} +30.0 s a step, 64 tokens/s, 12 min left", head)
    assert [line.split("  ")[0] for line in numbers] == ["reward", "cross-entropy", "duplicate rollouts"]
    assert numbers[0].split()[1:] == ["0.7188", "↗", "▁▁▂▂▃▃▄▄▅▅▆▆▇▇██"]  # mean of 8/16 ... 15/16
    assert numbers[1].split()[1:] == ["-11.5000", "↘", "██▇▇▆▆▅▅▄▄▃▃▂▂▁▁"]
    assert numbers[2].split()[2:] == ["0.2500", "·", "▅" * 16]


def test_the_trends_of_a_resumed_run_go_on():
    rows = [{"reward": step / 16, "lr": 1.0} for step in range(16)]
    resumed = run_of(Clock(), total=40, done=15, history=rows[:15])
    (head, number) = lines_of(resumed)
    assert head.split("━")[0] == "step 15/40 "
    assert number.split() == ["reward", "0.6562", "·"]  # mean of 7/16 ... 14/16; fewer than 16 steps
    resumed.advance(rows[15], logged=False)
    assert lines_of(resumed)[1].split() == ["reward", "0.7188", "↗", "▁▁▂▂▃▃▄▄▅▅▆▆▇▇██"]


def test_a_run_shows_four_numbers_of_those_it_has():
    progress = run_of(Clock())
    names = ("kl", "duplicate_rollouts", "cross_entropy", "feature_matching_loss", "reward")
    progress.advance(dict.fromkeys(names, 1.0), logged=False)
    assert [line.split("  ")[0] for line in lines_of(progress)[1:]] == [
        "reward",
        "feature-matching loss",
        "cross-entropy",
        "duplicate rollouts",
    ]


def test_what_is_better_is_green_and_what_is_worse_is_not():
    progress = run_of(Clock())
    for step in range(20):
        progress.advance({"reward": float(step), "cross_entropy": float(step), "kl": float(step)}, logged=False)
    assert [str(row[2].style) for row in progress._rows] == ["green", "yellow", "cyan"]


def test_a_pause_is_named_while_it_lasts():
    clock = Clock()
    progress = run_of(clock)
    with progress.pause("validation"):
        clock.now += 42
        assert "validation 42 s" in lines_of(progress)[0]
    assert "validation" not in lines_of(progress)[0]


class Screen:
    """A terminal as far as lines go: what it shows after the bytes that were written to it."""

    def __init__(self, text):
        self.lines, row, column = [""], 0, 0
        for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            if piece == "\r":
                column = 0
            elif piece == "\n":
                row += 1
                self.lines += [""] * (row + 1 - len(self.lines))
            elif piece.endswith("A"):
                row -= int(piece[2:-1])
            elif piece.endswith("K"):
                self.lines[row] = ""
            elif not piece.startswith("\x1b"):
                line = self.lines[row].ljust(column)
                self.lines[row] = line[:column] + piece + line[column + len(piece) :]
                column += len(piece)


@contextmanager
def terminal(monkeypatch):
    """Standard error is a terminal of its own; gives a function that reads what it was sent."""
    master, slave = os.openpty()
    os.set_blocking(master, False)
    with os.fdopen(slave, "w", buffering=1) as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("COLUMNS", "100")

        def read():
            received = b""
            while True:
                try:
                    received += os.read(master, 65536)
                except BlockingIOError:
                    return received.decode()

        yield read
    os.close(master)


def test_lines_printed_meanwhile_stand_above_the_display_whole(monkeypatch):
    logger, clock = logging.getLogger("some.library"), Clock()
    with terminal(monkeypatch) as read:
        handler = logging.StreamHandler()  # bound to the terminal before there is a display
        logger.addHandler(handler)
        with run_of(clock) as progress:
            for step in range(3):
                clock.now += 1
                progress.advance({"reward": 0.5, "seconds/step": 1.0}, logged=True)
                logger.warning("logged %d", step)
                print(f"printed {step}", file=sys.stderr)
        assert handler.stream is sys.stderr
        logger.removeHandler(handler)
        received = read()
    shown = [line.rstrip() for line in Screen(received).lines]
    assert shown[:6] == ["logged 0", "printed 0", "logged 1", "printed 1", "logged 2", "printed 2"]
    assert shown[6].startswith("step 3/10")
    assert shown[7].split()[:2] == ["reward", "0.5000"]
    assert shown[8:] == [""]
    assert received.rfind("\x1b[?25h") > received.rfind("\x1b[?25l")  # the cursor is visible


def test_a_signal_handlers_note_joins_the_display(monkeypatch):
    with terminal(monkeypatch) as read:
        with run_of(Clock()) as progress:
            progress.note("SIGTERM: stopping")
        assert "SIGTERM: stopping" in Screen(read()).lines


def test_a_display_ends_with_what_it_shows_when_a_run_fails(monkeypatch):
    with terminal(monkeypatch) as read:
        before = sys.stderr
        with suppress(FloatingPointError), run_of(Clock()) as progress:
            progress.advance({"reward": 0.25}, logged=True)
            raise FloatingPointError
        assert sys.stderr is before
        assert "0.2500" in Screen(read()).lines[1]


def test_colour_forced_upon_a_file_makes_no_terminal_of_it(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    with run_of(Clock()) as progress:
        progress.advance({"seconds/step": 1.0}, logged=False)
    assert file.getvalue() == ""


def test_a_warning_is_said_once_however_often_filters_change():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        say_warnings_once()
        for _ in range(3):
            warnings.filterwarnings("ignore", "something else")  # makes Python's own rule forget
            for text in ("one", "another"):
                warnings.warn(text, stacklevel=1)
    assert [str(each.message) for each in caught] == ["one", "another"]
