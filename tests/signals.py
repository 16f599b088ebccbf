"""Parts of a pipeline that send their own process a signal in the midst of their work, once: the phase is hit for certain."""

import os
import signal

import torch.distributed as dist

from components.losses import PolicyGradientLoss
from components.rollouts import BlockParallelGenerator
from components.training import HFCheckpointer


class Sender:
    """Sends ``names`` when it is called for the ``at``-th time, on rank ``on_rank`` or on all."""

    def __init__(self, at, names=("SIGTERM",), on_rank=None):
        self.left, self.names, self.on_rank = at, names, on_rank

    def __call__(self):
        self.left -= 1
        if self.left == 0 and self.on_rank in (None, dist.get_rank()):
            for name in self.names:
                os.kill(os.getpid(), signal.Signals[name])


class DuringRollouts(BlockParallelGenerator):
    def __init__(self, *, at: int, names: list[str] = ["SIGTERM"], on_rank: int | None = None, **options):  # noqa: B006
        super().__init__(**options)
        self.send = Sender(at, names, on_rank)

    def __call__(self, policy, batch, rng):
        self.send()
        return super().__call__(policy, batch, rng)


class DuringBackward(PolicyGradientLoss):
    def __init__(self, *, at: int, **options):
        super().__init__(**options)
        self.send = Sender(at)

    def __call__(self, logprobs, *args, **keywords):
        if logprobs.rollout.requires_grad:
            logprobs.rollout.register_hook(lambda grad: self.send())
        return super().__call__(logprobs, *args, **keywords)


class DuringSaving(HFCheckpointer):
    def __init__(self, *, at: int, **options):
        super().__init__(**options)
        self.send = Sender(at)

    def _write(self, *args, **keywords):
        self.send()
        super()._write(*args, **keywords)
