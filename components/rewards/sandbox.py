"""Generated code runs here and nowhere else: in processes that can reach no file, process or network of this machine.

Every run has its own namespaces (bubblewrap), sees ``/usr`` read-only and an empty ``/tmp`` of its own, is an unprivileged
user, and may take only so much time, memory, disk, processes and output. What is asked of a program's results stands in
``unit_tests.py``; what runs around the program in there, in ``guest.py``.
"""

import math
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar, get_args

from components.rewards.isolation import bubblewrap, call_filter, shared_python, unprivileged

Isolation = Literal["bubblewrap", "rlimits_only"]
Status = Literal["ok", "error", "timeout", "output"]
Task = Literal["run", "serve", "check"]
Item = TypeVar("Item")
Value = TypeVar("Value")

OPEN_FILES = 64
MESSAGE_BYTES = 1 << 20
GUEST = Path(__file__).with_name("guest.py").read_text(encoding="utf-8")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a program ended.

    Attributes:
        status: ``ok`` (exit code 0), ``error`` (any other end), ``timeout`` (of wall-clock or processor time) or ``output``
            (it wrote more than it may, and was stopped).
        stdout: what it wrote, undecodable bytes replaced.
        stderr: likewise.
        returncode: 128 + the signal's number for one that a signal ended.
        seconds: wall-clock time, its start included.
    """

    status: Status
    stdout: str
    stderr: str
    returncode: int
    seconds: float


class Sandbox:
    """Runs Python programs that may do anything.

    Args:
        isolation: ``bubblewrap``; or ``rlimits_only``, which limits what a program takes but not what it sees: files of
            this machine, processes and the network stay in reach. Only for code you would run yourself.
        wall_seconds: how long a run may take.
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
            interpreter; limits that no program can run with.
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

    def start(self, task: Task, program: str, *, stdin: str = "") -> "Process":
        """A process that may be talked to; end it by leaving its ``with`` block."""
        return Process(self, task, program, stdin)

    def command(self, task: Task, *, filter_fd: int) -> list[str]:
        """What a process is started with: the guest, which takes descriptors and limits as further arguments."""
        contained = [*self._prefix, "--seccomp", str(filter_fd)] if self._contained else self._prefix
        return [*contained, self.python, "-s", "-S", "-B", "-c", GUEST, task]

    def _probe(self) -> None:
        """Run a trivial program and, if they are to be contained, let a hostile one try what must not work."""
        if not self._contained:
            warnings.warn(
                "isolation is rlimits_only: generated code can read this machine's files and use its network",
                stacklevel=3,
            )
            result = self.run("print(6 * 7)")
            if result.stdout != "42\n":
                raise ValueError(
                    f"{self.python} cannot run a program within the limits set: {_last_line(result.stderr)}"
                )
            return
        with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
            os.chmod(folder, 0o777)
            server.setblocking(False)
            result = self.run(HOSTILE.format(folder=folder, port=server.getsockname()[1]))
            if result.stdout != "42\n":
                raise ValueError(
                    f"bubblewrap (isolation) cannot run a program with {self.python} and the limits set: "
                    f"{_last_line(result.stderr) or result.status}; it takes bubblewrap 0.8 or newer (apt-get install "
                    "bubblewrap), user namespaces, and an interpreter that all users may read"
                )
            try:
                server.accept()
            except BlockingIOError:
                if not os.listdir(folder):
                    return
        raise ValueError("bubblewrap (isolation) did not contain a hostile program; install bubblewrap 0.8 or newer")


# Prints 42; whether the rest did anything is looked at from outside.
HOSTILE = """
import socket
for attack in (
    lambda: socket.create_connection(("127.0.0.1", {port}), timeout=1),
    lambda: open({folder!r} + "/written", "w"),
):
    try:
        attack()
    except OSError:
        pass
print(6 * 7)
"""


class Process:
    """A program in the sandbox. Reading never blocks past the deadline, and keeps no more than the limits say."""

    def __init__(self, sandbox: Sandbox, task: Task, program: str, stdin: str) -> None:
        self._started = time.monotonic()
        self._deadline = self._started + sandbox.wall_seconds
        self._output_bytes = sandbox.output_bytes
        self._status: Status | None = None  # None while it runs
        self._outbox = self._inbox = b""
        self._channel, guest = socket.socketpair()
        with (
            guest,
            _file(program) as program_file,
            _file(stdin) as stdin_file,
            _file(sandbox.call_filter) as filter_file,
        ):
            fds = (program_file.fileno(), guest.fileno(), filter_file.fileno())
            self._process = subprocess.Popen(
                [*sandbox.command(task, filter_fd=fds[2]), *map(str, (*fds[:2], *sandbox.limits))],
                stdin=stdin_file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=fds,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        self._outputs = [pipe for pipe in (self._process.stdout, self._process.stderr) if pipe is not None]
        self._texts = {pipe.fileno(): b"" for pipe in self._outputs}
        self._exit = os.pidfd_open(self._process.pid)
        self._open = {self._exit, self._channel.fileno(), *self._texts}
        for fd in self._open - {self._exit}:
            os.set_blocking(fd, False)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._end("error")
        self._channel.close()
        for pipe in self._outputs:
            pipe.close()
        os.close(self._exit)

    def tell(self, line: bytes) -> None:
        """Send one line; it leaves while :meth:`hear` waits for the next."""
        self._outbox += line + b"\n"

    def hear(self) -> bytes | None:
        """The next line that the program sends; None if it ended, or was stopped by a limit, before there was one."""
        channel = self._channel.fileno()
        self._pump(until=lambda: b"\n" in self._inbox or channel not in self._open)
        line, newline, rest = self._inbox.partition(b"\n")
        if not newline:
            return None
        self._inbox = rest
        return line

    def wait(self) -> Result:
        """Wait for its end."""
        self._pump(until=lambda: False)
        assert self._status is not None
        seconds = time.monotonic() - self._started
        returncode = self._process.wait()
        if returncode < 0:  # as bubblewrap and shells put it
            returncode = 128 - returncode
        status = self._status
        if status == "ok" and returncode:
            status = "timeout" if returncode == 128 + signal.SIGXCPU else "error"
        stdout, stderr = (text.decode(errors="replace") for text in self._texts.values())
        return Result(status=status, stdout=stdout, stderr=stderr, returncode=returncode, seconds=seconds)

    def _pump(self, until: Callable[[], bool]) -> None:
        """Read and write what can be, until there is what is waited for, or the program has ended."""
        while self._status is None and not until():
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                return self._end("timeout")
            poll = select.poll()
            for fd in self._open:
                writes = fd == self._channel.fileno() and self._outbox
                poll.register(fd, select.POLLIN | (select.POLLOUT if writes else 0))
            ready = dict(poll.poll(math.ceil(remaining * 1000)))
            if self._exit in ready:
                return self._finish()
            for fd, events in ready.items():
                if events & select.POLLOUT:
                    self._write()
                if events & ~select.POLLOUT:
                    self._read(fd)

    def _read(self, fd: int) -> bool:
        """Take what ``fd`` has, and end the program if it said too much; whether there may be more."""
        try:
            chunk = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        except OSError:  # the other end is gone
            chunk = b""
        if not chunk:
            self._open.discard(fd)
        elif fd in self._texts:
            room = self._output_bytes - sum(map(len, self._texts.values()))
            self._texts[fd] += chunk[:room]
            if len(chunk) > room:
                self._end("output")
        else:
            self._inbox += chunk
            if len(self._inbox) > MESSAGE_BYTES:
                self._end("output")
        return bool(chunk) and self._status is None

    def _write(self) -> None:
        try:
            self._outbox = self._outbox[self._channel.send(self._outbox) :]
        except BlockingIOError:
            pass
        except OSError:  # the other end is gone
            self._outbox = b""

    def _finish(self) -> None:
        """It has ended by itself: read what it left."""
        for fd in self._open - {self._exit}:
            while self._status is None and self._read(fd):
                pass
        self._end("ok")

    def _end(self, status: Status) -> None:
        """Stop what still runs, once: the number of a process belongs to it only until it has been waited for."""
        if self._status is not None:
            return
        self._status = status
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _file(content: str | bytes) -> BinaryIO:
    """A nameless file that holds ``content``, at its beginning."""
    file = os.fdopen(os.memfd_create("sandbox"), "w+b")
    file.write(content if isinstance(content, bytes) else content.encode(errors="replace"))
    file.seek(0)
    return file


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
