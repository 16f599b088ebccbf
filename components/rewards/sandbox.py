"""Generated code runs here and nowhere else: in processes that can reach no file, process or network of this machine.

Every run has its own namespaces (bubblewrap), sees an interpreter with its libraries read-only and an empty ``/tmp`` of its
own, is an unprivileged user, and may take only so much time, memory, disk, processes and output. What is asked of a program's
results stands in ``unit_tests.py``; what runs around the program in there, in ``guest.py``; how it is watched, in
``process.py``; how all is tried out, in ``probe.py``.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar, get_args

from components.rewards.isolation import bubblewrap, call_filter, shared_python, unprivileged
from components.rewards.probe import escapes
from components.rewards.process import Process, Result, SandboxError, last_line

Isolation = Literal["bubblewrap", "rlimits_only"]
Task = Literal["run", "serve", "check"]
Item = TypeVar("Item")
Value = TypeVar("Value")

OPEN_FILES = 64
GUEST = Path(__file__).with_name("guest.py").read_text(encoding="utf-8")


class Sandbox:
    """Runs Python programs that may do anything.

    Args:
        isolation: ``bubblewrap``; or ``rlimits_only``, which limits what a program takes but not what it sees: files of
            this machine, processes and the network stay in reach. Only for code you would run yourself.
        wall_seconds: how long a run may take, from when its program begins.
        cpu_seconds: processor time of each of its processes: what a program is judged by, whatever else the machine does.
        memory_mb: address space of each of its processes.
        disk_mb: size of its ``/tmp``, and of any file.
        processes: it may have at a time, threads included (``rlimits_only``: its user may have).
        output_kb: of stdout and stderr together; a run that writes more is stopped.
        workers: runs at a time in :meth:`map` and :meth:`spread`; by default the number of processors.
        python: the interpreter inside. By default the one that runs this, without its virtual environment, or the
            system's ``python3`` if other users may not read that one.

    Raises:
        ValueError: bubblewrap is missing, may not make namespaces here or does not contain a hostile program; no
            interpreter, or one that stands among private files; limits that no program can run with.
        SandboxError: later, if a process ends, or a minute passes, before a program could begin.
    """

    def __init__(
        self,
        *,
        isolation: Isolation = "bubblewrap",
        wall_seconds: float = 10.0,
        cpu_seconds: int = 5,
        memory_mb: int = 512,
        disk_mb: int = 16,
        processes: int = 8,
        output_kb: int = 64,
        workers: int | None = None,
        python: str | None = None,
    ) -> None:
        if isolation not in get_args(Isolation):
            raise ValueError(f"isolation is {isolation!r}; choose one of {', '.join(get_args(Isolation))}")
        limits = {
            "wall_seconds": wall_seconds,
            "cpu_seconds": cpu_seconds,
            "memory_mb": memory_mb,
            "disk_mb": disk_mb,
            "processes": processes,
            "output_kb": output_kb,
            "workers": 1 if workers is None else workers,
        }
        for name, value in limits.items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        self.wall_seconds = wall_seconds
        self.output_bytes = output_kb << 10
        self.workers = workers or len(os.sched_getaffinity(0))
        self.python = python or shared_python()
        self._contained = isolation == "bubblewrap"
        self._prefix = unprivileged()
        self.call_filter = b""
        if self._contained:
            self._prefix += bubblewrap(self.python, disk_bytes=disk_mb << 20)
            self.call_filter = call_filter()
            processes += 1  # bubblewrap's own
        self.limits = [cpu_seconds, memory_mb << 20, disk_mb << 20, processes, OPEN_FILES]
        self._probe()

    def run(self, program: str, *, stdin: str = "") -> Result:
        """Run a script to its end."""
        with self.start("run", program, stdin=stdin) as process:
            return process.wait()

    def map(self, programs: Iterable[str]) -> list[Result]:
        """:meth:`run` of each, several at a time; results in order."""
        return self.spread(self.run, programs)

    def spread(self, function: Callable[[Item], Value], items: Iterable[Item]) -> list[Value]:
        """``function`` of each item, ``workers`` at a time in threads that wait for processes; results in order."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(function, items))

    def start(self, task: Task, program: str, *, stdin: str = "") -> Process:
        """A process that may be talked to; end it by leaving its ``with`` block."""

        def command(program_fd: int, channel_fd: int, filter_fd: int) -> list[str]:
            numbers = (program_fd, channel_fd, *self.limits)
            return [*self.command(task, filter_fd=filter_fd), *map(str, numbers)]

        return Process(
            command,
            program=program,
            stdin=stdin,
            call_filter=self.call_filter,
            wall_seconds=self.wall_seconds,
            output_bytes=self.output_bytes,
            unusable=self.unusable,
        )

    def command(self, task: Task, *, filter_fd: int) -> list[str]:
        """What a process is started with: the guest, which takes descriptors and limits as further arguments."""
        contained = [*self._prefix, "--seccomp", str(filter_fd)] if self._contained else self._prefix
        return [*contained, self.python, "-s", "-S", "-B", "-c", GUEST, task]

    def unusable(self, cause: str) -> SandboxError:
        """What to raise where no program can be run because of ``cause``."""
        needs = "limits that an interpreter can start with, and room for processes"
        if self._contained:
            needs = (
                "bubblewrap 0.8 or newer (apt-get install bubblewrap), user namespaces, an interpreter that all users may "
                f"read, {needs}"
            )
        return SandboxError(f"the sandbox cannot run a program with {self.python} ({cause}); it needs {needs}")

    def _probe(self) -> None:
        """Run a trivial program and, if they are to be contained, let a hostile one try what must not work."""
        if not self._contained:
            warnings.warn(
                "isolation is rlimits_only: generated code can read this machine's files and use its network",
                stacklevel=3,
            )
            self._print_42("")
        elif found := escapes(self._print_42):
            raise ValueError(
                f"bubblewrap (isolation) did not contain a hostile program ({', '.join(found)}); "
                "install bubblewrap 0.8 or newer"
            )

    def _print_42(self, program: str) -> str:
        """What ``program`` prints, if it comes to its end."""
        result = self.run(f"{program}\nprint(6 * 7)")
        if not result.stdout.endswith("42\n"):
            raise self.unusable(last_line(result.stderr) or result.status)
        return result.stdout
