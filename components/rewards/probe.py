"""What a sandbox must not let through, tried out by a program that lists, reads, writes and connects where it must not."""

import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from components.rewards.isolation import private_folders

# Prints what it got at; what it wrote and whom it reached is looked at from outside.
HOSTILE = """
import os, socket
for folder, name in {markers!r}:
    path = os.path.join(folder, name)
    try:
        if name in os.listdir(folder): print("list", folder)
    except OSError: pass
    try:
        open(path).read()
        print("read", folder)
    except OSError: pass
    try: open(path, "a").write("written")
    except OSError: pass
try: socket.create_connection(("127.0.0.1", {port}), timeout=1)
except OSError: pass
"""


def escapes(run: Callable[[str], str]) -> list[str]:
    """What a hostile program could do in the sandbox, such as ``read /home/me``; nothing if it was contained.

    It is set on files made for it: in a temporary folder open to all, and in the folders that are private.

    Args:
        run: runs a program in the sandbox and gives what it printed.
    """
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.setblocking(False)
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shared.chmod(0o777)
        markers = []
        for folder in (shared, *private_folders()):
            with suppress(OSError):  # what this user cannot write to cannot be marked
                file = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".sandbox-", dir=folder))
                os.chmod(file.name, 0o666)
                markers.append(Path(file.name))
        output = run(
            HOSTILE.format(
                markers=[(str(marker.parent), marker.name) for marker in markers], port=server.getsockname()[1]
            )
        )
        found = [line for line in output.splitlines() if line.startswith(("list ", "read "))]
        found += [f"write {marker.parent}" for marker in markers if marker.stat().st_size]
        with suppress(BlockingIOError):
            server.accept()[0].close()
            found.append("connect to this machine")
    return found
