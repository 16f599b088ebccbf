"""Optimizer and schedule tried on a single number: what they refuse, they refuse before a run and not in its last hour."""

import math
import warnings
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from components.training.instantiate import accepts, instantiate
from components.training.kinds import Optimizer, Scheduler


def build_scheduler(cfg: DictConfig, optimizer: Any, *, max_steps: int) -> Scheduler | None:
    """The schedule that a config names, which is told the length of the run if it asks for it; None if it names none.

    Raises:
        ValueError: see :func:`instantiate`.
    """
    if "lr_scheduler" not in cfg:
        return None
    known: dict[str, Any] = {"max_steps": max_steps} if accepts(cfg.lr_scheduler, "max_steps") else {}
    built: Scheduler = instantiate(cfg.lr_scheduler, path="lr_scheduler", kind=Scheduler, optimizer=optimizer, **known)
    return built


def rehearse(cfg: DictConfig, *, max_steps: int) -> None:
    """Take a step with the optimizer of a config, and all steps of its schedule.

    Args:
        cfg: of ``recipes/ebft.py``.
        max_steps: length of the run. A schedule is followed for the first 100,000 (a second).

    Raises:
        ValueError: what cannot be built, an optimizer that needs more than gradients, a schedule that fails on its way or leads
            to a rate that is none.
    """
    number = nn.Parameter(torch.zeros(1, 1))  # some take matrices alone
    optimizer: Any = instantiate(cfg.optimizer, path="optimizer", kind=Optimizer, params=[number])
    number.grad = torch.ones_like(number)
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):  # torchao compiles its steps
        warnings.simplefilter("ignore")
        try:
            optimizer.step()
        except Exception as error:
            raise ValueError(
                f"optimizer: {cfg.optimizer._component_} cannot take a step ({_first_line(error)}); choose another"
            ) from error
        scheduler = build_scheduler(cfg, optimizer, max_steps=max_steps)
        for step in range(min(max_steps, 100_000) if scheduler is not None else 0):
            assert scheduler is not None
            for group in optimizer.param_groups:
                if not (math.isfinite(group["lr"]) and group["lr"] >= 0):
                    raise ValueError(
                        f"lr_scheduler: the rate of step {step + 1} would be {float(group['lr'])}; correct its arguments"
                    )
            try:
                scheduler.step()
            except Exception as error:
                raise ValueError(
                    f"lr_scheduler: {cfg.lr_scheduler._component_} fails after step {step + 1} of {max_steps} "
                    f"({_first_line(error)}); correct its arguments"
                ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
