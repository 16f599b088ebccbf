"""SIGTERM and SIGINT as a wish to stop that is granted between two steps, on all ranks at once."""

import os
import shlex
import signal
import sys
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist
from omegaconf import DictConfig

from components.training.distributed import total


class Interrupt:
    """Inside ``with Interrupt(note) as interrupt:`` the first SIGTERM or SIGINT is only noted; a SIGINT after it, or a SIGTERM
    after a SIGINT, ends the process.

    A signal that reaches one rank stops all: the others learn of it by :meth:`agreed`. torchrun passes on what it gets,
    and kills workers that run for longer than ``--shutdown_timeout`` (or ``TORCH_ELASTIC_SHUTDOWN_TIMEOUT``, 30 s) after that.

    Args:
        note: is told what happens. It is called from the signal handler: not the logger, which may hold its lock at this
            very moment (``Progress.note``).
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._tell = note

    def __enter__(self) -> "Interrupt":
        self._noted = False
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if exception[0] is not None and dist.get_world_size() > 1:
            # Once one process is gone the launcher sends it to the others, and would cut short what they have to say.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective; to be called between steps."""
        return bool(total(torch.tensor(int(self._noted))))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._noted:
            name = signal.Signals(number).name
            self._tell(f"{name}: stopping after this step, with a checkpoint; Ctrl-C stops at once")
        self._noted = True
        # torchrun passes on the first Ctrl-C as such and the second as SIGTERM, and its own SIGTERM once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGINT:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def resume_command(cfg: DictConfig) -> str:
    """The command line that goes on with this run; of several nodes, without their rendezvous, which only torchrun knows."""
    here, world = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    words = ["tune", "run", *([] if here == world else ["--nnodes", str(world // here)]), "--nproc_per_node", str(here)]
    command = shlex.join([*words, *sys.argv, *([] if cfg.get("resume") == "auto" else ["resume=auto"])])
    return command if here == world else f"{command} (on every node, with the --rdzv options it was started with)"
