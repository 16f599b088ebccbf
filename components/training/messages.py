"""What a run says in the terminal: one line per fact, from one rank."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from torchtune.utils import get_logger

from components.training import watchdog
from components.training.distributed import is_main

_log = get_logger("INFO")


def say(message: str) -> None:
    """Print a line, if this is the rank that does."""
    if is_main():
        _log.info(message)


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Say how long a phase of the start took, and tell the watchdog that it is one."""
    start = time.perf_counter()
    with watchdog.phase(phase):
        yield
    say(f"{phase}: {time.perf_counter() - start:.1f} s")


def say_warnings_once() -> None:
    """From now on a Python warning is shown when it is first given, and by one rank, since all run the same code.

    Python's own filters forget what was shown whenever a library changes them, as torch does in every step.
    """
    show, shown = warnings.showwarning, set[tuple[str, type[Warning]]]()

    def show_once(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if is_main() and (str(message), category) not in shown:
            shown.add((str(message), category))
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_once
