"""Learning-rate schedules, as multiples of the optimizer's ``lr``."""

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_then(
    optimizer: Optimizer,
    *,
    max_steps: int,
    warmup: float = 0.03,
    decay: Literal["constant", "cosine", "linear"] = "constant",
    final: float = 0.0,
) -> LambdaLR:
    """Linear warm-up, then constant (paper), cosine or linear decay.

    Args:
        optimizer: whose ``lr`` is the peak.
        max_steps: length of the run; the recipe gives it.
        warmup: share of ``max_steps`` (paper: 3%); the first step already has a rate above 0.
        decay: what follows.
        final: share of the peak that cosine and linear decay end at.

    Raises:
        ValueError: shares outside [0, 1), or an unknown decay.
    """
    if not 0 <= warmup < 1 or not 0 <= final <= 1:
        raise ValueError(f"warmup is {warmup} and final {final}; both are shares, of max_steps and of lr, from 0 to 1")
    if decay not in ("constant", "cosine", "linear"):
        raise ValueError(f"decay is {decay!r}; choose 'constant', 'cosine' or 'linear'")
    warmup_steps = math.ceil(warmup * max_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if decay == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        left = 1 - progress if decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return final + (1 - final) * left

    return LambdaLR(optimizer, factor)
