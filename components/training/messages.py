"""What a run says in the terminal: one line per fact, from one rank."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

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
