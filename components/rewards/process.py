"""One process in the sandbox: started, talked to, watched and ended.

It is the guest (``guest.py``) that is started. It says when it goes on to the program: what goes wrong before is an error of
ours, and the program's time begins there.
"""

import math
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Literal

Status = Literal["ok", "error", "timeout", "output"]

MESSAGE_BYTES = 1 << 20
START_SECONDS = 60.0  # from a process to its program; a machine that needs longer is broken
READY = b"READY"  # as guest.py writes it
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}


class SandboxError(ValueError):
    """Programs cannot be run, whatever they are: no fault of theirs, and no score."""


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


class Process:
    """A program in the sandbox. Reading never blocks past the deadline, and keeps no more than the limits say.

    Args:
        command: makes the command line, of the descriptors of program, channel and filter.
        program: what the guest is given.
        stdin: of the program.
        call_filter: as ``isolation.call_filter`` gives it.
        wall_seconds: that the program may take, once it has begun.
        output_bytes: that it may write.
        unusable: makes the error of a cause.

    Raises:
        SandboxError: before the program has begun (when built, or by :meth:`hear` and :meth:`wait`).
    """

    def __init__(
        self,
        command: Callable[[int, int, int], list[str]],
        *,
        program: str,
        stdin: str,
        call_filter: bytes,
        wall_seconds: float,
        output_bytes: int,
        unusable: Callable[[str], SandboxError],
    ) -> None:
        self._started = time.monotonic()
        self._deadline = self._started + START_SECONDS
        self._wall_seconds = wall_seconds
        self._output_bytes = output_bytes
        self._unusable = unusable
        self._ready = False
        self._status: Status | None = None  # None while it runs
        self._outbox = self._inbox = b""
        self._channel, guest = socket.socketpair()
        with guest, _file(program) as program_file, _file(stdin) as stdin_file, _file(call_filter) as filter_file:
            fds = (program_file.fileno(), guest.fileno(), filter_file.fileno())
            try:
                self._process = subprocess.Popen(
                    command(*fds),
                    stdin=stdin_file,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=fds,
                    env=ENVIRONMENT,
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                self._channel.close()
                raise unusable(str(error)) from error
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
        self._await_start()
        return self._line()

    def wait(self) -> Result:
        """Wait for its end."""
        self._await_start()
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

    def _await_start(self) -> None:
        """Wait until the guest goes on to the program, whose time begins here, however long the machine took until then."""
        if self._ready:
            return
        if self._line() != READY:
            self._pump(until=lambda: False)
            late = f"it did not start within {START_SECONDS:.0f} s" if self._status == "timeout" else ""
            stderr = list(self._texts.values())[1].decode(errors="replace")
            raise self._unusable(late or last_line(stderr) or f"it ended with exit code {self._process.returncode}")
        self._ready = True
        self._deadline = time.monotonic() + self._wall_seconds

    def _line(self) -> bytes | None:
        channel = self._channel.fileno()
        self._pump(until=lambda: b"\n" in self._inbox or channel not in self._open)
        if channel in self._open and b"\n" not in self._inbox:
            self._read(channel)  # what it was stopped for may have been seen before the line that it had sent
        line, newline, rest = self._inbox.partition(b"\n")
        if not newline:
            return None
        self._inbox = rest
        return line

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


def last_line(text: str) -> str:
    """The last line of ``text``, which is where programs say what went wrong."""
    return (text.strip().splitlines() or [""])[-1]
