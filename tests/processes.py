"""Processes for tests, forked from a server that has imported torch and the recipe once: each starts in an instant."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from recipes import ebft

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.processes"])


def launch(world: int, target: Callable[..., None], *args: Any) -> list[BaseProcess]:
    """``target(*args)`` on ``world`` ranks, with the environment that torchrun gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [_context.Process(target=_rank, args=(rank, world, port, target, args)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Wait for all ranks; their exit codes (of a killed one minus the signal's number)."""
    try:
        for process in processes:
            process.join(timeout)
        return [process.exitcode for process in processes]
    finally:
        kill(processes)


def kill(processes: list[BaseProcess]) -> None:
    """SIGKILL to all ranks."""
    for process in processes:
        process.kill()
        process.join()


def recipe(settings: list[str]) -> None:
    """The quickstart with overrides, as the command line runs it."""
    sys.argv = ["recipes/ebft.py", "--config", str(QUICKSTART), *settings]
    sys.exit(ebft.main())


def _rank(rank: int, world: int, port: int, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    target(*args)
