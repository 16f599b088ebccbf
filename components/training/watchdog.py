"""A run of several processes neither hangs nor dies without a word.

A rank that does not come to a collective call leaves the others waiting in it, and a rank that fails takes the others down
with it, whose complaints about lost connections would bury the cause. So each rank has a thread that writes into the process
group's store which phase the rank is in, and ends the process once its rank has stood still for too long or another has
failed. What happened is said once, by the rank that found out first, on any backend.

A process alone is not watched: there is nobody to wait for.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn, TypeVar

import torch.distributed as dist

T = TypeVar("T")

# Seconds between two looks at the store. A rank whose failure is not the first leaves one look later than it could, so that
# the launcher sees the one that was first leave first, and names it.
_INTERVAL = 1.0


class Place(NamedTuple):
    """Where a rank is: ``number`` places into its run, at ``where``, such as ``in 'update'``, of ``step``."""

    number: int
    where: str
    step: int


class Watchdog:
    """The thread of one rank.

    Args:
        store: of the process group; no other thread uses this client of it.
        rank: of this process.
        world_size: number of processes.
        timeout_minutes: how long a rank may stay at one place.
    """

    def __init__(self, store: dist.Store, *, rank: int, world_size: int, timeout_minutes: float) -> None:
        self._store = dist.PrefixStore("watchdog", store)
        self._rank = rank
        self._world_size = world_size
        self._minutes = timeout_minutes
        self._ending = False
        self._stopped = threading.Event()
        self._arrived = time.monotonic(), Place(0, "at the start", 0)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def arrive(self, where: str, step: int | None) -> None:
        """Take note of this rank's place; ``step`` is by default the one before's."""
        _, last = self._arrived
        self._arrived = time.monotonic(), Place(last.number + 1, where, last.step if step is None else step)

    def end(self, message: str) -> NoReturn:
        """Leave with exit code 1, having said why if no other rank has done so. Not even pending collectives are waited for.

        Whoever is first to fail may have been let down by a rank that is gone; then that is said instead.
        """
        self._ending = True
        try:
            self._store.set(f"present {self._rank}", "")
            first = self._store.add("failures", 1) == 1
            if first and (dead := self._absent()):
                message = (
                    f"error: rank {', '.join(map(str, dead))} does not answer and left no error of its own, as a process that "
                    f"is killed or runs out of memory; last heard of: {describe(self._places())}"
                )
        except RuntimeError:  # the store went down with the process that held it
            first, message = True, f"error: rank {self._rank} has lost the other processes"
        if first:
            print(message, file=sys.stderr)
        else:
            time.sleep(_INTERVAL)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def stop(self) -> None:
        """End the thread, and nothing else."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        told = None
        while not self._stopped.wait(_INTERVAL):
            since, place = self._arrived
            try:
                if place != told:
                    self._store.set(f"rank {self._rank}", json.dumps(place))
                    told = place
                if self._store.check(["failures"]) and not self._ending:
                    self.end("")
                if time.monotonic() - since > 60 * self._minutes and not self._ending:
                    self.end(
                        f"error: no progress for {self._minutes:g} min: {describe(self._places())} (set timeout_minutes higher "
                        "if that takes so long)"
                    )
            except RuntimeError:  # the store went down: its process has finished, or the launcher is ending all
                return

    def _absent(self) -> list[int]:
        """The ranks that do not answer to a failure, as every rank's thread does at its next look."""
        deadline = time.monotonic() + 3 * _INTERVAL
        absent = list(range(self._world_size))
        while absent and time.monotonic() < deadline:
            time.sleep(_INTERVAL / 10)
            absent = [rank for rank in absent if not self._store.check([f"present {rank}"])]
        return absent

    def _places(self) -> list[Place | None]:
        keys = [f"rank {rank}" for rank in range(self._world_size)]
        return [Place(*json.loads(self._store.get(key))) if self._store.check([key]) else None for key in keys]


def describe(places: list[Place | None]) -> str:
    """Where the ranks are, in order, and which of them the others wait for; None for a rank that has never said."""
    known = [place for place in places if place is not None]
    ranks: dict[Place | None, list[str]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place, []).append(str(rank))
    parts = []
    for place, members in ranks.items():
        several = len(members) > 1
        who = f"ranks {', '.join(members)}" if several else f"rank {members[0]}"
        if place is None:
            parts.append(f"{who} never started")
        elif place.number > min(known).number:
            parts.append(f"{who} {'wait' if several else 'waits'} {place.where} of step {place.step}")
        else:
            parts.append(f"{who} {'are' if several else 'is'} still {place.where} of step {place.step}")
    return "; ".join(parts)


_watchdog: Watchdog | None = None


def watch(store: dist.Store, *, rank: int, world_size: int, timeout_minutes: float) -> None:
    """Watch this process from now on; see :class:`Watchdog`."""
    global _watchdog
    assert _watchdog is None
    _watchdog = Watchdog(store, rank=rank, world_size=world_size, timeout_minutes=timeout_minutes)


def unwatch() -> None:
    """Stop watching, if this process is watched."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None


@contextmanager
def phase(name: str, *, step: int | None = None) -> Iterator[None]:
    """What runs inside is ``name``, of ``step`` or of the last step named. All ranks go through the same phases."""
    if _watchdog is not None:
        _watchdog.arrive(f"in '{name}'", step)
    yield
    if _watchdog is not None:
        _watchdog.arrive(f"after '{name}'", step)


def phases(name: str, items: Iterable[T]) -> Iterator[T]:
    """``items``; what is done with each of them is a phase ``name`` of its own."""
    for item in items:
        with phase(name):
            yield item


def fail(message: str) -> int:
    """Print ``message`` and return the exit code 1.

    In a group of processes, leave at once instead, and print it only if no other rank failed before: what follows the first
    failure are its consequences.
    """
    if _watchdog is not None:
        # The launcher sends it to the others as soon as one process is gone, before they have found out why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _watchdog.end(message)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # before there is a group, all processes of a node find the same
        print(message, file=sys.stderr)
    return 1
