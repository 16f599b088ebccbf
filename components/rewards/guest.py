"""What runs inside the sandbox around a program. Never imported: ``sandbox.py`` sends this file's text to a bare interpreter.

Standard library only. It sets the limits that hold from then on, then does one of three things with the program it is given:

- ``run``: execute it as a script.
- ``serve``: execute a completion as a module, then answer requests for values, one line of JSON each.
- ``check``: execute trusted assertions about a function that lives in another sandbox, and ask for its values.

Before that, and before it has looked at the program, it says ``READY``: a process that ends without having said so failed by
no fault of the program's.

Nothing in a process that has executed generated code can be relied upon, this code included. A serving program can
therefore only *state* values; whether they are right is decided elsewhere, by what it never sees.
"""

import builtins
import os
import resource
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing it takes as long as all else here
    from typing import Any


def main() -> None:
    """Arguments: the task, the descriptors of program and channel, and the limits in the order below."""
    task, *numbers = sys.argv[1:]
    program_fd, channel_fd, cpu_seconds, memory, file_size, processes, files = map(int, numbers)
    del sys.argv[1:]
    with open(program_fd, encoding="utf-8") as file:
        program = file.read()
    channel = None if task == "run" else Channel(channel_fd)
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),  # SIGXCPU, which says why, before SIGKILL
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, file_size, file_size),
        (resource.RLIMIT_NPROC, processes, processes),
        (resource.RLIMIT_NOFILE, files, files),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # `site` would have put them there
    os.write(channel_fd, b"READY\n")
    if channel is None:
        os.close(channel_fd)
        execute(compile(program, "<__main__>", "exec"), "__main__")
    elif task == "serve":
        serve(program, channel)
    else:
        check(program, channel)


def execute(code: types.CodeType, name: str) -> dict[str, "Any"]:
    """Run ``code`` as the module ``name``, which dataclasses, pickle and others look up; its namespace."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(code, module.__dict__)
    return module.__dict__


class Channel:
    """Lines of JSON to and from the process outside."""

    def __init__(self, fd: int) -> None:
        import json  # only here: `run` starts faster without

        self.dumps, self.loads = json.dumps, json.loads
        self.reader, self.writer = os.fdopen(fd, "rb"), os.fdopen(os.dup(fd), "wb")

    def send(self, line: str) -> None:
        self.writer.write(line.encode() + b"\n")
        self.writer.flush()

    def receive(self) -> dict[str, "Any"]:
        line = self.reader.readline()
        if not line:
            os._exit(1)  # nobody is left to talk to
        return self.loads(line)


def serve(program: str, channel: Channel) -> None:
    """Answer ``{"expression"}`` with ``{"value": plain JSON}`` and ``{"call", "arguments"}`` with ``{"value": tagged}``.

    A request that raises is answered with ``{"error": name of the exception}``. ``program`` is a JSON ``{"context",
    "candidates"}``, see :func:`compiled`.
    """
    record = channel.loads(program)
    namespace = execute(compiled(record["context"], record["candidates"]), "solution")
    sys.set_int_max_str_digits(0)
    while True:
        request = channel.receive()
        try:
            if "expression" in request:
                value = eval(request["expression"], namespace)
            else:
                args, kwargs = decode(request["arguments"])
                value = encode(namespace[request["call"]](*args, **kwargs))
            reply = channel.dumps({"value": value})
        except BaseException as error:
            reply = channel.dumps({"error": type(error).__name__})
        channel.send(reply)


def check(program: str, channel: Channel) -> None:
    """Run ``check(candidate)`` of a JSON ``{"context", "check", "entry_point"}`` and send ``PASSED`` if it returns.

    ``candidate`` stands for a function in another process. It takes and gives copies of plain data.
    """
    record = channel.loads(program)
    sys.set_int_max_str_digits(0)

    def candidate(*args: "Any", **kwargs: "Any") -> "Any":
        channel.send(channel.dumps({"call": record["entry_point"], "arguments": encode((args, kwargs))}))
        reply = channel.receive()
        if "error" in reply:
            kind = getattr(builtins, reply["error"], RuntimeError)
            known = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if known else RuntimeError)(f"raised by {record['entry_point']}")
        return decode(reply["value"])

    namespace = execute(compile(record["context"], "<checker>", "exec"), "checker")
    exec(compile(record["check"], "<check>", "exec"), namespace)
    namespace[record["entry_point"]] = candidate  # what the context has under this name has no body yet
    namespace["check"](candidate)
    channel.send("PASSED")


def compiled(context: str, candidates: list[str]) -> types.CodeType:
    """The first of ``candidates`` that compiles behind ``context``, as it is or without what follows its whole statements.

    A completion that was cut off, or goes on in prose, is so judged by what it had said before. Only statements at the margin
    are left out, with all that follows: no part of a function stays, and never the context alone.
    """
    for candidate in candidates:
        text = context + candidate
        while True:
            try:
                return compile(text, "<solution>", "exec")
            except SyntaxError as error:
                text = shortened(text, error.lineno)
            if not text[len(context) :].strip():
                break
    raise SyntaxError("no code")


def shortened(text: str, line: "int | None") -> str:
    """``text`` up to the statement at the margin that ``line`` (from 1; None: the last) belongs to."""
    lines = text.split("\n")
    last = min(line or len(lines), len(lines)) - 1
    starts = (number for number in range(last, 0, -1) if lines[number][:1] not in ("", " ", "\t", "#"))
    return "\n".join(lines[: next(starts, 0)])


KINDS: dict[str, "Any"] = {kind.__name__: kind for kind in (tuple, set, frozenset, bytes, bytearray, dict)}


def encode(value: "Any") -> "Any":
    """Plain data as JSON: what JSON lacks becomes ``{kind: items}``. Values of subclasses become values of the base."""
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    name = next((name for name, kind in KINDS.items() if isinstance(value, kind)), None)
    if name is None:
        raise TypeError(f"{type(value).__name__} is not plain data")
    return {name: [encode(item) for item in (value.items() if isinstance(value, dict) else value)]}


def decode(value: "Any") -> "Any":
    """The value that :func:`encode` was given."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        ((name, items),) = value.items()
        return complex(*items) if name == "complex" else KINDS[name](decode(items))
    return value


main()
